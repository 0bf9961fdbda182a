"""Which checkpoint of a run's folder is gone on from, where some are damaged."""

import argparse
import json

import pytest

from hymeg.checkpoint.dist_files import FORMAT
from hymeg.checksums import MANIFEST, sum_of, write_manifest
from hymeg.errors import UserError
from hymeg.training.checkpoints import newest_undamaged
from hymeg.training.weights import fall_back

FILES = ("__0_0.distcp", "__1_0.distcp", "metadata.json")


@pytest.fixture
def folder(tmp_path):
    """Three iterations of three files each, with checksums."""
    contents = {name: name.encode() * 10 for name in FILES} | {"metadata.json": json.dumps(FORMAT).encode()}
    for step in (1, 2, 3):
        (tmp_path / f"iter_{step:07d}").mkdir()
        for name, data in contents.items():
            (tmp_path / f"iter_{step:07d}" / name).write_bytes(data)
        write_manifest(
            tmp_path / f"iter_{step:07d}" / MANIFEST, {name: sum_of(data) for name, data in contents.items()}
        )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    return tmp_path


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def fallen_back(folder, step: int | None = None) -> tuple[int | None, list[str]]:
    said, args = [], argparse.Namespace(load=str(folder), ckpt_step=step)
    fall_back(args, said.append)
    return args.ckpt_step, said


@pytest.mark.parametrize("name", FILES)
def test_a_flip_in_any_file_is_found(folder, name):
    flip(folder / "iter_0000003" / name)
    assert newest_undamaged(str(folder), [1, 2, 3]) == (2, [f"{folder}/iter_0000003/{name}: damaged"])


def test_a_file_that_is_gone_is_said(folder):
    (folder / "iter_0000003" / FILES[0]).unlink()
    assert newest_undamaged(str(folder), [1, 2, 3]) == (2, [f"{folder}/iter_0000003/{FILES[0]}: missing"])


def test_where_nothing_is_wrong_nobody_falls_back(folder):
    assert fallen_back(folder) == (None, [])
    assert fallen_back(folder, 2) == (2, [])


def test_the_newest_that_is_older_is_taken_and_said(folder):
    flip(folder / "iter_0000003" / FILES[1])
    assert fallen_back(folder) == (2, [f"{folder}/iter_0000003/{FILES[1]}: damaged: falling back to iteration 2"])
    flip(folder / "iter_0000002" / FILES[1])
    assert fallen_back(folder, 2)[0] == 1
    flip(folder / "iter_0000001" / FILES[1])
    with pytest.raises(UserError, match="no undamaged checkpoint in --load"):
        fallen_back(folder)


def test_a_tracker_that_names_an_incomplete_one_is_said(folder):
    (folder / "iter_0000003" / "metadata.json").unlink()
    step, [said] = fallen_back(folder)
    assert step == 2 and "names '3', which is not complete: falling back to iteration 2" in said
