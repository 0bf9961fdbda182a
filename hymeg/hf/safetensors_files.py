"""Checkpoints in safetensors files, read and written as bytes with bounded memory. What the tensors mean is
`hymeg.checkpoint`'s business.

A safetensors file is: 8 bytes, the header's length n as a little-endian unsigned integer; n bytes of JSON; the tensors'
bytes, little-endian and in row-major order, without a gap. The JSON maps each tensor's name to its dtype ("BF16"), its
shape and its `data_offsets` [begin, end), counted from the end of the header; the key `__metadata__` maps strings to
strings; spaces at the end bring the tensors' bytes to a multiple of 8. A checkpoint of more than one file has
`model.safetensors.index.json`, whose `weight_map` names the file of each tensor. Source:
https://github.com/huggingface/safetensors, section "Format"; for the file names, transformers' `save_pretrained`.

Files are not trusted: every number in a header is checked against the file's real size before anything is read through
it.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Buffer, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hymeg.checksums import open_verified
from hymeg.errors import UserError, located
from hymeg.files import are_sizes, is_file_name, os_errors, read_json, shown, write_whole, written_whole
from hymeg.hf.config import local_directory
from hymeg.hf.dtypes import ITEM_SIZES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_SHARD_BYTES = 5_000_000_000


class TensorEntry(NamedTuple):
    """Where a stored tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    nbytes: int


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


class Shard(NamedTuple):
    """One file of a checkpoint to be written; `tensors` in the order of their bytes."""

    file_name: str
    tensors: tuple[TensorSpec, ...]


def read_header(path: Path, opened: Callable[[str | os.PathLike], BinaryIO] = open_verified) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name, in the order of their bytes. (safetensors' own `safe_open` would map
    the whole file, which a limit on address space does not allow.)

    Raises:
        UserError: the file cannot be read, is truncated, or its header does not describe exactly the bytes that follow
            it.
    """
    with os_errors(path, "read"), opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        text = file.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
    with located(path):
        if size < 8 or not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise UserError(f"not a safetensors file ({size} bytes); if it is a Git LFS pointer, run `git lfs pull`")
        begin = 8 + header_bytes
        if begin > size:
            raise UserError(f"truncated: {size} bytes, too few for its header of {header_bytes}; fetch the file again")
        try:
            header = json.loads(text.decode(), object_pairs_hook=_without_twins)
            metadata = header.pop("__metadata__", {})
            if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
                raise ValueError("__metadata__ must map strings to strings")
            entries = _checked_entries(path, header, begin)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            found = str(error) or type(error).__name__
            raise UserError(f"the header is damaged: {found}; fetch the file again") from None
        end = begin + sum(entry.nbytes for entry in entries.values())
        if end != size:
            problem = "truncated" if size < end else "bytes after the last tensor"
            raise UserError(f"{problem}: {size} bytes where the header describes {end}; fetch the file again")
        return entries


def open_checkpoint(directory: str | os.PathLike) -> dict[str, TensorEntry]:
    """Where every tensor of the checkpoint in `directory` lies, from the headers alone.

    With an index its files are read, without one all *.safetensors of the folder.

    Raises:
        UserError: a file is missing or broken, the index and the headers disagree, two files hold the same tensor, or
            there is SINGLE_FILE beside an index of others.
    """
    directory = local_directory(directory)
    index = directory / INDEX_FILE
    weight_map = _read_index(index) if index.exists() else {}
    file_names = list(dict.fromkeys(weight_map.values())) or _files_without_index(directory)
    if missing := [name for name in file_names if not os.path.isfile(directory / name)]:
        raise UserError(
            f"{directory}: {len(missing)} of {len(file_names)} files in {INDEX_FILE} are missing: {shown(missing)}; "
            "fetch them again"
        )
    if SINGLE_FILE not in file_names and (directory / SINGLE_FILE).exists():
        raise UserError(
            f"{directory}: holds {SINGLE_FILE}, which transformers would read, and {INDEX_FILE}, which names other "
            "files; remove one of the two"
        )
    tensors: dict[str, TensorEntry] = {}
    for file_name in file_names:
        for name, entry in read_header(directory / file_name).items():
            if name in tensors:
                raise UserError(
                    f"{entry.file}: holds tensor {shown(name)} which {tensors[name].file.name} holds too; remove one "
                    "of the files"
                )
            if weight_map and weight_map.get(name) != file_name:
                where = f"is in {weight_map[name]}" if name in weight_map else "does not exist"
                found = f"holds tensor {shown(name)} which, by {INDEX_FILE}, {where}"
                raise UserError(f"{entry.file}: {found}; the files do not belong together")
            tensors[name] = entry
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{directory / file_name}: does not hold tensor {shown(name)} as {INDEX_FILE} says; the files do not "
                "belong together"
            )
    return tensors


def files_by_tensor(directory: str | os.PathLike) -> dict[str, str]:
    """The file of each tensor of the checkpoint in `directory`. Raises UserError as `open_checkpoint` does."""
    return {name: entry.file.name for name, entry in open_checkpoint(directory).items()}


def into_shards(tensors: Iterable[TensorSpec], sharding: int | Mapping[str, str] = MAX_SHARD_BYTES) -> list[Shard]:
    """Distribute `tensors`, in order, over files of at most so many bytes of tensors, `sharding`; a tensor above that
    gets a file of its own. Or over the files that `sharding` gives to their names.

    One file alone is `model.safetensors`, as transformers names it.

    Raises:
        UserError: it gives none to one of them.
    """
    if not isinstance(sharding, int):
        named: dict[str, list[TensorSpec]] = {}
        for tensor in tensors:
            if tensor.name not in sharding:
                raise UserError(
                    f"{tensor.name}: is in no file of the folder whose files were asked for; leave that out"
                )
            named.setdefault(sharding[tensor.name], []).append(tensor)
        if len(named) == 1:
            return [one_shard(SINGLE_FILE, *named.values())]
        return [one_shard(name, named[name]) for name in sorted(named)]
    groups: list[list[TensorSpec]] = [[]]
    group_bytes = 0
    for tensor in tensors:
        if groups[-1] and group_bytes + tensor.nbytes > sharding:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_FILE]
    return [one_shard(name, group) for name, group in zip(names, groups, strict=True)]


def one_shard(name: str, tensors: Iterable[TensorSpec]) -> Shard:
    """Wider dtypes come first, so that each tensor is aligned to its own item size."""
    return Shard(name, tuple(sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])))


def shard_header(shard: Shard) -> bytes:
    """What a file begins with: the header's length and the header. The tensors' bytes follow, in the shard's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard.tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_files(shards: list[Shard]) -> dict[str, bytes]:
    """INDEX_FILE, which says which tensor lies in which file; it makes the checkpoint valid. One shard has none."""
    if len(shards) == 1:
        return {}
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    return {INDEX_FILE: text.encode()}


def write_checkpoint(
    directory: str | os.PathLike,
    tensors: Iterable[TensorSpec],
    read: Callable[[TensorSpec], Iterable[Buffer]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Shard]:
    """Write `tensors` into `directory`, an existing folder without a checkpoint, each file whole or not at all and the
    index last; the files.

    Args:
        read: called once for each tensor, in the order of the files; gives its bytes in one or more buffers,
            `tensor.nbytes` in all.

    Raises:
        UserError: a file cannot be written.
        ValueError: `read` gave too few or too many bytes.
    """
    shards = into_shards(tensors, max_shard_bytes)
    for shard in shards:
        with written_whole(Path(directory) / shard.file_name) as file:
            file.write(shard_header(shard))
            for tensor in shard.tensors:
                num_bytes = sum(file.write(buffer) for buffer in read(tensor))
                if num_bytes != tensor.nbytes:
                    raise ValueError(f"tensor {tensor.name}: {num_bytes} bytes given, {tensor.nbytes} are needed")
    for name, data in index_files(shards).items():
        write_whole(Path(directory) / name, data)
    return shards


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it names {shown(twice)} twice")
    return made


def _checked_entries(path: Path, header: dict[str, Any], position: int) -> dict[str, TensorEntry]:
    """Those whose bytes begin at `position` of the file. Raises ValueError where they leave a gap, or overlap."""
    spans = []
    for name, fields in header.items():
        dtype, shape, offsets = (fields[key] for key in ("dtype", "shape", "data_offsets"))
        if dtype not in ITEM_SIZES:
            raise ValueError(f"tensor {shown(name)}: dtype is {shown(dtype)}; one of {', '.join(ITEM_SIZES)} is needed")
        are_lists = type(shape) is type(offsets) is list
        if not (are_lists and are_sizes([*shape, *offsets]) and len(offsets) == 2 and len(shape) <= 64):
            raise ValueError(
                f"tensor {shown(name)}: shape {shown(shape)} and data_offsets {shown(offsets)} are no sizes"
            )
        spans.append((*offsets, name, dtype, tuple(shape)))
    done, entries = 0, {}
    for begin, end, name, dtype, shape in sorted(spans):
        if begin != done or end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
            place = f"{dtype} {shown(list(shape))} cannot lie at [{begin}, {end})"
            raise ValueError(f"tensor {shown(name)}: {place}, behind the {done} bytes of those before it")
        entries[name] = TensorEntry(path, dtype, shape, position + begin, end - begin)
        done = end
    return entries


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> file name."""
    index = read_json(path, open_verified)
    weight_map = index.get("weight_map") if type(index) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise UserError(f'{path}: an object "weight_map" from tensor names to file names is needed')
    for name, file_name in weight_map.items():
        if not is_file_name(file_name):
            found = f"tensor {shown(name)}: the file is {shown(file_name)}"
            raise UserError(f"{path}: {found}; the name of a file in this folder is needed")
    return weight_map


def _files_without_index(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise UserError(
            f"{directory}: no *.safetensors in this folder; a Hugging Face checkpoint in safetensors files is needed"
        )
    numbered = [match for name in names if (match := re.search(r"-(\d+)-of-(\d+)\.safetensors$", name))]
    if numbered and len(numbered) != int(numbered[0][2]):
        raise UserError(
            f"{directory}: {len(numbered)} of {int(numbered[0][2])} files and no {INDEX_FILE}; fetch the rest"
        )
    return names
