"""Conversion of what is wrong, onto what is full, killed half way: a clear message each time, and nothing left
behind.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.dist_files import TRACKER
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.sinks import new_folder, transfer
from hymeg.checkpoint.sources import open_dist
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import read_header

TOOLS = Path(__file__).parents[2] / "tools"


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change) -> None:
    """Change a safetensors header; the tensors' bytes stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def drop_tensors(folder: Path, pattern: str) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(path).items() if not re.fullmatch(pattern, name)}, path)
    edit_json(folder / "model.safetensors.index.json", lambda index: remove_keys(index["weight_map"], pattern))


def remove_keys(mapping: dict, pattern: str) -> None:
    for name in [name for name in mapping if re.fullmatch(pattern, name)]:
        del mapping[name]


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def overwrite_bytes(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def rename_tensor(folder: Path, old: str, new: str) -> None:
    def change(header):
        if old in header:
            header[new] = header.pop(old)

    for path in folder.glob("*.safetensors"):
        edit_header(path, change)
    edit_json(folder / "model.safetensors.index.json", lambda index: change(index["weight_map"]))


def reshape_tensor(header: dict) -> None:
    header["model.embed_tokens.weight"]["shape"].reverse()


def quantise(header: dict) -> None:
    fields = header["model.embed_tokens.weight"]
    fields["dtype"], fields["shape"] = "F8_E4M3", [fields["shape"][0], 2 * fields["shape"][1]]


def set_config(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


EXPERT_3 = r"model\.layers\.2\.mlp\.experts\.3\..*"
WRONG_HF = {
    "missing shard": (lambda folder: first_shard(folder).unlink(), r"1 of 4 files .* are missing"),
    "wrong shape": (
        lambda folder: edit_header(first_shard(folder), reshape_tensor),
        r"1 misshapen \(model\.embed_tokens\.weight is \[64, 1024\]",
    ),
    "experts missing in the middle": (
        lambda folder: drop_tensors(folder, EXPERT_3),
        r"3 missing \(model\.layers\.2\.mlp\.experts\.3\.gate",
    ),
    "many missing": (lambda folder: drop_tensors(folder, r"model\.layers\.1\..*"), r"37 missing .*, and 27 more"),
    "unexpected": (
        lambda folder: rename_tensor(folder, "model.norm.weight", "model.norm.bias"),
        r"1 missing .*1 unexpected \(model\.norm\.bias\)",
    ),
    "config of another model": (set_config(num_hidden_layers=3), "not those of config.json: .*missing.*unexpected"),
    "config against the tensors": (set_config(intermediate_size=256), r"3 misshapen \(model\.layers\.0\.mlp"),
    "config without MTP": (set_config(num_nextn_predict_layers=0), "All belong to MTP layers"),
    "quantised": (lambda folder: edit_header(first_shard(folder), quantise), "in F8_E4M3 without a scale"),
    "mixed layouts": (
        lambda folder: rename_tensor(folder, "model.layers.1.mlp.router.gate.weight", "model.layers.1.mlp.gate.weight"),
        "mix two layouts",
    ),
}


@pytest.mark.parametrize("case", WRONG_HF)
def test_a_wrong_hugging_face_folder_is_refused(hf_checkpoint, tmp_path, case):
    spoil, message = WRONG_HF[case]
    shutil.copytree(hf_checkpoint, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as raised:
        hf_to_dist(tmp_path / "hf", tmp_path / "dist")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500
    assert os.listdir(tmp_path) == ["hf"]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def edit_metadata(folder: Path, change) -> None:
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def drop_chunk(metadata) -> None:
    chunks = metadata.state_dict_metadata["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].chunks
    del chunks[5]


def first_place(metadata):
    return next(place for index, place in metadata.storage_data.items() if index.offset is not None)


def remove_tensor(metadata) -> None:
    del metadata.state_dict_metadata["decoder.layers.2.mlp.router.weight"]


WRONG_DIST = {
    "hostile": (
        lambda folder: (folder / "release" / ".metadata").write_bytes(pickle.dumps(Hostile())),
        r"names 'posix\.system', which has no place",
    ),
    "hostile inside": (
        lambda folder: edit_metadata(folder, lambda m: setattr(m, "planner_data", Hostile())),
        r"names 'posix\.system'",
    ),
    "not a pickle": (
        lambda folder: (folder / "release" / ".metadata").write_bytes(b"\0" * 100),
        "not a checkpoint's metadata",
    ),
    "truncated metadata": (lambda folder: truncate(folder / "release" / ".metadata"), "not a checkpoint's metadata"),
    "no metadata": (lambda folder: (folder / "release" / ".metadata").unlink(), "cannot be read"),
    "another pickle": (
        lambda folder: (folder / "release" / ".metadata").write_bytes(pickle.dumps({})),
        "it holds 'dict'",
    ),
    "tracker missing": (
        lambda folder: (folder / TRACKER).unlink(),
        "not a distributed checkpoint: no latest_checkpointed_iteration",
    ),
    "tracker wrong": (lambda folder: (folder / TRACKER).write_text("../x"), "an iteration or 'release' is needed"),
    "iteration missing": (
        lambda folder: (folder / TRACKER).write_text("12"),
        r"iter_0000012 is missing .*complete in it: release",
    ),
    "not saved to the end": (
        lambda folder: (folder / "release" / "metadata.json").unlink(),
        "release is missing or was not saved to the end",
    ),
    "file missing": (lambda folder: (folder / "release" / "__1_0.distcp").unlink(), "file __1_0.distcp is missing"),
    "file truncated": (lambda folder: truncate(folder / "release" / "__1_0.distcp"), "truncated"),
    "file overwritten": (
        lambda folder: overwrite_bytes(folder / "release" / "__1_0.distcp", 0, bytes(400)),
        "not a stored BF16 tensor of shape",
    ),
    "chunk missing": (lambda folder: edit_metadata(folder, drop_chunk), "chunks do not fill"),
    "tensor missing": (
        lambda folder: edit_metadata(folder, remove_tensor),
        r"1 missing \(decoder\.layers\.2\.mlp\.router\.weight\)",
    ),
    "file outside": (
        lambda folder: edit_metadata(folder, lambda m: setattr(first_place(m), "relative_path", "../../x")),
        "a file in this folder is needed",
    ),
    "beyond the file": (
        lambda folder: edit_metadata(folder, lambda m: setattr(first_place(m), "offset", 10**12)),
        "truncated",
    ),
    "negative": (lambda folder: edit_metadata(folder, lambda m: setattr(first_place(m), "offset", -5)), "lies at -5"),
    "another config": (set_config(num_experts=16), "misshapen"),
}


@pytest.mark.parametrize("case", WRONG_DIST)
def test_a_wrong_distributed_checkpoint_is_refused(hf_checkpoint, dist_checkpoint, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    spoil, message = WRONG_DIST[case]
    shutil.copytree(dist_checkpoint, tmp_path / "dist")
    spoil(tmp_path / "dist")
    (tmp_path / "dist" / "release" / "checksums.sfv").unlink()  # else the sums alone refuse the damaged
    with pytest.raises(UserError, match=message) as raised:
        dist_to_hf(tmp_path / "dist", tmp_path / "out")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500
    assert os.listdir(tmp_path) == ["dist"]


def test_damaged_metadata_never_end_in_a_traceback(dist_checkpoint, tmp_path):
    """That nothing in them is run, the hostile ones above show."""
    shutil.copytree(dist_checkpoint, tmp_path / "dist")
    path = tmp_path / "dist" / "release" / ".metadata"
    data, choose, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(choose.randint(1, 5)):
            damaged[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(damaged)
        try:
            open_dist(tmp_path / "dist")
        except UserError:
            refused += 1
    assert refused > 75


# ---- the target


def test_a_target_in_use_is_not_overwritten_by_accident(hf_checkpoint, dist_checkpoint, tmp_path):
    (tmp_path / "dist").mkdir()
    hf_to_dist(hf_checkpoint, tmp_path / "dist")  # an empty folder will do
    with pytest.raises(UserError, match=r"not empty .*--overwrite"):
        hf_to_dist(hf_checkpoint, tmp_path / "dist")
    (tmp_path / "dist" / "iter_0000100").mkdir()
    with pytest.raises(UserError, match="would lose iter_0000100"):
        hf_to_dist(hf_checkpoint, tmp_path / "dist", overwrite=True)
    os.rmdir(tmp_path / "dist" / "iter_0000100")
    write_tiny_checkpoint(tmp_path / "new", seed=9)
    hf_to_dist(tmp_path / "new", tmp_path / "dist", overwrite=True)
    assert compare_checkpoints(tmp_path / "new", tmp_path / "dist") == []
    with pytest.raises(UserError, match="is, holds or lies in"):
        dist_to_hf(tmp_path / "dist", tmp_path / "dist", overwrite=True)
    with pytest.raises(UserError, match="is, holds or lies in"):
        dist_to_hf(tmp_path / "dist", tmp_path / "dist" / "release" / "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        dist_to_hf(dist_checkpoint, tmp_path / "file")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("")
    with pytest.raises(UserError, match="is in the way"):
        dist_to_hf(dist_checkpoint, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB that can be made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True).returncode
        != 0
    ):
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_or_read_only_disk_is_said_and_nothing_is_left(hf_checkpoint, dist_checkpoint, small_disk, monkeypatch):
    (small_disk / "filler").write_bytes(bytes(31 << 20))
    for convert, given in ((hf_to_dist, hf_checkpoint), (dist_to_hf, dist_checkpoint)):
        with pytest.raises(UserError, match=r"GB are needed and .* are free on that disk"):
            convert(given, small_disk / "target")
        monkeypatch.setattr(new_folder, "check_target", lambda *_: None)  # the disk fills up while it works
        (small_disk / "more").write_bytes(bytes((small_disk / "filler").stat().st_size and (1 << 20) - 300_000))
        with pytest.raises(UserError, match="No space left on device"):
            convert(given, small_disk / "target")
        (small_disk / "more").unlink()
        monkeypatch.undo()
        assert os.listdir(small_disk) == ["filler"]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="is not writable"):
        hf_to_dist(hf_checkpoint, small_disk / "target")


def test_killed_at_any_moment_nothing_is_accepted_and_the_next_run_starts_anew(tmp_path):
    config = HyConfig.from_dict(
        TINY_CONFIG | {"vocab_size": 100_000, "hidden_size": 256, "num_experts": 64, "num_hidden_layers": 6}
    )
    write_tiny_checkpoint(tmp_path / "hf", config)
    hf_to_dist(tmp_path / "hf", tmp_path / "whole")
    choose, killed = random.Random(3), 0
    for direction, given, option, name in (
        ("hf-to-dist", "hf", "--dist", "dist"),
        ("dist-to-hf", "whole", "--hf", "out"),
    ):
        other = {"--dist": "--hf", "--hf": "--dist"}[option]
        command = [
            sys.executable,
            TOOLS / "convert_checkpoint.py",
            direction,
            other,
            tmp_path / given,
            option,
            tmp_path / name,
        ]
        for _ in range(10):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            partial = tmp_path / f"{name}.partial"
            while process.poll() is None and not partial.exists():
                time.sleep(0.002)
            time.sleep(choose.random() * 0.2)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if (tmp_path / name).exists():  # it was done before
                shutil.rmtree(tmp_path / name)
                continue
            killed += 1
            assert (
                not _accepted(partial) or compare_checkpoints(tmp_path / "hf", partial) == []
            )  # killed when only the rename was left
        convert = hf_to_dist if direction == "hf-to-dist" else dist_to_hf
        convert(tmp_path / given, tmp_path / name, verify=True)
        assert compare_checkpoints(tmp_path / "hf", tmp_path / name) == []
    assert killed >= 5
    assert sorted(os.listdir(tmp_path)) == ["dist", "hf", "out", "whole"]


def test_a_shard_is_none_until_all_its_tensors_are_written(dist_checkpoint, tmp_path, monkeypatch):
    seen = []

    def run(*args):
        outcome = real_run(*args)
        folder = tmp_path / "out.partial"
        for path in folder.glob("*.safetensors"):
            with pytest.raises(UserError):
                read_header(path)
            with pytest.raises(SafetensorError):
                load_file(path)
            seen.append(path)
        return outcome

    real_run = transfer.run
    monkeypatch.setattr(transfer, "run", run)  # the tensors are written, the headers not yet
    dist_to_hf(dist_checkpoint, tmp_path / "out", max_shard_bytes=200_000)
    assert len(seen) > 2 and compare_checkpoints(dist_checkpoint, tmp_path / "out") == []


def _accepted(folder: Path) -> bool:
    """Whether the converter takes what a killed conversion left."""
    try:
        describe(folder)
    except UserError:
        return False
    return True


def test_killed_while_it_removes_what_another_left_the_next_run_starts_anew_all_the_same(
    hf_checkpoint, tmp_path, monkeypatch
):
    partial = tmp_path / "dist.partial"
    (partial / "release").mkdir(parents=True)
    (partial / "release" / "__0_0.distcp").write_bytes(bytes(10))
    (partial / "config.json").write_text("{}")
    (partial / ".unfinished").touch()
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        removals = iter([lambda path: shutil.os.unlink(path)])
        killed.setattr(new_folder.Path, "unlink", lambda path, **_: next(removals, _killed)(path))
        new_folder._remove(partial)
    assert partial.is_dir()
    said = []
    hf_to_dist(hf_checkpoint, tmp_path / "dist", say=said.append)
    assert os.listdir(tmp_path) == ["dist"]
    assert f"{partial}: removed, an earlier conversion did not finish; starting anew" in said


def test_what_a_killed_replacement_left_aside_is_named_and_kept(hf_checkpoint, tmp_path):
    """Killed between the two renames of --overwrite."""
    old, said = tmp_path / "dist[1].old-x7", []
    old.mkdir()
    (tmp_path / "dist2.old-x").mkdir()
    hf_to_dist(hf_checkpoint, tmp_path / "dist[1]", say=said.append)
    assert [line for line in said if ".old-" in line] == [
        f"{old}: kept, it was dist[1] until a conversion that replaced it was killed; remove it yourself"
    ]
    assert sorted(os.listdir(tmp_path)) == ["dist2.old-x", "dist[1]", old.name]


def _killed(_: Path) -> None:
    raise KeyboardInterrupt


def test_the_second_of_two_conversions_to_one_folder_is_refused(hf_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(new_folder, "_SECONDS_TO_WAIT", 0.2)
    with (
        new_folder.new_folder(tmp_path / "dist", 0, False, {}, print),
        pytest.raises(UserError, match="another conversion is writing there"),
    ):
        hf_to_dist(hf_checkpoint, tmp_path / "dist")
