# SPDX-License-Identifier: MIT OR Apache-2.0
# The server, as a Python package with a command.
{
  lib,
  python,
  pyproject,
  requirements,
}:
let
  inherit (pyproject) project;
  inherit (requirements) lagging;
  # pyproject.toml reads the version from the same file.
  source = builtins.readFile ../src/embedding_server/__init__.py;
  version = builtins.head (builtins.match ".*\n__version__ = \"([^\"]+)\".*" source);
  describe = { name, atLeast, ... }: "${name} ${python.pkgs.${name}.version} (wanted: ${atLeast})";
in
python.pkgs.buildPythonPackage {
  pname = project.name;
  inherit version;
  pyproject = true;

  # Only the files of the wheel, so that a change of a test or a page rebuilds nothing.
  src = builtins.path {
    name = "embedding-server-source";
    path = ../.;
    filter =
      path: _:
      let
        inside = lib.removePrefix "${toString ../.}/" (toString path);
      in
      builtins.elem (builtins.head (builtins.split "/" inside)) (
        [
          "pyproject.toml"
          project.readme
          "src"
        ]
        ++ project.license-files
      );
  };

  build-system = requirements.build;
  dependencies = requirements.runtime;
  optional-dependencies = builtins.mapAttrs (
    name: _: requirements.extra name
  ) project.optional-dependencies;

  # Older versions are accepted with a warning; versions that are too new fail the build.
  pythonRelaxDeps = lib.warnIf (lagging != [ ]) ''
    this nixpkgs has older versions than pyproject.toml asks for, with which embedding-server is
    not tested: ${builtins.concatStringsSep ", " (map describe lagging)}. Take a newer nixpkgs, or
    run `nix flake check` to see whether they do.'' (map ({ name, ... }: name) lagging);

  pythonImportsCheck = [ "embedding_server.cli" ];

  meta = {
    inherit (project) description;
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "embedding-server";
  };
}
