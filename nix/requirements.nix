# SPDX-License-Identifier: MIT OR Apache-2.0
# The requirements of pyproject.toml as packages of nixpkgs, whose attributes are their normalised
# names.
{
  lib,
  python,
  pyproject,
}:
let
  inherit (pyproject) project;

  normalise = name: builtins.replaceStrings [ "_" "." ] [ "-" "-" ] (lib.toLower name);
  split = list: builtins.filter builtins.isString (builtins.split " *, *" list);

  # "a_b[x,y]>=1,<2; marker" -> { name = "a-b"; extras = [ "x" "y" ]; atLeast = "1"; }
  parse =
    requirement:
    let
      name = "([A-Za-z0-9._-]+)";
      brought = "(\\[([A-Za-z0-9._, -]+)])?";
      versions = "([<>=!~][^;@]*)?";
      marker = "(; *(.*))?";
      parts = builtins.match "${name} *${brought} *${versions}${marker}" requirement;
      part = builtins.elemAt parts;
      bound = if part 3 == null then null else builtins.match ".*>= *([0-9.]+).*" (part 3);
    in
    if parts == null then
      throw "pyproject.toml asks for ${requirement}, which nix/requirements.nix can't read"
    else if
      !builtins.elem (part 5) [
        null
        "sys_platform != 'win32'" # true wherever Nix is
      ]
    then
      throw "pyproject.toml asks for ${requirement}: tell nix/requirements.nix where its marker holds"
    else
      {
        name = normalise (part 0);
        extras = if part 2 == null then [ ] else split (part 2);
        atLeast = if bound == null then "0" else builtins.head bound;
      };

  find =
    name:
    python.pkgs.${name}
      or (throw "nixpkgs has no Python package ${name}, which pyproject.toml asks for");

  extra = name: builtins.concatMap packages project.optional-dependencies.${name};

  # The package of a requirement and those of its extras; an extra of this project is replaced by its
  # requirements.
  packages =
    requirement:
    let
      inherit (parse requirement) name extras;
    in
    if name == normalise project.name then
      builtins.concatMap extra extras
    else
      let
        package = find name;
      in
      [ package ] ++ builtins.concatMap (theirs: package.optional-dependencies.${theirs}) extras;
in
{
  inherit extra;
  build = builtins.concatMap packages pyproject.build-system.requires;
  runtime = builtins.concatMap packages project.dependencies;

  # The runtime requirements of which nixpkgs has only versions older than pyproject.toml requires.
  lagging = builtins.filter (
    { name, atLeast, ... }: builtins.compareVersions (find name).version atLeast < 0
  ) (map parse project.dependencies);
}
