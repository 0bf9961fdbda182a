"""Rows of parquet files. pyarrow, which reads them, is an optional package: `pip install hymeg[parquet]`.

Memory: a few hundred rows, and what one row group of the file takes on disk.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from hymeg.errors import UserError
from hymeg.files import shown

_ROWS_AT_ONCE = 256


def check_available(path: str) -> None:
    """Raises UserError where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; install it (pip install 'hymeg[parquet]') or convert the file to "
            ".jsonl"
        )


class ParquetRows:
    """(number from 1, row) of each row, in order: as an object of what JSON knows. A row with a text that is not UTF-8
    comes as the bytes of that text.

    A struct has every key that any row's has, null where a row has none; what was null and what was not there cannot be
    told apart any more. So nulls inside of a column are left out.

    Args:
        columns: those that are wanted; None: all.

    Attributes:
        row_bytes: what the last row takes in memory.

    Raises:
        UserError: it is no parquet file, is broken, or lacks a column.
    """

    def __init__(self, path: str, file: BinaryIO, columns: tuple[str, ...] | None):
        import pyarrow.parquet

        self._path, self._columns = path, columns and list(columns)
        self._num_bytes = file.seek(0, os.SEEK_END)
        self._num_read = self.row_bytes = 0
        with self._errors():
            self._file = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            names = self._file.schema_arrow.names
        if missing := [column for column in columns or () if column not in names]:
            raise UserError(
                f"{path}: no column {shown(missing[0])} among {shown(names)}; --json-keys names the columns to read"
            )

    def __iter__(self) -> Iterator[tuple[int, dict | bytes]]:
        with self._errors():
            for batch in self._file.iter_batches(_ROWS_AT_ONCE, columns=self._columns, use_threads=False):
                for index in range(len(batch)):
                    row = batch.slice(index, 1)
                    self._num_read, self.row_bytes = self._num_read + 1, row.nbytes
                    yield self._num_read, _as_object(row)

    def tell(self) -> int:
        """The bytes of the file that the rows so far stand for."""
        num_rows = self._file.metadata.num_rows
        return self._num_bytes * self._num_read // num_rows if num_rows else self._num_bytes

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self._path}: is no parquet file or a broken one: {reason.rstrip('.')}; copy or make it again"
            ) from error


def _as_object(batch) -> dict | bytes:
    """The one row of `batch`."""
    try:
        [row] = batch.to_pylist()
        return {key: _plain(value) for key, value in row.items()}
    except UnicodeDecodeError as error:
        return error.object


def _plain(value: Any) -> Any:
    """Binary columns hold text where they hold UTF-8; what JSON does not know is shown as what it is, and will be
    refused as a text.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    return value if value is None or isinstance(value, str | int | float) else {type(value).__name__: str(value)}
