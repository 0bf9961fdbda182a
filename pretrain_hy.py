"""The door: torchrun --nproc-per-node N pretrain_hy.py --hf-model DIR [--config FILE.yaml] [any Megatron flag]."""

import os
import sys

from hymeg.errors import exit_on_user_error

if __name__ == "__main__":
    # The driver may read its environment as soon as it is asked anything, and the checks complete it
    # (CUDA_DEVICE_MAX_CONNECTIONS). So NVML is asked for GPUs until then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with exit_on_user_error():
        from hymeg.training.run import main
    main(sys.argv[1:])
