"""Where the time of a training step goes, by class of work: what each kernel (on CPU, each operator) was launched for.

Names of kernels do not tell a grouped GEMM from another. So the model's modules mark what they do in the forward pass,
and an operator of the backward pass is of the class of the forward operator whose sequence number autograd gave it. The
innermost mark counts.
"""

import collections
import contextlib
import functools
import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hymeg import platform
from hymeg.platform import device

MARK = "class: "
CLASSES = [  # pattern of a module's name -> class; the first that matches
    (r"norm$", "norm"),
    (r"core_attention$", "attention"),
    (r"mlp\.experts$", "grouped GEMM"),
    (r"mlp\.(router|gate)$", "permute and routing"),
    (
        r"shared_experts$|self_attn\.|self_attention\.linear|\.mlp\.(linear_fc|gate_proj|up_proj|down_proj)|eh_proj$",
        "projections and shared expert",
    ),
    (r"output_layer$|lm_head$", "head and loss"),
    (r"\.mlp$", "permute and routing"),
    (r"self_attn$|self_attention$", "attention"),
]
OTHER, GAPS = "other", "gaps"


def class_of(module_name: str) -> str | None:
    return next((label for pattern, label in CLASSES if re.search(pattern, module_name)), None)


def marked(function: Callable, label: str) -> Callable:
    """`function`, whose work is of class `label`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(MARK + label):
            return function(*args, **kwargs)

    return call


def mark(model: torch.nn.Module) -> None:
    """Let every module of a known name mark its forward pass."""
    for name, module in model.named_modules():
        if (label := class_of(name)) is not None:
            module.forward = marked(module.forward, label)
    for module in model.modules():
        if hasattr(module, "compute_language_model_loss"):
            module.compute_language_model_loss = marked(module.compute_language_model_loss, "head and loss")


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one `step` by class, and what of its wall time no kernel filled."""
    on_gpu = not platform.is_cpu()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler, record_function("whole step"):
        step()
        device.synchronize()
    events = list(profiler.events())
    whole = next(event for event in events if event.name == "whole step" and event.cpu_parent is None)
    return by_class(events, whole.time_range.elapsed_us(), on_gpu)


def by_class(events: Iterable, wall_us: float, on_gpu: bool) -> dict[str, float]:
    """`{class: ms}` of profiler events, largest first, `gaps` last."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    of_sequence = _classes_of_sequences(events)
    spent = collections.Counter()
    for event in events:
        own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if own:
            spent[_class_of_event(event, of_sequence)] += own / 1e3
    found = dict(spent.most_common())
    return found | {GAPS: wall_us / 1e3 - sum(found.values())}


def _classes_of_sequences(events: list) -> dict[int, str]:
    """What autograd's sequence numbers stand for: the class of the forward operator that has it, which its backward
    node gets as well.
    """
    found = {}
    for event in events:
        if event.sequence_nr >= 0 and (label := _mark_above(event)) is not None:
            found.setdefault(event.sequence_nr, label)
    return found


def _class_of_event(event, of_sequence: dict[int, str]) -> str:
    label = _mark_above(event)
    while label is None and event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            label = of_sequence.get(event.sequence_nr)
        event = event.cpu_parent
    return label or OTHER


def _mark_above(event) -> str | None:
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        event = event.cpu_parent
    return None


@contextlib.contextmanager
def marking_optimizer(optimizer):
    """While the context is open, what `optimizer.step` does is of class `optimizer`."""
    optimizer.step = marked(optimizer.step, "optimizer")
    try:
        yield
    finally:
        del optimizer.step
