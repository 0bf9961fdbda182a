"""The language-model head: fp32 logits from bf16 weights (`enable_lm_head_fp32`), and no probability for rows that only pad the vocabulary."""

import functools

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from hymeg.platform.kernels import matmul_to_fp32


def adapt_head(head: ColumnParallelLinear, vocab_size: int, fp32_logits: bool) -> None:
    """Change how `head` computes its logits `[s, b, padded_vocab / tp]`; its weight, its checkpoint keys and its sharding stay.

    Args:
        head: Megatron's output layer.
        vocab_size: the checkpoint's vocabulary; Megatron may have padded it to divide by the tensor-parallel size.
        fp32_logits: logits in fp32 although the weights are not (without effect on fp32 weights).

    Raises:
        RuntimeError: Megatron's layer no longer computes through `_forward_impl`.
    """
    if not hasattr(head, "_forward_impl"):
        raise RuntimeError("ColumnParallelLinear._forward_impl is gone: look at hymeg.models.head before using this version of Megatron")
    forward = head._forward_impl
    if fp32_logits and head.weight.dtype != torch.float32:
        forward = _fp32_logits
    first_padded = vocab_size - head.tp_group.rank() * head.output_size_per_partition
    if first_padded < head.output_size_per_partition:
        forward = functools.partial(_without_padding, forward, max(first_padded, 0))
    head._forward_impl = forward


def _without_padding(forward, first_padded: int, **kwargs) -> torch.Tensor:
    logits = forward(**kwargs)
    logits[..., first_padded:] = torch.finfo(logits.dtype).min
    return logits


def _fp32_logits(*, input, weight, sequence_parallel: bool, allreduce_dgrad: bool, tp_group, **unused) -> torch.Tensor:
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    return _LinearToFp32.apply(input.flatten(0, -2), weight).view(*input.shape[:-1], weight.shape[0])


class _LinearToFp32(torch.autograd.Function):
    """`[n, h] x [v, h] -> [n, v]` in fp32. The gradient of the logits is rounded to the weight's dtype for the two products of the backward pass, as
    Megatron's cross-entropy rounds it for a head in that dtype."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(input, weight)
        return matmul_to_fp32(input, weight.t())

    @staticmethod
    def backward(ctx, grad_logits):
        input, weight = ctx.saved_tensors
        grad = grad_logits.to(weight.dtype)
        return grad @ weight, grad.t() @ input if ctx.needs_input_grad[1] else None
