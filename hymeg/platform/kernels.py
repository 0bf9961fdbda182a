"""Arithmetic that CPU and CUDA offer under different names, and in sizes of their own."""

import torch

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
