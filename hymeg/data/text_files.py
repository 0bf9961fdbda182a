"""Files of documents, read in batches of bounded memory. What is in a document is not looked at here.

Three kinds are known by their names. JSON lines: a row a line. Text: documents separated by blank lines, whose own line
feeds are kept. Both may be compressed (.gz, .zst); a byte-order mark, carriage returns before line feeds and blank
lines are left out. Parquet: a row a row, as an object.
"""

import functools
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from hymeg.data import parquet_files
from hymeg.errors import UserError, located
from hymeg.files import shown

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt",)
PARQUET_SUFFIXES = (".parquet",)
COMPRESSED_SUFFIXES = (".gz", ".zst")
BATCH_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Given to the decompressor at once: even the most compressible data become no more than 32 MiB.
_ZSTD_BLOCK_BYTES = 1 << 10

Row = tuple[int, bytes | dict]
"""(line number, from 1; the line, or the document that starts there), of parquet (row number, the row)."""


class Batch(NamedTuple):
    """Rows of one file, about `BATCH_BYTES` of them."""

    path: str
    rows: list[Row]
    num_bytes_read: int  # of the file as it lies on disk, since the batch before


def is_text(path: str) -> bool:
    """Whether the file is plain text, as against JSON lines."""
    return _suffix(path) in TEXT_SUFFIXES


def is_parquet(path: str) -> bool:
    return _suffix(path) in PARQUET_SUFFIXES


def place(path: str, number: int) -> str:
    """Where row `number` of the file stands, for messages."""
    return f"{path}: {'row' if is_parquet(path) else 'line'} {number}"


@functools.lru_cache(1024)
def _suffix(path: str) -> str:
    """What tells the kind. A parquet file is compressed inside: ".parquet.gz" is no kind."""
    *_, before, last = ["", "", *Path(path).suffixes]
    return before if last in COMPRESSED_SUFFIXES and before not in PARQUET_SUFFIXES else last


def check_name(path: str | os.PathLike) -> str:
    """`path` as a string. Raises UserError where there is no such file, it cannot be read or is empty, its name is of
    no known kind, or parquet cannot be read here."""
    path = str(path)
    try:
        path.encode()
        status = os.stat(path)
    except UnicodeEncodeError as error:
        raise UserError(f"{shown(path)}: the name is not UTF-8; rename the file") from error
    except (OSError, ValueError) as error:
        found = f"is a link to {os.readlink(path)}, where no file is" if os.path.islink(path) else "no such file"
        raise UserError(f"{path or repr(path)}: {found}; check the path") from error
    with located(path):
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"is a folder; name the files in it ({path.rstrip('/')}/*.jsonl)")
        if not stat.S_ISREG(status.st_mode):
            raise UserError("is a pipe or a device; write what it gives to a file, which can be read more than once")
        if not os.access(path, os.R_OK):
            raise UserError("not readable by this user; change its permissions (chmod a+r)")
        if status.st_size == 0:
            raise UserError("is empty; leave it out, or give a file with documents or rows, one a line")
        if is_parquet(path):
            parquet_files.check_available()
        elif _suffix(path) not in JSON_SUFFIXES + TEXT_SUFFIXES:
            raise UserError(
                f"its name does not tell what it holds; {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)} (each also as .gz "
                f"or .zst) and {', '.join(PARQUET_SUFFIXES)} can be read"
            )
    return path


def check_row_file(path: str | os.PathLike) -> str:
    """`check_name` for a file of conversations or translations."""
    path = check_name(path)
    if is_text(path):
        raise UserError(f"{path}: plain text is for pre-training; conversations come as JSON lines (.jsonl)")
    return path


def check_given_once(label: str, paths: list[str]) -> None:
    """Raises UserError where one file stands twice among `paths`, under whatever name."""
    first = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in first:
            raise UserError(
                f"{label} {path}: the same file as {first[real]}, given before; leave one out (the weights of a blend "
                "make up for it)"
            )
        first[real] = path


def read_batches(path: str, columns: tuple[str, ...] | None = None) -> Iterator[Batch]:
    """The rows of one file, in order.

    Args:
        columns: of a parquet file, those that are wanted; None: all. Other files are not looked into.

    Raises:
        UserError: the file cannot be read, lacks a column, or a row is longer than `MAX_ROW_BYTES`.
    """
    rows, num_bytes, start = [], 0, 0
    try:
        with open(path, "rb") as raw:
            found = parquet_files.read_rows(path, raw, columns) if is_parquet(path) else _read_rows(path, raw)
            for number, row, row_bytes, position in found:
                rows.append((number, row))
                num_bytes += row_bytes
                if num_bytes >= BATCH_BYTES:
                    yield Batch(path, rows, position - start)
                    rows, num_bytes, start = [], 0, position
            yield Batch(path, rows, os.fstat(raw.fileno()).st_size - start)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(
            f"{path}: the compressed file is broken or cut short: {error}; copy or make it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; check the file and its disk") from error


def _read_rows(path: str, raw: BinaryIO) -> Iterator[tuple[int, bytes, int, int]]:
    """As `parquet_files.read_rows`, of the other kinds, without blank lines."""
    file = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    if path.endswith(".zst"):
        file = io.BufferedReader(_ZstdFile(raw), 1 << 16)
    for number, row in (_documents if is_text(path) else _lines)(path, file):
        if row and not row.isspace():
            yield number, row, len(row), raw.tell()


class _ZstdFile(io.RawIOBase):
    """Reads one zstd frame after another. zstandard's own readers take a frame that is cut short for the end of the
    file.
    """

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._pending and (block := self._frame.unused_data or self._raw.read(_ZSTD_BLOCK_BYTES)):
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._pending = memoryview(self._frame.decompress(block))
        if not self._pending and not self._frame.eof:
            raise EOFError("the last frame has no end")
        num_bytes = min(len(buffer), len(self._pending))
        buffer[:num_bytes], self._pending = self._pending[:num_bytes], self._pending[num_bytes:]
        return num_bytes


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
        raise UserError(
            f"{path}: line {number}: a document of more than {MAX_ROW_BYTES >> 20} MiB starts here; cut it up, one "
            "document a row"
        )
