"""A distributed checkpoint as a sink: into which chunks, and into which files, its tensors go.

Megatron reads whole chunks, whatever part of one a rank needs. So they are cut where tensor and expert parallelism cut
too: between experts, between gate and up projections, between KV groups; and no chunk of several rows, or KV
groups, is larger than MAX_CHUNK_BYTES.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping

from hymeg.checkpoint.adapter_settings import ADAPTER_FILE, AdapterSettings
from hymeg.checkpoint.dist_files import COMMON_STATE_KEY, FORMAT, FORMAT_FILE, METADATA, StoredChunk, StoredTensor
from hymeg.checkpoint.mapping import Entry, Range, Shape, hf_entries, num_rows
from hymeg.checkpoint.pickles import called, plain
from hymeg.checkpoint.row_tensors import RowTensor
from hymeg.checkpoint.sinks.transfer import FilesToWrite, Task, files_to_write, num_files, shares
from hymeg.checkpoint.stored_tensor import stored_object
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ITEM_SIZES, WEIGHTS

MAX_CHUNK_BYTES = 64 << 20
_TORCH = "torch.distributed.checkpoint.metadata"


def files_of_dist(config: HyConfig, tensors: Mapping[str, RowTensor], dtype: str | None, workers: int) -> FilesToWrite:
    """An iteration's folder that holds `tensors`, in `dtype` (None: their own; the expert bias is always F32)."""

    def first_byte(task: Task) -> tuple[str, int, int]:
        row = task.rows[0][0]
        return *task.tensor.first_byte(row), row

    # In the order in which the source's files are read from beginning to end.
    return _files_of_chunks(config, sorted(_chunks(config, tensors, dtype), key=first_byte), {}, workers)


def files_of_adapter(
    config: HyConfig, settings: AdapterSettings, tensors: Mapping[str, RowTensor], dtype: str | None, workers: int
) -> FilesToWrite:
    """An iteration's folder that holds an adapter, a chunk for each expert's A and B."""
    chunks = []
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.key):
        height = num_rows(tensor.shape[-2:])
        for start in range(0, num_rows(tensor.shape), height):
            chunks.append(_chunk(tensor, (start, start + height), dtype or tensor.dtype_kept))
    return _files_of_chunks(config, chunks, {ADAPTER_FILE: settings.to_bytes()}, workers)


def _files_of_chunks(config: HyConfig, chunks: list[Task], beside: dict[str, bytes], workers: int) -> FilesToWrite:
    """A file holds what is consecutive in `chunks`, which have no place yet."""
    tasks: list[Task] = []
    stored: dict[str, StoredTensor] = {}
    in_files = shares(chunks, num_files(sum(chunk.nbytes for chunk in chunks), workers))
    for i, share in enumerate(in_files):
        position = 0
        for chunk in share:
            task = chunk._replace(file=f"__{i}_0.distcp", position=position)
            tasks.append(task)
            key, shape, length = task.tensor.key, task.tensor.shape, task.stored_length
            if key not in stored:
                stored[key] = StoredTensor(task.dtype, shape, [])
            stored[key].chunks.append(StoredChunk(task.file, position, length, *_block(shape, *task.rows[0])))
            position += length
    for tensor in stored.values():
        tensor.chunks.sort(key=lambda chunk: chunk.offset)
    state, state_file = _common_state(config), f"__{len(in_files)}_0.distcp"
    described = _metadata(stored, {COMMON_STATE_KEY: (state_file, 0, len(state))})
    last = {FORMAT_FILE: json.dumps(FORMAT).encode()}
    return files_to_write(tasks, workers, {state_file: state, METADATA: described, **beside}, last)


def _chunk(tensor: RowTensor, rows: Range, dtype: str) -> Task:
    return Task(tensor, [rows], dtype, "", 0, _block(tensor.shape, *rows)[1])


def _chunks(config: HyConfig, tensors: Mapping[str, RowTensor], dtype: str | None) -> Iterator[Task]:
    """Every chunk, without its place."""
    for entry in hf_entries(config, "hub"):
        tensor = tensors[entry.dist_key]
        if tensor.shape != entry.dist_shape:
            tensor = tensor._replace(shape=entry.dist_shape)  # without a vocabulary's padding rows
        to_write = "F32" if entry.is_fp32_buffer else dtype or tensor.dtype_kept
        for rows in _cut(entry, ITEM_SIZES[to_write]):
            yield _chunk(tensor, rows, to_write)


def _cut(entry: Entry, item_size: int) -> Iterator[Range]:
    """The rows of the chunks that hold a hub tensor; with q those of the whole tensor, in which k and v lie too."""
    (start, stop), unit = entry.rows[0], 1
    if len(entry.rows) > 1:
        if start > 0:
            return
        stop = num_rows(entry.dist_shape)
        unit = stop // len(entry.rows)  # a KV group
    num_units = (stop - start) // unit
    most = max(MAX_CHUNK_BYTES // (unit * entry.dist_shape[-1] * item_size), 1)
    step = math.ceil(num_units / math.ceil(num_units / most)) * unit
    for row in range(start, stop, step):
        yield row, min(row + step, stop)


def _block(shape: Shape, start: int, stop: int) -> tuple[Shape, Shape]:
    """Offset and extent, in a tensor of `shape`, of rows that lie in one slice of it."""
    if len(shape) == 1:
        return (0,), shape
    in_stack, first = divmod(start, shape[-2])
    offset, extent = (first, 0), (stop - start, shape[-1])
    return (offset, extent) if len(shape) == 2 else ((in_stack, *offset), (1, *extent))


# ---- what describes it: `.metadata` and the object beside the tensors; `dist_files` says what they hold


def _common_state(config: HyConfig) -> bytes:
    """The object of key `dist_files.COMMON_STATE_KEY`. Megatron compares these flags with its own, and wants a version
    under virtual pipelines.
    """
    flags = argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    return stored_object([{"args": flags, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}])


def _metadata(tensors: Mapping[str, StoredTensor], objects: Mapping[str, tuple[str, int, int]]) -> bytes:
    """`.metadata` for these tensors and objects (key -> file, position, length)."""
    described = [plain(key) + _instance(_TORCH, "BytesStorageMetadata") for key in objects]
    located = [_location(key, None, *place) for key, place in objects.items()]
    layout = called("torch.serialization._get_layout", plain("torch.strided"))
    contiguous = called(f"{_TORCH}._MEM_FORMAT_ENCODING", plain(0))
    for key, tensor in tensors.items():
        chunks = [
            _instance(_TORCH, "ChunkStorageMetadata", offsets=_size(chunk.offset), sizes=_size(chunk.shape))
            for chunk in tensor.chunks
        ]
        dtype = f"ctorch\n{WEIGHTS[tensor.dtype].torch}\n".encode()
        state = [b"(", dtype, layout, plain(False), contiguous, plain(False), b"t"]
        attributes = {
            "properties": _instance(_TORCH, "TensorProperties") + b"".join(state) + b"b",
            "size": _size(tensor.shape),
            "chunks": b"](" + b"".join(chunks) + b"e",
        }
        described.append(plain(key) + _instance(_TORCH, "TensorStorageMetadata", **attributes))
        located += [_location(key, chunk.offset, chunk.file, chunk.position, chunk.length) for chunk in tensor.chunks]
    meta = {name: plain(None) for name in ("checkpoint_id", "save_id", "load_id")}
    # Joined once: the two long lists are most of the file.
    attributes = {
        "state_dict_metadata": [b"}(", *described, b"u"],
        "planner_data": [plain(None)],
        "storage_data": [b"}(", *located, b"u"],
        "storage_meta": [_instance(_TORCH, "StorageMeta", **meta, modules=b"]")],
        "version": [plain("1.0.0")],
    }
    named = itertools.chain.from_iterable([plain(name), *pieces] for name, pieces in attributes.items())
    return b"".join([b"\x80\x02", _instance(_TORCH, "Metadata"), b"}(", *named, b"ub."])


def _instance(module: str, name: str, **state: bytes) -> bytes:
    """The pickle of an object with these attributes, themselves pickled."""
    made = f"c{module}\n{name}\n".encode() + b")\x81"
    return b"".join([made, b"}(", *(_text(key) + value for key, value in state.items()), b"ub"]) if state else made


@functools.cache
def _text(text: str | None) -> bytes:
    return plain(text)


@functools.cache
def _size(shape: Shape) -> bytes:
    return called("torch.Size", plain(shape))


def _location(key: str, offset: Shape | None, file: str, position: int, length: int) -> bytes:
    """An item of storage_data: where the chunk at `offset` (None: the object) of this key lies."""
    of_chunk = {"offset": _size(offset)} if offset is not None else {}
    index = _instance(_TORCH, "MetadataIndex", fqn=_text(key), index=_text(None), **of_chunk)
    info = {"relative_path": _text(file), "offset": plain(position), "length": plain(length)}
    return index + _instance("torch.distributed.checkpoint.filesystem", "_StorageInfo", **info)
