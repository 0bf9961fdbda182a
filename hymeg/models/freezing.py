"""Parameters that are not trained."""

from collections.abc import Collection, Mapping

import torch

from hymeg.checkpoint.adapter_table import FULL, PREFIX
from hymeg.errors import UserError


def freeze(trained: Collection[str], chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Before the model is wrapped: what is frozen then has neither gradients nor optimizer."""
    for chunk in chunks:
        keys = {name: stored.key for name, stored in chunk.sharded_state_dict(metadata={}).items()}
        for name, parameter in chunk.named_parameters():
            if name not in keys:
                raise UserError(f"--freeze and --train-only: {name} is stored under no name, as these flags build it")
            parameter.requires_grad_(keys[name] in trained)
        require_gradients_of_inputs(chunk)
    return chunks


def train_in_full(names: Mapping[str, str], model: torch.nn.Module) -> None:
    """Beside its adapters, of a model that is frozen otherwise. `names`: of the distributed tensors (keys) the
    published ones, under which `hymeg.checkpoint.adapter_table` stores them.
    """
    for name, stored in model.weights_sharded_state_dict(metadata={}).items():
        if stored.key in names:
            model.get_parameter(name).requires_grad_(True)
    model.trained_in_full = {key: PREFIX + name + FULL for key, name in names.items()}


def require_gradients_of_inputs(model: torch.nn.Module) -> None:
    """Of a frozen embedding's output, where Megatron passes gradients on only if a layer's inputs ask for them: layers
    that are recomputed in the backward pass, or whose communication is overlapped, graphs of kernels, and a pipeline
    stage without adapters (megatron/core/tensor_parallel/random.py, CheckpointFunction; pipeline_parallel/schedules.py,
    backward_step). Elsewhere the backward pass ends at the first parameter that is trained.
    """
    config, embedding = model.config, getattr(model, "embedding", None)
    ask = (
        config.recompute_granularity is not None
        or config.overlap_moe_expert_parallel_comm
        or config.cuda_graph_impl != "none"
        or config.pipeline_model_parallel_size > 1
    )
    if embedding is not None and ask:
        embedding.register_forward_hook(_require_gradient)


def _require_gradient(embedding: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
    return output
