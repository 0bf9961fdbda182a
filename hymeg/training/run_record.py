"""What training leaves beside its checkpoints: a run's record (hymeg.reporting.record), a file that says how it is,
what TensorBoard and Weights & Biases draw. The last rank writes, which has the losses and Megatron's writers.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from megatron.training import get_tensorboard_writer, get_wandb_writer

import hymeg
from hymeg.errors import UserError
from hymeg.files import write_whole
from hymeg.hf.config import HyConfig
from hymeg.platform import device, megatron
from hymeg.progress import Say
from hymeg.reporting.record import FOLDER, RunRecord
from hymeg.training.checkpoints import tracked_step

LINES_PER_HEAT_MAP = 10
_PIXELS = 6  # of a side of an expert's square
_WHITE = 3.0  # times the mean
_PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine", "sacrebleu")
_LAYOUT = """tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size data_parallel_size seq_length
    micro_batch_size global_batch_size"""
_SHAPE = "num_hidden_layers num_nextn_predict_layers hidden_size num_experts num_experts_per_tok vocab_size"


@contextlib.contextmanager
def recording(args: argparse.Namespace, config: HyConfig, data: dict[str, Any], say: Say) -> Iterator[RunRecord]:
    """While the context is open, evaluations and checkpoints are added to the record that it gives.

    Args:
        data: what decides the order of the samples (hymeg.training.data_record).
        say: told what went wrong.
    """
    place = args.save or args.tensorboard_dir
    is_writer = args.rank == args.world_size - 1
    record = RunRecord(Path(place, FOLDER) if place and is_writer else None, facts(args, config, data), say)
    names = args.validation_set_names or []

    def evaluated(iteration: int, title: str, losses: list[dict[str, float]], _) -> None:
        kind = "test" if title.endswith("test set") else "validation"
        for number, of_set in enumerate(losses):
            name = f"{kind} {names[number]}" if len(losses) > 1 and names else kind
            record.add("evaluation", iteration, set=name, losses=of_set)

    with (
        megatron.after_evaluations(evaluated),
        megatron.after_saves(lambda iteration, seconds: record.add("save", iteration, seconds=seconds)),
    ):
        yield record


def facts(args: argparse.Namespace, config: HyConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a start says. `args` are validated by Megatron."""
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return {
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "host": socket.gethostname(),
        "device": device.name(),
        "world_size": args.world_size,
        "layout": {name: getattr(args, name) for name in _LAYOUT.split()},
        "train_iters": args.train_iters,
        "model": {"folder": args.hf_model} | {name: getattr(config, name) for name in _SHAPE.split()},
        "data": data,
        "versions": {"hymeg": hymeg.__version__, **_versions()},
        "expert_counts": [num_layers, config.num_experts],
    }


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def beat(save: str, iteration: int, seconds: float, line: str) -> None:
    """Leave in `save` how the run is: what Megatron's log line says of this iteration, which took so long."""
    loss = re.search(r"lm loss: (\S+)", line)
    found = {
        "iteration": iteration,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "loss": float(loss[1]) if loss else None,
        "seconds_per_iteration": seconds,
        "last_checkpoint": tracked_step(save),
        "pid": os.getpid(),
    }
    with contextlib.suppress(UserError):  # a full disk is told of when a checkpoint does not fit
        write_whole(Path(save, "heartbeat.json"), json.dumps(found).encode())


def write_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    if (tensorboard := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(dict(scalars), iteration)


def write_heat_map(counts: np.ndarray, iteration: int) -> None:
    """The tokens `[layers, experts]` over their layer's mean as a picture, to Weights & Biases. A layer is a row of
    squares, layers without experts are left out: black is none, a third of white the mean, white three times and more.
    """
    if (wandb := get_wandb_writer()) is None:
        return
    load = counts[counts.any(axis=1)]
    load = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    grey = np.rint(np.minimum(load / _WHITE, 1) * 255).astype(np.uint8)
    squares = grey.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)
    caption = "layers x experts: tokens over the mean, from 0 (black) to 3 (white)"
    wandb.log({"expert-load/heat-map": wandb.Image(squares, caption=caption)}, iteration)
