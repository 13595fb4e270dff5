# SPDX-License-Identifier: MIT OR Apache-2.0
# What test_nix.py puts its own in the place of: the Python that runs what is built, the arguments
# of its pytest, and versions of packages other than the newest.
{
  python = "python3";
  pytest = "";
  versions = { };
}
