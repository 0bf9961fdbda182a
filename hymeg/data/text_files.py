"""Files of documents, read in batches of bounded memory. What is in a document is not looked at here.

Two kinds are known by their names, each also gzipped (.gz). JSON lines: a row a line. Text: documents separated by blank lines, whose own line feeds
are kept. A byte-order mark, carriage returns before line feeds and blank lines are left out.
"""

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hymeg.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt",)
BATCH_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = tuple[int, bytes]  # (line number, from 1; the line, or the document that starts there)


class Batch(NamedTuple):
    """Rows of one file, about `BATCH_BYTES` of them."""

    path: str
    rows: list[Row]
    num_bytes_read: int  # of the file as it lies on disk, since the batch before


def is_text(path: str) -> bool:
    """Whether the file is plain text, as against JSON lines."""
    return _suffix(path) in TEXT_SUFFIXES


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def check_name(path: str | os.PathLike) -> str:
    """`path` as a string. Raises UserError where there is no such file or its name is of neither kind."""
    path = str(path)
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name the files in it ({path.rstrip('/')}/*.jsonl)")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if path.endswith(".zst"):
        raise UserError(f"{path}: zstd files cannot be read here; decompress it first (zstd -d {path})")
    if _suffix(path) not in JSON_SUFFIXES + TEXT_SUFFIXES:
        raise UserError(f"{path}: its name does not tell what it holds; {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)} can be read, each also as .gz")
    return path


def read_batches(path: str) -> Iterator[Batch]:
    """The rows of one file, in order. Raises UserError where the file cannot be read or a row is longer than `MAX_ROW_BYTES`."""
    rows, num_bytes, position = [], 0, 0
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.endswith(".gz") else contextlib.nullcontext(raw) as file:
            for row in _documents(path, file) if is_text(path) else _lines(path, file):
                if not row[1] or row[1].isspace():
                    continue
                rows.append(row)
                num_bytes += len(row[1])
                if num_bytes >= BATCH_BYTES:
                    yield Batch(path, rows, raw.tell() - position)
                    rows, num_bytes, position = [], 0, raw.tell()
            yield Batch(path, rows, raw.tell() - position)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is broken or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(path: str, file: BinaryIO) -> Iterator[Row]:
    number = 1
    while line := file.readline(MAX_ROW_BYTES + 1):
        _check_length(path, number, len(line))
        yield number, line.removeprefix(_BYTE_ORDER_MARK if number == 1 else b"").rstrip(b"\r\n")
        number += 1


def _documents(path: str, file: BinaryIO) -> Iterator[Row]:
    first, block, num_bytes = 0, [], 0
    for number, line in _lines(path, file):
        if line and not line.isspace():
            first = first if block else number
            block.append(line)
            num_bytes += len(line) + 1
            _check_length(path, first, num_bytes)
        elif block:
            yield first, b"\n".join(block)
            block, num_bytes = [], 0
    if block:
        yield first, b"\n".join(block)


def _check_length(path: str, number: int, length: int) -> None:
    if length > MAX_ROW_BYTES:
        raise UserError(f"{path}: line {number}: a document of more than {MAX_ROW_BYTES >> 20} MiB starts here; cut it up, one document a row")
