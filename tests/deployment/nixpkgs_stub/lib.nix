# SPDX-License-Identifier: MIT OR Apache-2.0
# The functions of nixpkgs' lib that our flake calls.
rec {
  fakeHash = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
  licenses = builtins.mapAttrs (_: spdxId: { inherit spdxId; }) {
    mit = "MIT";
    asl20 = "Apache-2.0";
  };
  fetchers.proxyImpureEnvVars = [
    "http_proxy"
    "https_proxy"
    "all_proxy"
    "no_proxy"
  ];

  nameValuePair = name: value: { inherit name value; };
  genAttrs = names: value: builtins.listToAttrs (map (name: nameValuePair name (value name)) names);
  mapAttrs' =
    pair: set: builtins.listToAttrs (map (name: pair name set.${name}) (builtins.attrNames set));
  optionalAttrs = condition: set: if condition then set else { };
  warnIf =
    condition: message: value:
    if condition then builtins.trace "warning: ${message}" value else value;
  concatMapStringsSep = separator: text: list: builtins.concatStringsSep separator (map text list);
  removePrefix =
    prefix: text:
    let
      length = builtins.stringLength prefix;
    in
    if builtins.substring 0 length text == prefix then
      builtins.substring length (-1) text
    else
      text;
  toLower =
    let
      letters = all: builtins.genList (at: builtins.substring at 1 all) 26;
      upper = letters "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
      lower = letters "abcdefghijklmnopqrstuvwxyz";
    in
    builtins.replaceStrings upper lower;
  escapeShellArg = text: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] text}'";
  getExe = package: "${package}/bin/${package.meta.mainProgram}";
}
