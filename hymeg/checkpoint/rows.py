"""A checkpoint's tensors as rows, whichever format they are stored in: the one way in which conversion and comparison
read them.

A distributed tensor of shape [..., columns] is seen as a matrix [rows, columns]; a vector as one row. Every Hugging
Face tensor is then a few ranges of whole rows of it, in order: gate and up projections and experts one range, the query
heads one range for each KV group. What is stored may be cut otherwise: one file holds a range of rows, or, saved under
tensor parallelism, some columns of it. A `RowTensor` knows which bytes of which file hold which rows and columns, a
`RowReader` reads any range of rows, a block at a time, so that memory does not grow with the checkpoint.
"""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hymeg.checkpoint.dist_files import DistCheckpoint, StoredTensor
from hymeg.checkpoint.mapping import Entry
from hymeg.checkpoint.stored_tensor import ElementFinder, FileWindow, Shape
from hymeg.errors import UserError
from hymeg.hf.safetensors_files import ITEM_SIZES, TensorEntry

BLOCK_BYTES = 512 << 10  # read and written at once: inside the cache of a core, which blocks of megabytes are not
_MAX_OPEN_FILES = 256  # a checkpoint of a thousand ranks has more files than a process may open

Range = tuple[int, int]


class Piece(NamedTuple):
    """Bytes of one file that hold some columns of consecutive rows, from `row` of the stored tensor on. `length` 0:
    bare elements at `position`; otherwise a stored tensor of that many bytes is there, of shape `shape`."""

    file: str  # not Path, which is slow to compare, hash and pickle
    position: int
    length: int
    shape: Shape
    row: int
    first_column: int
    num_columns: int


class Band(NamedTuple):
    """Rows `start` to `stop` lie in these pieces, from the first column to the last."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


class RowTensor(NamedTuple):
    """A distributed tensor and the bytes that hold it; the bands follow each other without a gap."""

    key: str
    dtype: str  # as in safetensors' ITEM_SIZES
    shape: Shape
    bands: tuple[Band, ...]

    def only(self, ranges: list[Range]) -> "RowTensor":
        """With the bands that these rows need and no others: little to hand on."""
        low, high = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        first = bisect_right(self.bands, low, key=lambda band: band.start) - 1
        return self._replace(bands=self.bands[first : bisect_left(self.bands, high, key=lambda band: band.start)])

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.num_columns * ITEM_SIZES[self.dtype]


def num_rows(shape: Shape) -> int:
    return math.prod(shape[:-1])


def row_ranges(entry: Entry) -> list[Range]:
    """The rows [start, stop) of the distributed tensor that are the Hugging Face tensor, in its order."""
    if len(entry.view) == 1:
        return [(0, 1)]
    assert entry.offset[-1] == 0 and entry.extent[-1] == entry.view[-1]
    return _ranges(entry.view, entry.offset, entry.extent)


def _ranges(shape: Shape, offset: Shape, extent: Shape) -> list[Range]:
    """The rows of a block, where shape is [columns], [rows, columns] or [slices, rows, columns]."""
    if len(shape) == 1:
        return [(0, 1)]
    if len(shape) == 2:
        return [(offset[0], offset[0] + extent[0])]
    height = shape[1]
    if extent[1] == height:
        return [(offset[0] * height, (offset[0] + extent[0]) * height)]
    return [
        (i * height + offset[1], i * height + offset[1] + extent[1]) for i in range(offset[0], offset[0] + extent[0])
    ]


def rows_of_dist(checkpoint: DistCheckpoint) -> dict[str, RowTensor]:
    """The tensors of a distributed checkpoint, by key."""
    return {key: _of_stored(checkpoint.folder, key, tensor) for key, tensor in checkpoint.tensors.items()}


def _of_stored(folder: Path, key: str, tensor: StoredTensor) -> RowTensor:
    if not 1 <= len(tensor.shape) <= 3:
        raise UserError(f"{folder}: {key} has shape {list(tensor.shape)}; one to three axes are needed")
    bands: dict[Range, list[Piece]] = {}
    for chunk in tensor.chunks:
        row = 0
        for start, stop in _ranges(tensor.shape, chunk.offset, chunk.shape):
            piece = Piece(
                os.path.join(folder, chunk.file),
                chunk.position,
                chunk.length,
                chunk.shape,
                row,
                chunk.offset[-1],
                chunk.shape[-1],
            )
            bands.setdefault((start, stop), []).append(piece)
            row += stop - start
    ordered = (Band(*rows, tuple(sorted(bands[rows], key=lambda piece: piece.first_column))) for rows in sorted(bands))
    return RowTensor(key, tensor.dtype, tensor.shape, tuple(ordered))


def rows_of_hf(entries: list[Entry], tensors: Mapping[str, TensorEntry]) -> dict[str, RowTensor]:
    """The distributed tensors that Hugging Face tensors make up, by key.

    Raises:
        UserError: tensors that become one differ in dtype.
    """
    bands: dict[str, list[Band]] = {}
    firsts: dict[str, Entry] = {}
    for entry in entries:
        stored, first = tensors[entry.hf_name], firsts.setdefault(entry.dist_key, entry)
        if stored.dtype != tensors[first.hf_name].dtype:
            both = f"{first.hf_name} is {tensors[first.hf_name].dtype} and {entry.hf_name} is {stored.dtype}"
            raise UserError(f"{both}, but both are parts of {entry.dist_key}; convert them to one dtype")
        columns, row = entry.hf_shape[-1], 0
        for start, stop in row_ranges(entry):
            piece = Piece(str(stored.file), stored.offset, 0, entry.hf_shape, row, 0, columns)
            bands.setdefault(entry.dist_key, []).append(Band(start, stop, (piece,)))
            row += stop - start
    return {
        key: RowTensor(
            key,
            tensors[firsts[key].hf_name].dtype,
            firsts[key].dist_shape,
            tuple(sorted(bands[key], key=lambda band: band.start)),
        )
        for key in bands
    }


def block_height(tensor: RowTensor) -> int:
    """How many of its rows are read at once."""
    return max(BLOCK_BYTES // max(tensor.row_bytes, 1), 1)


class RowReader:
    """Reads rows. A context manager: it keeps files open."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._finder = ElementFinder()

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def blocks(self, tensor: RowTensor, ranges: list[Range], height: int | None = None) -> Iterator[memoryview]:
        """The bytes of these rows in order, in blocks of at most BLOCK_BYTES or one row; each is gone when the next is
        asked for.

        Args:
            height: rows of a block at most, to read two tensors in step.

        Raises:
            UserError: a file cannot be read, or does not hold what the checkpoint says.
        """
        height = height or block_height(tensor)
        longest = min(max((stop - start for start, stop in ranges), default=0), height)
        buffer = memoryview(bytearray(longest * tensor.row_bytes))
        for start, stop in ranges:
            for low in range(start, stop, height):
                high = min(low + height, stop)
                block = buffer[: (high - low) * tensor.row_bytes]
                self._read(tensor, low, high, block)
                yield block

    def _read(self, tensor: RowTensor, low: int, high: int, block: memoryview) -> None:
        at = bisect_right(tensor.bands, low, key=lambda band: band.start) - 1
        while low < high:
            band = tensor.bands[at]
            end = min(high, band.stop)
            part, block = block[: (end - low) * tensor.row_bytes], block[(end - low) * tensor.row_bytes :]
            if len(band.pieces) == 1:
                self._read_piece(tensor, band.pieces[0], low - band.start, part)
            else:
                unsigned = np.dtype(f"u{ITEM_SIZES[tensor.dtype]}")
                whole = np.frombuffer(part, unsigned).reshape(end - low, tensor.num_columns)
                for piece in band.pieces:
                    columns = np.empty((end - low, piece.num_columns), unsigned)
                    self._read_piece(tensor, piece, low - band.start, memoryview(columns).cast("B"))
                    whole[:, piece.first_column : piece.first_column + piece.num_columns] = columns
            low, at = end, at + 1

    def _read_piece(self, tensor: RowTensor, piece: Piece, row: int, into: memoryview) -> None:
        try:
            if piece.file not in self._descriptors:
                while len(self._descriptors) >= _MAX_OPEN_FILES:
                    os.close(self._descriptors.pop(next(iter(self._descriptors))))
                self._descriptors[piece.file] = os.open(piece.file, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors[piece.file]
            position = piece.position
            if piece.length:
                window = FileWindow(descriptor, piece.position, piece.length)
                position += self._finder.find(
                    window, tensor.dtype, piece.shape, f"{piece.file}: {tensor.key} at byte {piece.position}"
                )
            position += (piece.row + row) * piece.num_columns * ITEM_SIZES[tensor.dtype]
            while into:
                count = os.preadv(descriptor, [into], position)
                if count == 0:
                    raise UserError(
                        f"{piece.file}: ends at byte {position}, inside {tensor.key}; it was changed while it was "
                        "read, or is truncated"
                    )
                into, position = into[count:], position + count
        except OSError as error:
            raise UserError(f"{piece.file}: cannot be read: {error.strerror or error}") from error


def converted(data: memoryview, found: str, wanted: str) -> memoryview:
    """The numbers in `data` in another dtype, rounded to the nearest, ties to even. dtypes are "BF16", "F16" or
    "F32".
    """
    if found == wanted:
        return data
    if found == "BF16":
        numbers = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[found]).astype("<f4")
    if wanted == "BF16":
        bits = numbers.view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = np.where(np.isnan(numbers), (bits >> 16) | 0x40, rounded).astype("<u2")
    else:
        result = numbers.astype({"F16": "<f2", "F32": "<f4"}[wanted])
    return memoryview(result).cast("B")
