#!/usr/bin/env python
"""Write a checkpoint of random weights in the form of Hy-MT2's: a tiny one, or of any shape that a config.json
gives.
"""

import argparse
import time

from hymeg.checkpoint.mapping import HF_LAYOUTS
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.errors import exit_on_user_error
from hymeg.files import parse_bytes
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", help="folder to write to; must be empty or not exist")
    parser.add_argument(
        "--config", metavar="FILE", help="config.json that gives the shape (default: a tiny Hy-MT2, 0.4 M parameters)"
    )
    parser.add_argument(
        "--layout",
        choices=HF_LAYOUTS,
        default="hub",
        help="tensor names: as published, or as in transformers' memory (default: hub)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of all but the fp32 expert bias (default: bf16)",
    )
    parser.add_argument(
        "--shard-size", default="5GB", metavar="BYTES", help="largest safetensors file, such as 500MB (default: 5GB)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the random weights (default: 1234)")
    parser.add_argument(
        "--mtp", type=int, metavar="N", help="number of multi-token-prediction layers (default: the config's)"
    )
    args = parser.parse_args()

    with exit_on_user_error():
        start = time.monotonic()
        write_tiny_checkpoint(
            args.out,
            HyConfig.from_file(args.config) if args.config else None,
            layout=args.layout,
            dtype=args.dtype,
            max_shard_bytes=parse_bytes(args.shard_size),
            seed=args.seed,
            num_mtp_layers=args.mtp,
        )
        tensors = open_checkpoint(args.out).values()
        num_files, num_bytes = len({tensor.file for tensor in tensors}), sum(tensor.nbytes for tensor in tensors)
        print(
            f"{args.out}: {len(tensors)} tensors, {num_bytes / 1e6:,.1f} MB in {num_files} file(s), "
            f"{time.monotonic() - start:.1f} s"
        )


if __name__ == "__main__":
    main()
