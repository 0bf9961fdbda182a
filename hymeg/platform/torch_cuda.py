"""The torch.cuda calls that Megatron makes, answered by the CPU.

Streams do nothing (the CPU runs in order), memory is the process's resident memory, the device's random
generator is torch's default one, and a tensor asked for on "cuda" is made on the CPU; nothing is compiled. Line numbers
are megatron-core 0.19.2's.
"""

import collections
import contextlib
import os
import resource
import types
from collections.abc import Callable

import psutil
import torch
from torch.overrides import TorchFunctionMode

from hymeg.platform.patches import patch

_CPU = torch.device("cpu")


def install() -> None:
    _install_mode()
    _install_device()
    _install_streams()
    _install_memory()
    _install_random()
    _leave_functions_as_they_are()


def _on_cpu(device):
    """The device to use where Megatron asks for `device`: CUDA names and indices become the CPU, the rest (None, cpu,
    meta, a dtype) stays.
    """
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    if isinstance(device, str | torch.device) and str(device).startswith("cuda"):
        return _CPU
    return device


class OnCpu(TorchFunctionMode):
    """Sees every call of torch in its thread: tensors asked for on CUDA, or pinned (training.py:1131,
    param_and_grad_buffer.py:1177, layers.py:302, ...), are made on the CPU, and what would move them leaves them there.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.to:
            args = (*args[:1], *map(_on_cpu, args[1:2]), *args[2:])
        found = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(found, str) and args[0].device == _CPU:
            # compared with "torch.cuda.FloatTensor": clip_grads.py:174, distrib_optimizer.py:401, optimizer.py:1009
            return found.replace("torch.", "torch.cuda.")
        return found


around_backward: Callable[[], contextlib.AbstractContextManager] | None = None
"""What a backward pass runs in; None: in the mode."""


def _install_mode() -> None:
    """Torch leaves a mode while it serves a call, and a whole backward pass is one: it is entered again for that."""
    mode, run_backward = OnCpu(), torch.autograd._engine_run_backward
    mode.__enter__()

    def run_in_mode(*args, **kwargs):
        with mode if around_backward is None else around_backward():
            return run_backward(*args, **kwargs)

    patch(torch.autograd, "_engine_run_backward", run_in_mode, "mappings.py:185 and others make tensors in backward()")


def _install_device() -> None:
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name="cpu",
        major=8,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count(),
        gcnArchName="cpu",
    )
    for name, new, reason in (
        ("current_device", lambda: 0, "nearly every module: the device a tensor is made on"),
        (
            "device_count",
            lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "initialize.py:270: 0 would skip the model-parallel set-up",
        ),
        ("set_device", lambda device: None, "initialize.py:282"),
        ("synchronize", lambda *args: None, "timers.py:152"),
        ("empty_cache", lambda: None, "training.py:3060, checkpointing.py:2727"),
        ("get_device_name", lambda *args: "cpu", "logs"),
        ("get_device_properties", lambda *args: properties, "common_utils.py:504, get_device_arch_version"),
        ("is_current_stream_capturing", lambda: False, "router_trace.py:268"),
        ("_lazy_call", lambda callback, **kwargs: callback(), "tensor_parallel/random.py:174"),
    ):
        patch(cuda, name, new, reason)


class Stream:
    """A stream, or an event on it, on a machine that has none: all work is already done."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def record_event(self, event=None):
        return event or self

    def synchronize(self):
        pass

    def __eq__(self, other):
        return isinstance(other, Stream)

    def __hash__(self):
        return 0


def _install_streams() -> None:
    only = Stream()
    for name, new in (
        ("Stream", Stream),
        ("current_stream", lambda *args: only),
        ("stream", lambda stream: contextlib.nullcontext()),
    ):
        patch(
            torch.cuda,
            name,
            new,
            "overlap of communication: param_and_grad_buffer.py:632, token_dispatcher.py:469, dist_utils.py:303",
        )


def _install_memory() -> None:
    def resident(*args, **kwargs) -> int:
        return psutil.Process().memory_info().rss

    def peak(*args, **kwargs) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def stats(*args):
        return collections.defaultdict(
            int, {"allocated_bytes.all.current": resident(), "allocated_bytes.all.peak": peak()}
        )

    for name, new in (
        ("memory_allocated", resident),
        ("memory_reserved", resident),
        ("max_memory_allocated", peak),
        ("max_memory_reserved", peak),
        ("device_memory_used", resident),
        ("memory_stats", stats),
    ):
        patch(
            torch.cuda,
            name,
            new,
            "memory report: common_utils.py:322, training.py:2742. Resident memory of the process stands in",
        )


class _OneGenerator:
    """torch.cuda.default_generators: the same generator under every index."""

    def __getitem__(self, index):
        return torch.default_generator


def _install_random() -> None:
    def get_rng_state(*args, **kwargs):
        return torch.default_generator.get_state()

    def set_rng_state(state, *args, **kwargs):
        torch.default_generator.set_state(state)

    def manual_seed(seed):
        torch.default_generator.manual_seed(seed)

    reason = "tensor_parallel/random.py:118, 305; checkpointing.py:417: the device's generator is torch's default one"
    for owner, name, new in (
        (torch.cuda, "get_rng_state", get_rng_state),
        (torch.cuda.random, "get_rng_state", get_rng_state),
        (torch.cuda, "set_rng_state", set_rng_state),
        (torch.cuda, "manual_seed", manual_seed),
        (torch.cuda, "default_generators", _OneGenerator()),
    ):
        patch(owner, name, new, reason)


def _leave_functions_as_they_are() -> None:
    """A fusion costs a compiler run and wins nothing on a CPU; the compiler alone is a sixth of all imports."""

    def compiled(model=None, **kwargs):
        return (lambda function: function) if model is None else model

    patch(torch, "compile", compiled, "jit.py:16 compiles the fusions as they are imported")
    for name in ("add_param_group", "state_dict", "load_state_dict"):
        original = getattr(torch.optim.Optimizer, name).__wrapped__
        patch(torch.optim.Optimizer, name, original, "torch's own imports the compiler, to be left alone by it")
