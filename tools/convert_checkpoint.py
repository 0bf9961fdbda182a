#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron's distributed format, and adapters between it and peft's, or
merge them: streaming, no GPU, no model in memory.
"""

import argparse
import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.adapters import adapter_to_peft, merge, peft_to_adapter
from hymeg.checkpoint.convert import average, dist_to_dist, dist_to_hf, hf_to_dist, hf_to_hf
from hymeg.checkpoint.gather import gather
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.mapping import HF_LAYOUTS
from hymeg.checkpoint.options import ANEW, ANY, FROM_DIST, OF_MODEL, TO_HF, VERIFIED
from hymeg.checkpoint.peft_table import PEFT_LAYOUTS
from hymeg.checkpoint.verification import verify_folder
from hymeg.errors import UserError, exit_on_user_error
from hymeg.files import parse_bytes
from hymeg.hf.dtypes import ROUNDED_TO
from hymeg.hf.hub import local_folder


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


OPTIONS: dict[str, dict[str, Any]] = {
    "dtype": {"choices": ROUNDED_TO, "default": "keep", "help": "of all but the fp32 expert bias (default: keep)"},
    "iteration": {"type": int, "metavar": "N", "help": "which one (default: the one that the tracker names)"},
    "iterations": {"type": _numbers, "metavar": "N,N", "help": "of the one distributed folder that is then given"},
    "layout": {
        "choices": HF_LAYOUTS,
        "default": "hub",
        "help": "tensor names: as published, or as in transformers' memory (default: hub)",
    },
    "peft_layout": {
        "choices": PEFT_LAYOUTS,
        "default": "peft",
        "dest": "layout",
        "help": "for PeftModel.from_pretrained, or, every expert by its own name, for vLLM and SGLang (default: peft)",
    },
    "max_shard_bytes": {
        "default": "5GB",
        "metavar": "BYTES",
        "help": "largest safetensors file, such as 500MB (default: 5GB)",
    },
    "shards_like": {"metavar": "DIR", "help": "put each tensor into the file that it has in this Hugging Face folder"},
    "quantize": {
        "choices": ("fp8",),
        "help": "as Tencent publishes FP8: a scale for each Linear of attention and MLPs (--dtype is of the rest)",
    },
    "scales_from": {
        "metavar": "DIR",
        "help": "--quantize: the published FP8 folder, for its scales of inputs and KV cache (default: none, dynamic)",
    },
    "cut_vocabulary": {
        "action": "store_true",
        "help": "lose rows of the vocabulary beyond config.json's even where they are not zero",
    },
    "keep_vocabulary": {"action": "store_true", "help": "keep them, padding included, and correct config.json"},
    "base_hf": {
        "metavar": "DIR",
        "help": "Hugging Face folder of the original: for what is missing, such as MTP layers that other trainers drop",
    },
    "drop_mtp": {"action": "store_true", "help": "leave multi-token-prediction layers out, of config.json as well"},
    "workers": {"type": int, "default": 2, "metavar": "N", "help": "processes (default: 2)"},
    "overwrite": {"action": "store_true", "help": "replace what an earlier conversion wrote"},
    "verify": {"action": "store_true", "help": "read everything back and compare it, before the folder appears"},
}
FLAGS = {"max_shard_bytes": "--shard-size", "peft_layout": "--layout"}  # the others are called as the argument
NEEDED = "folder to write; must be empty or not exist"


class Command(NamedTuple):
    run: Callable[..., Any]
    help: str
    folders: dict[str, str]  # that it reads and, last, writes; and what they are
    options: tuple[str, ...]


COMMANDS = {
    "hf-to-dist": Command(
        hf_to_dist,
        "Hugging Face to distributed, for `pretrain_hy.py --load`",
        {"hf": "Hugging Face folder to read; hub or fused names, FP8 as well", "dist": NEEDED},
        OF_MODEL,
    ),
    "dist-to-hf": Command(
        dist_to_hf,
        "distributed, as training saved it, to Hugging Face",
        {"dist": "folder to read, with its tracker file", "hf": NEEDED},
        (*OF_MODEL, *FROM_DIST, *ANEW),
    ),
    "hf-to-hf": Command(
        hf_to_hf,
        "Hugging Face anew: another layout, dtype, size of files; out of FP8 or into it; with MTP layers or without",
        {"hf": "Hugging Face folder to read", "to": NEEDED},
        (*OF_MODEL, *ANEW),
    ),
    "dist-to-dist": Command(
        dist_to_dist,
        "distributed without its optimizer state, to begin a run with",
        {"dist": "folder to read, with its tracker file", "to": NEEDED},
        (*OF_MODEL, *FROM_DIST),
    ),
    "average": Command(
        average,
        "the mean of several checkpoints, or iterations of one",
        {"folders": "Hugging Face or distributed checkpoints to read"},
        (*OF_MODEL, *TO_HF, "iterations"),
    ),
    "gather": Command(
        gather,
        "a distributed checkpoint whose files lie on several nodes' disks, as one",
        {"folders": "what --save named on each node", "dist": NEEDED},
        ("iteration", "overwrite"),
    ),
    "adapter-to-peft": Command(
        adapter_to_peft,
        "a trained adapter to a peft folder",
        {"adapter": "distributed checkpoint of an adapter to read", "peft": NEEDED},
        (*ANY, "iteration", "base_hf", "peft_layout"),
    ),
    "peft-to-adapter": Command(
        peft_to_adapter,
        "a peft folder to distributed, to train on from",
        {"peft": "peft folder to read, in either layout", "dist": NEEDED},
        (*VERIFIED, "base_hf"),
    ),
    "merge": Command(
        merge,
        "an adapter into the weights of its base, to Hugging Face",
        {
            "base-hf": "Hugging Face folder of the base model to read",
            "adapter": "to read: distributed or a peft folder",
            "hf": NEEDED,
        },
        (*VERIFIED, *TO_HF, "iteration"),
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.help)
        for folder, what in command.folders.items():
            if folder == "folders":
                of_command.add_argument(folder, nargs="+", metavar="DIR", help=what)
            else:
                of_command.add_argument(f"--{folder}", required=True, metavar="DIR", help=what)
        if name == "average":
            target = of_command.add_mutually_exclusive_group(required=True)
            for kind in ("hf", "dist"):
                target.add_argument(f"--{kind}", metavar="DIR", help=NEEDED)
        for option in command.options:
            settings = {"dest": option, **OPTIONS[option]}
            if name == "peft-to-adapter" and option == "base_hf":
                settings["required"] = True
            of_command.add_argument(FLAGS.get(option, f"--{option.replace('_', '-')}"), **settings)
    inspect = commands.add_parser("inspect", help="say what a folder holds")
    inspect.add_argument("folder", metavar="DIR", help="Hugging Face or distributed checkpoint")
    inspect.add_argument("--iteration", **OPTIONS["iteration"])
    inspect.add_argument("--tensors", action="store_true", help="list them, too: name, dtype, shape")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument(
        "--verify",
        action="store_true",
        help="read every file, of all iterations, and compare it with its checksum; exit code 1 where one is damaged",
    )
    inspect.add_argument("--workers", type=int, default=2, metavar="N", help="--verify: processes (default: 2)")
    return parser


def _inspect(folder: str, iteration: int | None, tensors: bool, as_json: bool) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `inspect | head`
    found = describe(local_folder(folder), iteration, tensors)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    listed = found.pop("list of tensors", {})
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    for name, (dtype, shape) in listed.items():
        print(f"{name} {dtype} {shape}")


def _local(given: str | list[str]) -> Any:
    """The cache's folder in place of an id of the Hugging Face hub."""
    return [local_folder(folder) for folder in given] if isinstance(given, list) else local_folder(given)


def _verify(folder: Path, workers: int) -> None:
    found = verify_folder(folder, workers)
    if not (found.num_files or found.damaged):
        others = f"{len(found.unverified):,} files, but no" if found.unverified else "no"
        raise UserError(
            f"{folder}: {others} checksums in it: nothing to verify; give the folder of a checkpoint that has"
        )
    print("\n".join([*map(str, found.damaged), f"{folder}: {found}"]))
    sys.exit(1 if found.damaged else 0)


def main() -> None:
    args = vars(_parser().parse_args())
    with exit_on_user_error():
        name = args.pop("command")
        if name == "inspect":
            if args["verify"]:
                if others := [f"--{option}" for option in ("iteration", "tensors", "json") if args[option]]:
                    raise UserError(f"--verify with {' '.join(others)}: it compares all there is; leave that out")
                _verify(local_folder(args["folder"]), args["workers"])
            _inspect(args["folder"], args["iteration"], args["tensors"], args["json"])
            return
        command = COMMANDS[name]
        folders = [args.pop(folder.replace("-", "_")) for folder in command.folders]
        target = folders[-1] if name != "average" else args["hf"] or args["dist"]
        if "max_shard_bytes" in args:
            args["max_shard_bytes"] = parse_bytes(args["max_shard_bytes"])
        num_read = len(folders) if name == "average" else len(folders) - 1
        try:
            folders[:num_read] = [_local(folder) for folder in folders[:num_read]]
            args |= {key: _local(args[key]) for key in ("base_hf", "shards_like", "scales_from") if args.get(key)}
            summary = command.run(*folders, **args, say=functools.partial(print, flush=True))
        except KeyboardInterrupt:
            raise UserError("interrupted; nothing was left behind") from None
        print(f"{target}: {summary}{', verified' if args.get('verify') else ''}")


if __name__ == "__main__":
    main()
