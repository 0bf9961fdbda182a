"""The torch.cuda calls that Megatron makes, answered by the CPU.

Streams and events do nothing (the CPU runs in order), memory is the process's resident memory, the device's random
generator is torch's default one, and a tensor asked for on "cuda" is made on the CPU. Line numbers are megatron-core
0.19.2's.
"""

import collections
import contextlib
import functools
import os
import resource
import time
import types

import psutil
import torch

from hymeg.platform.patches import patch

_CPU = torch.device("cpu")
_FACTORIES = [
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "randint",
    "arange",
    "linspace",
    "as_tensor",
    "eye",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_strided",
    "tril_indices",
    "triu_indices",
    "scalar_tensor",
    "randperm",
]
_TENSOR_FACTORIES = ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]


def install() -> None:
    # torch.device("meta") as a context finds the factories by identity: it must have listed them before they are
    # wrapped.
    from torch.utils._device import _device_constructors

    _device_constructors()
    _install_factories()
    _install_tensor_methods()
    _install_device()
    _install_streams()
    _install_memory()
    _install_random()


def _on_cpu(device):
    """The device to use where Megatron asks for `device`: CUDA names and indices become the CPU, the rest (None, cpu,
    meta) stays.
    """
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _install_factories() -> None:
    def wrap(factory):
        @functools.wraps(factory)
        def on_cpu(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return on_cpu

    reason = 'device="cuda" or torch.cuda.current_device(), pin_memory=True (training.py:1131, param_and_grad_buffer.py:1177, layers.py:302, ...)'
    for name in _FACTORIES:
        patch(torch, name, wrap(getattr(torch, name)), reason)
    for name in _TENSOR_FACTORIES:
        patch(torch.Tensor, name, wrap(getattr(torch.Tensor, name)), reason)


def _install_tensor_methods() -> None:
    patch(
        torch.Tensor,
        "cuda",
        lambda self, *args, **kwargs: self,
        "batches are moved by .cuda(); distrib_optimizer.py:1374",
    )
    patch(
        torch.nn.Module, "cuda", lambda self, *args, **kwargs: self, "training/models/dist_utils.py:174 moves the model"
    )
    patch(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self, "optimizer offload, data loader")
    patch(torch.Tensor, "record_stream", lambda self, stream: None, "overlapped all-to-all")

    tensor_to, module_to, tensor_type = torch.Tensor.to, torch.nn.Module.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        if args:
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def module_to_cpu(self, *args, **kwargs):
        if args:
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return module_to(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        found = tensor_type(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) and self.device.type == "cpu" else found

    patch(torch.Tensor, "to", to, "router.py:98, rotary_pos_embedding.py:162, filesystem_async.py:243")
    patch(torch.nn.Module, "to", module_to_cpu, "dist_utils.py moves stages")
    patch(
        torch.Tensor,
        "type",
        type_,
        "compared with 'torch.cuda.FloatTensor': clip_grads.py:174, distrib_optimizer.py:401, optimizer.py:1009",
    )


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
        ("ipc_collect", lambda: None, "optimizer set-up"),
        ("device", lambda *args: contextlib.nullcontext(), "context manager around device work"),
        ("get_device_capability", lambda *args: (8, 0), "arguments.py: compute capability"),
        ("get_device_name", lambda *args: "cpu", "logs"),
        ("get_device_properties", lambda *args: properties, "common_utils.py:504, get_device_arch_version"),
        ("can_device_access_peer", lambda *args: False, "symmetric memory probing"),
        ("is_current_stream_capturing", lambda: False, "CUDA graph checks"),
        ("_lazy_init", lambda: None, "tensor_parallel/random.py"),
        ("_lazy_call", lambda callback, **kwargs: callback(), "tensor_parallel/random.py:174"),
        ("is_initialized", lambda: True, "rng and checkpoint code"),
    ):
        patch(cuda, name, new, reason)
    for name in ("range_push", "range_pop", "mark"):
        patch(torch.cuda.nvtx, name, lambda *args, **kwargs: None, "nvtx ranges")


class Stream:
    """A stream on a machine that has none: all work is already done."""

    cuda_stream = 0
    stream_id = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        pass

    def query(self):
        return True

    def __eq__(self, other):
        return isinstance(other, Stream)

    def __hash__(self):
        return 0


class Event:
    """An event that is complete when recorded, and tells the time between two of its kind in milliseconds."""

    def __init__(self, *args, **kwargs):
        self._seconds = 0.0

    def record(self, *args, **kwargs):
        self._seconds = time.perf_counter()

    def wait(self, *args, **kwargs):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, end: "Event") -> float:
        return (end._seconds - self._seconds) * 1e3


def _install_streams() -> None:
    only = Stream()
    for name, new in (
        ("Stream", Stream),
        ("Event", Event),
        ("current_stream", lambda *args: only),
        ("default_stream", lambda *args: only),
        ("set_stream", lambda stream: None),
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

    def free_and_total(*args):
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    for name, new in (
        ("memory_allocated", resident),
        ("memory_reserved", resident),
        ("max_memory_allocated", peak),
        ("max_memory_reserved", peak),
        ("device_memory_used", resident),
        ("memory_stats", stats),
        ("mem_get_info", free_and_total),
        ("reset_peak_memory_stats", lambda *args: None),
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
    for owner in (torch.cuda, torch.cuda.random):
        for name, new in (
            ("get_rng_state", get_rng_state),
            ("set_rng_state", set_rng_state),
            ("manual_seed", manual_seed),
            ("manual_seed_all", manual_seed),
        ):
            patch(owner, name, new, reason)
    patch(torch.cuda, "default_generators", _OneGenerator(), reason)
