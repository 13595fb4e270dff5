# SPDX-License-Identifier: MIT OR Apache-2.0
# What our flake touches of nixpkgs, so that it can be evaluated, and its own steps built, where
# nixpkgs can't be had. Functions take the arguments that nixpkgs gives them here, and no others.
{
  outputs =
    { self }:
    {
      lib = import ./lib.nix;
      legacyPackages = self.lib.genAttrs [
        "x86_64-linux"
        "aarch64-linux"
        "aarch64-darwin"
      ] (system: import ./packages.nix { inherit (self) lib; inherit system; });
    };
}
