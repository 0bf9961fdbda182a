#!/usr/bin/env python
"""Compare two checkpoints, Hugging Face or distributed on either side, or two adapters, distributed or of peft, tensor
by tensor and bit by bit. Exit code 1 on any difference.
"""

import argparse
import signal
import sys

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.errors import exit_on_user_error
from hymeg.hf.hub import local_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", metavar="A", help="folder of a checkpoint")
    parser.add_argument("b", metavar="B", help="folder of another")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="absolute difference that is none; dtypes may differ then: compared in fp32 (default: 0)",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--base-hf", metavar="DIR", help="folder of their base, to compare two peft folders")
    args = parser.parse_args()

    with exit_on_user_error():
        a, b = local_folder(args.a), local_folder(args.b)
        differences = compare_checkpoints(a, b, args.tolerance, args.workers, args.base_hf)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head`
        for difference in differences:
            print(f"{difference.name}: {difference.what}")
        print(f"{len(differences)} differences" if differences else "no difference")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
