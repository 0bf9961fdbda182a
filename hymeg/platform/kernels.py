"""Arithmetic that CPU and CUDA offer under different names, and in sizes of their own."""

from collections.abc import Sequence

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


def slice_elements() -> int:
    return SLICE_ELEMENTS[platform.name()]


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """`[n, in]`, of which the first counts[0] rows are multiplied by `weights[0]` `[out, in]`, the next counts[1] by
    `weights[1]`, and so on: `[n, out]`. On CUDA one kernel does it where it can: in 16 bits, with both sizes a multiple
    of 8.
    """
    if not platform.is_cpu() and x.dtype == torch.bfloat16 and weights.shape[-1] % 8 == weights.shape[-2] % 8 == 0:
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
        return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends)
    return torch.cat([rows @ weight.t() for rows, weight in zip(x.split(list(counts)), weights.unbind(0), strict=True)])
