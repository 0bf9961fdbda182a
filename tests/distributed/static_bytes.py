"""What a rank holds for the whole of a training, in bytes, read from Megatron's objects."""

import torch
from megatron.core import parallel_state


def static_bytes(model_chunks: list, optimizer) -> dict[str, int]:
    """Weights, gradients, optimizer state and the router's buffers, and which rank of which group this is."""
    ddp_buffers = [buffer for chunk in model_chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    in_buffers = {
        id(parameter) for buffer in ddp_buffers if buffer.param_data is not None for parameter in buffer.params
    }
    apart = [parameter for chunk in model_chunks for parameter in chunk.parameters() if id(parameter) not in in_buffers]
    routers = [buffer for chunk in model_chunks for name, buffer in chunk.module.named_buffers() if ".router." in name]
    return {
        "weights": _bytes(apart)
        + _bytes([buffer.param_data for buffer in ddp_buffers if buffer.param_data is not None]),
        "gradients": _bytes([buffer.grad_data for buffer in ddp_buffers]),
        "optimizer": sum(_state_bytes(one) for one in getattr(optimizer, "chained_optimizers", [optimizer])),
        "buffers": _bytes(routers),
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "dense_rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert_rank": parallel_state.get_expert_data_parallel_rank(),
    }


def _state_bytes(optimizer) -> int:
    """Adam's moments and, where the weights are bf16, their fp32 copies."""
    moments = [
        tensor
        for state in optimizer.optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    ]
    names = ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")
    copies = [parameter for name in names for group in getattr(optimizer, name, []) for parameter in group]
    return _bytes(moments) + _bytes(copies)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
