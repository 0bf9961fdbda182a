"""A checkpoint's tensors as rows, whichever format they are stored in: what sources give and what sinks take.

A distributed tensor of shape [..., columns] is seen as a matrix [rows, columns]; a vector as one row. Every Hugging
Face tensor is then a few ranges of whole rows of it, in order: gate and up projections and experts one range, the query
heads one range for each KV group. What is stored may be cut otherwise: one file holds a range of rows, or, saved under
tensor parallelism, some columns of it. A `RowTensor` knows which bytes of which file hold which rows and columns, a
`TensorReader` reads any range of rows, a block at a time, so that memory does not grow with the checkpoint. Rows may
also be made of those of other tensors (`MadeRows`).
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hymeg.checkpoint.mapping import Range, Shape, num_rows
from hymeg.checkpoint.rounding import converted, dequantised
from hymeg.checkpoint.stored_tensor import ElementFinder
from hymeg.checksums import Damaged, FilePart, Latest, ReadFile, expected_sum
from hymeg.errors import UserError
from hymeg.files import os_errors
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ITEM_SIZES

BLOCK_BYTES = 512 << 10  # read and written at once: inside the cache of a core, which blocks of megabytes are not
_MAX_OPEN_FILES = 256  # a checkpoint of a thousand ranks has more files than a process may open
_MAX_KEPT_BYTES = 256 << 20
_MAX_BLOCK_BYTES = 8 << 20  # of files that have checksums


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
    dtype: str
    scales: "Scales | None" = None  # of FP8


class Scales(NamedTuple):
    """Bytes of a file that hold fp32 factors, row-major, one for each block of `rows` x `columns` numbers of a matrix;
    of `height` rows each is a matrix of a stack, its blocks counted anew. What is scaled counts as `wanted`."""

    file: str
    position: int
    dtype: str
    rows: int
    columns: int
    height: int
    wanted: str  # BF16 or F32


class Band(NamedTuple):
    """Rows `start` to `stop` lie in these pieces, from the first column to the last."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


class MadeRows(Protocol):
    """A function of rows: what the rows of a tensor are that no file holds as they are. It can be pickled."""

    @property
    def sources(self) -> Sequence["RowTensor"]:
        """What it reads."""

    @property
    def dtype_kept(self) -> str:
        """What its rows are written as where dtypes are kept."""

    def only(self, ranges: Sequence[Range]) -> "MadeRows":
        """With no more of its sources than these rows need."""

    def fill(self, reader: "TensorReader", low: int, high: int, into: memoryview) -> None:
        """Put rows `low` to `high` into `into`, in the dtype of the tensor that they make up."""


class RowTensor(NamedTuple):
    """A distributed tensor and the bytes that hold it; the bands follow each other without a gap."""

    key: str
    dtype: str  # that of its pieces, or, where they differ or the rows are made, F32, which holds all of them exactly
    shape: Shape
    bands: tuple[Band, ...]
    made: MadeRows | None = None  # then there are no bands

    @property
    def dtype_kept(self) -> str:
        """What it is written as where dtypes are kept."""
        return self.made.dtype_kept if self.made else self.dtype

    def files(self) -> set[str]:
        """That hold it, or what it is made of."""
        if self.made:
            return set().union(*(source.files() for source in self.made.sources))
        return {piece.file for band in self.bands for piece in band.pieces}

    def first_byte(self, row: int) -> tuple[str, int]:
        """File and position of what holds the row, or the beginning of what it is made of."""
        if self.made:
            return self.made.only([(row, row + 1)]).sources[0].first_byte(row)
        piece = self.bands[bisect_right(self.bands, row, key=lambda band: band.start) - 1].pieces[0]
        return piece.file, piece.position

    def only(self, ranges: Sequence[Range]) -> "RowTensor":
        """With the bands that these rows need and no others: little to hand on."""
        if self.made:
            return self._replace(made=self.made.only(ranges))
        low, high = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        first = bisect_right(self.bands, low, key=lambda band: band.start) - 1
        return self._replace(bands=self.bands[first : bisect_left(self.bands, high, key=lambda band: band.start)])

    @property
    def all_rows(self) -> list[Range]:
        return [(0, num_rows(self.shape))]

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.num_columns * ITEM_SIZES[self.dtype]


def stacked(key: str, tensors: Sequence[RowTensor], num_slices: int) -> RowTensor:
    """The rows of matrices of one shape one after the other: as one matrix, or (`num_slices` not 0) as a stack."""
    shapes, dtypes = ({getattr(tensor, name) for tensor in tensors} for name in ("shape", "dtype"))
    if len(shapes) > 1 or len(tensors[0].shape) != 2:
        raise UserError(f"{key}: its parts are of several shapes, or no matrices: {sorted(shapes)}")
    (height, columns), bands = shapes.pop(), []
    for number, tensor in enumerate(tensors):
        first = number * height
        bands += [band._replace(start=band.start + first, stop=band.stop + first) for band in tensor.bands]
    rows = len(tensors) * height
    shape = (num_slices, rows // num_slices, columns) if num_slices else (rows, columns)
    return RowTensor(key, dtypes.pop() if len(dtypes) == 1 else "F32", shape, tuple(bands))


def block_height(tensor: RowTensor) -> int:
    """How many of its rows are read at once."""
    return max(BLOCK_BYTES // max(tensor.row_bytes, 1), 1)


class Source(NamedTuple):
    """A checkpoint opened for reading: its tensors as rows, by distributed key."""

    what: str  # in words
    folder: Path  # in which the tensors' files are
    config: HyConfig | None  # None: a distributed checkpoint without config.json
    tensors: dict[str, RowTensor]
    notes: tuple[str, ...] = ()  # for the user
    iteration: int | None = None  # None: no training made it
    has_optimizer: bool = False
    unknown: tuple[str, ...] = ()  # stored tensors whose names are neither a model's nor an optimizer's
    # By their own names, tensors of a Hugging Face folder that are set aside; None: it is none that could have some.
    aside: dict[str, RowTensor] | None = None


class TensorReader:
    """Reads rows, and verifies what it reads of files that have checksums. A context manager: it keeps files open.

    Attributes:
        sums: numbers that functions of rows add up while it reads, by name.
        kept: what they made last, up to _MAX_KEPT_BYTES: `checksums.Latest.get`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self._files: dict[str, ReadFile] = {}
        self._blocks = Latest(_MAX_BLOCK_BYTES)
        self._finder = ElementFinder()
        self.kept = Latest(_MAX_KEPT_BYTES).get

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def blocks(self, tensor: RowTensor, ranges: Sequence[Range], height: int | None = None) -> Iterator[memoryview]:
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

    def numbers(self, tensor: RowTensor, ranges: Sequence[Range]) -> np.ndarray:
        """These rows as fp32 [rows, columns], whole: for what is small. Raises UserError as `blocks` does."""
        height = sum(stop - start for start, stop in ranges)
        made = np.empty((height, tensor.num_columns), np.float32)
        row = 0
        for block in self.blocks(tensor, ranges):
            rows = np.frombuffer(converted(block, tensor.dtype, "F32"), "<f4").reshape(-1, tensor.num_columns)
            made[row : row + len(rows)] = rows
            row += len(rows)
        return made

    def _read(self, tensor: RowTensor, low: int, high: int, block: memoryview) -> None:
        if tensor.made:
            tensor.made.fill(self, low, high, block)
            return
        at = bisect_right(tensor.bands, low, key=lambda band: band.start) - 1
        while low < high:
            band = tensor.bands[at]
            end = min(high, band.stop)
            part, block = block[: (end - low) * tensor.row_bytes], block[(end - low) * tensor.row_bytes :]
            for piece in band.pieces:
                self._read_piece(tensor, piece, low - band.start, end - low, part)
            low, at = end, at + 1

    def _read_piece(self, tensor: RowTensor, piece: Piece, row: int, num_rows: int, into: memoryview) -> None:
        """`num_rows` rows of the piece, from its `row` on, to their columns of the rows `into`."""
        first = (piece.row + row) * piece.num_columns * ITEM_SIZES[piece.dtype]
        if piece.dtype == tensor.dtype and piece.num_columns == tensor.num_columns:
            self._read_bytes(tensor, piece, first, into)
            return
        data = memoryview(bytearray(num_rows * piece.num_columns * ITEM_SIZES[piece.dtype]))
        self._read_bytes(tensor, piece, first, data)
        found = piece.dtype
        if piece.scales:
            factors, of_row = self._factors(tensor, piece, piece.row + row, num_rows)
            data, found = dequantised(data, factors, of_row, piece.scales.wanted), piece.scales.wanted
        unsigned = np.dtype(f"u{ITEM_SIZES[tensor.dtype]}")
        rows = np.frombuffer(into, unsigned).reshape(num_rows, tensor.num_columns)
        columns = np.frombuffer(converted(data, found, tensor.dtype), unsigned)
        rows[:, piece.first_column : piece.first_column + piece.num_columns] = columns.reshape(num_rows, -1)

    def _factors(self, tensor: RowTensor, piece: Piece, row: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The scales, fp32 [n, columns], or [1, 1] where one is for all; and which of the n are a row's, [num_rows]."""
        scales, size = piece.scales, ITEM_SIZES[piece.scales.dtype]
        a_row, a_matrix = (
            math.ceil(n / m) for n, m in ((piece.num_columns, scales.columns), (scales.height, scales.rows))
        )
        rows = np.arange(row, row + num_rows)
        block_rows = rows // scales.height * a_matrix + rows % scales.height // scales.rows
        first, last = int(block_rows[0]), int(block_rows[-1])
        data = memoryview(bytearray((last + 1 - first) * a_row * size))
        place = Piece(scales.file, scales.position, 0, (), 0, 0, a_row, scales.dtype)
        self._read_bytes(tensor, place, first * a_row * size, data)
        factors = np.frombuffer(converted(data, scales.dtype, "F32"), "<f4").reshape(-1, a_row)
        if not np.isfinite(factors).all() or (factors < 0).any():
            wrong = factors[~np.isfinite(factors) | (factors < 0)][0]
            raise UserError(f"{scales.file}: a scale of {tensor.key} is {wrong}; a finite number from 0 is needed")
        if factors.size > 1:
            factors = np.repeat(factors, scales.columns, axis=1)[:, : piece.num_columns]
        return factors, block_rows - first

    def _read_bytes(self, tensor: RowTensor, piece: Piece, first: int, into: memoryview) -> None:
        try:
            with os_errors(piece.file, "read"):
                file, position = self._opened(piece.file), piece.position + first
                if piece.length:
                    window = FilePart(file, piece.position, piece.length)
                    what = f"{piece.file}: {tensor.key} at byte {piece.position}"
                    position += self._finder.find(window, piece.dtype, piece.shape, what)
                count = file.read_into(position, into)
        except Damaged as error:
            raise error.reading(tensor.key) from None
        if count < len(into):
            raise UserError(
                f"{piece.file}: ends at byte {position + count}, inside {tensor.key}; it was changed while it was "
                "read, or is truncated"
            )

    def _opened(self, path: str) -> ReadFile:
        if path not in self._files:
            while len(self._files) >= _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = ReadFile(path, expected_sum(path), self._blocks)
        return self._files[path]
