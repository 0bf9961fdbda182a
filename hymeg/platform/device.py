"""The device, for the rest of hymeg: nothing else asks for one."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import torch

from hymeg import platform
from hymeg.platform.patches import patched


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """On CPU, calls of torch as torch serves them, without the mode that sees each of them: a good third of the time
    where tensors are small. Of what is asked for on CUDA only `current_device()` is then answered: for passes of the
    local layer spec.
    """
    if not platform.is_cpu():
        yield
        return
    cpu = torch.device("cpu")
    with (
        torch._C.DisableTorchFunction(),
        patched(torch.cuda, "current_device", lambda: cpu, "router.py:98, mappings.py:95"),
    ):
        yield


def watched() -> contextlib.AbstractContextManager:
    """As if not `unwatched`."""
    return torch._C._EnableTorchFunction() if platform.is_cpu() else contextlib.nullcontext()


def unwatched_backward() -> contextlib.AbstractContextManager:
    """While open, backward passes are `unwatched`."""
    if not platform.is_cpu():
        return contextlib.nullcontext()
    from hymeg.platform import torch_cuda

    return patched(torch_cuda, "around_backward", unwatched, "param_and_grad_buffer.py, mappings.py")


def current() -> torch.device:
    """Where this process's tensors live."""
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def count() -> int:
    """How many processes this machine can serve: its GPUs; without any, as many as the launcher started."""
    return torch.cuda.device_count()


def name() -> str:
    """The GPU's name as its driver gives it, or "cpu"."""
    return torch.cuda.get_device_name()


def has_block_scaled_fp8() -> bool:
    """Whether FP8 numbers are multiplied with a scale for every block: from Hopper and CUDA 12.9 on, as Transformer
    Engine asserts (quantization.py:180). True where there is no GPU.
    """
    return platform.is_cpu() or (torch.cuda.get_device_capability() >= (9, 0) and float(torch.version.cuda) >= 12.9)


def move(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device, copied without waiting where its memory is pinned."""
    return tensor.cuda(non_blocking=True)


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    torch.cuda.synchronize()


def missing_build_tool() -> str | None:
    """Of what torch compiles C++ with, what is not on PATH (torch/utils/cpp_extension.py); None on a CPU, where nothing
    is compiled.
    """
    tools = [] if platform.is_cpu() else ["ninja", os.environ.get("CXX", "c++").split()[0]]
    return next((tool for tool in tools if shutil.which(tool) is None), None)


def peak_bytes_by_stage() -> list[int] | None:
    """For each pipeline stage, what the allocator held at most on its fullest rank; None on a CPU. Collective."""
    if platform.is_cpu():
        return None
    from megatron.core import parallel_state

    peaks = torch.zeros(parallel_state.get_pipeline_model_parallel_world_size(), dtype=torch.int64, device=current())
    peaks[parallel_state.get_pipeline_model_parallel_rank()] = torch.cuda.max_memory_allocated()
    torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
    return peaks.tolist()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """While the context is open, models and DDP's buffers take no memory: they are made on the meta device."""
    meta = torch.device("meta")
    with patched(torch.cuda, "current_device", lambda: meta, "param_and_grad_buffer.py:1179: DDP's buffers"), meta:
        yield
