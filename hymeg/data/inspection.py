"""What a fine-tuning file holds, counted: rows, tokens, lengths, and what a sequence length would do to them."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hymeg.data.chat import ChatEncoder, Tokens
from hymeg.data.packing import pack
from hymeg.data.row_index import RowIndex
from hymeg.data.rows import RowReader
from hymeg.data.text_files import check_row_file, read_batches
from hymeg.errors import UserError

_ROWS_AT_ONCE = 4096


@dataclass
class Summary:
    """Of a file; one entry a row that can be trained on."""

    lengths: np.ndarray  # tokens, int64
    num_trained: np.ndarray  # tokens, int64
    first_trained: np.ndarray  # place of the first trained token, int64


class Fit(NamedTuple):
    """Rows put into sequences of `seq_length` positions; a row of n tokens takes n - 1 of them, because its last token
    is a label only.
    """

    num_too_long: int
    num_tokens_over: int  # of the rows that are too long, beyond what fits
    num_untrained: int  # rows without a trained token once they are cut on the right
    num_sequences: int  # packed
    packed_share: float  # real tokens of all positions, packed
    padded_share: float  # the same with one row a sequence


def read_row(path: str | os.PathLike, line: int, reader: RowReader, encoder: ChatEncoder) -> Tokens:
    """The row in line `line` (from 1) of the file. Raises UserError where there is none, or it cannot be trained on."""
    for batch in read_batches(check_row_file(path)):
        for number, raw in batch.rows:
            if number == line:
                return encoder.encode(reader.parse(batch.path, number, raw))
            if number > line:
                raise UserError(f"--row {line}: line {line} of {path} is blank; the next row is in line {number}")
    raise UserError(f"--row {line}: {path} has no row in line {line}")


def summarize(index: RowIndex) -> Summary:
    """What the rows of an index hold."""
    num_trained, first_trained = np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
    for first in range(0, len(index), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        starts = index.starts[first : first + _ROWS_AT_ONCE + 1]
        places = np.flatnonzero(index.stored[starts[0] : starts[-1]] < 0) + starts[0]
        found = np.searchsorted(places, starts)
        num_trained[rows] = np.diff(found)
        first_trained[rows] = places[found[:-1]] - starts[:-1]  # every row has an assistant's turn
    return Summary(index.lengths(), num_trained, first_trained)


def fit(summary: Summary, seq_length: int, seed: int = 0) -> Fit:
    """How the rows fit into sequences of `seq_length`."""
    lengths = summary.lengths - 1
    over = np.maximum(lengths - seq_length, 0)
    taken = np.minimum(lengths, seq_length)
    num_sequences = len(pack(taken, seq_length, seed))
    num_tokens = int(taken.sum())
    return Fit(
        num_too_long=int(np.count_nonzero(over)),
        num_tokens_over=int(over.sum()),
        num_untrained=int(np.count_nonzero(summary.first_trained > seq_length)),
        num_sequences=num_sequences,
        packed_share=num_tokens / (num_sequences * seq_length),
        padded_share=num_tokens / (len(lengths) * seq_length),
    )


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) of each class of lengths, whose bounds are powers of two."""
    exponents = np.frexp(lengths)[1].astype(int) - 1
    return [
        (1 << exponent, (2 << exponent) - 1, int(np.count_nonzero(exponents == exponent)))
        for exponent in range(exponents.min(), exponents.max() + 1)
    ]
