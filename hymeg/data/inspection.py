"""What a fine-tuning file holds, counted: rows, tokens, lengths, and what a sequence length would do to them."""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hymeg.data.chat import ChatEncoder, Tokens
from hymeg.data.packing import pack
from hymeg.data.rows import RowReader
from hymeg.data.text_files import Batch, check_row_file, read_batches
from hymeg.errors import UserError


@dataclass
class Summary:
    """Of a file; one entry a row that can be trained on."""

    lengths: np.ndarray  # tokens, int64
    num_trained: np.ndarray  # tokens, int64
    first_trained: np.ndarray  # place of the first trained token, int64
    bad_rows: int = 0
    first_bad_row: str | None = None  # what is wrong with it


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


def summarize(path: str | os.PathLike, reader: RowReader, encoder: ChatEncoder) -> Summary:
    """Encode every row of the file. Rows that cannot be trained on are counted and left out; UserError is for a file
    that cannot be read.
    """
    bad_rows, table = [], array("q")
    for batch in read_batches(check_row_file(path)):
        for tokens in _encoded(batch, reader, encoder, bad_rows):
            table.extend((len(tokens.trained), np.count_nonzero(tokens.trained), int(np.argmax(tokens.trained))))
    if not table and not bad_rows:
        raise UserError(f"{path}: holds no row; give a file with conversations or translations, one a line")
    return Summary(*np.array(table, np.int64).reshape(-1, 3).T, len(bad_rows), next(iter(bad_rows), None))


def _encoded(batch: Batch, reader: RowReader, encoder: ChatEncoder, bad_rows: list[str]) -> Iterator[Tokens]:
    conversations = []
    for number, raw in batch.rows:
        try:
            conversations.append(reader.parse(batch.path, number, raw))
        except UserError as error:
            bad_rows.append(str(error))
    try:
        yield from encoder.encode_batch(conversations)
    except UserError:  # one of them cannot be rendered: which?
        for conversation in conversations:
            try:
                yield encoder.encode(conversation)
            except UserError as error:
                bad_rows.append(str(error))


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
