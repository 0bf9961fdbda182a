"""The kernels of Transformer Engine's compiled part that our models call, each computed plainly with torch.

Their contracts are those of Transformer Engine 2.20's callers, of its pybind declarations (pytorch/csrc/extensions.h)
and of the headers in common/include. They compute in fp32 whatever comes in, and round once to what goes out.
test_kernels.py holds each to autograd.
"""

from kernels import attention, context_parallel, linear, moe, optimizer
from kernels.registry import KERNELS

__all__ = ["KERNELS", "attention", "context_parallel", "linear", "moe", "optimizer"]
