"""Runs trainings under Transformer Engine's layer spec in gloo worlds, as tests/distributed/forks.py does under the
local one: the same cases, the same results.

Transformer Engine's Python sources are the real ones and must be on PYTHONPATH; its kernels are those of kernels.py.
Flags are read as on a machine with GPUs, so that all defaults are a GPU's, but for what only NCCL and CUDA have.
"""

import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
sys.path[1:1] = [str(HERE.parent / "distributed"), str(HERE.parent / "layer_specs")]

import stand_in  # noqa: E402
from kernels import KERNELS, moe  # noqa: E402

stand_in.install(KERNELS)

import forks  # noqa: E402
import torch  # noqa: E402


def pretend_cuda() -> None:
    """What Transformer Engine asks of the device before it calls a kernel: a Hopper's answers."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="stand-in"
    )
    torch.Tensor.is_cuda = property(lambda self: True)
    # Context parallelism waits between its two streams.
    torch.cuda.Stream.wait_event = lambda self, event: None
    torch.cuda.Event = torch.cuda.Stream


class _TorchWithLongHalf(types.ModuleType):
    """torch, but that `torch.float16` is fp32."""

    float16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)


def allow_fp32_in_fused_attention() -> None:
    """cuDNN's attention takes 16 bits, our kernel any dtype. Layouts are compared in fp32, where nothing is rounded: it
    takes the place of fp16 wherever Transformer Engine's attention asks for a dtype.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel, utils

    from hymeg.training import preflight

    for module in (backends, context_parallel, utils):
        module.torch = _TorchWithLongHalf("torch")
    preflight.check_combinations = lambda args: None  # which would refuse it


def exchange_in_order() -> None:
    """The ring of context parallelism without NCCL: an even rank sends first, an odd one receives first, and both are
    done when the call returns.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    def exchange(rank, send_tensor, send_dst, recv_tensor, recv_src, cp_group, batch_p2p_comm):
        def send():
            torch.distributed.send(send_tensor, send_dst, cp_group)

        def receive():
            torch.distributed.recv(recv_tensor, recv_src, cp_group)

        for step in (send, receive) if rank % 2 == 0 else (receive, send):
            step()
        return []

    context_parallel.flash_attn_p2p_communicate = exchange


def replace_triton() -> None:
    """Triton compiles for GPUs only."""
    from transformer_engine.pytorch.triton import permutation

    for function in moe.TRITON:
        setattr(permutation, function.__name__, function)


def use_its_own_adam() -> None:
    """The CPU platform has put torch's in its place."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam


def share_by_copying() -> None:
    """What is computed a second time takes the place of what was thrown away. Megatron compiles eight lines of C++ for
    that when they are first needed, which takes longer than all that the tests do with them.
    """
    from megatron.core.tensor_parallel import random

    def share_storage(to: torch.Tensor, source: torch.Tensor) -> None:
        to.untyped_storage().resize_(source.untyped_storage().nbytes())
        to.untyped_storage().copy_(source.untyped_storage())

    random._share_storage_ext = types.SimpleNamespace(share_storage=share_storage)


def parse_for_gpus(argv: list[str]):
    from hymeg.platform import for_gpus
    from hymeg.training.arguments import parse

    with for_gpus():
        return parse([*argv, "--distributed-backend", "gloo"])


def prepare(worker: types.ModuleType) -> None:
    pretend_cuda()
    allow_fp32_in_fused_attention()
    exchange_in_order()
    replace_triton()
    use_its_own_adam()
    share_by_copying()
    worker.parse = worker.checks.parse = parse_for_gpus
    worker.static_bytes = lambda *held: {}  # the planner's affair


if __name__ == "__main__":
    forks.main(Path(sys.argv[1]), prepare)
