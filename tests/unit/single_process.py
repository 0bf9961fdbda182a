"""A world of one process in the test's own interpreter: our model, built from flags as the trainer builds it."""

import contextlib
import os

from hymeg import platform

platform.install()

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.training.arguments import validate_args  # noqa: E402
from model_weights import load_into  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from hymeg.models.hy import construct  # noqa: E402
from hymeg.platform import device  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.preflight import preflight  # noqa: E402
from hymeg.training.run import model_config_from_args  # noqa: E402

NEEDED = ["--mock-data", "--train-iters", "1", "--lr", "1e-3"]


def ensure_world() -> None:
    if not torch.distributed.is_initialized():
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }
        torch.distributed.init_process_group("gloo" if platform.is_cpu() else "nccl")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    destroy_num_microbatches_calculator()
    MTPLossLoggingHelper.tracker.clear()  # it has as many layers as the model before had


def build(folder: str, *flags: str, seq_length: int = 64, weights: bool = True) -> torch.nn.Module:
    """The model of the checkpoint in `folder` with its weights in it; wrapped for bf16 when `--bf16` is among
    `flags`.
    """
    ensure_world()
    folder = str(folder)
    args, config = parse(["--hf-model", folder, "--load", folder, "--seq-length", str(seq_length), *NEEDED, *flags])
    preflight(args, config, lambda note: None)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        validate_args(args)
    model = construct(model_config_from_args(args), ProcessGroupCollection.use_mpu_process_groups()).to(
        device.current()
    )
    if args.bf16:
        model = Float16Module(model.config, model)
        for module in model.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()
    if weights:
        load_into(config, [model], load_file(f"{folder}/model.safetensors"))
    return model


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
