"""A model with a checkpoint's weights in any layout, without a training around it: for generation and judging."""

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from hymeg.checkpoint.adapters import merged
from hymeg.checkpoint.live import load_tensors
from hymeg.checkpoint.sources import open_adapter, open_any
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.platform.connections import set_connections
from hymeg.training.arguments import parse
from hymeg.training.preflight import preflight
from hymeg.training.run import megatron_refusals, model_config_from_args, stand_alone

_NO_TRAINING = "--mock-data --train-iters 1 --lr 0 --eval-iters 0 --seq-length 1024 --no-initialization --no-load-optim"


def load_model(
    checkpoint: str | os.PathLike,
    flags: Sequence[str] = (),
    *,
    hf_model: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
) -> tuple[list[torch.nn.Module], HyConfig]:
    """The model in `checkpoint`, as this rank's virtual stages, and its config. Without a launcher this process is a
    world of its own; otherwise every rank calls it.

    Args:
        checkpoint: a Hugging Face folder or a distributed checkpoint.
        flags: pretrain_hy.py's, of layout and precision; and --ckpt-step, which iteration of a distributed one.
        hf_model: the folder with config.json and tokenizer, if it is another.
        adapter: whose delta is added to the weights: a distributed checkpoint of adapters or a peft folder.

    Raises:
        UserError: a flag or the checkpoint cannot be used.
    """
    if not Path(checkpoint).is_dir():
        raise UserError(f"{checkpoint}: no such folder; give a Hugging Face folder or a distributed checkpoint")
    stand_alone()
    set_connections(flags)  # which Megatron asserts
    hf_model = checkpoint if hf_model is None else hf_model
    if not (Path(hf_model) / "config.json").is_file():
        raise UserError(f"{hf_model}: no config.json in it; say with --hf-model where config.json and tokenizer are")
    args, config = parse(["--hf-model", str(hf_model), "--load", str(checkpoint), *_NO_TRAINING.split(), *flags])
    preflight(args, config, lambda note: None)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # standard output is the answers'
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = build_model(args)
    base = open_any(checkpoint, args.ckpt_step)
    tensors = base.tensors if adapter is None else merged(config, base.tensors, open_adapter(Path(adapter), config))
    load_tensors(model, config, tensors, base.folder)
    return [chunk.eval() for chunk in model], config


def build_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """This rank's virtual stages of the model of checked but not yet validated `args`, in its process groups, which are
    made here. Its weights are whatever they are.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.training import initialize_megatron

    from hymeg.models.hy import HyModelBuilder

    with megatron_refusals():
        validate_args(args)
        set_global_variables(args, build_tokenizer=False)
        model_config = model_config_from_args(args)
        initialize_megatron()
    return HyModelBuilder(model_config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False, data_parallel_random_init=False
    )
