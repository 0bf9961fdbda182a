"""What a conversion must not lose, delete, believe or do without: at its edges, in this process."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hymeg.checkpoint import companions, conversion, workers
from hymeg.checkpoint.companions import carried_files, carry
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist, hf_to_hf
from hymeg.checkpoint.dist_files import TRACKER
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.mapping import VOCABULARY_KEYS
from hymeg.checkpoint.sinks import new_folder, transfer
from hymeg.checkpoint.sinks.hf_folder import with_dtype
from hymeg.checkpoint.sources import open_any, open_dist, open_hf
from hymeg.checkpoint.stored_tensor import stored_object
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.checksums import MANIFEST
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import TensorSpec

CONVERT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_metadata(folder: Path, change) -> None:
    path = next(folder.glob("*/.metadata"))
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def hf(hf_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(hf_checkpoint, tmp_path / "hf"))


@pytest.fixture
def dist(dist_checkpoint, tmp_path) -> Path:
    """To spoil: without checksums, which would find it."""
    return Path(shutil.copytree(dist_checkpoint, tmp_path / "dist", ignore=shutil.ignore_patterns(MANIFEST)))


class _Said(list):
    """What is said of a conversion, but for what is said of sources without checksums, or edited since."""

    def append(self, line: str) -> None:
        if "is not verified" not in line and "was changed after it was written" not in line:
            super().append(line)


@pytest.fixture
def said() -> list[str]:
    return _Said()


@pytest.fixture
def trunk(tmp_path, hf_checkpoint) -> Path:
    """A distributed checkpoint without the MTP layer that its config.json counts."""
    write_tiny_checkpoint(tmp_path / "hf-trunk", seed=5)
    hf_to_dist(tmp_path / "hf-trunk", tmp_path / "trunk")
    shutil.copy(hf_checkpoint / "config.json", tmp_path / "trunk")
    return tmp_path / "trunk"


# ---- the target


def test_a_folder_beside_the_target_is_left_alone(dist_checkpoint, tmp_path):
    for overwrite in (False, True):
        (tmp_path / "out.replaced").mkdir(exist_ok=True)
        (tmp_path / "out.replaced" / "thesis").touch()
        dist_to_hf(dist_checkpoint, tmp_path / "out", overwrite=overwrite)
        assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]
        assert (tmp_path / "out.replaced" / "thesis").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_the_target_meanwhile_is_left_alone(dist_checkpoint, tmp_path, monkeypatch, overwrite):
    def write_late(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        return transfer.write(*args)

    monkeypatch.setattr(conversion, "write", write_late)
    with pytest.raises(UserError, match=r"out: (something was written there meanwhile|--overwrite replaces)"):
        dist_to_hf(dist_checkpoint, tmp_path / "out", overwrite=overwrite)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["precious"]


def test_a_conversion_that_waited_for_another_does_not_replace_its_result(dist_checkpoint, tmp_path, monkeypatch, said):
    partial, real_lock = tmp_path / "out.partial", new_folder._lock
    partial.mkdir()
    (partial / ".unfinished").touch()
    (partial / "result").touch()

    def lock(descriptor, seconds):  # the other one finishes while this one waits
        if partial.exists() and (partial / "result").exists():
            os.rename(partial, tmp_path / "out")
            (tmp_path / "out" / ".unfinished").unlink()
        return real_lock(descriptor, seconds)

    monkeypatch.setattr(new_folder, "_lock", lock)
    with pytest.raises(UserError, match="not empty"):
        dist_to_hf(dist_checkpoint, tmp_path / "out", say=said.append)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["result"]
    assert not any("did not finish" in line for line in said)


def test_only_what_a_conversion_wrote_is_replaced(dist_checkpoint, tmp_path):
    llama = tmp_path / "Llama"
    llama.mkdir()
    (llama / "model.safetensors").write_bytes(b"llama")
    (llama / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no conversion\.json in it says that one did"):
        dist_to_hf(dist_checkpoint, llama, overwrite=True)
    assert (llama / "model.safetensors").read_bytes() == b"llama"
    dist_to_hf(dist_checkpoint, tmp_path / "out")
    for path in ("release", "notes.txt", "model-00002.safetensors"):
        (tmp_path / "out" / path).touch()
        with pytest.raises(UserError, match=rf"--overwrite would lose {path}, which no conversion wrote"):
            dist_to_hf(dist_checkpoint, tmp_path / "out", overwrite=True)
        (tmp_path / "out" / path).unlink()
    dist_to_hf(dist_checkpoint, tmp_path / "out", overwrite=True, layout="fused")
    assert describe(tmp_path / "out")["format"] == "Hugging Face, fused layout"
    assert os.listdir(tmp_path).count("out") == 1 and len(os.listdir(tmp_path)) == 2


def test_a_conversion_says_where_it_came_from(dist_checkpoint, hf_checkpoint, tmp_path):
    from hymeg import __version__

    dist_to_hf(dist_checkpoint, tmp_path / "out", dtype="fp32")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    found = {name: record[name] for name in ("hymeg", "command", "from", "iteration", "dtype")}
    assert list(found.values()) == [__version__, "dist-to-hf", f"{dist_checkpoint}/release", None, "fp32"]
    assert set(record["files"]) == set(os.listdir(tmp_path / "out")) - {"conversion.json"}
    assert json.loads((dist_checkpoint / "conversion.json").read_text())["from"] == str(hf_checkpoint)


@pytest.mark.parametrize("content", ["seven", "7.0", "-7", "1" * 19, ""])
def test_a_tracker_that_names_no_iteration_is_said(dist_checkpoint, tmp_path, content):
    shutil.copytree(dist_checkpoint, tmp_path / "dist")
    (tmp_path / "dist" / TRACKER).write_text(content)
    with pytest.raises(UserError, match=rf"{TRACKER} names '{content}'; an iteration or 'release' is needed .*release"):
        dist_to_hf(tmp_path / "dist", tmp_path / "out")


def test_a_tokenizers_file_of_a_models_size_is_not_carried(hf_checkpoint, tmp_path, monkeypatch):
    size = (hf_checkpoint / "tokenizer.json").stat().st_size
    monkeypatch.setattr(companions, "_MAX_BYTES", size)
    hf_to_dist(hf_checkpoint, tmp_path / "carried")
    monkeypatch.setattr(companions, "_MAX_BYTES", size - 1)
    with pytest.raises(
        UserError, match=rf"tokenizer.json: {size} bytes, too many for a tokenizer's file \({size - 1}\)"
    ):
        hf_to_dist(hf_checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["carried"]


def test_the_base_is_not_overwritten(trunk, hf, tmp_path):
    hf_to_dist(hf, tmp_path / "base-dist")
    dist_to_hf(tmp_path / "base-dist", tmp_path / "base")
    for target in (tmp_path / "base", tmp_path / "base" / "inside"):
        with pytest.raises(UserError, match=r"is, holds or lies in .*base, which is read"):
            dist_to_hf(trunk, target, base_hf=tmp_path / "base", overwrite=True)
    assert compare_checkpoints(hf, tmp_path / "base") == []


def test_an_export_may_lie_beside_the_iterations_of_its_run(dist, tmp_path):
    dist_to_hf(dist, dist / "hf_100")
    assert compare_checkpoints(dist, dist / "hf_100") == []
    for target in (dist, dist / "release", dist / "release" / "hf", tmp_path):
        with pytest.raises(UserError, match="is, holds or lies in"):
            dist_to_hf(dist, target)


def test_the_target_may_be_a_link_to_an_empty_folder(dist_checkpoint, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    dist_to_hf(dist_checkpoint, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and compare_checkpoints(dist_checkpoint, tmp_path / "disk") == []


def test_a_mount_point_is_refused(dist_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is a mount point"):
        dist_to_hf(dist_checkpoint, tmp_path / "out")


def test_all_files_follow_the_umask(dist_checkpoint, tmp_path):
    old = os.umask(0o002)
    try:
        dist_to_hf(dist_checkpoint, tmp_path / "out", max_shard_bytes=300_000)
        hf_to_dist(tmp_path / "out", tmp_path / "dist")
    finally:
        os.umask(old)
    files = [path for folder in ("out", "dist") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(files) > 15 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def number(request):
    """Of a signal that ends a process, also where the tests run under nohup, which has SIGHUP ignored."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_a_conversion_that_is_told_to_end_leaves_nothing(dist_checkpoint, tmp_path, monkeypatch, number):
    parent = os.getpid()

    def told(*_):
        os.kill(parent, number)
        signal.pause()

    monkeypatch.setattr(transfer, "_write_task", told)
    with pytest.raises(SystemExit) as ended:
        dist_to_hf(dist_checkpoint, tmp_path / "out", workers=1)
    assert ended.value.code == 128 + number and os.listdir(tmp_path) == []
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_whose_exception_was_lost_ends_a_conversion_too(dist_checkpoint, tmp_path, monkeypatch):
    """An exception that a handler raises inside a finalizer goes nowhere."""
    parent = os.getpid()

    def told(*_):
        os.kill(parent, signal.SIGTERM)
        signal.pause()

    def lost(number, _):
        workers.told_to_end.append(number)

    monkeypatch.setattr(transfer, "_write_task", told)
    monkeypatch.setattr(new_folder, "_exit", lost)
    with pytest.raises(SystemExit) as ended:
        dist_to_hf(dist_checkpoint, tmp_path / "out", workers=1)
    assert ended.value.code == 128 + signal.SIGTERM and os.listdir(tmp_path) == [] and not workers.told_to_end


# ---- file systems that cannot do everything


def refuse(code: int):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_a_conversion_works_and_a_leftover_is_left_to_the_user(
    dist_checkpoint, tmp_path, monkeypatch, code
):
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    dist_to_hf(dist_checkpoint, tmp_path / "out")
    assert compare_checkpoints(dist_checkpoint, tmp_path / "out") == []
    (tmp_path / "two.partial").mkdir()
    (tmp_path / "two.partial" / ".unfinished").touch()
    with pytest.raises(UserError, match="cannot be told, as this file system has no locks; remove it if none is"):
        dist_to_hf(dist_checkpoint, tmp_path / "two")
    assert (tmp_path / "two.partial").exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_folders_that_cannot_be_flushed_do_not_end_a_conversion(dist_checkpoint, tmp_path, monkeypatch, code):
    fsync = os.fsync

    def fsync_of_files(descriptor: int) -> None:
        refuse(code)() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    dist_to_hf(dist_checkpoint, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(errno.EIO)())
    with pytest.raises(UserError, match="cannot be written: Input/output error"):
        dist_to_hf(dist_checkpoint, tmp_path / "lost")


def test_every_file_is_flushed_to_disk_before_the_folder_appears(dist_checkpoint, tmp_path, monkeypatch):
    log, fsync, rename = tmp_path / "log", os.fsync, os.rename

    def logged(descriptor: int) -> None:
        with open(log, "a") as file:
            print(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removesuffix(".tmp"), file=file)
        fsync(descriptor)

    def renamed(*paths) -> None:
        with open(log, "a") as file:
            print("RENAMED", file=file)
        rename(*paths)

    monkeypatch.setattr(os, "fsync", logged)
    monkeypatch.setattr(os, "rename", renamed)
    dist_to_hf(dist_checkpoint, tmp_path / "out", max_shard_bytes=300_000)
    flushed, _, last = log.read_text().partition("RENAMED\n")
    of_shards = [line for line in flushed.splitlines() if line.endswith(".safetensors")]
    shards = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert all(of_shards.count(name) >= 2 for name in shards) and len(shards) > 3  # the tensors, then the header
    assert "out.partial" in flushed and last.split() == [tmp_path.name]


# ---- what is carried


def test_a_companion_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/gone.json: cannot be read or copied: No such file"):
        carry({"tokenizer.json": tmp_path / "gone.json"}, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_tokenizer_that_the_checkpoint_lacks_comes_from_the_base_and_is_told(dist, hf_checkpoint, tmp_path, said):
    for path in carried_files(dist).values():
        path.unlink()
    dist_to_hf(dist, tmp_path / "bare", say=said.append)
    assert f"no tokenizer in {dist}: --base-hf says where one is" in said
    said.clear()
    dist_to_hf(dist, tmp_path / "out", base_hf=hf_checkpoint, say=said.append)
    assert carried_files(tmp_path / "out").keys() == carried_files(hf_checkpoint).keys()
    assert said == [f"taken from {hf_checkpoint}: {', '.join(carried_files(hf_checkpoint))}"]


def test_tokenizers_are_not_mixed_and_a_base_that_gives_nothing_is_told(dist, hf, tmp_path, said):
    for name in ("vocab.json", "chat_template.jinja"):
        (hf / name).write_text("the base's")
    (dist / "chat_template.jinja").unlink()
    dist_to_hf(dist, tmp_path / "out", base_hf=hf, say=said.append)
    assert not {"vocab.json", "chat_template.jinja"} & set(os.listdir(tmp_path / "out"))
    assert said == [f"--base-hf {hf}: nothing was taken from it, all is there already"]
    said.clear()
    (dist / "config.json").unlink()
    dist_to_hf(dist, tmp_path / "configured", base_hf=hf, say=said.append)
    assert said == [] and (tmp_path / "configured" / "config.json").is_file()


def test_a_chat_template_is_no_tokenizer(dist, hf_checkpoint, tmp_path, said):
    """One that was put beside a run's checkpoint is taken, and the tokenizer from the base as if it were not there."""
    for path in carried_files(dist).values():
        path.unlink()
    (dist / "chat_template.jinja").write_text("another")
    dist_to_hf(dist, tmp_path / "out", base_hf=hf_checkpoint, say=said.append)
    assert carried_files(tmp_path / "out").keys() == carried_files(hf_checkpoint).keys()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "another"
    dist_to_hf(dist, tmp_path / "bare", say=said.append)
    assert said[-1].startswith(f"no tokenizer in {dist}")


def test_a_hugging_face_folder_without_a_tokenizer_is_told(hf, tmp_path, said):
    for path in carried_files(hf).values():
        path.unlink()
    for number, convert in enumerate((hf_to_dist, hf_to_hf)):
        convert(hf, tmp_path / str(number), say=said.append)
    assert sum(line.startswith(f"no tokenizer in {hf}") for line in said) == 2


def test_files_that_the_index_does_not_name_are_told(hf, tmp_path, said):
    shutil.copy(next(hf.glob("*-00001-of-*")), hf / "model-00001-of-00009.safetensors")
    hf_to_dist(hf, tmp_path / "dist", say=said.append)
    assert any(line.startswith("not read, as") and line.endswith("model-00001-of-00009.safetensors") for line in said)


CARRIED = [
    *("LICENSE", "Notice.txt", "modeling_hy.py", "configuration_hy.py", "tokenization_hy.py", "hy.tiktoken"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    "additional_chat_templates/tool_use.jinja",
]


def test_everything_that_belongs_to_a_checkpoint_is_carried_there_and_back(hf, tmp_path):
    (hf / "additional_chat_templates").mkdir()
    for name in (*CARRIED, "README.md", "optimizer.pt"):
        (hf / name).write_text(name)
    hf_to_dist(hf, tmp_path / "dist")
    dist_to_hf(tmp_path / "dist", tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in CARRIED] == CARRIED
    assert not {"README.md", "optimizer.pt"} & {*os.listdir(tmp_path / "out"), *os.listdir(tmp_path / "dist")}


def test_links_of_a_download_cache_are_followed_and_one_to_nothing_is_an_error(hf, tmp_path):
    (tmp_path / "blobs").mkdir()
    for path in hf.iterdir():
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    hf_to_dist(hf, tmp_path / "dist")
    assert compare_checkpoints(tmp_path / "dist", hf) == [] and not (tmp_path / "dist" / "tokenizer.json").is_symlink()
    (tmp_path / "blobs" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: a link to a file that is not there"):
        hf_to_dist(hf, tmp_path / "again")


# ---- what is converted


@pytest.mark.parametrize("num_workers", [0, -1, 257])
def test_a_number_of_workers_that_cannot_work_is_refused(hf_checkpoint, dist_checkpoint, tmp_path, num_workers):
    for use in (
        lambda: hf_to_dist(hf_checkpoint, tmp_path / "out", workers=num_workers),
        lambda: dist_to_hf(dist_checkpoint, tmp_path / "out", workers=num_workers),
        lambda: compare_checkpoints(hf_checkpoint, dist_checkpoint, workers=num_workers),
    ):
        with pytest.raises(UserError, match=rf"--workers {num_workers}: 1 to 256 are possible"):
            use()


def test_a_trained_vocabulary_is_not_cut_without_a_word(tmp_path, said):
    write_tiny_checkpoint(tmp_path / "hf", HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1030}))
    hf_to_dist(tmp_path / "hf", tmp_path / "dist")
    smaller = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    edit_json(tmp_path / "dist" / "config.json", **smaller)
    with pytest.raises(UserError, match=r"word_embeddings.weight has 1030 rows, config.json a vocabulary of 1024"):
        dist_to_hf(tmp_path / "dist", tmp_path / "out")
    dist_to_hf(tmp_path / "dist", tmp_path / "out", cut_vocabulary=True, say=said.append)
    cut = [f"cut off: 6 rows of {key} beyond the vocabulary of 1024" for key in VOCABULARY_KEYS]
    assert said == cut and weights(tmp_path / "out")["lm_head.weight"].shape == (1024, 64)
    tensors = weights(tmp_path / "hf")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][1024:] = 0
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    hf_to_dist(tmp_path / "hf", tmp_path / "padded")
    edit_json(tmp_path / "padded" / "config.json", **smaller)
    said.clear()
    dist_to_hf(tmp_path / "padded", tmp_path / "of-padded", say=said.append)
    assert said == cut


def test_verification_finds_what_was_not_written_as_it_was_read(hf_checkpoint, dist_checkpoint, tmp_path, monkeypatch):
    dropped = []

    def spoiled(path: Path) -> None:
        dropped.append(path.name)
        if len(dropped) == 1:
            with open(path, "r+b") as file:
                file.seek(-3000, os.SEEK_END)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(conversion, "drop_from_cache", spoiled)
    for use, given, others in (
        (hf_to_dist, hf_checkpoint, {}),
        (dist_to_hf, dist_checkpoint, {"max_shard_bytes": 300_000}),
    ):
        dropped.clear()
        with pytest.raises(UserError, match=r"damaged: bytes \d+ to \d+ are not those that were written"):
            use(given, tmp_path / "out", verify=True, **others)
        assert os.listdir(tmp_path) == [] and len(set(dropped)) == len(dropped) > 1
        use(given, tmp_path / "out", **others)  # unseen, when it is not asked for
        shutil.rmtree(tmp_path / "out")


def test_verification_reads_from_the_disk(dist_checkpoint, tmp_path, monkeypatch):
    asked, advised = [], os.posix_fadvise

    def advise(descriptor, *args):
        asked.append((os.readlink(f"/proc/self/fd/{descriptor}"), args))
        advised(descriptor, *args)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    dist_to_hf(dist_checkpoint, tmp_path / "out", verify=True)
    assert asked == [(f"{tmp_path}/out.partial/model.safetensors", (0, 0, os.POSIX_FADV_DONTNEED))]


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_the_dtype_asked_for_is_written_both_ways(tmp_path, stored, wanted):
    write_tiny_checkpoint(tmp_path / "hf", dtype=stored)
    hf_to_dist(tmp_path / "hf", tmp_path / "kept")
    hf_to_dist(tmp_path / "hf", tmp_path / "dist", dtype=wanted, verify=True)
    dist_to_hf(tmp_path / "dist", tmp_path / "one")
    dist_to_hf(tmp_path / "kept", tmp_path / "two", dtype=wanted, verify=True)
    torch_dtype, name = {"fp32": (torch.float32, "float32"), "bf16": (torch.bfloat16, "bfloat16")}[wanted]
    for folder in (tmp_path / "one", tmp_path / "two"):
        found = weights(folder)
        for tensor, expected in weights(tmp_path / "hf").items():
            expected = expected if "expert_bias" in tensor else expected.to(torch_dtype)
            assert found[tensor].dtype == expected.dtype and torch.equal(found[tensor], expected), tensor
        assert json.loads((folder / "config.json").read_text())["dtype"] == name


def test_parts_of_one_tensor_may_differ_in_dtype_where_one_is_asked_for(tmp_path):
    write_tiny_checkpoint(tmp_path / "hf", dtype="fp32")
    tensors = weights(tmp_path / "hf")
    for name in ("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.2.self_attn.k_proj.weight"):
        tensors[name] = tensors[name].half()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match="convert with --dtype bf16 or fp32"):
        hf_to_dist(tmp_path / "hf", tmp_path / "dist")
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hf_to_dist(tmp_path / "hf", tmp_path / dtype, dtype=dtype, verify=True)
        dist_to_hf(tmp_path / dtype, tmp_path / f"{dtype}-out")
        for name, tensor in weights(tmp_path / f"{dtype}-out").items():
            expected = tensors[name].float()
            assert torch.equal(tensor, expected if "expert_bias" in name else expected.to(torch_dtype)), name


def test_the_iteration_asked_for_is_exported(dist, tmp_path):
    write_tiny_checkpoint(tmp_path / "newer", seed=8, num_mtp_layers=1)
    hf_to_dist(tmp_path / "newer", tmp_path / "newer-dist")
    (dist / "release").rename(dist / "iter_0000003")
    shutil.copytree(tmp_path / "newer-dist" / "release", dist / "iter_0000007")
    (dist / TRACKER).write_text("7")
    dist_to_hf(dist, tmp_path / "seven")
    dist_to_hf(dist, tmp_path / "three", iteration=3)
    assert compare_checkpoints(tmp_path / "newer", tmp_path / "seven") == []
    assert len(compare_checkpoints(tmp_path / "newer", tmp_path / "three")) == 166
    assert json.loads((tmp_path / "three" / "conversion.json").read_text())["iteration"] == 3
    assert describe(dist, 3)["iteration"] == "3" and describe(dist)["iteration"] == "7"
    assert describe(dist)["iterations"] == "iter_0000003, iter_0000007"
    with pytest.raises(UserError, match=r"iter_0000005 is missing .*complete in it: 3, 7"):
        dist_to_hf(dist, tmp_path / "five", iteration=5)


# ---- layers for multi-token prediction


def test_another_context_length_or_end_token_is_no_other_model(trunk, hf_checkpoint, tmp_path):
    edit_json(trunk / "config.json", max_position_embeddings=8192, eos_token_id=7)
    dist_to_hf(trunk, tmp_path / "out", base_hf=hf_checkpoint, verify=True)
    found, base, own = (weights(folder) for folder in (tmp_path / "out", hf_checkpoint, tmp_path / "hf-trunk"))
    assert all(torch.equal(tensor, own.get(name, base[name])) for name, tensor in found.items())
    assert found.keys() == base.keys()


def test_a_hugging_face_folder_without_its_mtp_layers_takes_them_from_a_base_or_drops_them(
    hf_checkpoint, tmp_path, said
):
    write_tiny_checkpoint(tmp_path / "hf", seed=5)
    shutil.copy(hf_checkpoint / "config.json", tmp_path / "hf")
    with pytest.raises(UserError, match=r"num_nextn_predict_layers = 1\); convert with --base-hf .*--drop-mtp"):
        hf_to_dist(tmp_path / "hf", tmp_path / "dist")
    hf_to_dist(tmp_path / "hf", tmp_path / "dist", base_hf=hf_checkpoint, verify=True, say=said.append)
    assert said == [f"taken from {hf_checkpoint}: the MTP layers, 16 tensors, which {tmp_path / 'hf'} does not hold"]
    dist_to_hf(tmp_path / "dist", tmp_path / "whole")
    found, own, base = (weights(folder) for folder in (tmp_path / "whole", tmp_path / "hf", hf_checkpoint))
    assert all(torch.equal(tensor, own.get(name, base[name])) for name, tensor in found.items())
    assert found.keys() == base.keys()
    hf_to_dist(tmp_path / "hf", tmp_path / "less", drop_mtp=True)
    assert HyConfig.from_dir(tmp_path / "less").num_nextn_predict_layers == 0
    dist_to_hf(tmp_path / "less", tmp_path / "back")
    assert weights(tmp_path / "back").keys() == own.keys()


def test_mtp_layers_that_are_there_can_be_dropped(hf_checkpoint, dist_checkpoint, tmp_path, said):
    hf_to_dist(hf_checkpoint, tmp_path / "dist", drop_mtp=True, say=said.append)
    dist_to_hf(dist_checkpoint, tmp_path / "hf", drop_mtp=True, say=said.append)
    assert said == ["left out: the MTP layers, 41 tensors", "left out: the MTP layers, 16 tensors"]
    assert compare_checkpoints(tmp_path / "dist", tmp_path / "hf") == []
    assert HyConfig.from_dir(tmp_path / "hf").num_nextn_predict_layers == 0
    assert not [name for name in weights(tmp_path / "hf") if name.startswith("model.layers.4.")]


def test_copies_of_the_trunk_in_mtp_layers_are_told_of(hf, tmp_path, said):
    save_file({"model.layers.4.embed_tokens.weight": torch.zeros(1024, 64)}, hf / "extra.safetensors")
    (hf / "model.safetensors.index.json").unlink()
    for number, path in enumerate(sorted(hf.glob("model-*"))):
        path.rename(hf / f"part{number}.safetensors")
    hf_to_dist(hf, tmp_path / "dist", say=said.append)
    assert said == ["left out, the trunk's own are used instead: model.layers.4.embed_tokens.weight"]


# ---- what .metadata may hold


def test_the_plans_that_megatron_leaves_in_metadata_are_read_and_not_run(dist):
    """As under --ckpt-assume-constant-structure from the second save on."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StoragePrefix
    from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, WriteItem, WriteItemType

    item = WriteItem(dcp.MetadataIndex("rng_state"), WriteItemType.BYTE_IO, BytesIOWriteData(100))
    plan = SavePlan([item], storage_data=_StoragePrefix("__0_"))
    made = MCoreMetadata.__new__(MCoreMetadata)
    edit_metadata(dist, lambda m: vars(made).update({**vars(m), "all_local_plans": [plan]}) or made)
    assert b"_StoragePrefix" in (dist / "release" / ".metadata").read_bytes()
    assert len(open_dist(dist).tensors) == 63


def test_tensors_under_unknown_names_are_counted_named_and_refused(dist, tmp_path):
    def to_others(metadata):
        metadata.state_dict_metadata = {f"vision.{key}": value for key, value in metadata.state_dict_metadata.items()}

    edit_metadata(dist, to_others)
    with pytest.raises(UserError, match=r"63 tensors that hymeg does not know \(vision\.\w+.*begin with embedding"):
        dist_to_hf(dist, tmp_path / "out")
    assert describe(dist)["not known"].startswith("63 tensors, such as vision.")
    assert len(compare_checkpoints(dist, dist)) == 126


def test_a_name_that_is_none_is_refused_before_it_is_looked_at(dist):
    name = ()
    for _ in range(14):
        name = (name, name)
    edit_metadata(dist, lambda m: m.state_dict_metadata.update({name: None}))
    with pytest.raises(UserError, match="maps no names") as raised:
        open_dist(dist)
    assert len(str(raised.value)) < 500


def test_transformed_storage_is_refused(dist):
    def transform(metadata):
        place = next(info for index, info in metadata.storage_data.items() if index.offset is not None)
        place.transform_descriptors = ("zstd",)

    edit_metadata(dist, transform)
    with pytest.raises(UserError, match="is stored transformed"):
        open_dist(dist)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("moe_mlp_glu_interleave_size", None, None),
        ("moe_mlp_glu_interleave_size", 32, r"--moe-mlp-glu-interleave-size \(32\): gate and up projections"),
        ("moe_shared_expert_glu_interleave_size", 8, r"--moe-shared-expert-glu-interleave-size \(8\)"),
        ("layernorm_zero_centered_gamma", False, None),
        ("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p .*norms are stored less 1"),
        ("rotary_interleaved", True, "--rotary-interleaved"),
    ],
)
def test_weights_that_mean_something_else_are_not_exported_as_if_they_did_not(dist, name, value, told):
    from types import SimpleNamespace

    state = [{"args": SimpleNamespace(num_layers=4, dtype=torch.bfloat16, **{name: value})}]
    data = stored_object(state)
    with open(dist / "release" / "__0_0.distcp", "r+b") as file:
        position = file.seek(0, os.SEEK_END)
        file.write(data)

    def point(metadata):
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "common_state/shard_0_1")
        info.relative_path, info.offset, info.length = "__0_0.distcp", position, len(data)

    edit_metadata(dist, point)
    if told is None:
        assert open_dist(dist).iteration is None
    else:
        with pytest.raises(UserError, match=told):
            open_dist(dist)


# ---- comparison and inspection


def test_comparison_with_a_tolerance_is_in_fp32_whichever_side_is_rounded(tmp_path):
    for dtype in ("fp32", "bf16"):
        write_tiny_checkpoint(tmp_path / dtype, dtype=dtype)
    sides = tmp_path / "fp32", tmp_path / "bf16"
    numbers = [len(compare_checkpoints(*pair, tolerance=1e-6)) for pair in (sides, sides[::-1])]
    assert numbers[0] == numbers[1] > 100
    assert compare_checkpoints(*sides, tolerance=0.02) == []
    found = compare_checkpoints(*sides)
    assert len(found) == len(weights(sides[0])) - 3  # the expert biases are fp32 in both
    assert {difference.what for difference in found} == {"dtypes: F32 and BF16"}


def test_comparison_sees_what_one_side_lacks_and_what_is_unknown(dist, dist_checkpoint, hf_checkpoint):
    lost, foreign = "decoder.layers.2.mlp.router.weight", "decoder.layers.9.mlp.router.weight"

    def rename(metadata):
        metadata.state_dict_metadata[foreign] = metadata.state_dict_metadata.pop(lost)
        for index in [index for index in metadata.storage_data if index.fqn == lost]:
            place = metadata.storage_data.pop(index)
            metadata.storage_data[type(index)(foreign, index.offset, index.index)] = place

    edit_metadata(dist, rename)
    for a, b in ((dist, hf_checkpoint), (dist_checkpoint, dist)):
        found = {difference.name: difference.what for difference in compare_checkpoints(a, b)}
        assert found == {
            "model.layers.2.mlp.router.gate.weight": f"only in {b if a == dist else a}",
            foreign: f"only in {dist}, and unknown to config.json",
        }


def test_comparison_sees_other_configs_and_other_shapes(dist, dist_checkpoint):
    edit_json(dist / "config.json", rope_theta=5.0, intermediate_size=256)
    found = {difference.name: difference.what for difference in compare_checkpoints(dist, dist_checkpoint)}
    assert found["config.json"] == "rope_theta: 5.0 and 11158840.0"
    assert found["model.layers.0.mlp.up_proj.weight"].startswith("shapes: [256, 64] and [256, 64] as")


@pytest.mark.parametrize("use", [describe, open_any, lambda folder: compare_checkpoints(folder, folder)])
def test_a_folder_that_is_not_there_is_told(tmp_path, use):
    with pytest.raises(
        UserError, match=f"^{tmp_path}/none: no such folder; give a Hugging Face or a distributed check"
    ):
        use(tmp_path / "none")


def test_config_json_says_the_dtype_that_most_elements_have():
    config = HyConfig.from_dict(TINY_CONFIG | {"dtype": "bfloat16"})
    large, small = (lambda dtype, n=n: TensorSpec(f"{n}", dtype, (n, 3)) for n in (10, 2))
    for specs, dtype in (
        ([large("F32"), small("BF16")], "float32"),
        ([small("F32"), large("BF16")], "bfloat16"),
        ([small("F16"), small("F16"), small("F32")], "float16"),
    ):
        assert with_dtype(config, specs).dtype == dtype


@pytest.mark.parametrize("without_config", ["first", "second"])
def test_one_config_is_enough_to_compare_and_none_is_not(dist, dist_checkpoint, without_config):
    (dist / "config.json").unlink()
    folders = (dist, dist_checkpoint) if without_config == "first" else (dist_checkpoint, dist)
    assert compare_checkpoints(*folders) == []
    with pytest.raises(UserError, match=r"neither .* has a config\.json; copy the model's into one of them"):
        compare_checkpoints(dist, dist)


def test_a_dtype_that_cannot_be_compared_is_an_error_not_a_traceback(hf, hf_checkpoint):
    path = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.float64)}, path)
    for use in (lambda: compare_checkpoints(hf, hf_checkpoint), lambda: describe(hf), lambda: open_hf(hf)):
        with pytest.raises(UserError, match=rf"{name} is F64; allowed are BF16, F16, F32, F8_E4M3"):
            use()


def test_inspection_sees_an_optimizer(dist):
    assert describe(dist)["optimizer state"] == "no"

    def add(metadata):
        key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata["decoder.final_layernorm.weight"]

    edit_metadata(dist, add)
    assert describe(dist)["optimizer state"] == "yes" and not open_any(dist).unknown


def test_inspection_may_be_cut_short(dist_checkpoint):
    command = f"{sys.executable} {CONVERT} inspect {dist_checkpoint} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 128 + signal.SIGPIPE)


def test_shared_memory_counts_once():
    ballast = bytearray(os.urandom(1 << 20) * 64)
    here = workers.memory_of_process("status", "VmRSS")

    def work(share, report):
        return sum(ballast[::4096]) + len(bytes(16 << 20).replace(b"\0", b"a"))

    peak = workers.run(work, [1, 2, 3]).peak_bytes
    assert here + 3 * (16 << 20) <= peak <= here + 3 * (64 << 20)
