# SPDX-License-Identifier: MIT OR Apache-2.0
# The tests, against the installed package and without network.
{
  runCommand,
  python,
  tree,
  model,
}:
runCommand "embedding-server-tests"
  {
    nativeBuildInputs = [ python ];
    __darwinAllowLocalNetworking = true;
  }
  ''
    export HOME="$TMPDIR"
    cp -r ${tree} tree
    chmod -R u+w tree
    cd tree

    # The model stands where the catalog looks for an installed package that carries it.
    place="$TMPDIR/site/$(python -c '
    from embedding_server.models.catalog import CATALOG
    print(CATALOG["all-MiniLM-L6-v2"].package)')"
    mkdir -p "$(dirname "$place")"
    touch "$(dirname "$place")/__init__.py"
    ln -s ${model}/all-MiniLM-L6-v2 "$place"
    export PYTHONPATH="$TMPDIR/site"

    # The README's commands install from an index, and so need network.
    python -m pytest -p no:cacheprovider --ignore=tests/test_readme.py
    touch "$out"
  ''
