"""safetensors files: what is written is what safetensors reads, what others write is read, and no damaged file passes
or crashes.
"""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hymeg.errors import UserError
from hymeg.files import parse_bytes
from hymeg.hf.safetensors_files import (
    INDEX_FILE,
    TensorSpec,
    into_shards,
    open_checkpoint,
    write_checkpoint,
)

TORCH_NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
TENSORS = {
    "odd": torch.randn(3, 5).to(torch.bfloat16),
    "bias": torch.randn(7),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(5),
    "none": torch.zeros(0, 4, dtype=torch.bfloat16),
    "eight": torch.randn(3).to(torch.float8_e4m3fn),
    "模型.weight": torch.randn(2, 3, 4).to(torch.bfloat16),
}
SPECS = [TensorSpec(name, TORCH_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def raw_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def in_small_pieces(spec):
    data = raw_bytes(TENSORS[spec.name])
    yield from (data[i : i + 4] for i in range(0, len(data), 4))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40, 1])
def test_safetensors_reads_what_is_written(max_shard_bytes, tmp_path):
    shards = write_checkpoint(tmp_path, SPECS, in_small_pieces, max_shard_bytes)
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            read |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (
            read[name].dtype == tensor.dtype
            and read[name].shape == tensor.shape
            and raw_bytes(read[name]) == raw_bytes(tensor)
        ), name
    names = sorted(path.name for path in tmp_path.iterdir())
    if len(shards) == 1:
        assert names == ["model.safetensors"]
    else:
        assert (
            names == [*(shard.file_name for shard in shards), INDEX_FILE]
            and names[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        )
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(len(raw_bytes(tensor)) for tensor in TENSORS.values())
        assert index["weight_map"].keys() == TENSORS.keys()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40])
def test_own_files_are_read(max_shard_bytes, tmp_path):
    write_checkpoint(tmp_path, SPECS, in_small_pieces, max_shard_bytes)
    check_against_tensors(open_checkpoint(tmp_path))


def test_files_of_safetensors_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt", "step": "7"})
    check_against_tensors(open_checkpoint(tmp_path))


def test_several_files_without_an_index_are_read(tmp_path):
    names = list(TENSORS)
    save_file({name: TENSORS[name] for name in names[:3]}, tmp_path / "a.safetensors")
    save_file({name: TENSORS[name] for name in names[3:]}, tmp_path / "b.safetensors")
    check_against_tensors(open_checkpoint(tmp_path))


def check_against_tensors(entries):
    assert entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape) == (TORCH_NAMES[tensor.dtype], tuple(tensor.shape))
        assert entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes] == raw_bytes(tensor)


def test_one_file_of_several_without_an_index_is_not_taken_for_all(tmp_path):
    save_file({"odd": TENSORS["odd"]}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match=f"1 of 3 files and no {INDEX_FILE}; fetch the rest"):
        open_checkpoint(tmp_path)


def test_a_name_that_a_header_has_twice_is_told(tmp_path):
    header = b'{"bias":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' + 2 * (
        b'"odd":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},'
    )
    header = header[:-1] + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(UserError, match="names 'odd' twice"):
        open_checkpoint(tmp_path)


def test_shards_hold_at_most_what_they_may():
    specs = [TensorSpec(f"t{i}", "BF16", (i,)) for i in (30, 30, 90, 10, 20, 20)]
    shards = into_shards(specs, 100)
    assert [[spec.shape[0] for spec in shard.tensors] for shard in shards] == [[30], [30], [90], [10, 20, 20]]
    assert into_shards([], 100)[0].tensors == ()


def test_one_file_alone_has_the_name_by_which_it_is_found():
    """By that of two it would be half a checkpoint: it has no index."""
    [shard] = into_shards([TensorSpec("t", "BF16", (3,))], {"t": "model-00001-of-00002.safetensors", "mtp": "other"})
    assert shard.file_name == "model.safetensors"


def test_wrong_amounts_of_bytes_leave_nothing_behind(tmp_path):
    for data in (b"123", b"12345"):
        with pytest.raises(ValueError, match="tensor t"):
            write_checkpoint(tmp_path, [TensorSpec("t", "BF16", (2,))], lambda spec, data=data: [data])
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_told_as_such(tmp_path):
    with pytest.raises(UserError, match=r"absent/model\.safetensors: cannot be written: No such file"):
        write_checkpoint(tmp_path / "absent", SPECS, in_small_pieces)


def header(**tensors):
    return json.dumps(
        {name: dict(zip(("dtype", "shape", "data_offsets"), fields, strict=True)) for name, fields in tensors.items()}
    ).encode()


def file_of(text, data=b"", length=None):
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


# (the file's bytes, what the message must tell beside the file's name)
DAMAGED = {
    "empty": (b"", "not a safetensors file"),
    "too short": (b"1234567", "not a safetensors file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
    "header of no bytes": (file_of(b""), "not a safetensors file"),
    "header over the limit": (file_of(b"{}", length=100_000_001), "not a safetensors file"),
    "header past the end": (file_of(b"{}", length=100), "truncated"),
    "not JSON": (file_of(b"{oops}"), "damaged"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "damaged"),
    "nested deeply": (file_of(b"[" * 200000), "damaged"),
    "an endless integer": (file_of(b'{"t": ' + b"9" * 10000 + b"}"), "damaged"),
    "not an object": (file_of(b"[1]"), "damaged"),
    "metadata not strings": (file_of(b'{"__metadata__": {"a": 1}}'), "__metadata__"),
    "tensor twice": (file_of(b'{"t": 1, "t": 2}'), "'t' twice"),
    "fields not an object": (file_of(b'{"t": 1}'), "damaged"),
    "field missing": (file_of(b'{"t": {"dtype": "BF16", "shape": [1]}}'), "'data_offsets'"),
    "unknown dtype": (file_of(header(t=("BF17", [1], [0, 2])), b"12"), "dtype is 'BF17'"),
    "dtype not a string": (file_of(header(t=([], [1], [0, 2])), b"12"), "damaged"),
    "negative size": (file_of(header(t=("BF16", [-1], [0, 2])), b"12"), "shape [-1]"),
    "size not an integer": (file_of(header(t=("BF16", [True], [0, 2])), b"12"), "shape"),
    "shape not a list": (file_of(header(t=("BF16", 1, [0, 2])), b"12"), "shape"),
    "shape of endless rank": (file_of(header(t=("BF16", [2**62] * 10000, [0, 2])), b"12"), "shape"),
    "offsets backwards": (file_of(header(t=("BF16", [1], [2, 0])), b"12"), "[2, 0)"),
    "three offsets": (file_of(header(t=("BF16", [1], [0, 1, 2])), b"12"), "data_offsets"),
    "offsets not integers": (file_of(header(t=("BF16", [1], [0.0, 2.0])), b"12"), "data_offsets"),
    "shape too large for its span": (
        file_of(header(t=("BF16", [2**60, 2**60], [0, 2])), b"12"),
        "cannot lie at [0, 2)",
    ),
    "span too large for its shape": (file_of(header(t=("BF16", [1], [0, 4])), b"1234"), "cannot lie at [0, 4)"),
    "overlap": (
        file_of(header(t=("BF16", [2], [0, 4]), u=("BF16", [1], [2, 4])), b"1234"),
        "'u': BF16 [1] cannot lie at [2, 4), behind the 4 bytes",
    ),
    "gap": (
        file_of(header(t=("BF16", [1], [0, 2]), u=("BF16", [1], [4, 6])), b"123456"),
        "'u': BF16 [1] cannot lie at [4, 6), behind the 2 bytes",
    ),
    "gap at the start": (
        file_of(header(t=("BF16", [1], [2, 4])), b"1234"),
        "cannot lie at [2, 4)",
    ),
    "truncated data": (file_of(header(t=("BF16", [2], [0, 4])), b"123"), "truncated"),
    "trailing bytes": (file_of(header(t=("BF16", [2], [0, 4])), b"12345"), "bytes after the last tensor"),
    "offsets far past the end": (file_of(header(t=("U8", [2**62], [0, 2**62])), b"12"), "truncated"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case, tmp_path):
    data, told = DAMAGED[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path)
    message = str(error.value)
    assert (
        message.startswith(str(tmp_path / "model.safetensors"))
        and told in message
        and "\n" not in message
        and len(message) < 800
    )


def test_random_damage_is_refused_or_harmless(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    good, generator = path.read_bytes(), random.Random(0)
    length = 8 + int.from_bytes(good[:8], "little")
    for _ in range(500):
        damaged = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(length)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors = open_checkpoint(tmp_path).values()
            assert all(tensor.offset + tensor.nbytes <= len(good) for tensor in tensors)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_newlines_in_a_tensor_name_stay_on_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(file_of(json.dumps({"a\nb" * 1000: {}}).encode()))
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def edit_index(folder, edit):
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def swap_in(name, value):
    return lambda folder: edit_index(folder, lambda weight_map: weight_map.update({name: value}))


# (what happens to a good checkpoint of shards, what the message must tell)
BROKEN_FOLDERS = {
    "shard missing": (
        lambda folder: (folder / "model-00002-of-00004.safetensors").unlink(),
        "model-00002-of-00004.safetensors",
    ),
    "shard missing, no index": (
        lambda f: [(f / INDEX_FILE).unlink(), (f / "model-00002-of-00004.safetensors").unlink()],
        "3 of 4 files",
    ),
    "absolute path": (swap_in("odd", "/etc/passwd"), "'/etc/passwd'"),
    "path out of the folder": (swap_in("odd", "../model.safetensors"), "'../model.safetensors'"),
    "backslash": (swap_in("odd", "..\\x"), "name of a file"),
    "parent folder": (swap_in("odd", ".."), "name of a file"),
    "NUL": (swap_in("odd", "a\0b"), "name of a file"),
    "surrogate": (swap_in("odd", "\ud800"), "missing"),
    "name too long": (swap_in("odd", "x" * 1000), "missing"),
    "file is a number": (swap_in("odd", 3), "name of a file"),
    "tensor in no header": (swap_in("extra", "model-00001-of-00004.safetensors"), "'extra'"),
    "tensor in another file": (swap_in("bias", "model-00001-of-00004.safetensors"), "'bias'"),
    "tensor not in the index": (
        lambda folder: edit_index(folder, lambda weight_map: weight_map.pop("flags")),
        "'flags'",
    ),
    "tensor in two files": (
        lambda folder: (folder / "model-00001-of-00004.safetensors").write_bytes(
            (folder / "model-00002-of-00004.safetensors").read_bytes()
        ),
        "holds tensor",
    ),
    "one file beside an index of others": (
        lambda folder: (folder / "model.safetensors").write_bytes(next(folder.glob("*01-of*")).read_bytes()),
        "which transformers would read, and model.safetensors.index.json, which names other files; remove one",
    ),
    "two files, no index": (
        lambda folder: [
            (folder / INDEX_FILE).unlink(),
            (folder / "b.safetensors").write_bytes(next(folder.glob("*01-of*")).read_bytes()),
        ],
        "too; remove one",
    ),
    "index not JSON": (lambda folder: (folder / INDEX_FILE).write_text("{"), "line 1, column 2"),
    "index not an object": (lambda folder: (folder / INDEX_FILE).write_text("[]"), "weight_map"),
    "no weight_map": (lambda folder: (folder / INDEX_FILE).write_text("{}"), "weight_map"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "no *.safetensors"),
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "no such folder"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folders_are_refused(case, tmp_path):
    damage, told = BROKEN_FOLDERS[case]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert len(write_checkpoint(folder, SPECS, in_small_pieces, 40)) == 4
    damage(folder)
    with pytest.raises(UserError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert message.startswith(str(folder)) and told in message and "\n" not in message and len(message) < 800


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("7", 7), ("7b", 7)],
)
def test_sizes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5XB", "1e9", "5GB5", "1" * 100, "0.1", "5ib", "\n"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="a number of bytes such as"):
        parse_bytes(text)
