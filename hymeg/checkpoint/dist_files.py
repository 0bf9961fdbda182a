"""The files of a distributed (Megatron torch_dist, PyTorch DCP) checkpoint, and how they are read without torch, a
process group or a model.

A checkpoint folder holds one folder for each iteration, `iter_0000100` or `release` for one that no training made, and
the tracker `latest_checkpointed_iteration.txt`, which names one of them ("100" or "release"). An iteration's folder
holds: `*.distcp`, stored tensors and objects one after the other; `.metadata`, a pickle that says for each key its
dtype, global shape and chunks (offset and shape in the global tensor), and for each chunk its file, position and
length; `metadata.json`, which names the format and, written last, makes the folder a checkpoint. What is no tensor
(flags, version) is one object, key `common_state/shard_0_1`: torch.save of a list of one dictionary. Sources:
torch/distributed/checkpoint/{metadata,filesystem}.py; megatron/core/dist_checkpointing/{core,serialization}.py.

`.metadata` is not trusted: nothing in it is imported or run, and every number is checked before anything is read
through it.
"""

import itertools
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.stored_tensor import STORAGES, Shape
from hymeg.errors import UserError
from hymeg.hf.files import read_json, shown

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
METADATA, FORMAT_FILE = ".metadata", "metadata.json"
SOURCE_FILE = "source.json"  # beside the tracker: what training converted the checkpoint from, by itself
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.", "mtp.")
COMMON_STATE_KEY = "common_state/shard_0_1"
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # as in safetensors' ITEM_SIZES -> torch's name
_MAX_METADATA_BYTES = 4 << 30


class StoredChunk(NamedTuple):
    """A block of a tensor and where it is stored: `length` bytes from `position` on."""

    file: str
    position: int
    length: int
    offset: Shape
    shape: Shape


class StoredTensor(NamedTuple):
    """A tensor in its chunks, which together fill it exactly once."""

    dtype: str  # as in safetensors' ITEM_SIZES
    shape: Shape
    chunks: tuple[StoredChunk, ...]


class DistCheckpoint(NamedTuple):
    """The model's part of one iteration's folder."""

    folder: Path
    iteration: int | None  # None: a release
    tensors: dict[str, StoredTensor]
    has_optimizer: bool


class _Record:
    """Stands for any object in `.metadata`: its state is kept, none of its code is run."""

    def __init__(self, *arguments: Any):
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
}
_CLASSES: dict[tuple[str, str], type] = {
    (module, name): type(name, (_Record,), {}) for module, names in _RECORDS.items() for name in names.split()
}
_FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): lambda *parts: parts,
    ("pathlib._local", "PosixPath"): lambda *parts: parts,
}
_Metadata, _Tensor = (
    _CLASSES[(_TORCH := "torch.distributed.checkpoint.metadata"), "Metadata"],
    _CLASSES[_TORCH, "TensorStorageMetadata"],
)
_DTYPE_NAME = re.compile(r"(bfloat16|u?int(8|16|32|64)|float(16|32|64|8_\w+)|bool|complex(64|128))")


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and _DTYPE_NAME.fullmatch(name):
            return name
        found = _CLASSES.get((module, name)) or _FUNCTIONS.get((module, name))
        if found is None:
            raise UserError(
                f"it names {shown(f'{module}.{name}')}, which has no place in a checkpoint's metadata: do not load "
                "this file"
            )
        return found


def iteration_folder(directory: str | os.PathLike, iteration: int | None = None) -> tuple[Path, int | None]:
    """The folder of one iteration (None in the result: a release) in a checkpoint folder: the tracker's, or
    `iteration`.

    `directory` may also be an iteration's folder itself.

    Raises:
        UserError: there is no such folder, no tracker, or the iteration was not saved to the end.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; give the folder of a distributed checkpoint (with {TRACKER})")
    if (directory / FORMAT_FILE).is_file() and iteration is None:
        named = re.fullmatch(r"iter_(\d+)", directory.resolve().name)
        return directory, int(named[1]) if named else None
    names = {
        name: int(match[1])
        for name in sorted(os.listdir(directory))
        if (match := re.fullmatch(r"iter_(\d{7,18})", name))
    }
    if (directory / RELEASE).is_dir():
        names[RELEASE] = None
    complete = [name for name in names if (directory / name / FORMAT_FILE).is_file()]
    available = f"complete in it: {', '.join(complete[-5:])}" if complete else "there is no complete one in it"
    if iteration is None:
        if not (directory / TRACKER).is_file():
            hint = "; an unfinished conversion? run it again" if directory.name.endswith(".partial") else ""
            raise UserError(
                f"{directory}: not a distributed checkpoint: no {TRACKER} "
                f"({available}){hint or '; give --iteration N or the right folder'}"
            )
        content = _tracker_content(directory / TRACKER)
        if content != RELEASE and not re.fullmatch(r"\d{1,18}", content):
            raise UserError(
                f"{directory / TRACKER}: says {shown(content)}; an iteration or {RELEASE!r} is needed ({available})"
            )
        iteration = None if content == RELEASE else int(content)
    name = RELEASE if iteration is None else f"iter_{iteration:07d}"
    if name not in complete:
        raise UserError(
            f"{directory}: {name} is missing or was not saved to the end ({available}); give --iteration N of a "
            "complete one"
        )
    return directory / name, iteration


def _tracker_content(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(100).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); write the iteration to load into it, or {RELEASE!r}"
        ) from None


def open_dist_checkpoint(directory: str | os.PathLike, iteration: int | None = None) -> DistCheckpoint:
    """Where every tensor of the model lies. Optimizer state and objects (`_extra_state`, random states) are left out.

    Raises:
        UserError: as `iteration_folder`; the metadata are broken, hostile or of another format; a file is missing or
            too short; a tensor's chunks leave a gap or overlap; a dtype is none of BF16, F16, F32.
    """
    folder, iteration = iteration_folder(directory, iteration)
    found = read_json(folder / FORMAT_FILE)
    if type(found) is not dict or found.get("sharded_backend") != FORMAT["sharded_backend"]:
        raise UserError(
            f"{folder / FORMAT_FILE}: holds {shown(found)}; sharded_backend torch_dist is needed (--ckpt-format "
            "torch_dist)"
        )
    path = folder / METADATA
    metadata = _read_metadata(path)
    try:
        described = {
            key: entry.state for key, entry in metadata.get("state_dict_metadata").items() if isinstance(entry, _Tensor)
        }
        places = _places(folder, metadata.get("storage_data"))
        tensors = {
            key: _stored_tensor(key, entry, places) for key, entry in described.items() if key.startswith(MODEL_KEYS)
        }
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    has_optimizer = any(
        re.match(r"(chained_\d+\.)?optimizer\.", str(key)) for key in metadata.get("state_dict_metadata")
    )
    return DistCheckpoint(folder, iteration, tensors, has_optimizer)


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
            key: tuple(entry.state["size"]) if isinstance(entry, _Tensor) else None for key, entry in entries.items()
        }
        if not all(type(key) is str and (shape is None or _is_shape(shape)) for key, shape in shapes.items()):
            raise ValueError("a name or a shape is none")
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None
    return shapes


def _read_metadata(path: Path) -> _Record:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_METADATA_BYTES:
                raise UserError(
                    f"{path}: larger than {_MAX_METADATA_BYTES >> 30} GiB; this is not a checkpoint's metadata"
                )
            metadata = _MetadataReader(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; copy the checkpoint again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever unpickling a broken file raises; nothing of the file's own is run
        raise UserError(
            f"{path}: not a checkpoint's metadata ({type(error).__name__}: {error}); copy the checkpoint again"
        ) from None
    if not isinstance(
        metadata, _Metadata | _CLASSES["megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"]
    ):
        raise UserError(f"{path}: not a checkpoint's metadata: it holds {shown(type(metadata).__name__)}")
    return metadata


def _places(folder: Path, storage_data: Any) -> dict[tuple[str, Shape], tuple[str, int, int]]:
    """(key, offset) -> file, position, length; each inside its file."""
    sizes: dict[str, int] = {}
    places = {}
    for index, info in storage_data.items():
        key, offset = index.get("fqn"), index.get("offset")
        if offset is None or not str(key).startswith(MODEL_KEYS):
            continue
        file, position, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if type(file) is not str or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise UserError(f"{shown(key)} lies in file {shown(file)}; the name of a file in this folder is needed")
        if info.get("transform_descriptors"):
            raise UserError(
                f"{shown(key)} is stored transformed ({shown(info.get('transform_descriptors'))}); only plain storage "
                "can be read"
            )
        if file not in sizes:
            if not (folder / file).is_file():
                raise UserError(f"file {file} is missing in {folder}; copy the checkpoint again")
            sizes[file] = os.path.getsize(folder / file)
        if not (_is_shape((position, length)) and position + length <= sizes[file]):
            raise UserError(
                f"{shown(key)} lies at {shown(position)} for {shown(length)} bytes in {file}, which has {sizes[file]}: "
                "truncated; copy it again"
            )
        places[key, tuple(offset)] = (file, position, length)
    return places


def _stored_tensor(
    key: str, entry: Mapping[str, Any], places: Mapping[tuple[str, Shape], tuple[str, int, int]]
) -> StoredTensor:
    shape, torch_dtype = tuple(entry["size"]), entry["properties"].state[0]
    dtype = next((dtype for dtype, name in TORCH_DTYPES.items() if name == torch_dtype), None)
    if dtype is None:
        raise UserError(f"{key} is {shown(torch_dtype)}; one of {', '.join(TORCH_DTYPES.values())} is needed")
    chunks = []
    for chunk in entry["chunks"]:
        offset, size = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if (key, offset) not in places:
            raise UserError(
                f"{key}: no file is given for its chunk at {list(offset)}; the checkpoint was not saved to the end, "
                "copy it again"
            )
        chunks.append(StoredChunk(*places[key, offset], offset, size))
    if not _is_shape(shape) or not all(
        _is_shape(c.offset) and _is_shape(c.shape) and len(c.offset) == len(c.shape) == len(shape) for c in chunks
    ):
        raise UserError(f"{key}: its shape {shown(shape)} and those of its chunks are not sizes of one number of axes")
    if not _fill(shape, chunks):
        raise UserError(
            f"{key}: its {len(chunks)} chunks do not fill {list(shape)} exactly once; parts of the checkpoint are "
            "missing"
        )
    return StoredTensor(dtype, shape, tuple(chunks))


def _is_shape(values: Iterable[Any]) -> bool:
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


assert TORCH_DTYPES.keys() == STORAGES.keys()
