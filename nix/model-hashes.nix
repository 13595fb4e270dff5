# SPDX-License-Identifier: MIT OR Apache-2.0
# What `embedding-server models pull NAME --to $out` must give, as `nix hash path` tells it. Which
# files at which revision that is stands in src/embedding_server/models/catalog.py; a model without
# a revision there can have no hash here. Where fakeHash stands, the first build fails and prints
# the hash to write here.
{ fakeHash }:
{
  all-MiniLM-L6-v2 = "sha256-Pjvo6PoJvSfmYwg0enLk/FL0MLXX96Ze7wIwRIqN37A=";
  nomic-embed-text-v1 = fakeHash;
  "nomic-embed-text-v1.5" = fakeHash;
}
