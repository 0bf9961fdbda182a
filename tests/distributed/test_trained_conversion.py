"""What conversion writes, training loads: as if it had read the Hugging Face folder; what training saves, conversion exports, to the bit."""

import pytest
from worlds import assert_same_training, launch

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.hf.config import HyConfig
from hymeg.hf.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint

TP2, PP2, EP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "expert-model"))
VPP2 = "--num-virtual-stages-per-pipeline-rank 2"
DISTRIBUTED = "--use-distributed-optimizer"

# name -> layout, checkpoint. "odd" has a vocabulary that two tensor-parallel ranks pad.
LOADED = {"TP2 PP2": (f"{TP2} {PP2}", "trunk"), "TP2 EP2": (f"{TP2} {EP2}", "odd"), "PP2 VPP2 EP2": (f"{PP2} {VPP2} {EP2}", "mtp")}
SAVED = {
    "TP2 PP2 saved": (f"{TP2} {PP2}", "trunk"),
    "TP2 PP2 distributed optimizer saved": (f"{TP2} {PP2} {DISTRIBUTED}", "odd"),
    "TP2 EP2 bf16 saved": (f"{TP2} {EP2} {DISTRIBUTED} --bf16", "bf16"),
    "PP2 EP2 saved": (f"{PP2} {EP2}", "mtp"),
}


@pytest.fixture(scope="module")
def converted(folder):
    """`dist-NAME` beside every Hugging Face folder NAME."""
    write_tiny_checkpoint(folder / "odd", HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1025}), dtype="fp32", layout="fused")
    write_tiny_checkpoint(folder / "bf16", dtype="bf16")
    for name in ("trunk", "mtp", "odd"):
        hf_to_dist(folder / name, folder / f"dist-{name}")
    return folder


@pytest.fixture(scope="module")
def world(converted, command):
    cases = {}
    for name, (layout, checkpoint) in LOADED.items():
        cases[f"{name} from HF"] = command(layout, checkpoint=checkpoint, steps=2)
        cases[name] = command(layout, checkpoint=checkpoint, load=str(converted / f"dist-{checkpoint}"), steps=2)
    for name, (layout, checkpoint) in SAVED.items():
        cases[name] = command(layout, f"--lr 0 --save {converted / 'exports' / name.replace(' ', '-')}", checkpoint=checkpoint, steps=1)
    return launch(4, cases, converted / "convert-4")


def test_one_process_computes_the_same_from_the_converted_checkpoint(converted, command, one_process):
    case = {"mtp": command(checkpoint="mtp", load=str(converted / "dist-mtp"), steps=6)}
    found = launch(1, case, converted / "convert-1")["mtp"]["steps"]
    assert_same_training(found, one_process["mtp"]["steps"], tolerance=0)


@pytest.mark.parametrize("name", LOADED)
def test_every_layout_computes_the_same_from_the_converted_checkpoint(world, name):
    assert_same_training(world[name]["steps"], world[f"{name} from HF"]["steps"], tolerance=1e-6)


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("name", SAVED)
def test_what_training_saved_is_exported_to_the_bit(world, folder, tmp_path, name, layout):
    original = folder / SAVED[name][1]
    dist_to_hf(folder / "exports" / name.replace(" ", "-"), tmp_path / "hf", base_hf=original, layout=layout, verify=True)
    assert compare_checkpoints(original, tmp_path / "hf") == []
    assert compare_checkpoints(original, folder / "exports" / name.replace(" ", "-")) == []
