#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron's distributed format, streaming: no GPU, no model in memory."""

import argparse
import functools
import signal

from hymeg.checkpoint.compare import describe
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.mapping import HF_LAYOUTS
from hymeg.errors import UserError, exit_on_user_error
from hymeg.files import parse_bytes
from hymeg.hf.dtypes import ROUNDED_TO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_dist = commands.add_parser("hf-to-dist", help="Hugging Face to distributed, for `pretrain_hy.py --load`")
    to_hf = commands.add_parser("dist-to-hf", help="distributed, as training saved it, to Hugging Face")
    inspect = commands.add_parser("inspect", help="say what a folder holds")
    to_dist.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder to read; hub or fused names")
    to_dist.add_argument("--dist", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    to_hf.add_argument("--dist", required=True, metavar="DIR", help="folder to read, with its tracker file")
    to_hf.add_argument("--hf", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    to_hf.add_argument("--iteration", type=int, metavar="N", help="which one (default: the one that the tracker names)")
    to_hf.add_argument(
        "--layout",
        choices=HF_LAYOUTS,
        default="hub",
        help="tensor names: as published, or as in transformers' memory (default: hub)",
    )
    to_hf.add_argument(
        "--shard-size", default="5GB", metavar="BYTES", help="largest safetensors file, such as 500MB (default: 5GB)"
    )
    to_hf.add_argument(
        "--cut-vocabulary",
        action="store_true",
        help="lose rows of the vocabulary beyond config.json's even where they are not zero",
    )
    for command in (to_dist, to_hf):
        command.add_argument(
            "--dtype",
            choices=ROUNDED_TO,
            default="keep",
            help="of all but the fp32 expert bias (default: keep)",
        )
        command.add_argument(
            "--base-hf",
            metavar="DIR",
            help="Hugging Face folder that training began with: for what is missing, such as MTP layers",
        )
        command.add_argument("--drop-mtp", action="store_true", help="leave multi-token-prediction layers out")
        command.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
        command.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")
        command.add_argument(
            "--verify", action="store_true", help="read everything back and compare it, before the folder appears"
        )
    inspect.add_argument("folder", metavar="DIR", help="Hugging Face or distributed checkpoint")
    inspect.add_argument(
        "--iteration", type=int, metavar="N", help="of a distributed one (default: the one that the tracker names)"
    )
    args = parser.parse_args()

    with exit_on_user_error():
        if args.command == "inspect":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `inspect | head`
            print("\n".join(describe(args.folder, args.iteration)))
            return
        shared = {
            name: getattr(args, name) for name in ("dtype", "base_hf", "drop_mtp", "workers", "overwrite", "verify")
        }
        shared["say"] = functools.partial(print, flush=True)
        try:
            if args.command == "hf-to-dist":
                target, summary = args.dist, hf_to_dist(args.hf, args.dist, **shared)
            else:
                only_here = {name: getattr(args, name) for name in ("iteration", "layout", "cut_vocabulary")}
                size = parse_bytes(args.shard_size)
                target, summary = args.hf, dist_to_hf(args.dist, args.hf, max_shard_bytes=size, **only_here, **shared)
        except KeyboardInterrupt:
            raise UserError("interrupted; nothing was left behind") from None
        print(f"{target}: {summary}{', verified' if args.verify else ''}")


if __name__ == "__main__":
    main()
