"""What conversion writes, training loads, in every layout; what training saves, conversion exports, to the bit."""

import itertools

import pytest
from worlds import assert_same_training

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.hf.config import HyConfig

TP2, PP2, EP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "expert-model"))
ETP = "--expert-tensor-parallel-size {}"
VPP2 = "--num-virtual-stages-per-pipeline-rank 2"
DISTRIBUTED = "--use-distributed-optimizer"

# name -> layout, checkpoint. "odd" has a vocabulary that two tensor-parallel ranks pad.
LOADED = {
    "TP2 PP2": (f"{TP2} {PP2}", "trunk"),
    "TP2 EP2": (f"{TP2} {EP2}", "odd"),
    "PP2 VPP2 EP2": (f"{PP2} {VPP2} {EP2}", "mtp"),
}
SAVED = {
    "TP2 PP2 saved": (f"{TP2} {PP2}", "trunk"),
    "TP2 PP2 distributed optimizer saved": (f"{TP2} {PP2} {DISTRIBUTED}", "odd"),
    "TP2 EP2 bf16 saved": (f"{TP2} {EP2} {DISTRIBUTED} --bf16", "bf16"),
    "PP2 EP2 saved": (f"{PP2} {EP2}", "mtp"),
    # Experts cut otherwise than the rest: whole in each of TP's ranks, or in two where the rest is whole.
    "TP2 EP2 ETP1 saved": (f"{TP2} {EP2} {ETP.format(1)}", "mtp"),
    "EP2 ETP2 saved": (f"{EP2} {ETP.format(2)} {DISTRIBUTED} --global-batch-size 4", "trunk"),
    # From the second save on every rank's plan is in .metadata.
    "TP2 PP2 saved twice": (f"{TP2} {PP2} --ckpt-assume-constant-structure --save-interval 1", "trunk"),
}
COMBINED = f"{TP2} {PP2} {EP2} {ETP.format(1)}"
# name -> flags, checkpoint, what is loaded. "{node}": nodes without a common disk have a conversion each, maybe by
# other numbers of workers.
UNTRAINED = {
    "TP2 PP2 EP2 untrained": (COMBINED, "mtp", "dist-mtp"),
    "TP2 PP2 EP2 bf16 untrained": (f"{COMBINED} --bf16", "bf16", "dist-bf16"),
    "TP2 PP2 EP2 of two nodes untrained": (COMBINED, "mtp", "dist-mtp-{node}"),
}


@pytest.fixture(scope="module")
def converted(folder):
    """`dist-NAME` beside every Hugging Face folder NAME."""
    write_tiny_checkpoint(
        folder / "odd", HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1025}), dtype="fp32", layout="fused"
    )
    write_tiny_checkpoint(folder / "bf16", dtype="bf16")
    for name in ("trunk", "mtp", "odd", "bf16"):
        hf_to_dist(folder / name, folder / f"dist-{name}")
    for node, workers in enumerate((1, 3)):
        hf_to_dist(folder / "mtp", folder / f"dist-mtp-{node}", workers=workers)
    return folder


@pytest.fixture(scope="module")
def world(worlds, converted, command):
    cases = {}
    for name, (layout, checkpoint) in LOADED.items():
        cases[name] = command(layout, checkpoint=checkpoint, load=str(converted / f"dist-{checkpoint}"), steps=2)
    for name, (layout, checkpoint) in SAVED.items():
        cases[name] = command(
            f"--global-batch-size 2 {layout}",
            f"--lr 0 --save {converted / 'exports' / name.replace(' ', '-')}",
            checkpoint=checkpoint,
            steps=2 if name.endswith("twice") else 1,
        )
    for name, (layout, checkpoint, load) in UNTRAINED.items():
        save = f"--save {converted / 'exports' / name.replace(' ', '-')} --save-interval 2"
        cases[name] = command(layout, save, checkpoint=checkpoint, load=str(converted / load))
    return worlds.cases(4, cases, dict.fromkeys(UNTRAINED, "save_untrained"))


@pytest.fixture(scope="module")
def alone(worlds, converted, command):
    """What one process computes from the same checkpoints; that it is right, tests/unit/test_converted_logits.py
    shows.
    """
    cases = {checkpoint: command(checkpoint=checkpoint, steps=2) for _, checkpoint in LOADED.values()}
    return worlds.cases(1, cases)


@pytest.mark.parametrize("name", LOADED)
def test_every_layout_computes_the_same_from_the_converted_checkpoint(world, alone, name):
    assert_same_training(world[name]["steps"], alone[LOADED[name][1]]["steps"])


@pytest.mark.parametrize(("name", "layout"), zip(SAVED | UNTRAINED, itertools.cycle(["hub", "fused"]), strict=False))
def test_what_training_saved_is_exported_to_the_bit(world, folder, tmp_path, name, layout):
    """Saved after a step at learning rate 0, or, by way of the distributed format, after none."""
    assert world[name] is not None  # it has saved
    original = folder / (SAVED | UNTRAINED)[name][1]
    dist_to_hf(
        folder / "exports" / name.replace(" ", "-"), tmp_path / "hf", base_hf=original, layout=layout, verify=True
    )
    assert compare_checkpoints(original, tmp_path / "hf") == []
    assert compare_checkpoints(original, folder / "exports" / name.replace(" ", "-")) == []
