#!/usr/bin/env bash
# One machine without Slurm: examples/launch_local.sh RECIPE.yaml [flags of pretrain_hy.py]
# As many processes as GPUs, or HYMEG_PROCESSES_PER_NODE. SIGTERM and SIGUSR1: save and leave with 75; the same command then goes on. docs/slurm.md
set -euo pipefail
refuse() { echo "error: $*" >&2; exit 2; }

usage="examples/launch_local.sh RECIPE.yaml [flags of pretrain_hy.py]"
[ $# -gt 0 ] || refuse "no recipe is given: $usage"
recipe=$1; shift
[[ $recipe != -* ]] || refuse "$recipe stands where the recipe belongs: $usage"
[[ -f $recipe && -r $recipe ]] || refuse "$recipe: no readable file; give a recipe such as those in examples/"
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${HYMEG_VENV:-$root/.venv}
# shellcheck disable=SC1091
[ ! -r "$venv/bin/activate" ] || . "$venv/bin/activate"
processes=${HYMEG_PROCESSES_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c "^GPU " || true)}
[ "$processes" != 0 ] || refuse "no GPU is visible; check the driver (nvidia-smi), or set HYMEG_PROCESSES_PER_NODE=2 HYMEG_PLATFORM=cpu for the CPU"
[[ $processes =~ ^[1-9][0-9]*$ ]] || refuse "HYMEG_PROCESSES_PER_NODE '$processes': how many processes to start is needed, one for each GPU: 8"
python=$(command -v python || echo "no python on PATH, which")
python -c 'import importlib.metadata as of; [of.version(name) for name in ("torch", "megatron-core", "psutil")]' 2>/dev/null ||
    refuse "$python has not what hymeg needs; run make setup, or set HYMEG_VENV (looked in $venv)"
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python -m hymeg.launch.node -- --standalone --nproc-per-node "$processes" "$root/pretrain_hy.py" --config "$recipe" "$@"
