"""A distributed checkpoint as a source of rows, read without torch, a process group or a model.

`.metadata` is not trusted: nothing in it is imported or run, and every number is checked before anything is read
through it.
"""

import functools
import io
import itertools
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hymeg.checkpoint.companions import config_folder
from hymeg.checkpoint.dist_files import (
    COMMON_STATE_KEY,
    FORMAT,
    FORMAT_FILE,
    METADATA,
    StoredChunk,
    StoredTensor,
    iteration_folder,
)
from hymeg.checkpoint.mapping import Range, Shape, row_ranges
from hymeg.checkpoint.row_tensors import Band, Piece, RowTensor, Source
from hymeg.checkpoint.sources.foreign_keys import is_of_model, under_our_keys
from hymeg.checkpoint.verification import verification_notes
from hymeg.checksums import Damaged, open_verified
from hymeg.errors import UserError
from hymeg.files import opened, read_json, shown
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS

_MAX_METADATA_BYTES, _MAX_FLAGS_BYTES = 4 << 30, 64 << 20
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\..*")
_OTHER_STATE = re.compile(r"(rng_state|rerun_state_machine_state|common_state)\b.*")


def open_dist(directory: str | os.PathLike, iteration: int | None = None) -> Source:
    """Where every tensor of the model, or of an adapter, lies. Optimizer state and objects (`_extra_state`, random
    states) are left out.

    Raises:
        UserError: as `iteration_folder`; the metadata are broken, hostile or of another format; a file is missing or
            too short; a tensor's chunks leave a gap or overlap; a dtype is none of BF16, F16, F32; the gate and up
            projections are interleaved.
    """
    folder, iteration = iteration_folder(directory, iteration)
    found = read_json(folder / FORMAT_FILE, open_verified)
    if type(found) is not dict or found.get("sharded_backend") != FORMAT["sharded_backend"]:
        raise UserError(
            f"{folder / FORMAT_FILE}: holds {shown(found)}; sharded_backend torch_dist is needed (--ckpt-format "
            "torch_dist)"
        )
    path = folder / METADATA
    metadata = _read_metadata(path)
    try:
        entries = metadata.get("state_dict_metadata")
        keys = [key for key, entry in entries.items() if _is_a(entry, "TensorStorageMetadata")]
        locations = _locations(folder, metadata.get("storage_data"))
        tensors = {
            key: _row_tensor(folder, key, _stored_tensor(key, entries[key].state, locations))
            for key in keys
            if is_of_model(key)
        }
        others = [key for key in keys if key not in tensors]
        tensors, foreign = under_our_keys(tensors)
        _check_flags(folder, locations.get((COMMON_STATE_KEY, None)))
    except Damaged:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    unknown = tuple(key for key in others if not _OPTIMIZER.fullmatch(key) and not _OTHER_STATE.fullmatch(key))
    has_optimizer = any(_OPTIMIZER.fullmatch(key) for key in entries)
    of_config = config_folder(Path(directory), folder)
    config = HyConfig.from_dir(of_config) if of_config else None
    what = "distributed (torch_dist)"
    notes = list(verification_notes(folder, Path(directory)))
    if foreign:
        notes.append(f"read under another trainer's names: {len(foreign):,} tensors, such as {foreign[0]}")
    if objects := [key for key in entries if key not in keys and not _is_known_object(key)]:
        notes.append(
            f"not taken along, objects of unknown names: {', '.join(objects[:3])}{', ...' * (len(objects) > 3)}"
        )
    return Source(what, folder, config, tensors, tuple(notes), iteration, has_optimizer, unknown)


def _is_known_object(key: str) -> bool:
    """Object beside the tensors: Transformer Engine's, the optimizer's, Megatron's own."""
    of_layer = is_of_model(key) and "_extra_state" in key
    return of_layer or bool(_OPTIMIZER.fullmatch(key) or _OTHER_STATE.fullmatch(key))


def stored_shapes(folder: str | os.PathLike) -> dict[str, Shape | None]:
    """The global shape of everything that an iteration's folder holds, optimizer state included, by key; None for what
    is no tensor.

    Of the files only `.metadata` is read, and nothing in it is run.

    Raises:
        UserError: it is missing, broken or hostile.
    """
    path = Path(folder) / METADATA
    try:
        entries = _read_metadata(path).get("state_dict_metadata")
        shapes = {
            key: tuple(entry.state["size"]) if _is_a(entry, "TensorStorageMetadata") else None
            for key, entry in entries.items()
        }
        if not all(shape is None or _are_sizes(shape) for shape in shapes.values()):
            raise ValueError("a shape is none")
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None
    return shapes


def stored_places(folder: str | os.PathLike) -> list[tuple[str, str, int, int]]:
    """Key, file, position and length of everything that an iteration's folder holds, checksums or not. Raises as
    `stored_shapes` does.
    """
    path = Path(folder) / METADATA
    try:
        return [
            (index.get("fqn"), info.get("relative_path"), int(info.get("offset")), int(info.get("length")))
            for index, info in _read_metadata(path, opened).get("storage_data").items()
        ]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None


# ---- the pickle


class _Record:
    """Stands for any object in a pickle: its state is kept, none of its code is run."""

    def __init__(self, *arguments: Any, **_: Any):
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


@functools.cache
def _record_class(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


def _is_a(value: Any, *names: str) -> bool:
    return isinstance(value, _Record) and type(value).__name__ in names


# What Megatron's flags put into `.metadata` are records of these two packages, plans of every rank among them.
_RECORDS = re.compile(r"(torch\.distributed\.checkpoint|megatron\.core\.dist_checkpointing)\.[\w.]+")
_FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): lambda *parts: parts,
    ("pathlib._local", "PosixPath"): lambda *parts: parts,
}
_DTYPE_NAME = re.compile(r"(bfloat16|u?int(8|16|32|64)|float(16|32|64|8_\w+)|bool|complex(64|128))")


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and _DTYPE_NAME.fullmatch(name):
            return name
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if _RECORDS.fullmatch(module):
            return _record_class(name)
        found = shown(f"{module}.{name}")
        raise UserError(f"it names {found}, which has no place in a checkpoint's metadata: do not load this file")


def _read_metadata(path: Path, opened: Callable[[Path], BinaryIO] = open_verified) -> _Record:
    try:
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_METADATA_BYTES:
                most = f"{_MAX_METADATA_BYTES >> 30} GiB"
                raise UserError(f"{path}: larger than {most}; this is not a checkpoint's metadata")
            metadata = _MetadataReader(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; copy the checkpoint again") from None
    except Damaged:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever unpickling a broken file raises; nothing of the file's own is run
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a checkpoint's metadata ({reason}); copy the checkpoint again") from None
    if not _is_a(metadata, "Metadata", "MCoreMetadata"):
        raise UserError(f"{path}: not a checkpoint's metadata: it holds {shown(type(metadata).__name__)}")
    entries = metadata.get("state_dict_metadata")
    if type(entries) is not dict or not all(type(key) is str for key in entries):
        raise UserError(f"{path}: damaged: its state_dict_metadata maps no names; copy the checkpoint again")
    return metadata


class _FlagsReader(pickle.Unpickler):
    """Every name stands for a record."""

    def find_class(self, module: str, name: str) -> Any:
        return _record_class(name)

    def persistent_load(self, pid: Any) -> Any:
        return None


def _check_flags(folder: Path, location: tuple[str, int, int] | None) -> None:
    """Megatron's flags of the run, where they can be read: is there one under which the same bytes mean something
    else?
    """
    try:
        file, position, length = location
        with open_verified(folder / file) as opened:
            opened.seek(position)
            archive = zipfile.ZipFile(io.BytesIO(opened.read(min(length, _MAX_FLAGS_BYTES))))
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        flags = _FlagsReader(io.BytesIO(archive.read(name))).load()[0]["args"]
        interleaved = flags.get("moe_mlp_glu_interleave_size")
    except Damaged:
        raise
    except Exception:  # whatever a broken, foreign or missing object raises: it is not needed for anything else
        return
    if interleaved is not None:
        raise UserError(
            f"trained with --moe-mlp-glu-interleave-size {shown(interleaved)}: gate and up projections of the experts "
            "are interleaved, which cannot be exported; save it without"
        )


# ---- places


Locations = dict[tuple[str, Shape | None], tuple[str, int, int]]


def _locations(folder: Path, storage_data: Any) -> Locations:
    """(key, offset of the chunk; None for an object) -> file, position, length, each inside its file; the model's and
    the flags' only.
    """
    sizes: dict[str, int] = {}
    locations = {}
    for index, info in storage_data.items():
        key, offset = index.get("fqn"), index.get("offset")
        if type(key) is not str or not (key == COMMON_STATE_KEY or (offset is not None and is_of_model(key))):
            continue
        file, position, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if type(file) is not str or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise UserError(f"{shown(key)} lies in file {shown(file)}; the name of a file in this folder is needed")
        if info.get("transform_descriptors"):
            how = shown(info.get("transform_descriptors"))
            raise UserError(f"{shown(key)} is stored transformed ({how}); only plain storage can be read")
        if file not in sizes:
            if not (folder / file).is_file():
                raise UserError(f"file {file} is missing in {folder}; copy the checkpoint again")
            sizes[file] = os.path.getsize(folder / file)
        if not (_are_sizes((position, length)) and position + length <= sizes[file]):
            raise UserError(
                f"{shown(key)} lies at {shown(position)} for {shown(length)} bytes in {file}, which has {sizes[file]}: "
                "truncated; copy it again"
            )
        locations[key, None if offset is None else tuple(offset)] = (file, position, length)
    return locations


def _stored_tensor(key: str, entry: Mapping[str, Any], locations: Locations) -> StoredTensor:
    shape, torch_dtype = tuple(entry["size"]), entry["properties"].state[0]
    dtype = next((dtype for dtype, names in WEIGHTS.items() if names.torch == torch_dtype), None)
    if dtype is None:
        allowed = ", ".join(names.torch for names in WEIGHTS.values())
        raise UserError(f"{key} is {shown(torch_dtype)}; one of {allowed} is needed")
    chunks = []
    for chunk in entry["chunks"]:
        offset, size = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if (key, offset) not in locations:
            raise UserError(
                f"{key}: no file is given for its chunk at {list(offset)}; the checkpoint was not saved to the end, "
                "copy it again"
            )
        chunks.append(StoredChunk(*locations[key, offset], offset, size))
    if not _are_sizes(shape) or not all(
        _are_sizes(c.offset) and _are_sizes(c.shape) and len(c.offset) == len(c.shape) == len(shape) for c in chunks
    ):
        raise UserError(f"{key}: its shape {shown(shape)} and those of its chunks are not sizes of one number of axes")
    if not 1 <= len(shape) <= 3:
        raise UserError(f"{key} has shape {list(shape)}; one to three axes are needed")
    if not _fill(shape, chunks):
        raise UserError(
            f"{key}: its {len(chunks)} chunks do not fill {list(shape)} exactly once; parts of the checkpoint are "
            "missing"
        )
    return StoredTensor(dtype, shape, tuple(chunks))


def _are_sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _fill(shape: Shape, chunks: list[StoredChunk]) -> bool:
    """Whether the chunks are the cells of a grid over `shape`: cut along each axis wherever any chunk begins."""
    ends = []
    num_cells = 1
    for axis, length in enumerate(shape):
        cuts = sorted({chunk.offset[axis] for chunk in chunks})
        if cuts[:1] != [0]:
            return False
        num_cells *= len(cuts)
        ends.append(dict(itertools.pairwise([*cuts, length])))
    in_cells = all(
        c.offset[axis] + c.shape[axis] == ends[axis][c.offset[axis]] for c in chunks for axis in range(len(shape))
    )
    return in_cells and num_cells == len({chunk.offset for chunk in chunks}) == len(chunks)


def _row_tensor(folder: Path, key: str, tensor: StoredTensor) -> RowTensor:
    bands: dict[Range, list[Piece]] = {}
    for chunk in tensor.chunks:
        file, row = os.path.join(folder, chunk.file), 0
        for start, stop in row_ranges(tensor.shape, chunk.offset, chunk.shape):
            columns = chunk.offset[-1], chunk.shape[-1]
            piece = Piece(file, chunk.position, chunk.length, chunk.shape, row, *columns, tensor.dtype)
            bands.setdefault((start, stop), []).append(piece)
            row += stop - start
    ordered = (Band(*rows, tuple(sorted(bands[rows], key=lambda piece: piece.first_column))) for rows in sorted(bands))
    return RowTensor(key, tensor.dtype, tensor.shape, tuple(ordered))
