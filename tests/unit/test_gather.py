"""A checkpoint scattered over nodes' own disks becomes one, complete, or is refused by naming what is missing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.dist_files import TRACKER
from hymeg.checkpoint.gather import gather
from hymeg.checkpoint.sinks import new_folder
from hymeg.checkpoint.verification import verify_folder
from hymeg.checksums import MANIFEST
from hymeg.errors import UserError


@pytest.fixture(scope="module")
def whole(hf_checkpoint, tmp_path_factory):
    """Iteration 40 of a run in four files, and what a run leaves beside them."""
    folder = tmp_path_factory.mktemp("gather") / "run"
    hf_to_dist(hf_checkpoint, folder, workers=4)
    os.rename(folder / "release", folder / "iter_0000040")
    (folder / TRACKER).write_text("40")
    (folder / "iter_0000040" / "common.pt").write_bytes(b"flags")
    (folder / "conversion.json").unlink()
    return folder


@pytest.fixture
def nodes(whole, tmp_path) -> list[Path]:
    """Two: the first has what rank 0 wrote."""
    found = [tmp_path / "node0", tmp_path / "node1"]
    for folder in found:
        (folder / "iter_0000040").mkdir(parents=True)
    for path in (whole / "iter_0000040").iterdir():
        on = found[path.name in ("__2_0.distcp", "__3_0.distcp")]
        shutil.copy(path, on / "iter_0000040")
    shutil.copy(whole / TRACKER, found[0])
    for path in whole.iterdir():
        if path.is_file() and path.name != TRACKER:
            shutil.copy(path, found[0])
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", [False, True], ids=["folders of runs", "folders of iterations"])
def test_what_was_scattered_is_whole_again_file_by_file(whole, nodes, tmp_path, inside):
    (nodes[1] / "iter_0000030").mkdir()
    given = [folder / "iter_0000040" for folder in nodes] if inside else nodes
    made = gather(given[::-1], tmp_path / "out")
    found = files(tmp_path / "out")
    record = json.loads(found.pop("conversion.json"))
    assert record["command"] == "gather" and record["iteration"] == made.iteration == 40
    expected = files(whole)
    kept = {name: data for name, data in expected.items() if Path(name).name != MANIFEST}
    assert {name: found[name] for name in kept} == kept
    assert made.num_files == sum(name.startswith("iter_") for name in kept)
    assert compare_checkpoints(whole, tmp_path / "out") == []
    with pytest.raises(UserError, match="not empty"):
        gather(nodes, tmp_path / "out")
    gather(nodes, tmp_path / "out", overwrite=True)


def refused(nodes, tmp_path, message, **options):
    with pytest.raises(UserError, match=message):
        gather(nodes, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_all_nodes_files_are_held_against_what_rank_0_kept_of_them(whole, nodes, tmp_path, monkeypatch):
    """And again wherever they are read; none of them is read into memory as a whole."""
    sum_of_file = new_folder.sum_of_file
    monkeypatch.setattr(
        new_folder, "sum_of_file", lambda path: pytest.fail("read") if path.suffix == ".distcp" else sum_of_file(path)
    )
    gather(nodes, tmp_path / "out")
    verified = verify_folder(tmp_path / "out")
    assert not verified.damaged and not verified.unverified
    assert verified.num_bytes == sum(
        len(data) for name, data in files(tmp_path / "out").items() if MANIFEST not in name
    )
    said = []
    dist_to_hf(tmp_path / "out", tmp_path / "hf", say=said.append)
    assert not any("without checksums" in line for line in said)
    with open(nodes[1] / "iter_0000040" / "__2_0.distcp", "r+b") as file:
        file.seek(5000)
        file.write(b"no")
    with pytest.raises(UserError, match=r"node1/iter_0000040/__2_0.distcp: damaged: bytes 0 to"):
        gather(nodes, tmp_path / "damaged")


def test_a_missing_node_is_named_by_its_files_and_ranks(nodes, tmp_path):
    message = r"2 of 5 files are in none of the 1 folders: __2_0\.distcp, __3_0\.distcp \(of ranks 2, 3\)"
    refused(nodes[:1], tmp_path, message)
    refused(nodes[1:], tmp_path, r"no folder holds \.metadata and metadata\.json, which rank 0 writes on its node")
    refused([*nodes, tmp_path / "node2"], tmp_path, "node2: no such folder")
    refused(nodes, tmp_path, "no folder holds .*iter_0000050 is missing", iteration=50)


def test_a_truncated_file_is_named(nodes, tmp_path):
    os.truncate(nodes[1] / "iter_0000040" / "__3_0.distcp", 1000)
    refused(nodes, tmp_path, r"__3_0\.distcp: truncated: 1000 bytes, \d+ are needed")


def test_parts_of_two_saves_are_not_mixed(nodes, tmp_path):
    twin = tmp_path / "node2"
    shutil.copytree(nodes[1], twin)
    gather([*nodes, twin], tmp_path / "same")
    path = twin / "iter_0000040" / "__2_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (twin / "iter_0000040" / MANIFEST).unlink(missing_ok=True)
    refused([*nodes, twin], tmp_path, r"__2_0\.distcp and .*__2_0\.distcp differ; they are of two saves")
    shutil.copytree(nodes[0], tmp_path / "node3")
    path = tmp_path / "node3" / "iter_0000040" / ".metadata"
    path.write_bytes(path.read_bytes() + b" ")
    refused([*nodes, tmp_path / "node3"], tmp_path, "are two saves, not parts of one")


def test_files_of_another_save_are_told_and_the_target_lies_elsewhere(nodes, tmp_path):
    (nodes[1] / "iter_0000040" / "__9_0.distcp").write_bytes(b"older")
    said = []
    gather(nodes, tmp_path / "out", say=said.append)
    assert said == ["left out, of another save: __9_0.distcp"]
    assert not (tmp_path / "out" / "iter_0000040" / "__9_0.distcp").exists()
    for target in (nodes[0] / "iter_0000040" / "out", tmp_path):
        with pytest.raises(UserError, match="is, holds or lies in"):
            gather(nodes, target)
