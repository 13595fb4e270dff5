# SPDX-License-Identifier: MIT OR Apache-2.0
# A folder for PYTHONPATH in which the model stands where the catalog looks for an installed package
# that carries it. The tests find it there.
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
