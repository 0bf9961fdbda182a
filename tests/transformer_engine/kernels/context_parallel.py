"""Packed sequences under context parallelism.

A rank has of every sequence two chunks of one length, its halves; of `cu_seqlens` the rank's own tokens are meant.
Tensors are `[t, h, d]`, or keys and values together `[2, t, h, d]`.
"""

import itertools

import torch
from torch import Tensor

from kernels.registry import kernel


def _half(cu_seqlens: Tensor, half: int) -> Tensor:
    """Places of the tokens in the first (0) or second (1) half of each sequence."""
    places = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        middle = start + (end - start) // 2
        places.append(torch.arange(start, middle) if half == 0 else torch.arange(middle, end))
    return torch.cat(places)


@kernel
def thd_get_partitioned_indices(cu_seqlens, total_tokens, world_size, rank):
    """Which tokens of packed sequences context-parallel rank `rank` has: of each sequence's 2 x world_size chunks its
    own from the front and from the back.
    """
    chunks = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        chunk = (end - start) // (2 * world_size)
        chunks += [start + number * chunk + torch.arange(chunk) for number in (rank, 2 * world_size - 1 - rank)]
    return torch.cat(chunks).to(torch.int32)


@kernel
def thd_read_half_tensor(tensor, cu_seqlens, half):
    return tensor.index_select(tensor.dim() - 3, _half(cu_seqlens, half))


@kernel
def thd_read_second_half_lse(lse, cu_seqlens, packed, length):
    assert packed, "statistics are packed where cuDNN is newer than 9.6"
    return lse[:, _half(cu_seqlens, 1)]


@kernel
def thd_second_half_lse_correction(lse, of_step, cu_seqlens, packed):
    """In place: the log-sum-exp `[h, t]` takes up the keys of one more step, which only the second halves saw."""
    assert packed
    second = _half(cu_seqlens, 1)
    lse[:, second] = torch.logaddexp(lse[:, second].float(), of_step.float()).to(lse.dtype)


@kernel
def thd_out_correction(out, of_step, old_lse, lse, lse_of_step, cu_seqlens, only_second_half, packed):
    """In place: the output so far and what one more step found, each weighted by its share of the softmax so far."""
    assert packed
    places = _half(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    before, step = (
        (one - lse[:, places]).exp().t()[..., None] for one in (old_lse[:, places], lse_of_step[:, : len(places)])
    )
    out[places] = (out[places].float() * before + of_step[: len(places)].float() * step).to(out.dtype)


@kernel
def thd_grad_correction(grad, of_step, cu_seqlens, first_half, second_half):
    """In place: add, copy, zero or leave (none) each half of every sequence. Where one half is left, `of_step` has only
    the other's tokens.
    """
    along = grad.dim() - 3
    whole = "none" not in (first_half, second_half)
    for half, what in enumerate((first_half, second_half)):
        places = _half(cu_seqlens, half)
        if what == "none":
            continue
        index = (slice(None),) * along + (places,)
        source = of_step[index] if whole else of_step[(slice(None),) * along + (slice(len(places)),)]
        if what == "zero":
            grad[index] = 0
        else:
            grad[index] = source.to(grad.dtype) if what == "copy" else grad[index] + source.to(grad.dtype)
