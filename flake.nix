# SPDX-License-Identifier: MIT OR Apache-2.0
{
  description = "Sentence embeddings over HTTP: exact to sentence-transformers, without torch";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
        "aarch64-darwin"
      ];
      built = lib.genAttrs systems (
        system:
        import ./nix {
          pkgs = nixpkgs.legacyPackages.${system};
          tree = self;
        }
      );
      output = name: lib.genAttrs systems (system: built.${system}.${name});
    in
    {
      packages = output "packages";
      apps = output "apps";
      devShells = output "devShells";
      checks = output "checks";
    };
}
