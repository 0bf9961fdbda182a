"""Losses that are looked at by Megatron's rerun machine."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from megatron.core.rerun_state_machine import RerunStateMachine

from hymeg.errors import UserError
from hymeg.training import step


class Machine(RerunStateMachine):
    """Its judgement of what is large, and what it was given to judge."""

    def __init__(self):
        self.large_value_counts, self.max_values, self.judged = {}, defaultdict(float), []

    def validate_result(self, result, rejection_func, message, tolerance, fatal):
        self.judged.append((float(result), bool(rejection_func(result)), message, fatal))


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    args = SimpleNamespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=True)
    monkeypatch.setattr(step, "get_args", lambda: args)
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: found)
    return found


def test_a_loss_that_is_ten_times_the_largest_is_named_and_ends_nothing(machine):
    """A loss is the mean over the trained tokens, however many those are."""
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for _ in range(100):
        step.loss_function(mask, torch.tensor([[2.0, 99.0, 4.0, 99.0]]))
    for size in (29.0, 30.0):
        step.loss_function(torch.ones(1, 2), torch.tensor([[size, size]]))
    message = "loss above 10 times the largest of its first 100"
    assert machine.judged == [(3.0, False, message, False)] * 100 + [
        (29.0, False, message, False),
        (30.0, True, message, False),
    ]


def test_stragglers_are_found_by_the_times_of_batch_and_model(monkeypatch):
    """Megatron's detector divides by what `--log-straggler` has measured."""
    times = []

    class Detector:
        def __call__(self, bdata=False):
            times.append("batch")
            return contextlib.nullcontext()

        def __enter__(self):
            times.append("model")

        def __exit__(self, *error):
            times.append("end")

    keys = ("tokens", "labels", "loss_mask", "position_ids", "packed_seq_params", "padding_mask", "dataset_id")
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(step, "straggler_times", Detector(), raising=False)
    monkeypatch.setattr(step, "get_args", lambda: None)
    monkeypatch.setattr(step, "get_timers", lambda: lambda *args, **kwargs: timer)
    monkeypatch.setattr(step, "get_batch", lambda *args: times.append("read") or dict.fromkeys(keys))
    model = torch.nn.Module()
    model.config, model.vp_stage = SimpleNamespace(pipeline_model_parallel_layout=None), None
    model.forward = lambda *args, **kwargs: times.append("forward")
    step.forward_step(None, model)
    assert times == ["batch", "read", "model", "forward", "end"]


@pytest.mark.parametrize(
    ("losses", "grad_norm", "named"),
    [
        ({"lm loss": torch.tensor(1.0)}, 2.0, None),
        ({}, None, None),
        ({"lm loss": torch.tensor(float("nan"))}, 2.0, "iteration 7: lm loss is nan"),
        ({"mtp_1 loss": torch.tensor(float("inf"))}, None, "iteration 7: mtp_1 loss is inf"),
        ({}, float("inf"), "iteration 7: the gradients' norm is inf"),
    ],
)
def test_what_is_no_number_ends_the_run(losses, grad_norm, named):
    if named is None:
        step.check_finite(7, losses, grad_norm)
    else:
        with pytest.raises(UserError, match=named):
            step.check_finite(7, losses, grad_norm)
