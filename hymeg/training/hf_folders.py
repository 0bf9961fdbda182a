"""`--save-hf DIR`: the run writes Hugging Face folders itself, DIR/iter_0000100, from the model as it is then."""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hymeg.checkpoint.live_folder import save_hf_folder
from hymeg.checkpoint.mapping import num_parameters
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.platform import megatron
from hymeg.progress import Say
from hymeg.training.data_paths import check_writable
from hymeg.training.flag_names import flag


def check_save_hf(args: argparse.Namespace, config: HyConfig) -> None:
    """Raises UserError: there is no room for one folder, or the place is another's."""
    if args.save_hf is None:
        return
    parent = check_writable("--save-hf", args.save_hf)
    for dest in ("save", "hf_model", "load", "pretrained_checkpoint"):
        other = getattr(args, dest)
        if other is not None and os.path.realpath(other) == os.path.realpath(args.save_hf):
            raise UserError(f"--save-hf {args.save_hf}: the same folder as {flag(dest)}; give one of its own")
    needed = num_parameters(config, include_expert_bias=True) * (2 if args.bf16 or args.fp16 else 4)
    free = shutil.disk_usage(parent).free
    if args.rank == 0 and free < needed:  # its disk alone is written to
        raise UserError(
            f"--save-hf {args.save_hf}: {needed / 1e9:,.3f} GB are needed for each folder and {free / 1e9:,.3f} GB are "
            "free on that disk; make room, or give a folder elsewhere"
        )


@contextlib.contextmanager
def saving_hf(args: argparse.Namespace, config: HyConfig, say: Say) -> Iterator[None]:
    """While the context is open, folders are written after every `--save-hf-interval` steps and after the last one. One
    that cannot be written does not end the training, in which the disk may be mended; it is a UserError at the end.
    """
    if args.save_hf is None:
        yield
        return
    failures: list[str] = []
    num_steps = 0

    def after_step(iteration: int, model_chunks: list[torch.nn.Module], optimizer: Any) -> None:
        """Collective, after each step."""
        nonlocal num_steps
        num_steps += 1
        if iteration == args.train_iters or (args.save_hf_interval and iteration % args.save_hf_interval == 0):
            with megatron.not_in_interval_time():
                megatron.gather_weights(model_chunks, optimizer)
                try:
                    _write(args, config, iteration, model_chunks, say)
                except UserError as error:
                    failures.append(str(error))
                    say(f"--save-hf: iteration {iteration} is not written, training goes on: {error}")

    with megatron.after_steps(after_step):
        yield
    if failures:
        raise UserError(f"--save-hf: {len(failures)} folders were not written: {failures[0]}")
    if not num_steps:
        say(f"--save-hf {args.save_hf}: no step was made, so no folder was written")


def _write(args: argparse.Namespace, config: HyConfig, iteration: int, chunks: list[torch.nn.Module], say: Say) -> None:
    target, source, started = Path(args.save_hf, f"iter_{iteration:07d}"), Path(args.hf_model), time.monotonic()
    record = {"command": "pretrain_hy.py --save-hf", "hf_model": args.hf_model, "iteration": iteration}
    # Over a folder of the same iteration, which a resumed run comes to again.
    save_hf_folder(chunks, config, target, companions=source, overwrite=True, record=record, say=say)
    say(f"wrote {target} in {time.monotonic() - started:.1f} s")
