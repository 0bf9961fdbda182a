"""The door: torchrun --nproc-per-node N pretrain_hy.py --hf-model DIR [--config FILE.yaml] [any Megatron flag]."""

import os
import sys

from hymeg.errors import exit_on_user_error

if __name__ == "__main__":
    # Whether there are GPUs is asked of NVML: the driver reads its environment, which the checks may yet complete
    # (CUDA_DEVICE_MAX_CONNECTIONS), when CUDA itself is first asked anything.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with exit_on_user_error():
        from hymeg.training.run import main
    main(sys.argv[1:])
