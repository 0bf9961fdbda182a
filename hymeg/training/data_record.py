"""What data a run's checkpoints were trained on, kept beside them: a resume under others, or in another order, is said.

`data.json` is a list of {"after": the iteration that a run went on from, "data": its record}, in order. What a run that
saved nothing left there is not what the checkpoint was trained on: an entry counts for later iterations only.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from hymeg.checkpoint.dist_files import named_iteration
from hymeg.checksums import sum_of_file
from hymeg.data.pretraining import contents
from hymeg.errors import UserError
from hymeg.files import read_json, shown, write_whole
from hymeg.progress import Say
from hymeg.training.checkpoints import is_distributed_checkpoint

RECORD = "data.json"
_OF_TEXT = "seed seq_length split data_path data_args_path train_data_path per_split_data_args_path mock_data"
_CONTENTS, _TOKENIZER = "contents of ", "tokenizer.json"
_ANOTHER_ORDER = ("the data are not in the order", "samples may come twice or never")
_MEANINGS = {
    _CONTENTS: ("the data are not those", "from here on others are trained on"),
    _TOKENIZER: ("the tokenizer is not the one", "token ids may stand for other text"),
    "global_batch_size": (
        "the batches, in which --train-epochs is counted, are not those",
        "it would end before or after so many epochs; give --train-samples, a sample a sequence, in its place",
    ),
}


def text_record(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the order of Megatron's samples of text: their number is part of it (gpt_dataset.py,
    _build_document_sample_shuffle_indices).
    """
    num_samples = args.train_samples or args.train_iters * args.global_batch_size
    return {dest: getattr(args, dest) for dest in _OF_TEXT.split()} | {"train_samples": num_samples, "sft": False}


def contents_record(args: argparse.Namespace) -> dict[str, str]:
    """What is in the data sets of text, by their checksums where they have some, and how the tokenizer makes tokens."""
    found = {f"{_CONTENTS}{prefix}": contents(Path(prefix)) for prefix in getattr(args, "text_prefixes", ())}
    return found | {_TOKENIZER: f"{sum_of_file(Path(args.hf_model, _TOKENIZER)).crc:08X}"}


def compare_and_keep(args: argparse.Namespace, record: dict[str, Any], say: Say) -> None:
    """Say where `record` differs from that of the checkpoint that is gone on from; keep it in `--save`. For rank 0."""
    iteration, kept = 0, []
    if args.load is not None and not args.finetune and is_distributed_checkpoint(args.load):
        step = args.ckpt_step
        iteration = step if step is not None else named_iteration(Path(args.load), "--ckpt-step") or 0
        kept = [entry for entry in _kept(args.load) if entry["after"] < iteration]
        if args.train_iters is not None and iteration >= args.train_iters:
            say(f"nothing left to train: {args.load} is at iteration {iteration} of --train-iters {args.train_iters}")
        for key, was in kept[-1]["data"].items() if kept else ():
            now = record.get(key, was)
            if now != was:
                said, means = _MEANINGS.get(_CONTENTS if key.startswith(_CONTENTS) else key, _ANOTHER_ORDER)
                say(f"{said} that {args.load} was trained on: {key} was {shown(was)} and is {shown(now)}; {means}")
    if args.save is not None:
        os.makedirs(args.save, exist_ok=True)
        kept.append({"after": iteration, "data": record})
        write_whole(Path(args.save, RECORD), json.dumps(kept, indent=1).encode())


def _kept(folder: str) -> list[dict[str, Any]]:
    try:
        kept = read_json(Path(folder, RECORD))
    except UserError:
        return []  # of a release, or of another tool
    return kept if isinstance(kept, list) else []
