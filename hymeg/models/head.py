"""The language-model head: fp32 logits from bf16 weights (`enable_lm_head_fp32`), no probability for rows that only pad
the vocabulary, and losses without logits."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from hymeg.models.linear_cross_entropy import VocabShard, linear_cross_entropy
from hymeg.platform.kernels import matmul_to_fp32


def adapt_head(head: ColumnParallelLinear, vocab_size: int, fp32_logits: bool, recompute: bool = False) -> VocabShard:
    """Change how `head` computes its logits `[s, b, padded_vocab / tp]`; its weight, its checkpoint keys and its
    sharding stay.

    Args:
        head: Megatron's output layer.
        vocab_size: the checkpoint's vocabulary; Megatron may have padded it to divide by the tensor-parallel size.
        fp32_logits: logits in fp32 although the weights are not (without effect on fp32 weights).
        recompute: keep nothing of the logits where only losses are asked for.

    Returns:
        What of the vocabulary `head` holds, for `without_logits`.

    Raises:
        RuntimeError: Megatron's layer no longer computes through `_forward_impl`.
    """
    if not hasattr(head, "_forward_impl"):
        raise RuntimeError(
            "ColumnParallelLinear._forward_impl is gone: look at hymeg.models.head before using this version of "
            "Megatron"
        )
    forward = head._forward_impl
    if fp32_logits and head.weight.dtype != torch.float32:
        forward = _fp32_logits
    start = head.tp_group.rank() * head.output_size_per_partition
    num_rows = min(max(vocab_size - start, 0), head.output_size_per_partition)
    if num_rows < head.output_size_per_partition:
        forward = functools.partial(_without_padding, forward, num_rows)
    head._forward_impl = forward
    return VocabShard(start, num_rows, fp32_logits, recompute, head.tp_group)


@contextlib.contextmanager
def without_logits(head: ColumnParallelLinear, shard: VocabShard) -> Iterator[None]:
    """While the context is open, `head` returns `PendingLogits` in place of logits."""
    forward, head._forward_impl = head._forward_impl, functools.partial(_pending, shard)
    try:
        yield
    finally:
        head._forward_impl = forward


class PendingLogits:
    """The hidden states `[s, b, h]` and the weight that logits would come from.

    Attributes:
        hits: whether the label is the likeliest token, bool `[s, b]`, once the losses were asked for.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, shard: VocabShard):
        self.hidden, self.weight, self.shard = hidden, weight, shard
        self.hits: torch.Tensor | None = None

    def cross_entropy(self, labels: torch.Tensor) -> torch.Tensor:
        """Losses `[s, b]` of the labels `[s, b]`."""
        losses, hits = linear_cross_entropy(self.hidden.flatten(0, 1), self.weight, labels.flatten(), self.shard)
        self.hits = hits.view_as(labels)
        return losses.view_as(labels)


def _pending(shard: VocabShard, *, input, weight, **kwargs) -> PendingLogits:
    return PendingLogits(_whole_input(input, **kwargs), weight, shard)


def _without_padding(forward, num_rows: int, **kwargs) -> torch.Tensor:
    logits = forward(**kwargs)
    logits[..., num_rows:] = torch.finfo(logits.dtype).min
    return logits


def _fp32_logits(*, input, weight, **kwargs) -> torch.Tensor:
    input = _whole_input(input, **kwargs)
    return _LinearToFp32.apply(input.flatten(0, -2), weight).view(*input.shape[:-1], weight.shape[0])


def _whole_input(
    input: torch.Tensor, *, sequence_parallel: bool, allreduce_dgrad: bool, tp_group, **unused
) -> torch.Tensor:
    """The hidden states of all tokens, whose gradient is summed over the tensor-parallel group."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    return copy_to_tensor_model_parallel_region(input, group=tp_group) if allreduce_dgrad else input


class _LinearToFp32(torch.autograd.Function):
    """`[n, h] x [v, h] -> [n, v]` in fp32. The gradient of the logits is rounded to the weight's dtype for the two
    products of the backward pass, as Megatron's cross-entropy rounds it for a head in that dtype."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(input, weight)
        return matmul_to_fp32(input, weight.t())

    @staticmethod
    def backward(ctx, grad_logits):
        input, weight = ctx.saved_tensors
        grad = grad_logits.to(weight.dtype)
        return grad @ weight, grad.t() @ input if ctx.needs_input_grad[1] else None
