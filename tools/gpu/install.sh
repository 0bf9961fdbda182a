#!/usr/bin/env bash
# Installs a folder made by bundle.sh into a machine's Python (one with torch, transformers and the CUDA compiler, and perhaps no network), and shows
# that Transformer Engine's kernels launch.
#
#   bash tools/gpu/install.sh DIR            PYTHON=/path/to/python to choose the interpreter, CUDA_HOME where CUDA is not in /usr/local/cuda
#
# Compiling the torch extension takes a few minutes; the wheel is kept in DIR and used the next time.
set -euo pipefail
cd "$(dirname "$0")/../.."
bundle=$(realpath "$1") python=${PYTHON:-python3}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
pip() { "$python" -m pip "$@"; }
install() { pip install --quiet --no-index --no-deps --no-warn-script-location --break-system-packages "$@"; }

install "$bundle"/*.whl
if ! ls "$bundle"/transformer_engine_torch-*.whl >/dev/null 2>&1; then
  # Next to the interpreter's torch lie cuDNN's and NCCL's headers.
  nvidia=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia")')
  export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-90} MAX_JOBS=${MAX_JOBS:-$(nproc)}
  export CPATH="$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include:${CPATH:-}"
  pip wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir "$bundle" "$bundle"/transformer_engine_torch-*.tar.gz
  install "$bundle"/transformer_engine_torch-*.whl
fi
"$python" - <<'PYTHON'
import torch
import transformer_engine.pytorch as te

import hymeg.training.run  # noqa: F401  whatever else is missing shows here

layer = te.LayerNormLinear(256, 512, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16, device="cuda")
hidden = torch.randn(64, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
layer(hidden).sum().backward()
torch.cuda.synchronize()
assert hidden.grad.isfinite().all() and hidden.grad.any()
print(f"torch {torch.__version__}, Transformer Engine runs on {torch.cuda.get_device_name()}")
PYTHON
