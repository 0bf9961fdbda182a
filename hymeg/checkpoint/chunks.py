"""Into which chunks, and in which files, a distributed checkpoint is written. Arithmetic only: nothing is read or
written here.

Megatron reads whole chunks, whatever part of one a rank needs. So they are cut where tensor and expert parallelism cut
too: between experts, between gate and up projections, between KV groups; and no chunk is larger than MAX_CHUNK_BYTES.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

from hymeg.checkpoint.dist_files import StoredChunk, StoredTensor
from hymeg.checkpoint.mapping import Entry, plan
from hymeg.checkpoint.rows import RowTensor, num_rows
from hymeg.checkpoint.transfer import Task, num_files, shares, stored_length
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import ITEM_SIZES

MAX_CHUNK_BYTES = 64 << 20


def plan_dist(
    config: HyConfig, tensors: Mapping[str, RowTensor], files: Sequence[str], workers: int
) -> tuple[list[Task], dict[str, StoredTensor]]:
    """Every chunk to write, and where each will lie.

    A file holds what is consecutive in the source's.

    Args:
        tensors: the source's, by key.
        files: the source's, in the order in which they are to be read.
    """
    chunks = []
    for entry in plan(config, "hub"):
        tensor = tensors[entry.dist_key]
        if entry.view != entry.dist_shape and entry.offset[1] > 0:
            continue  # k and v: their tensor's chunks are made with q's
        dtype = "F32" if entry.is_fp32_buffer else tensor.dtype
        for offset, shape in _chunks(entry, ITEM_SIZES[dtype]):
            first = offset[0] if len(shape) < 3 else offset[0] * entry.dist_shape[1] + offset[1]
            rows = (first, first + num_rows(shape)) if len(shape) > 1 else (0, 1)
            nbytes = math.prod(shape) * ITEM_SIZES[dtype]
            chunks.append(
                (offset, Task(f"{entry.dist_key} {list(offset)}", tensor, [rows], dtype, nbytes, "", 0, shape))
            )
    file_numbers = {file: number for number, file in enumerate(files)}
    chunks.sort(key=lambda chunk: _first_byte(chunk[1], file_numbers))
    offsets = {task.name: offset for offset, task in chunks}
    tasks, stored = [], {}
    num_bytes = sum(task.nbytes for _, task in chunks)
    for number, share in enumerate(shares([task for _, task in chunks], num_files(num_bytes, workers))):
        position = 0
        for task in share:
            placed = task._replace(file=f"__{number}_0.distcp", position=position)
            length = stored_length(placed)
            tasks.append(placed)
            stored.setdefault(task.tensor.key, []).append(
                StoredChunk(placed.file, position, length, offsets[task.name], task.stored_shape)
            )
            position += length
    dtypes = {task.tensor.key: task.dtype for task in tasks}
    return tasks, {
        key: StoredTensor(dtypes[key], tensors[key].shape, tuple(sorted(of_key, key=lambda c: c.offset)))
        for key, of_key in stored.items()
    }


def _chunks(entry: Entry, item_size: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the chunks that hold a hub entry; for q, those of the whole tensor that it lies in."""
    if len(entry.view) == 1:
        yield entry.offset, entry.extent
        return
    is_shuffled = entry.view != entry.dist_shape
    unit = entry.view[1] if is_shuffled else 1
    *lead, start = (0,) if is_shuffled else entry.offset[:-1]
    height = entry.dist_shape[0] if is_shuffled else entry.extent[-2]
    columns = entry.dist_shape[-1]
    units_per_chunk = math.ceil(height // unit / math.ceil(height * columns * item_size / MAX_CHUNK_BYTES))
    step = units_per_chunk * unit
    for row in range(0, height, step):
        yield (*lead, start + row, 0), (*(1 for _ in lead), min(step, height - row), columns)


def _first_byte(task: Task, file_numbers: Mapping[str, int]) -> tuple[int, int, int]:
    """Where the task's first row lies in the source, for reading files from beginning to end."""
    low, bands = task.ranges[0][0], task.tensor.bands
    piece = bands[bisect_right(bands, low, key=lambda band: band.start) - 1].pieces[0]
    return file_numbers[piece.file], piece.position, low
