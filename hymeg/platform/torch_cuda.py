"""The torch.cuda calls that Megatron makes, answered by the CPU. Importing this module replaces the names.

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

from hymeg.platform.patches import patch, replaces

_CPU = torch.device("cpu")


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


_MODE = OnCpu()
_MODE.__enter__()
around_backward: Callable[[], contextlib.AbstractContextManager] = lambda: _MODE  # noqa: E731
"""What a backward pass runs in. Torch leaves a mode while it serves a call, and a whole backward pass is one: so it is
entered again.
"""


@replaces(torch.autograd, "_engine_run_backward", "mappings.py:185 and others make tensors in backward()")
def _run_backward(run_backward, *args, **kwargs):
    with around_backward():
        return run_backward(*args, **kwargs)


@replaces(torch, "compile", "jit.py:16 compiles the fusions as they are imported")
def _compile(compile, model=None, **kwargs):
    """A fusion costs a compiler run and wins nothing on a CPU; the compiler alone is a sixth of all imports."""
    return (lambda function: function) if model is None else model


class Stream:
    """A stream, or an event on it, on a machine that has none: all work is already done. There is but one: on another
    than the current, memory would be recorded (token_dispatcher.py:919).
    """

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


def _resident_memory(*args) -> int:
    return psutil.Process().memory_info().rss


def _memory_stats(device=None) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    of_bytes = {"all": {"current": _resident_memory(), "peak": peak}}
    return {"allocated_bytes": of_bytes, "reserved_bytes": of_bytes, "allocation": {"all": {"current": 0}}}


_STREAMS = "overlap of communication: param_and_grad_buffer.py:632, token_dispatcher.py:469, dist_utils.py:303"
_RANDOM = "tensor_parallel/random.py:118, 174, 305; checkpointing.py:417: the device's generator is torch's default one"
_PROPERTIES = types.SimpleNamespace(name="cpu", major=8, minor=0, gcnArchName="cpu")
_PROPERTIES.total_memory, _PROPERTIES.multi_processor_count = psutil.virtual_memory().total, os.cpu_count()
_STREAM = Stream()

# Each a function of its own: torch._dynamo has rules by object.
for _owner, _name, _new, _reason in (
    (torch.cuda, "current_device", lambda: 0, "nearly every module: the device a tensor is made on"),
    (torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "initialize.py:270 wants some"),
    (torch.cuda, "set_device", lambda device: None, "initialize.py:282"),
    (torch.cuda, "synchronize", lambda device=None: None, "timers.py:152"),
    (torch.cuda, "get_device_properties", lambda *args: _PROPERTIES, "common_utils.py:504; get_device_name"),
    (torch.cuda, "is_current_stream_capturing", lambda: False, "router_trace.py:268"),
    (torch.cuda, "Stream", Stream, _STREAMS),
    (torch.cuda, "current_stream", lambda *args: _STREAM, _STREAMS),
    (torch.cuda, "stream", lambda stream: contextlib.nullcontext(), _STREAMS),
    (torch.cuda, "device_memory_used", _resident_memory, "common_utils.py:327"),
    (torch.cuda.memory, "memory_stats_as_nested_dict", _memory_stats, "common_utils.py:322, training.py:2742"),
    (torch.cuda, "_lazy_call", lambda callback, **kwargs: callback(), _RANDOM),
    (torch.cuda.random, "_lazy_call", lambda callback, **kwargs: callback(), _RANDOM),
    (torch.cuda.random, "_lazy_init", lambda: None, _RANDOM),
    (torch.cuda.random, "current_device", lambda: 0, _RANDOM),
    (torch.cuda, "default_generators", collections.defaultdict(lambda: torch.default_generator), _RANDOM),
):
    patch(_owner, _name, _new, _reason)

for _name in ("add_param_group", "state_dict", "load_state_dict"):
    _original = getattr(torch.optim.Optimizer, _name).__wrapped__
    patch(torch.optim.Optimizer, _name, _original, "torch's own imports the compiler, to be left alone by it")
