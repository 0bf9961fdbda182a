"""Arithmetic that CPU and CUDA offer under different names, and in sizes of their own."""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from hymeg import platform


def matmul_to_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[m, k] @ [k, n] -> [m, n]` in fp32 from operands of any dtype. On CUDA no operand is copied: its kernels
    accumulate in fp32 anyway.
    """
    if platform.is_cpu() or a.dtype == torch.float32:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""fp32 numbers that are computed, used and dropped at a time: 16 MiB lie in a CPU's cache; a GPU would spend its time
on launches, and takes 256 MiB."""


def grouped_linear(
    x: torch.Tensor, weights: torch.Tensor | Sequence[torch.Tensor], counts: Sequence[int]
) -> torch.Tensor:
    """`[n, in]`, of which the first counts[0] rows are multiplied by `weights[0]` `[out, in]`, the next counts[1] by
    `weights[1]`, and so on: `[n, out]`. On CUDA one kernel does it where it can: in 16 bits, from weights that are one
    tensor, with both sizes a multiple of 8.
    """
    is_one = isinstance(weights, torch.Tensor) and weights.shape[-1] % 8 == weights.shape[-2] % 8 == 0
    if is_one and x.dtype == torch.bfloat16 and not platform.is_cpu():
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
        return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends)
    return _GroupedLinear.apply(x, list(counts), *weights)


class _GroupedLinear(torch.autograd.Function):
    """Each product is written where it belongs: put together afterwards, all would be copied, and their gradients."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, counts: list[int], *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *weights)
        ctx.counts = counts
        out = x.new_empty(len(x), len(weights[0]))
        for rows, weight, to in zip(x.split(counts), weights, out.split(counts), strict=True):
            if len(rows):
                torch.mm(rows, weight.t(), out=to)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        x, *weights = ctx.saved_tensors
        gradients = gradient.split(ctx.counts)
        of_x, of_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            of_x = gradient.new_empty(len(gradient), weights[0].shape[1])
            for rows, weight, to in zip(gradients, weights, of_x.split(ctx.counts), strict=True):
                torch.mm(rows, weight, out=to)
        if x is not None:
            of_weights = [rows.t() @ of for rows, of in zip(gradients, x.split(ctx.counts), strict=True)]
        return of_x, None, *of_weights


def chunks_of_rank(boundaries: Sequence[int], cp_size: int, cp_rank: int) -> Iterator[tuple[int, int, int]]:
    """What a rank has of a sample under context parallelism: of every sequence (they meet at `boundaries`), cut into
    2 x cp_size chunks, chunk cp_rank and its mirror, as Megatron's batches are balanced. Gives where the sequence
    begins, where the chunk begins, where it ends.
    """
    for first, end in itertools.pairwise(boundaries):
        length = (end - first) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            yield first, first + number * length, first + (number + 1) * length
