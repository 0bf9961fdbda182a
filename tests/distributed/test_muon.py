"""Muon, where emerging-optimizers is installed: CI has none, because no registry has it (docs/training.md)."""

import importlib.util

import pytest
from worlds import assert_same_training

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("emerging_optimizers") is None, reason="emerging-optimizers is not installed"
)


def test_it_trains_on_two_processes_as_on_one(worlds, command):
    """To what its orthogonalization, in 16 bits, leaves of gradients that differ by rounding."""
    found = worlds.run(2, command("--optimizer muon"))["steps"]
    alone = worlds.run(1, command("--optimizer muon"))["steps"]
    assert_same_training(found[:1], alone[:1])
    assert_same_training(found, alone, 5e-3)


def test_it_is_not_adam(worlds, command, one_process):
    found, adam = worlds.run(1, command("--optimizer muon"))["steps"], one_process["trunk"]["steps"]
    assert found[0]["loss"] == adam[0]["loss"] and found[2]["loss"] != adam[2]["loss"]
