# SPDX-License-Identifier: MIT OR Apache-2.0
# The Python that stands in for nixpkgs' in what is built here; test_nix.py puts in its own.
{
  python = "python3";
}
