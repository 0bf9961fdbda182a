#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron's distributed format, and adapters between it and peft's, or
merge them: streaming, no GPU, no model in memory.
"""

import argparse
import functools
import signal
import sys

from hymeg.checkpoint.adapters import adapter_to_peft, merge, peft_to_adapter
from hymeg.checkpoint.compare import describe
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.mapping import HF_LAYOUTS
from hymeg.checkpoint.peft_table import PEFT_LAYOUTS
from hymeg.checkpoint.verification import verify_folder
from hymeg.errors import UserError, exit_on_user_error
from hymeg.files import parse_bytes
from hymeg.hf.dtypes import ROUNDED_TO

COMMANDS = {  # and the folders that each reads and, last, writes
    "hf-to-dist": (hf_to_dist, ("hf", "dist")),
    "dist-to-hf": (dist_to_hf, ("dist", "hf")),
    "adapter-to-peft": (adapter_to_peft, ("adapter", "peft")),
    "peft-to-adapter": (peft_to_adapter, ("peft", "dist")),
    "merge": (merge, ("base_hf", "adapter", "hf")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_dist = commands.add_parser("hf-to-dist", help="Hugging Face to distributed, for `pretrain_hy.py --load`")
    to_hf = commands.add_parser("dist-to-hf", help="distributed, as training saved it, to Hugging Face")
    to_peft = commands.add_parser("adapter-to-peft", help="a trained adapter to a peft folder")
    to_adapter = commands.add_parser("peft-to-adapter", help="a peft folder to distributed, to train on from")
    merge_in = commands.add_parser("merge", help="an adapter into the weights of its base, to Hugging Face")
    inspect = commands.add_parser("inspect", help="say what a folder holds")
    to_dist.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder to read; hub or fused names")
    to_dist.add_argument("--dist", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    to_hf.add_argument("--dist", required=True, metavar="DIR", help="folder to read, with its tracker file")
    to_hf.add_argument("--hf", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    to_hf.add_argument("--iteration", type=int, metavar="N", help="which one (default: the one that the tracker names)")
    for command in (to_hf, merge_in):
        command.add_argument(
            "--layout",
            choices=HF_LAYOUTS,
            default="hub",
            help="tensor names: as published, or as in transformers' memory (default: hub)",
        )
        command.add_argument(
            "--shard-size",
            default="5GB",
            metavar="BYTES",
            help="largest safetensors file, such as 500MB (default: 5GB)",
        )
    to_hf.add_argument(
        "--cut-vocabulary",
        action="store_true",
        help="lose rows of the vocabulary beyond config.json's even where they are not zero",
    )
    to_peft.add_argument("--adapter", required=True, metavar="DIR", help="distributed checkpoint of an adapter to read")
    to_peft.add_argument("--peft", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    to_peft.add_argument(
        "--layout",
        choices=PEFT_LAYOUTS,
        default="peft",
        help="for PeftModel.from_pretrained, or, every expert by its own name, for vLLM and SGLang (default: peft)",
    )
    to_adapter.add_argument("--peft", required=True, metavar="DIR", help="peft folder to read, in either layout")
    to_adapter.add_argument("--dist", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    merge_in.add_argument(
        "--base-hf", required=True, metavar="DIR", help="Hugging Face folder of the base model to read"
    )
    merge_in.add_argument("--adapter", required=True, metavar="DIR", help="to read: distributed or a peft folder")
    merge_in.add_argument("--hf", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    to_peft.add_argument(
        "--base-hf", metavar="DIR", help="Hugging Face folder of its base (default: its own config.json)"
    )
    to_adapter.add_argument("--base-hf", required=True, metavar="DIR", help="Hugging Face folder of its base model")
    for command in (to_peft, merge_in):
        command.add_argument("--iteration", type=int, metavar="N", help="which one (default: the tracker's)")
    for command in (to_dist, to_hf):
        command.add_argument(
            "--base-hf",
            metavar="DIR",
            help="Hugging Face folder that training began with: for what is missing, such as MTP layers",
        )
        command.add_argument("--drop-mtp", action="store_true", help="leave multi-token-prediction layers out")
    for command in (to_dist, to_hf, to_peft, to_adapter, merge_in):
        command.add_argument(
            "--dtype",
            choices=ROUNDED_TO,
            default="keep",
            help="of all but the fp32 expert bias (default: keep)",
        )
        command.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
        command.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")
    for command in (to_dist, to_hf, to_adapter, merge_in):
        command.add_argument(
            "--verify", action="store_true", help="read everything back and compare it, before the folder appears"
        )
    inspect.add_argument("folder", metavar="DIR", help="Hugging Face or distributed checkpoint")
    inspect.add_argument(
        "--iteration", type=int, metavar="N", help="of a distributed one (default: the one that the tracker names)"
    )
    inspect.add_argument(
        "--verify",
        action="store_true",
        help="read every file, of all iterations, and compare it with its checksum; exit code 1 where one is damaged",
    )
    inspect.add_argument("--workers", type=int, default=2, metavar="N", help="--verify: processes (default: 2)")
    args = parser.parse_args()

    with exit_on_user_error():
        if args.command == "inspect" and args.verify:
            found = verify_folder(args.folder, args.workers)
            print("\n".join([*map(str, found.damaged), f"{args.folder}: {found}"]))
            sys.exit(1 if found.damaged else 0)
        if args.command == "inspect":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `inspect | head`
            print("\n".join(describe(args.folder, args.iteration)))
            return
        given = vars(args)
        convert, folders = COMMANDS[given.pop("command")]
        target = given[folders[-1]]
        if "shard_size" in given:
            given["max_shard_bytes"] = parse_bytes(given.pop("shard_size"))
        try:
            read_and_written = [given.pop(name) for name in folders]
            summary = convert(*read_and_written, **given, say=functools.partial(print, flush=True))
        except KeyboardInterrupt:
            raise UserError("interrupted; nothing was left behind") from None
        print(f"{target}: {summary}{', verified' if given.get('verify') else ''}")


if __name__ == "__main__":
    main()
