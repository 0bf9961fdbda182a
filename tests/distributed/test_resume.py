"""A run saved under one layout and resumed under another, optimizer state included, goes on as if nothing had
happened.
"""

import pytest
from worlds import assert_same_training

TP2, PP2, CP2, EP2 = (
    f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "context", "expert-model")
)
DISTRIBUTED = "--use-distributed-optimizer"

PAIRS = {  # name -> saved under, resumed under, checkpoint
    "TP2 to PP2": (TP2, PP2, "trunk"),
    "EP1 to EP2": (DISTRIBUTED, f"{EP2} {DISTRIBUTED}", "trunk"),
    "EP2 to TP2": (f"{EP2} {DISTRIBUTED}", f"{TP2} {DISTRIBUTED}", "trunk"),
    "PP2 to CP2": (f"{PP2} {DISTRIBUTED}", f"{CP2} {DISTRIBUTED}", "mtp"),
    "CP2 to PP2 VPP2": (CP2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2", "mtp"),
}


@pytest.fixture(scope="module")
def resumed(worlds, folder, command):
    cases = {}
    for name, (before, after, checkpoint) in PAIRS.items():
        save = str(folder / "saves" / name.replace(" ", "-"))
        cases[f"save {name}"] = command(before, f"--save {save}", checkpoint=checkpoint, steps=2)
        cases[name] = command(after, checkpoint=checkpoint, load=save, steps=4)
    return worlds.cases(2, cases)


@pytest.mark.parametrize("name", PAIRS)
def test_next_losses_equal_the_uninterrupted_run(resumed, one_process, name):
    expected = one_process[PAIRS[name][2]]["steps"]
    assert_same_training(resumed[f"save {name}"]["steps"], expected[:2])
    assert_same_training(resumed[name]["steps"], expected[2:])


def test_a_damaged_checkpoint_is_named_and_fallen_back_from_when_asked(worlds, folder, command, one_process):
    """The run then goes on from the one before it as if that were the newest."""
    save = folder / "saves" / "damaged"
    worlds.run(2, command(f"{DISTRIBUTED} --save {save} --save-interval 1", steps=3))
    damaged = sorted((save / "iter_0000003").glob("*.distcp"))[0]
    with open(damaged, "r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(AssertionError, match=rf"iter_0000003/{damaged.name}: damaged.* is 2: give --ckpt-step 2 or"):
        worlds.run(2, command(DISTRIBUTED, load=str(save), steps=4))
    found = worlds.run(2, command(f"{DISTRIBUTED} --fall-back-to-older-checkpoint", load=str(save), steps=4))
    assert_same_training(found["steps"], one_process["trunk"]["steps"][2:4])
