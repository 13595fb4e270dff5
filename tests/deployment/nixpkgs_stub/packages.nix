# SPDX-License-Identifier: MIT OR Apache-2.0
# The packages and builders of nixpkgs that our flake uses. What they make runs the machine's own
# bash and Python, in the place of those of nixpkgs.
{ lib, system }:
let
  host = import ./host.nix;

  # stdenv.mkDerivation as runCommand calls it: each attribute is in the script's environment.
  # The last colon keeps bash from becoming the last command: most close their output before they
  # end, and Nix kills a builder whose output is closed.
  runCommand =
    name: attributes: script:
    let
      inputs = attributes.nativeBuildInputs or [ ];
    in
    derivation (
      attributes
      // {
        inherit name system;
        outputs = [ "out" ];
        builder = "/bin/bash";
        args = [
          "-euc"
          "${script}\n:"
        ];
        PATH = lib.concatMapStringsSep ":" (input: "${input}/bin") (inputs ++ [ "/usr" "" ]);
      }
    );

  program =
    name: text:
    runCommand name { } ''
      mkdir -p "$out/bin"
      printf '%s\n' '#!/bin/bash' ${lib.escapeShellArg text} > "$out/bin/${name}"
      chmod +x "$out/bin/${name}"
    '';

  module = pname: extras: {
    inherit pname;
    outPath = builtins.toFile pname "";
    version = host.versions.${pname} or "9999";
    optional-dependencies = lib.genAttrs extras (_: [ ]);
  };

  buildPythonPackage =
    {
      pname,
      version,
      pyproject,
      src,
      build-system,
      dependencies,
      optional-dependencies,
      pythonRelaxDeps,
      pythonImportsCheck,
      meta,
    }:
    assert pyproject;
    let
      built = program meta.mainProgram ''
        # ${toString (build-system ++ dependencies ++ pythonRelaxDeps)}
        export PYTHONPATH=${src}/src''${PYTHONPATH:+:$PYTHONPATH}
        exec ${host.python} -m embedding_server.cli "$@"
      '';
    in
    built
    // {
      inherit
        pname
        version
        meta
        optional-dependencies
        pythonRelaxDeps
        ;
      propagatedBuildInputs = dependencies;
      sources = "${src}/src";
    };

  interpreter = program "python" ''exec ${host.python} "$@"'';
  python313 = interpreter // {
    pkgs = builtins.mapAttrs module (import ./python-packages.nix) // {
      inherit buildPythonPackage;
    };
    withPackages =
      choose:
      let
        chosen = choose python313.pkgs;
        sources = builtins.concatStringsSep ":" (map (package: package.sources or package) chosen);
      in
      program "python" ''
        export PYTEST_ADDOPTS=${lib.escapeShellArg host.pytest}
        PYTHONPATH=''${PYTHONPATH:+$PYTHONPATH:}${sources} exec ${host.python} "$@"
      '';
  };

  # The fields of the OCI image specification's config that an image of ours has.
  imageConfig =
    {
      Entrypoint,
      Cmd,
      Env,
      ExposedPorts,
      User,
      StopSignal,
      Labels,
    }@config:
    builtins.toJSON config;

  # Symbolic links into the store, as in the image's last layer, and its config as JSON.
  buildLayeredImage =
    {
      name,
      tag,
      contents,
      config,
    }:
    runCommand "${name}-${tag}" { config = imageConfig config; } ''
      mkdir -p "$out/root"
      ${lib.concatMapStringsSep "\n" (content: ''cp -rs ${content}/. "$out/root"'') contents}
      printf '%s' "$config" > "$out/config.json"
    '';

  pkgs = {
    inherit lib python313 runCommand;
    stdenv.hostPlatform.isLinux = builtins.match ".*-linux" system != null;
    cacert = runCommand "cacert" { } ''
      mkdir -p "$out/etc/ssl/certs"
      ln -s /etc/ssl/certs/ca-certificates.crt "$out/etc/ssl/certs/ca-bundle.crt"
    '';
    dockerTools = { inherit buildLayeredImage; };
    writeShellScript =
      name: text:
      runCommand name { } ''
        printf '%s\n' '#!/bin/bash' ${lib.escapeShellArg text} > "$out"
        chmod +x "$out"
      '';
    mkShell =
      { packages, shellHook }:
      runCommand "nix-shell" { nativeBuildInputs = packages; inherit shellHook; } ''mkdir "$out"'';
    callPackage =
      file: arguments:
      let
        function = import file;
        found = builtins.intersectAttrs (builtins.functionArgs function) pkgs;
        result = function (found // arguments);
      in
      if builtins.isAttrs result then
        result // { override = more: pkgs.callPackage file (arguments // more); }
      else
        result;
  };
in
pkgs
