"""The language-model head: fp32 logits from bf16 weights (`enable_lm_head_fp32`), no probability for rows that only pad
the vocabulary, and losses without logits."""

import copy

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from hymeg.models.linear_cross_entropy import VocabShard, linear_cross_entropy
from hymeg.platform.kernels import matmul_to_fp32


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


class Head(ColumnParallelLinear):
    """Megatron's output layer, of which weight, checkpoint keys and sharding stay: `[s, b, h]` gives logits `[s, b,
    padded_vocab / tp]`.

    Args:
        vocab_size: the checkpoint's vocabulary; Megatron may have padded it to divide by the tensor-parallel size.

    Attributes:
        shard: what of the vocabulary this rank holds.
        wants_losses: whether `PendingLogits` are returned in place of logits.
    """

    def __init__(self, *args, vocab_size: int, config, **kwargs):
        own = copy.copy(config)
        # Its products are not those that add into the gradients' buffer, for which Megatron demands APEX.
        own.gradient_accumulation_fusion = False
        super().__init__(*args, config=own, **kwargs)
        start = self.tp_group.rank() * self.output_size_per_partition
        num_rows = min(max(vocab_size - start, 0), self.output_size_per_partition)
        self.shard = VocabShard(start, num_rows, config.hy_lm_head_fp32, config.hy_recompute_logits, self.tp_group)
        self.wants_losses = False

    def _forward_impl(self, *, input, weight, **kwargs) -> torch.Tensor | PendingLogits:
        if self.wants_losses:
            return PendingLogits(_whole_input(input, **kwargs), weight, self.shard)
        if self.shard.fp32_logits and weight.dtype != torch.float32:
            input = _whole_input(input, **kwargs)
            logits = _LinearToFp32.apply(input.flatten(0, -2), weight).view(*input.shape[:-1], weight.shape[0])
        else:
            logits = super()._forward_impl(input=input, weight=weight, **kwargs)
        if self.shard.num_rows < weight.shape[0]:
            logits[..., self.shard.num_rows :] = torch.finfo(logits.dtype).min
        return logits


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
