"""Functions of rows (`row_tensors.MadeRows`): what the rows of tensors are that no file holds as they are."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hymeg.checkpoint.mapping import Range, num_rows, with_first_rows
from hymeg.checkpoint.rounding import E4M3_MAX, as_fp32, common_dtype, e4m3_numbers, quantised
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader
from hymeg.errors import UserError
from hymeg.hf.fp8 import E4M3


class LowRank(NamedTuple):
    """What is added to rows `start` to `stop`: scale * B @ A, of B the rows from `first_b` on, one for each; of A
    `rank` rows from `first_a` on. Without an A, B's rows take the place of these rows.
    """

    start: int
    stop: int
    b: RowTensor
    first_b: int
    a: RowTensor | None = None
    first_a: int = 0
    rank: int = 0
    scale: float = 1.0

    def numbers_of_a(self, reader: TensorReader) -> np.ndarray:
        """[rank, columns]; kept by the reader, as an A is for many rows."""
        a, rows = self.a, (self.first_a, self.first_a + self.rank)
        return reader.kept(("A", a.key, a.first_byte(self.first_a), rows), lambda: reader.numbers(a, [rows]))

    def only(self) -> "LowRank":
        b = self.b.only([(self.first_b, self.first_b + self.stop - self.start)])
        return self._replace(b=b, a=self.a and self.a.only([(self.first_a, self.first_a + self.rank)]))


class PlusLowRank(NamedTuple):
    """The rows of `base`, with what each of `parts` adds to some of them; the parts in order, none over another. In
    fp32, and rounded, if at all, by whoever writes them.
    """

    base: RowTensor
    parts: tuple[LowRank, ...]

    @property
    def sources(self) -> Sequence[RowTensor]:
        adapters = [tensor for part in self.parts for tensor in (part.a, part.b) if tensor]
        return [self.base, *adapters]

    @property
    def dtype_kept(self) -> str:
        return self.base.dtype_kept

    def only(self, ranges: Sequence[Range]) -> "PlusLowRank":
        needed = [part.only() for low, high in ranges for part in self._between(low, high)]
        return PlusLowRank(self.base.only(ranges), tuple(dict.fromkeys(needed)))

    def _between(self, low: int, high: int) -> Sequence[LowRank]:
        first = bisect_right(self.parts, low, key=lambda part: part.stop)
        return self.parts[first : bisect_left(self.parts, high, key=lambda part: part.start)]

    def fill(self, reader: TensorReader, low: int, high: int, into: memoryview) -> None:
        rows = np.frombuffer(into, np.float32).reshape(high - low, -1)
        [block] = reader.blocks(self.base, [(low, high)], high - low)
        if self.base.dtype == "BF16":
            # As `converted`, without a copy.
            bits = np.frombuffer(block, "<u2").reshape(rows.shape)
            np.left_shift(bits, np.uint32(16), out=rows.view("<u4"), dtype="<u4")
        else:
            rows[:] = as_fp32(block, self.base.dtype).reshape(rows.shape)
        for part in self._between(low, high):
            start, stop = max(low, part.start), min(high, part.stop)
            shift = part.first_b - part.start
            b = reader.numbers(part.b, [(start + shift, stop + shift)])
            changed = rows[start - low : stop - low]
            if part.a is None:
                changed[:] = b
            else:
                b *= np.float32(part.scale)
                changed += b @ part.numbers_of_a(reader)


class Mean(NamedTuple):
    """The mean of the same rows of each: their sum in fp32, in order, divided by their number, and rounded, if at all,
    by whoever writes it.
    """

    sources: tuple[RowTensor, ...]

    @property
    def dtype_kept(self) -> str:
        return common_dtype(source.dtype_kept for source in self.sources)

    def only(self, ranges: Sequence[Range]) -> "Mean":
        return Mean(tuple(source.only(ranges) for source in self.sources))

    def fill(self, reader: TensorReader, low: int, high: int, into: memoryview) -> None:
        rows = np.frombuffer(into, np.float32).reshape(high - low, -1)
        rows[:] = reader.numbers(self.sources[0], [(low, high)])
        for source in self.sources[1:]:
            rows += reader.numbers(source, [(low, high)])
        rows /= np.float32(len(self.sources))


class Rearranged(NamedTuple):
    """The rows of what `arrange` makes of its sources, read whole: for tensors of an adapter, which are small."""

    name: str  # unlike any other's
    sources: tuple[RowTensor, ...]
    arrange: Callable[..., np.ndarray]  # of fp32 [rows, columns] each, to fp32 [rows, columns]; can be pickled

    @property
    def dtype_kept(self) -> str:
        return common_dtype(source.dtype_kept for source in self.sources)

    def only(self, ranges: Sequence[Range]) -> "Rearranged":
        return self

    def fill(self, reader: TensorReader, low: int, high: int, into: memoryview) -> None:
        whole = (reader.numbers(source, [(0, num_rows(source.shape))]) for source in self.sources)
        rows = np.frombuffer(into, np.float32).reshape(high - low, -1)
        rows[:] = reader.kept(("arranged", self.name), lambda: self.arrange(*whole))[low:high]


class Fp8Scale(NamedTuple):
    """The one scale, fp32, of a weight in FP8 that is made of these rows of `source`: their largest magnitude / 448."""

    weight: str  # its name, unlike any other's
    source: RowTensor
    rows: tuple[Range, ...]

    @property
    def sources(self) -> Sequence[RowTensor]:
        return [self.source]

    @property
    def dtype_kept(self) -> str:
        return "F32"

    def only(self, ranges: Sequence[Range]) -> "Fp8Scale":
        return self._replace(source=self.source.only(self.rows))

    def fill(self, reader: TensorReader, low: int, high: int, into: memoryview) -> None:
        np.frombuffer(into, np.float32)[:] = self.of(reader)

    def of(self, reader: TensorReader) -> np.float32:
        """Raises UserError where a number is not finite."""
        [scale] = reader.kept(("scale", self.weight), lambda: self._found(reader))
        return scale

    def _found(self, reader: TensorReader) -> np.ndarray:
        largest = np.float32(0)
        for block in reader.blocks(self.source, self.rows):
            numbers = as_fp32(block, self.source.dtype)
            largest = np.maximum(largest, np.maximum(numbers.max(), -numbers.min()))
        if not np.isfinite(largest):
            raise UserError(f"{self.weight}: holds {largest}, which FP8 has no scale for; finite numbers are needed")
        # A weight of zeros needs a scale that can be divided by.
        return np.maximum(largest / np.float32(E4M3_MAX), np.finfo(np.float32).tiny).reshape(1)


class Fp8Codes(NamedTuple):
    """A weight in FP8: its rows divided by its scale. What that loses is added to the reader's `sums`, by the weight's
    `kind`: the squares of the differences, and those of the numbers.
    """

    scale: Fp8Scale
    kind: str

    @property
    def sources(self) -> Sequence[RowTensor]:
        return self.scale.sources

    @property
    def dtype_kept(self) -> str:
        return E4M3

    def only(self, ranges: Sequence[Range]) -> "Fp8Codes":
        return self._replace(scale=self.scale.only(ranges))

    def fill(self, reader: TensorReader, low: int, high: int, into: memoryview) -> None:
        source, scale = self.scale.source, self.scale.of(reader)
        all_codes, at = np.frombuffer(into, np.uint8), 0
        for block in reader.blocks(source, _part_of(self.scale.rows, low, high)):
            codes = quantised(block, source.dtype, scale)
            all_codes[at : at + len(codes)] = codes
            at += len(codes)
            numbers = as_fp32(block, source.dtype)
            difference = np.take(e4m3_numbers(), codes) * scale - numbers
            squares = (np.square(found).sum(dtype=np.float64) for found in (difference, numbers))
            reader.sums[self.kind] = reader.sums.get(self.kind, 0) + np.array(list(squares))


def _part_of(ranges: Sequence[Range], low: int, high: int) -> list[Range]:
    """Rows `low` to `high` of those in `ranges`, counted from the first of them."""
    cut = ((start + max(low - row, 0), min(stop, start + high - row)) for start, stop, row in with_first_rows(ranges))
    return [(start, stop) for start, stop in cut if start < stop]
