# SPDX-License-Identifier: MIT OR Apache-2.0
# A folder for PYTHONPATH that has the model at the place where the catalog looks for an installed
# package with the model. The tests find it there.
{
  runCommand,
  python,
  name,
  model,
}:
runCommand "${name}-package" { nativeBuildInputs = [ python ]; } ''
  folder="$out/$(PYTHONPATH=${../src/embedding_server/models} python -c '
  from catalog import CATALOG
  print(CATALOG["${name}"].package)')"
  mkdir -p "$(dirname "$folder")"
  touch "$(dirname "$folder")/__init__.py"
  ln -s ${model}/${name} "$folder"
''
