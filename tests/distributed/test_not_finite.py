"""NaN and infinity end a run, or begin the search for their cause, as asked; none is trained on, and none is saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

INJECTED = "--error-injection-rate 1 --error-injection-type"


@pytest.fixture(scope="module")
def poisoned(folder):
    """One weight of it is NaN."""
    shutil.copytree(folder / "trunk", folder / "poisoned")
    tensors = load_file(folder / "poisoned" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "poisoned" / "model.safetensors")
    return "poisoned"


@pytest.mark.parametrize("flags", ["", "--rerun-mode disabled", "--clip-grad 0"])
def test_a_first_step_that_is_nan_is_not_saved(worlds, command, folder, poisoned, tmp_path, flags):
    """Megatron's machine looks at nothing in the first step of a start."""
    argv = command(f"--save {tmp_path} --save-interval 1 {flags}", checkpoint=poisoned, steps=2)
    what = "Unexpected result nan" if "disabled" in flags else "iteration 1: .*is nan, and so are the weights now"
    with pytest.raises(AssertionError, match=what):
        worlds.run(1, argv)
    assert not list(tmp_path.glob("iter_*"))


def test_nan_is_trained_on_where_that_is_asked_for(worlds, command, poisoned):
    steps = worlds.run(1, command("--no-check-for-nan-in-loss-and-grad", checkpoint=poisoned, steps=2))["steps"]
    assert [step["loss"] != step["loss"] for step in steps] == [True, True]


@pytest.mark.parametrize(
    ("kind", "code", "saved"), [("transient_error", 17, []), ("correct_result", 16, ["iter_0000001"])]
)
def test_an_injected_error_ends_the_run_before_its_step_counts(worlds, command, tmp_path, kind, code, saved):
    """Wrong once: a new start computes it again. Wrong twice: the state before the step is kept, for another GPU."""
    argv = command(f"--save {tmp_path} {INJECTED} {kind}", steps=4)
    with pytest.raises(AssertionError, match=f"SystemExit: {code}"):
        worlds.run(2, argv)
    assert [path.name for path in tmp_path.glob("iter_*")] == saved
