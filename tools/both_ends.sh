#!/usr/bin/env bash
# The tests that hold hymeg against torch and transformers, at both ends of what pyproject.toml allows.
# Usage: tools/both_ends.sh [DIR]   two environments are made there (default: out/both_ends), of 1 to 2 GB each; make setup comes first
# Whatever is not torch, transformers or needed by them comes from .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "${1:-out/both_ends}")
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || { echo "error: no $python: run make setup first" >&2; exit 2; }
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
tests=(tests/unit/test_{make_tiny_checkpoint,against_transformers,converted_logits,convert,adapter,mapping,hy_config,chat,corpus,platform}.py)

lowest() { sed -n "s/^ *\"$1>=\([0-9.]*\)\",$/\1/p" pyproject.toml; }

# environment NAME TORCH TRANSFORMERS: what pip is told of both
environment() {
    local venv=$dir/$1
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$3"
    # .venv has the CUDA libraries of another torch, which are good enough to import this one; or all are installed.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$2"
    echo "import site; site.addsitedir('$packages')" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
    "$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/pip" install --quiet --disable-pip-version-check --ignore-installed "$2"
}

failed=()
for end in lowest newest; do
    echo "both_ends: making $dir/$end"
    if [ $end = lowest ]; then
        environment $end "torch==$(lowest torch).0" "transformers==$(lowest transformers).0"
    else
        environment $end torch transformers
    fi
    "$dir/$end/bin/python" -c 'import torch, transformers, tokenizers as t
print(f"both_ends: torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {t.__version__}")'
    OMP_NUM_THREADS=1 "$dir/$end/bin/python" -m pytest -p no:cacheprovider "${tests[@]}" || failed+=("$end")
done
[ ${#failed[@]} -eq 0 ] || { echo "error: both_ends: ${failed[*]} failed" >&2; exit 1; }
echo "both_ends: both pass"
