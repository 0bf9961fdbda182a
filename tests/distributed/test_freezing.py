"""What `--freeze` and `--train-only` leave out stays to the bit in every layout; what is trained learns as in one
process. Frozen parameters cost neither gradients nor optimizer states.
"""

import fnmatch
import math

import pytest
from safetensors.torch import load_file
from test_layouts import EP2, PP2, TP2, VPP2
from worlds import assert_same_training

from hymeg.checkpoint.mapping import hf_entries
from hymeg.hf.config import HyConfig

STEPS = 3
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
DISTRIBUTED = "--use-distributed-optimizer"
OVERLAPS = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
WHAT = {
    "half": "--freeze model.embed_tokens.* model.layers.1.* *.experts.*.down_proj.* *.router.* *.o_proj.* *_layernorm*",
    "experts": "--train-only *.mlp.experts.*",
    "head": "--train-only lm_head.weight",
    "embedding": "--train-only model.embed_tokens.weight",
}
LAYOUTS = {  # name -> world size, flags, what is trained, checkpoint
    "PP2 VPP2, all recomputed": (2, f"{PP2} {VPP2} {FULL}", "half", "mtp"),
    "PP2, the first stage frozen": (2, f"{PP2} {DISTRIBUTED}", "head", "trunk"),
    "TP2 EP2": (4, f"{TP2} {EP2} {OVERLAPS}", "half", "mtp"),
}
MORE = {  # the same, in nightly runs
    "TP2 SP": (2, TP2, "half", "mtp"),
    "EP2": (2, EP2, "half", "mtp"),
    "ETP2": (2, "--expert-tensor-parallel-size 2", "half", "mtp"),
    "DP2": (2, OVERLAPS, "half", "mtp"),
    "PP2, the last stage frozen": (2, PP2, "embedding", "trunk"),
    "TP2 EP2, experts": (4, f"{TP2} {EP2} {OVERLAPS}", "experts", "mtp"),
}
CASES = [pytest.param(*case, id=name) for name, case in LAYOUTS.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.soak) for name, case in MORE.items()]


@pytest.fixture(scope="module")
def partly(command, tmp_path_factory):
    """A training of a part, and the file of what it has made of the weights."""

    def build(flags: str, what: str, checkpoint: str, **others):
        folder = tmp_path_factory.mktemp("partly")
        flags = f"--clip-grad 0.5 --save-hf {folder} {flags} {WHAT[what]}"
        argv = command(flags, checkpoint=checkpoint, **{"steps": STEPS} | others)
        return argv, folder / f"iter_{STEPS:07d}" / "model.safetensors"

    return build


@pytest.fixture(scope="module")
def alone(worlds, partly):
    """In one process."""
    started = {}

    def run(what: str, checkpoint: str) -> dict:
        argv = started.setdefault((what, checkpoint), partly("", what, checkpoint)[0])
        return worlds.run(1, argv)

    return run


def trained_names(config: HyConfig, what: str) -> set[str]:
    """By the patterns alone: none of them means a part of a tensor."""
    option, *patterns = WHAT[what].split()
    names = {entry.hf_name for entry in hf_entries(config, "hub") if not entry.is_fp32_buffer}
    meant = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    return meant if option == "--train-only" else names - meant


@pytest.mark.parametrize(("size", "flags", "what", "checkpoint"), CASES)
def test_frozen_to_the_bit_and_trained_as_in_one_process(worlds, partly, folder, alone, size, flags, what, checkpoint):
    argv, made = partly(flags, what, checkpoint)
    found = worlds.run(size, argv)
    assert_same_training(found["steps"], alone(what, checkpoint)["steps"])
    before, after = load_file(folder / checkpoint / "model.safetensors"), load_file(made)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == trained_names(HyConfig.from_dir(folder / checkpoint), what)


def test_frozen_parameters_have_neither_gradients_nor_optimizer_states(alone, folder):
    """In bytes, of all that the trainer holds; and their number is said."""
    config = HyConfig.from_dir(folder / "mtp")
    sizes = {entry.hf_name: math.prod(entry.hf_shape) for entry in hf_entries(config, "hub")}
    trained = sum(sizes[name] for name in trained_names(config, "half"))
    found = alone("half", "mtp")
    assert found["static"][0]["gradients"] == 4 * trained
    assert found["static"][0]["optimizer"] == 8 * trained
    assert any(note.startswith(f"training {trained:,} of ") for note in found["notes"])


def test_resumed_in_another_layout_goes_on_as_if_nothing_had_happened(worlds, partly, alone, tmp_path):
    """Experts alone: Megatron has an optimizer for all the others, of nothing here."""
    saved = worlds.run(2, partly(f"{TP2} {DISTRIBUTED} --save {tmp_path}/saved", "experts", "trunk", steps=2)[0])
    resumed = worlds.run(2, partly(f"{EP2} {DISTRIBUTED}", "experts", "trunk", load=str(tmp_path / "saved"))[0])
    expected = alone("experts", "trunk")["steps"]
    assert_same_training(saved["steps"] + resumed["steps"], expected)
