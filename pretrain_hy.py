"""The door: torchrun --nproc-per-node N pretrain_hy.py --hf-model DIR [--config FILE.yaml] [any Megatron flag]."""

import gc
import sys

from hymeg.errors import exit_on_user_error
from hymeg.platform.connections import set_connections

if __name__ == "__main__":
    gc.disable()  # modules are made to stay: looking for garbage among them is a fifth of the time that imports take
    set_connections(sys.argv[1:])
    with exit_on_user_error():
        from hymeg.training.run import main
    gc.freeze()
    gc.enable()
    main(sys.argv[1:])
