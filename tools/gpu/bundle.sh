#!/usr/bin/env bash
# What a bare GPU machine lacks, in one folder of 36 MB that can be carried to it: megatron-core, small packages and Transformer Engine as wheels
# (the library cut down to one GPU architecture) and the sources of Transformer Engine's torch extension, which install.sh compiles there.
#
#   bash tools/gpu/bundle.sh DIR [ARCH]      ARCH: 90 for H100 and H200 (default)
#
# Needs: pip with its registry, readelf, strip, xz. Versions are those of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$(realpath -m "$1") arch=${2:-90} python=${PYTHON:-.venv/bin/python}
te=$(sed -n 's/.*transformer-engine\[pytorch\]==\([0-9.]*\).*/\1/p' pyproject.toml)
core=$(sed -n 's/.*megatron-core==\([0-9.]*\).*/\1/p' pyproject.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$target"

download() { "$python" -m pip download --quiet --no-deps --dest "$1" "${@:2}"; }
binary() {
  download "$1" --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 "${@:2}"
}

binary "$target" "megatron-core==$core" psutil isal zstandard einops onnx_ir ml_dtypes
download "$target" --only-binary=:all: "transformer_engine==$te"
download "$target" --no-binary=:all: --no-build-isolation "transformer_engine_torch==$te"
binary "$work" "transformer-engine-cu13==$te"

"$python" - "$work" "$target" "$arch" <<'PYTHON'
import pathlib, subprocess, sys, zipfile

work, target, arch = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
(wheel,) = work.glob("*.whl")
LIBRARY = "transformer_engine/wheel_lib/libtransformer_engine.so"
whole, cut = work / "whole.so", work / "cut.so"
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target / wheel.name, "w", zipfile.ZIP_LZMA) as packed:
    whole.write_bytes(source.read(LIBRARY))
    subprocess.run([sys.executable, "tools/gpu/strip_fatbin.py", str(whole), str(cut), "--keep", arch], check=True)
    subprocess.run(["strip", "-s", str(cut)], check=True)
    for entry in source.infolist():
        packed.writestr(entry.filename, cut.read_bytes() if entry.filename == LIBRARY else source.read(entry.filename))
PYTHON
du -sh "$target"
