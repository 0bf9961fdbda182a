#!/usr/bin/env bash
# Make the folder that stand_in.py needs on PYTHONPATH. Usage: tests/layer_specs/environment.sh FOLDER [PYTHON]
# A folder of its own (55 MB), because Megatron cannot be imported beside a Transformer Engine that lacks its compiled part.
# Does nothing where FOLDER holds what requirements.txt asks for. FOLDER appears whole or not at all.
set -euo pipefail
folder=$1
python=${2:-python3}
requirements=$(dirname "$0")/requirements.txt

if cmp -s "$requirements" "$folder/requirements.txt"; then
    exit
fi
mkdir -p "$(dirname "$folder")"
beside=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$beside"' EXIT
"$python" -m pip install --disable-pip-version-check --quiet --no-deps --target "$beside" --requirement "$requirements"
cp "$requirements" "$beside/"
chmod 755 "$beside"
rm -rf "$folder"
mv "$beside" "$folder"
