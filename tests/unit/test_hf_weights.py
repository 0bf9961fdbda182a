"""A Hugging Face folder given to --load is converted once, used again while it stays the same, and never half."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.training import hf_weights
from hymeg.training.hf_weights import converted


@pytest.fixture
def hf(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    write_tiny_checkpoint(tmp_path / "hf", max_shard_bytes=400_000)
    return tmp_path / "hf"


@pytest.fixture
def said():
    return []


def change_a_weight(hf: Path, seed: int) -> None:
    shutil.rmtree(hf)
    write_tiny_checkpoint(hf, max_shard_bytes=400_000, seed=seed)


def test_it_is_converted_once_and_used_again(hf, tmp_path, said):
    first = converted(hf, tmp_path / "save", 0, 0, said.append)
    assert first.parent == tmp_path / "save" / "hf_weights"
    assert compare_checkpoints(hf, first) == []
    written = (first / "release" / "metadata.json").stat().st_mtime_ns
    again = converted(hf, tmp_path / "save", 0, 0, said.append)
    assert again == first and (first / "release" / "metadata.json").stat().st_mtime_ns == written
    assert [line for line in said if "converting it, once" in line] == said[:1] and "was converted before" in said[-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda hf: change_a_weight(hf, 5),
        lambda hf: os.utime(hf / "model-00001-of-00003.safetensors", (1, 1)),
        lambda hf: (hf / "config.json").write_text((hf / "config.json").read_text() + "\n"),
    ],
    ids=["weights", "time", "config"],
)
def test_a_source_that_changed_is_converted_anew(hf, tmp_path, said, change):
    target = converted(hf, tmp_path / "save", 0, 0, said.append)
    change(hf)
    assert converted(hf, tmp_path / "save", 0, 0, said.append) == target
    assert sum("converting it, once" in line for line in said) == 2
    assert compare_checkpoints(hf, target) == []


def test_another_folder_of_the_same_name_has_a_conversion_of_its_own(hf, tmp_path, said):
    write_tiny_checkpoint(tmp_path / "other" / "hf", seed=7)
    targets = [converted(folder, tmp_path / "save", 0, 0, said.append) for folder in (hf, tmp_path / "other" / "hf")]
    assert targets[0] != targets[1] and targets[0].name[:3] == targets[1].name[:3] == "hf-"
    assert compare_checkpoints(tmp_path / "other" / "hf", targets[1]) == []


@pytest.mark.parametrize("lost", ["source.json", "latest_checkpointed_iteration.txt"])
def test_what_is_not_complete_is_made_anew(hf, tmp_path, said, lost):
    target = converted(hf, tmp_path / "save", 0, 0, said.append)
    (target / lost).unlink()
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir()
    (partial / ".unfinished").touch()
    assert converted(hf, tmp_path / "save", 0, 0, said.append) == target
    assert compare_checkpoints(hf, target) == [] and not partial.exists()
    assert any("did not finish; starting anew" in line for line in said)


def test_a_failure_names_the_folder_and_where_else_it_could_go(hf, tmp_path, said):
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "hf_weights").write_text("in the way")
    with pytest.raises(
        UserError, match=r"hf must be converted, which goes to --save, else to --data-cache-path, .*hf_weights"
    ):
        converted(hf, tmp_path / "save", 0, 0, said.append)
    shutil.rmtree(hf)
    with pytest.raises(UserError, match="hf: cannot be read"):
        converted(hf, tmp_path / "save", 0, 0, said.append)


def test_a_node_that_sees_rank_0s_result_uses_it_though_its_copy_of_the_source_is_another(hf, tmp_path, said):
    target = converted(hf, tmp_path / "save", 0, 0, said.append)
    os.utime(hf / "model-00001-of-00003.safetensors", (1, 1))
    assert converted(hf, tmp_path / "save", 8, 0, said.append) == target


def test_a_node_that_does_not_see_it_converts_to_a_folder_of_its_own(hf, tmp_path, said):
    first = converted(hf, tmp_path / "node0", 0, 0, said.append)
    second = converted(hf, tmp_path / "node1", 8, 0, said.append)
    assert second == tmp_path / "node1" / "hf_weights" / f"{first.name}-{socket.gethostname()}"
    assert compare_checkpoints(first, second) == []
    assert converted(hf, tmp_path / "node1", 9, 1, said.append) == second
    # An outdated one that rank 0 would replace, were it here, is not taken.
    change_a_weight(hf, 3)
    (hf / "config.json").write_text((hf / "config.json").read_text() + "\n")
    assert compare_checkpoints(hf, converted(hf, tmp_path / "node1", 8, 0, said.append)) == []


def test_who_waits_says_so_and_how_far_rank_0_is(hf, tmp_path, said, monkeypatch):
    monkeypatch.setattr(hf_weights, "_SECONDS_BETWEEN_LINES", 0.05)
    release = tmp_path / "target.partial" / "release"
    with hf_weights._waiting(hf, tmp_path / "target", said.append):
        wait_for(lambda: said)
        release.mkdir(parents=True)
        (release / "__0_0.distcp").write_bytes(
            bytes(sum(path.stat().st_size for path in hf.glob("*.safetensors")) // 4)
        )
        wait_for(lambda: said[-1].endswith(", 25% is there"))
    number = len(said)
    assert "waits for rank 0 to convert" in said[0] and "there" not in said[0]
    time.sleep(0.2)
    assert len(said) == number


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
