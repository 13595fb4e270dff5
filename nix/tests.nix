# SPDX-License-Identifier: MIT OR Apache-2.0
# The tests, against the installed package and without network.
{
  runCommand,
  python,
  tree,
  model-package,
}:
runCommand "embedding-server-tests"
  {
    nativeBuildInputs = [ python ];
    PYTHONPATH = model-package;
    __darwinAllowLocalNetworking = true;
  }
  ''
    export HOME="$TMPDIR"
    cp -r ${tree} tree
    chmod -R u+w tree
    cd tree
    # The README's commands install from an index, and so need network.
    python -m pytest -p no:cacheprovider --ignore=tests/test_readme.py
    touch "$out"
  ''
