"""Nothing that was written is read as something else: checksums as standard tools take them, and single bits that
flip."""

import contextlib
import errno
import functools
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import psutil
import pytest
import torch

from hymeg import checksums
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.verification import verify_folder
from hymeg.checksums import (
    MANIFEST,
    Damaged,
    ReadFile,
    Summer,
    SummingStream,
    open_verified,
    sum_of,
    write_manifest,
)
from hymeg.errors import UserError

CONVERT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def flip(path: Path, position: int, bit: int = 4) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def lines_of_sfv(folder: Path) -> dict[str, int]:
    """As cksfv reads them."""
    lines = [line for line in (folder / MANIFEST).read_text().splitlines() if not line.startswith(";")]
    return {name: int(crc, 16) for name, crc in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture
def small_blocks(monkeypatch):
    """So that tiny files have many."""
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 4096)


@pytest.fixture
def dist(dist_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(dist_checkpoint, tmp_path / "dist"))


# ---- sums


def test_sums_of_pieces_in_any_order_are_those_of_the_file(small_blocks):
    chance = random.Random(1)
    data = chance.randbytes(50_000)
    cuts = sorted(chance.sample(range(1, len(data)), 40))
    summer, pieces = Summer(), list(zip([0, *cuts], [*cuts, len(data)], strict=True))
    chance.shuffle(pieces)
    for start, stop in pieces:
        assert summer.add(start, data[start:stop]) == zlib.crc32(data[start:stop])
    found = summer.result()
    assert (found.size, found.crc) == (len(data), zlib.crc32(data))
    blocks = [zlib.crc32(data[start : start + 4096]) for start in range(0, len(data), 4096)]
    assert [found.block(number) for number in range(len(blocks))] == blocks
    with pytest.raises(ValueError, match="a piece at"):
        checksums.joined(summer.pieces[1:])


def test_much_at_once_is_summed_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_MUCH", 1000)
    chance, threads = random.Random(0), set()
    add = Summer.add
    monkeypatch.setattr(Summer, "add", lambda *args: (threads.add(threading.get_ident()), add(*args))[1])
    summer, path = Summer(), tmp_path / "file"
    with open(path, "wb") as file:
        stream = SummingStream(file, summer)
        written = [stream.write(memoryview(chance.randbytes(size))) for size in (7, 1000, 999, 3_000_000, 5)]
    assert written == [7, 1000, 999, 3_000_000, 5] and len(threads) > 1
    assert summer.result() == sum_of(path.read_bytes())
    with open("/dev/full", "wb") as file, pytest.raises(OSError, match="No space left"):
        SummingStream(file, Summer()).write(bytes(3_000_000))


def test_an_empty_file_has_a_sum(tmp_path):
    (tmp_path / "a").touch()
    write_manifest(tmp_path / MANIFEST, {"a": sum_of(b"")})
    assert checksums.read_manifest(tmp_path / MANIFEST)["a"] == (0, 0, b"")
    assert not verify_folder(tmp_path).damaged


# ---- reading


def test_a_name_may_hold_what_looks_like_the_end_of_a_line(tmp_path):
    files = {"a\u2028b": checksums.sum_of(b"1"), "c\u0085": checksums.sum_of(b"2")}
    checksums.write_manifest(tmp_path / MANIFEST, files)
    assert checksums.read_manifest(tmp_path / MANIFEST) == files


def test_whatever_is_read_of_a_damaged_block_is_refused(small_blocks, tmp_path):
    data, chance = random.Random(2).randbytes(30_000), random.Random(3)
    path = tmp_path / "file"
    for damaged_at in (0, 4095, 4096, 20_000, 29_999):
        path.write_bytes(data)
        flip(path, damaged_at)
        with contextlib.closing(ReadFile(path, sum_of(data))) as reader:
            for _ in range(60):
                start, length = chance.randrange(31_000), chance.randrange(1, 12_000)
                buffer = memoryview(bytearray(length))
                touched = start // 4096 <= damaged_at // 4096 <= (min(start + length, 30_000) - 1) // 4096
                if touched and start < 30_000:
                    with pytest.raises(Damaged, match=rf"bytes {damaged_at // 4096 * 4096} to"):
                        reader.read_into(start, buffer)
                else:
                    assert buffer[: reader.read_into(start, buffer)] == data[start : start + length]


def test_a_file_of_another_length_is_refused(tmp_path):
    write_manifest(tmp_path / MANIFEST, {"a": sum_of(b"abc")})
    for found in (b"ab", b"abcd"):
        (tmp_path / "a").write_bytes(found)
        with pytest.raises(Damaged, match=rf"{len(found)} bytes, 3 were written"):
            open_verified(tmp_path / "a")


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(dist):
    path = dist / "release" / MANIFEST
    intact = path.read_bytes()
    for position in random.Random(4).sample(range(len(intact)), 8):
        flip(path, position)
        assert verify_folder(dist).damaged
        with pytest.raises(UserError, match=r"checksums\.sfv|damaged"):
            dist_to_hf(dist, dist.with_name("out"))
        path.write_bytes(intact)


# ---- conversions


def test_conversions_write_what_standard_tools_check(small_blocks, hf_checkpoint, tmp_path):
    hf_to_dist(hf_checkpoint, tmp_path / "dist", workers=3)
    dist_to_hf(tmp_path / "dist", tmp_path / "hf", max_shard_bytes=200_000, workers=3)
    for folder in (tmp_path / "dist", tmp_path / "dist" / "release", tmp_path / "hf"):
        sums = lines_of_sfv(folder)
        assert set(sums) == {path.name for path in folder.iterdir() if path.is_file()} - {MANIFEST}
        for name, crc in sums.items():
            assert zlib.crc32((folder / name).read_bytes()) == crc, name
        for name, found in checksums.read_manifest(folder / MANIFEST).items():
            data = (folder / name).read_bytes()
            assert [found.block(n) for n in range(len(found.blocks) // 4)] == [
                zlib.crc32(data[start : start + 4096]) for start in range(0, len(data), 4096)
            ]


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "model.safetensors.index.json"])
def test_a_damaged_hugging_face_folder_is_not_converted(dist_checkpoint, tmp_path, name):
    dist_to_hf(dist_checkpoint, tmp_path / "hf", max_shard_bytes=300_000)
    for position in (3, 700, -5):
        size = (tmp_path / "hf" / name).stat().st_size
        flip(tmp_path / "hf" / name, position % size)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            hf_to_dist(tmp_path / "hf", tmp_path / "out")
        with pytest.raises(UserError, match=f"{name}: damaged"):
            compare_checkpoints(tmp_path / "hf", dist_checkpoint)
        flip(tmp_path / "hf" / name, position % size)
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_damaged_distributed_checkpoint_is_not_converted(dist, tmp_path, name):
    flip(dist / "release" / name, (dist / "release" / name).stat().st_size // 2)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        dist_to_hf(dist, tmp_path / "out")
    assert os.listdir(tmp_path) == ["dist"]


def test_what_has_no_checksums_is_converted_and_said_to_be_unverified(hf_checkpoint, dist, tmp_path):
    said: list[str] = []
    hf_to_dist(hf_checkpoint, tmp_path / "out", say=said.append)
    assert [line for line in said if "not verified" in line] == [
        f"{hf_checkpoint}: written without checksums, what is read of it is not verified"
    ]
    said.clear()
    dist_to_hf(dist, tmp_path / "hf", say=said.append)
    assert not any("verified" in line for line in said)
    (dist / "config.json").write_text((dist / "config.json").read_text() + "\n")
    hf_to_dist(tmp_path / "hf", tmp_path / "again")
    dist_to_hf(dist, tmp_path / "edited", say=said.append)
    assert f"{dist / 'config.json'}: was changed after it was written, or is damaged" in said


# ---- whole folders


def test_inspect_names_damaged_files_and_their_tensors(dist, tmp_path):
    dist_to_hf(dist, tmp_path / "hf")
    flip(dist / "release" / "__0_0.distcp", 100_000)
    (dist / "tokenizer.json").unlink()
    flip(tmp_path / "hf" / "tokenizer_config.json", 7)
    words = [sys.executable, str(CONVERT), "inspect", "--verify"]
    found = subprocess.run([*words, str(dist)], capture_output=True, text=True)
    assert found.returncode == 1
    first, second, last = found.stdout.splitlines()
    assert "__0_0.distcp: bytes 0 to" in first and first.endswith("there lie: embedding.word_embeddings.weight")
    assert second == f"{dist / 'tokenizer.json'}: missing" and "verified: 2 damaged" in last
    assert [finding.path.name for finding in verify_folder(tmp_path / "hf").damaged] == ["tokenizer_config.json"]


def test_a_folder_without_checksums_does_not_pass_for_verified(hf_checkpoint, tmp_path):
    for folder, told in ((tmp_path, "no checksums in it"), (hf_checkpoint, "4 files, but no checksums in it")):
        words = [sys.executable, str(CONVERT), "inspect", "--verify", str(folder)]
        found = subprocess.run(words, capture_output=True, text=True)
        assert found.returncode == 2 and f"{folder}: {told}: nothing to verify" in found.stderr


def test_tensors_of_older_checkpoints_are_verified_by_their_zips(dist):
    for manifest in dist.rglob(MANIFEST):
        manifest.unlink()
    assert not verify_folder(dist).damaged
    flip(dist / "release" / "__0_0.distcp", 100_000)
    [finding] = verify_folder(dist).damaged
    assert finding.tensors == ("embedding.word_embeddings.weight",)


def test_files_of_the_hub_are_verified_by_the_hashes_it_gave(hf_checkpoint, tmp_path):
    import hashlib

    blobs, snapshot, local = tmp_path / "blobs", tmp_path / "snapshots" / "1", tmp_path / "local"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    of_local = local / ".cache" / "huggingface" / "download"  # what `hf download --local-dir` leaves
    of_local.mkdir(parents=True)
    for path in hf_checkpoint.iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
        (local / path.name).write_bytes(data)
        (of_local / f"{path.name}.metadata").write_text(f"{'c' * 40}\n{name}\n1764400000.0\n")
    for folder in (snapshot, local):
        assert str(verify_folder(folder)).endswith("verified: none damaged")
        for name in ("model-00001-of-00004.safetensors", "config.json"):
            flip((folder / name).resolve(), 50)
        assert [finding.path.name for finding in verify_folder(folder).damaged] == [
            "config.json",
            "model-00001-of-00004.safetensors",
        ]


# ---- Megatron's own


@pytest.fixture
def saved(tmp_path) -> Path:
    from megatron.core import dist_checkpointing
    from single_process import ensure_world

    ensure_world()
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    dist_checkpointing.save(_state(torch.arange(600_000.0)), str(folder))
    return folder


def _state(tensor: torch.Tensor) -> dict:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {"weight": ShardedTensor.from_rank_offsets("decoder.weight", tensor), "said": "yes"}


def test_megatrons_files_have_checksums_and_the_same_bytes(saved):
    sums = lines_of_sfv(saved)
    assert set(sums) == {path.name for path in saved.iterdir()} - {MANIFEST}
    for name, crc in sums.items():
        assert zlib.crc32((saved / name).read_bytes()) == crc
    metadata = (saved / ".metadata").read_bytes()
    assert b"hymeg" not in metadata and "WriteResult" not in str(pickle.loads(metadata))


def test_small_files_beside_the_data_are_in_the_manifest_and_an_earlier_life_s_data_are_not(tmp_path):
    from megatron.core import dist_checkpointing
    from single_process import ensure_world

    ensure_world()
    for name in ("rates.pt", "__7_0.distcp", ".half.1.tmp"):
        (tmp_path / name).write_text(name)
    dist_checkpointing.save(_state(torch.zeros(10)), str(tmp_path))
    sums = lines_of_sfv(tmp_path)
    assert sums["rates.pt"] == zlib.crc32(b"rates.pt")
    assert set(sums) == set(os.listdir(tmp_path)) - {MANIFEST, "__7_0.distcp", ".half.1.tmp"}


def test_megatron_loads_what_was_written_and_nothing_else(saved):
    from megatron.core import dist_checkpointing

    from hymeg.platform.saving import user_errors

    def load() -> torch.Tensor:
        with user_errors():
            return dist_checkpointing.load(_state(torch.zeros(600_000)), str(saved))["weight"]

    assert torch.equal(load(), torch.arange(600_000.0))
    for name, position in (("__0_0.distcp", 2_000_000), ("__0_0.distcp", 1000)):
        flip(saved / name, position)
        with pytest.raises(Damaged, match=f"{name}: damaged"):
            load()
        flip(saved / name, position)
    (saved / MANIFEST).unlink()
    assert torch.equal(load(), torch.arange(600_000.0))


def test_what_a_rank_could_not_write_is_a_users_error_on_all_and_nothing_else_is():
    from torch.distributed.checkpoint.api import CheckpointException

    from hymeg.platform.saving import user_errors

    def told(error: BaseException) -> str:
        with pytest.raises(UserError) as caught, user_errors():
            raise error
        return str(caught.value)

    unwritable = OSError("__1_0.distcp cannot be written: No space left on device")
    assert told(CheckpointException("save", {1: (unwritable, None)})).startswith(
        "a checkpoint cannot be written: No space left on device; "
    )
    assert "rank 0 says why" in told(CheckpointException("save", {}))
    assert told(CheckpointException("save", {1: (UserError("its own words"), None)})) == "its own words"
    assert told(UserError("as it is")) == "as it is"
    assert "/full/file" in told(OSError(errno.ENOSPC, "No space left on device", "/full/file"))
    for error in (CheckpointException("save", {1: (ValueError("a bug"), None)}), OSError(errno.EIO, "I/O error")):
        with pytest.raises(type(error)), user_errors():
            raise error


def test_a_file_that_could_not_be_written_is_told_by_name(tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from single_process import ensure_world

    from hymeg.platform.saving import user_errors

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    ensure_world()
    monkeypatch.setattr(filesystem_async, "_write_item", full)
    with (
        pytest.raises(UserError, match=r"a checkpoint cannot be written: __0_0\.distcp: No space left on device; "),
        user_errors(),
    ):
        dist_checkpointing.save(_state(torch.zeros(10)), str(tmp_path))


def test_a_save_over_a_checkpoint_takes_its_marks_away_first(saved, monkeypatch):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def killed(*args, **kwargs):
        assert not (saved / "metadata.json").exists() and not (saved / MANIFEST).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(filesystem_async, "_write_item", killed)
    with pytest.raises(KeyboardInterrupt):
        dist_checkpointing.save(_state(torch.zeros(600_000)), str(saved))


def test_a_save_starts_no_process(saved, monkeypatch):
    """Megatron's would hold a queue, and import all that the rank has."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    before = psutil.Process().children()
    dist_checkpointing.save(_state(torch.ones(600_000)), str(saved))
    assert psutil.Process().children() == before


def test_megatrons_background_process_can_be_given_the_summing_writer():
    from hymeg.platform.saving import SummingWriter, save_with_sums

    save = functools.partial(save_with_sums, SummingWriter.write_preloaded_data_multithread)
    assert pickle.loads(pickle.dumps(save)).args == save.args
