"""`--save-hf` writes, from the model in training and in any layout, what `dist-to-hf` writes of a save at the same
step.
"""

import json

import pytest
from safetensors.torch import load_file

from hymeg.checkpoint.convert import dist_to_hf

TP2, PP2, EP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "expert-model"))
OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

CASES = {  # name -> world size, flags, checkpoint
    "DP2 overlaps bf16": (2, f"{OVERLAPS} --bf16", "mtp"),
    "TP2 PP2 EP2 ETP1": (4, f"{TP2} {PP2} {EP2} --expert-tensor-parallel-size 1", "mtp"),
}


@pytest.fixture(scope="module", params=CASES)
def saved(request, worlds, folder, command):
    """The folder of a run that has trained three steps and written both kinds of checkpoint after steps 2 and 3."""
    size, flags, checkpoint = CASES[request.param]
    out = folder / "save-hf" / request.param.replace(" ", "-")
    both = f"--save {out}/dist --save-interval 2 --save-hf {out}/hf --save-hf-interval 2"
    said = worlds.run(size, command(flags, both, checkpoint=checkpoint, steps=3))["said"]
    assert sum(line.startswith(f"wrote {out}/hf/iter_") for line in said) == 2 and "no step was made" not in str(said)
    return out


@pytest.mark.parametrize("iteration", [2, 3])
def test_every_file_is_that_of_the_save_at_the_same_step(saved, folder, tmp_path, iteration):
    dist_to_hf(saved / "dist", tmp_path / "hf", iteration=iteration, base_hf=folder / "mtp")
    live = saved / "hf" / f"iter_{iteration:07d}"
    names = [{path.name for path in folder.iterdir()} for folder in (live, tmp_path / "hf")]
    assert names[0] == names[1] >= {"model.safetensors", "config.json", "tokenizer.json"}
    own = {"conversion.json", "checksums.sfv"}  # where each comes from, and its checksum
    for name in names[0] - own:
        assert (live / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    assert json.loads((live / "conversion.json").read_bytes())["iteration"] == iteration


def test_steps_differ_and_only_those_asked_for_are_written(saved):
    folders = sorted(path.name for path in (saved / "hf").iterdir())
    assert folders == ["iter_0000002", "iter_0000003"]
    second, third = (load_file(saved / "hf" / name / "model.safetensors") for name in folders)
    assert not second["model.norm.weight"].equal(third["model.norm.weight"])
