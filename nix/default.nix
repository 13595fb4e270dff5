# SPDX-License-Identifier: MIT OR Apache-2.0
# The flake's outputs for one system; `tree` is the whole repository.
{ pkgs, tree }:
let
  inherit (pkgs) lib;
  python = pkgs.python313;
  pyproject = builtins.fromTOML (builtins.readFile ../pyproject.toml);
  requirements = import ./requirements.nix { inherit lib python pyproject; };

  embedding-server = import ./package.nix {
    inherit
      lib
      python
      pyproject
      requirements
      ;
  };
  models = builtins.mapAttrs (pkgs.callPackage ./model.nix { inherit embedding-server; }) (
    import ./model-hashes.nix { inherit (lib) fakeHash; }
  );

  # The requirements of the tests, from pyproject.toml's extras.
  testing = requirements.extra "test" ++ requirements.extra "torch";
  model-package = pkgs.callPackage ./model-package.nix rec {
    inherit python;
    name = "all-MiniLM-L6-v2";
    model = models.${name};
  };

  app = program: {
    type = "app";
    program = "${program}";
    meta.description = pyproject.project.description;
  };
in
{
  packages = {
    inherit embedding-server;
    default = embedding-server;
  }
  // lib.mapAttrs' (name: model: lib.nameValuePair "model-${name}" model) models
  // lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux {
    docker-image = pkgs.callPackage ./image.nix { inherit embedding-server models; };
  };

  apps = {
    default = app (
      pkgs.writeShellScript "serve" ''
        exec ${lib.getExe embedding-server} serve "$@"
      ''
    );
    embedding-server = app (lib.getExe embedding-server);
  };

  devShells.default = pkgs.mkShell {
    packages = [ (python.withPackages (_: requirements.runtime ++ testing)) ];
    shellHook = ''
      export PYTHONPATH="$PWD/src:${model-package}''${PYTHONPATH:+:$PYTHONPATH}"
    '';
  };

  checks.tests = pkgs.callPackage ./tests.nix {
    inherit tree model-package;
    python = python.withPackages (_: [ embedding-server ] ++ testing);
  };
}
