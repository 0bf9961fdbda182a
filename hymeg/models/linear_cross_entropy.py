"""The cross entropy of tokens straight from their hidden states: the logits are computed a slice of the vocabulary at a
time and never held whole.

With 120,832 tokens in the vocabulary fp32 logits and what a cross entropy makes of them take 6 bytes a token and
vocabulary entry at their peak: 3 GB for 4,096 tokens. Here they take 2 (exponentials in bf16, kept for the backward
pass), or only a slice when they are computed again there.

Slices are merged as tensor-parallel shards are: by the maximum m and the sum z of exp(logit - m), both `[n]` (Milakov
and Gimelshein, "Online normalizer calculation for softmax", 2018). The loss is log z + m - logit[label]; its gradient
by a logit is exp(logit - m) / z, less 1 at the label.
"""

import dataclasses

import torch
import torch.distributed as dist

from hymeg import platform
from hymeg.platform import kernels

SLICE_ELEMENTS = kernels.SLICE_ELEMENTS[platform.name()]
"""Logits in a slice."""


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The rows of the vocabulary that this rank's part of the head holds.

    Attributes:
        start: the token of the first row.
        num_rows: the rows that stand for tokens; what follows them pads the vocabulary, has no probability and gets no
            gradient.
        fp32_logits: logits in fp32 whatever the weight's dtype; otherwise they are rounded to it.
        recompute: keep nothing of the logits for the backward pass.
        group: the tensor-parallel ranks, whose shards make up the vocabulary.
        slice_elements: logits that are computed at a time.
    """

    start: int
    num_rows: int
    fp32_logits: bool
    recompute: bool
    group: dist.ProcessGroup
    slice_elements: int = SLICE_ELEMENTS

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`[n, h] x [rows, h] -> [n, rows]` in fp32."""
        return kernels.matmul_to_fp32(hidden, weight.t()) if self.fp32_logits else (hidden @ weight.t()).float()

    def slices(self, num_tokens: int) -> list[slice]:
        width = self._width(num_tokens)
        return [slice(start, min(start + width, self.num_rows)) for start in range(0, self.num_rows, width)]

    def places(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the labels `[n]` stand in each slice: the index `[slices, n, 1]`, any where they stand elsewhere, and
        whether they stand there `[slices, n]`.
        """
        rows, width = labels - self.start, self._width(len(labels))
        starts = torch.arange(0, self.num_rows, width, device=labels.device)[:, None]
        inside = (rows >= starts) & (rows < starts + width) & (rows < self.num_rows)
        return (rows.clamp(0, max(self.num_rows - 1, 0)) - starts).clamp(0, width - 1)[..., None], inside

    def _width(self, num_tokens: int) -> int:
        return max(128, self.slice_elements // num_tokens // 128 * 128)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, shard: VocabShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses in nats `[n]` (fp32), and whether the label is the likeliest token `[n]` (bool; a tie counts).

    Args:
        hidden: `[n, h]`, the same on every rank of the group; its gradient is this rank's summand.
        weight: `[rows, h]`, the head's.
        labels: `[n]`, tokens. One outside the vocabulary gives a finite loss without a meaning: mask it.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, shard, torch.is_grad_enabled() and not shard.recompute)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, shard: VocabShard, keep: bool):
        slices = shard.slices(len(labels))
        index, inside = shard.places(labels)
        at_index = torch.empty(index.shape, device=hidden.device)
        highest, sums = (torch.empty(len(slices), len(labels), device=hidden.device) for _ in range(2))  # of each slice
        kept = []
        for number, rows in enumerate(slices):
            logits = shard.logits(hidden, weight[rows])
            torch.amax(logits, dim=-1, out=highest[number])
            torch.gather(logits, 1, index[number], out=at_index[number])
            exponentials = logits.sub_(highest[number][:, None]).exp_()
            torch.sum(exponentials, dim=-1, out=sums[number])
            if keep:
                kept.append(exponentials.to(weight.dtype))
        peak = highest.amax(dim=0) if slices else torch.full(labels.shape, -torch.inf, device=hidden.device)
        total = (sums * (highest - peak).exp()).sum(dim=0)
        at_label = at_index[..., 0].where(inside, 0.0).sum(dim=0)
        if shard.group.size() > 1:
            of_all = peak.clone()
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=shard.group)
            summed = torch.stack([total * (peak - of_all).exp(), at_label])
            dist.all_reduce(summed, group=shard.group)
            peak, (total, at_label) = of_all, summed
        losses, hits = total.log() - (at_label - peak), at_label >= peak
        ctx.shard = shard
        ctx.save_for_backward(hidden, weight, labels, losses, peak + total.log(), highest if keep else None, *kept)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx, grad_losses, _):
        shard = ctx.shard
        hidden, weight, labels, losses, log_total, highest, *kept = ctx.saved_tensors
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[shard.num_rows :] = 0
        grad_at_label = (torch.expm1(-losses) * grad_losses).to(weight.dtype)[:, None]
        index, inside = shard.places(labels)
        factors = (highest - log_total).exp()[..., None] * grad_losses[:, None] if kept else None
        for number, rows in enumerate(shard.slices(len(labels))):
            if kept:
                # In place: a second backward pass through the same graph is an error of autograd's.
                grad = kept[number].mul_(factors[number])
            else:
                exponentials = shard.logits(hidden, weight[rows]).sub_(log_total[:, None]).exp_()
                grad = exponentials.mul_(grad_losses[:, None]).to(weight.dtype)
            at_index = grad.gather(1, index[number])
            grad.scatter_(1, index[number], grad_at_label.where(inside[number][:, None], at_index))
            if grad_hidden is not None:
                grad_hidden += grad @ weight[rows]
            if grad_weight is not None:
                torch.mm(grad.t(), hidden, out=grad_weight[rows])
        return grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None
