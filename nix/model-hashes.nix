# SPDX-License-Identifier: MIT OR Apache-2.0
# The hash of what `embedding-server models pull NAME --to $out` writes, as `nix hash path` prints it.
# src/embedding_server/models/catalog.py has the files and the revision; a model without a revision
# there can have no hash here. With fakeHash, the first build fails and prints the hash to write here.
{ fakeHash }:
{
  all-MiniLM-L6-v2 = "sha256-Pjvo6PoJvSfmYwg0enLk/FL0MLXX96Ze7wIwRIqN37A=";
  nomic-embed-text-v1 = fakeHash;
  "nomic-embed-text-v1.5" = fakeHash;
}
