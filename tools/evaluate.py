#!/usr/bin/env python
"""Judge checkpoints by what they say: held-out rows answered by each, chrF, chrF++, BLEU and alarms side by side.

    tools/evaluate.py Hy-MT2-30B-A3B runs/mine held_out.jsonl --out judged
    torchrun --nproc-per-node 8 tools/evaluate.py runs/mine held_out.jsonl --tensor-model-parallel-size 2 \\
        --expert-model-parallel-size 4

Checkpoints are Hugging Face folders or distributed checkpoints of one model. They and the file stand first; flags that
are not listed here are those of pretrain_hy.py for layout and precision.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hymeg import platform
from hymeg.errors import UserError, exit_on_user_error
from hymeg.files import shown, write_whole
from hymeg.hf.hub import is_hub_id, local_folder

_DECISIVE = (
    "num_experts_per_tok",
    "router_scaling_factor",
    "moe_router_enable_expert_bias",
    "rms_norm_eps",
    "rope_theta",
    "eos_token_id",
)
"""Of what config.json says that weights do not show."""


def main() -> None:
    args, flags = _parser().parse_known_args()
    with exit_on_user_error():
        platform.install()
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        _check(args, flags)
        _evaluate(args, flags)
    if dist.is_initialized():
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders, or ids of the hub, of one model")
    parser.add_argument("file", metavar="FILE", help="held-out rows, as for training")
    parser.add_argument("--hf-model", metavar="DIR", help="config.json and tokenizer, if not in the first CHECKPOINT")
    parser.add_argument("--rows", type=int, metavar="N", help="so many, spread evenly over the file (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers at a time (default: 16)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write there, by checkpoint: what it said (NAME.jsonl), for rows with an md5 {md5, response} lines, which "
        "IFMTBench's scorer takes (NAME.responses.jsonl); and all figures (scores.json)",
    )
    return parser


def _check(args: argparse.Namespace, flags: list[str]) -> None:
    """What can be seen to be wrong before a model is loaded."""
    if len(args.checkpoints) > 1 and any(word.partition("=")[0] == "--ckpt-step" for word in flags):
        raise UserError(
            "--ckpt-step: of which of several checkpoints is not said; judge that iteration alone, or give it behind "
            "the first one as RUN/iter_0000100"
        )
    for name in ("rows", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: 1 or more is needed")
    for checkpoint in args.checkpoints:
        if not is_hub_id(checkpoint) and not Path(checkpoint).is_dir():
            raise UserError(
                f"{checkpoint}: no such folder; give a Hugging Face folder or a distributed checkpoint, before the "
                "file and all flags"
            )
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")


def _evaluate(args: argparse.Namespace, flags: list[str]) -> None:
    from hymeg.checkpoint.live import load_weights
    from hymeg.generation import generate_dealt
    from hymeg.generation.held_out import HeldOut, figures, rows
    from hymeg.generation.prompts import published_sampling
    from hymeg.hf.config import HyConfig
    from hymeg.hf.tokenizer import load_tokenizer
    from hymeg.platform import device
    from hymeg.training.loaded import load_model

    folders = {checkpoint: local_folder(checkpoint) for checkpoint in args.checkpoints}
    first, *others = args.checkpoints
    hf_model = args.hf_model and local_folder(args.hf_model, weights=False, flag="--hf-model")
    folder = hf_model or folders[first]
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; say with --hf-model where config.json and tokenizer are")
    config = HyConfig.from_file(Path(folder) / "config.json")
    if hf_model is None:
        _check_one_model(Path(folder), [Path(folders[checkpoint]) for checkpoint in others])
    held_out = HeldOut(args.file, load_tokenizer(folder, config), config, args.rows)
    sampling = held_out.sampling(published_sampling(folder, config).stop_ids)
    if device.current().type == "cuda" and not {"--bf16", "--fp16"} & set(flags):
        flags = ["--bf16", *flags]
    model, config = load_model(folders[first], flags, hf_model=hf_model)
    table = _Table(args.checkpoints)
    for checkpoint in args.checkpoints:
        if checkpoint in others:
            load_weights(model, config, folders[checkpoint])
        answers = generate_dealt(model, held_out.prompts, sampling, batch_size=args.batch_size)
        if dist.get_rank() == 0:
            examples = held_out.examples(answers)
            found, said = figures(examples), rows(held_out.questions, examples)
            table.add(checkpoint, found)
            if args.out:
                _write(Path(args.out), table, checkpoint, said, held_out.questions)
    if dist.get_rank() == 0:
        print(table)


def _check_one_model(folder: Path, others: list[Path]) -> None:
    """Raises UserError where a folder's config.json says otherwise how its weights compute or end than that of
    `folder`, by which all are judged.
    """
    from hymeg.hf.config import HyConfig

    expected = HyConfig.from_dir(folder)
    for other in (other for other in others if (other / "config.json").is_file()):
        config = HyConfig.from_dir(other)
        for name in _DECISIVE:
            if getattr(config, name) != getattr(expected, name):
                raise UserError(
                    f"{other / 'config.json'}: {name} is {shown(getattr(config, name))}, and "
                    f"{shown(getattr(expected, name))} in {folder}: these are not checkpoints of one model; judge each "
                    "alone, or say with --hf-model which config.json holds for all"
                )


class _Table:
    """Figures, a checkpoint a column."""

    def __init__(self, checkpoints: list[str]):
        self.names = dict(zip(checkpoints, _names(checkpoints), strict=True))
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, checkpoint: str, found: dict[str, Any]) -> None:
        self.found[self.names[checkpoint]] = found

    def __str__(self) -> str:
        from hymeg.generation.held_out import METRICS

        first = next(iter(self.found.values()))
        lines = [["", *self.found]]
        for pair in (None, *first["pairs"]):
            for metric in METRICS:
                scores = [(of["pairs"][pair] if pair else of["overall"])[metric] for of in self.found.values()]
                lines.append([f"{metric} {pair or 'all'}", *(f"{score:.2f}" for score in scores)])
        for name in first["alarms"]:
            lines.append([name, *(f"{of['alarms'][name]:.1%}" for of in self.found.values())])
        lines.append(["texts", *(str(of["overall"]["texts"]) for of in self.found.values())])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([*rows, *(f"{name}: {signature}" for name, signature in first["signatures"].items())])


def _names(checkpoints: list[str]) -> list[str]:
    """Short ones for columns and files; with a number where two would be the same."""
    names: list[str] = []
    for checkpoint in checkpoints:
        name = Path(checkpoint).resolve().name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _write(out: Path, table: _Table, checkpoint: str, said: list[dict[str, Any]], questions: list) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror or error}") from error
    name = table.names[checkpoint]
    write_whole(out / f"{name}.jsonl", _lines(said))
    responses = [
        {"md5": question.row["md5"], "response": row["hypothesis"]}
        for question, row in zip(questions, said, strict=True)
        if "md5" in question.row
    ]
    if responses:
        write_whole(out / f"{name}.responses.jsonl", _lines(responses))
    write_whole(out / "scores.json", (json.dumps(table.found, ensure_ascii=False, indent=2) + "\n").encode())


def _lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


if __name__ == "__main__":
    main()
