"""Arithmetic that CPU and CUDA offer under different names."""

import torch

from hymeg import platform


def matmul_to_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[m, k] @ [k, n] -> [m, n]` in fp32 from operands of any dtype. On CUDA no operand is copied: its kernels
    accumulate in fp32 anyway.
    """
    if platform.is_cpu() or a.dtype == torch.float32:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
