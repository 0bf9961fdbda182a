"""Losses that are looked at by Megatron's rerun machine."""

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
