"""Rows of parquet files. pyarrow, which reads them, is an optional package: `pip install hymeg[parquet]`.

Memory: a few hundred rows, and what one row group of the file takes on disk.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from hymeg.errors import UserError
from hymeg.files import shown

_ROWS_AT_ONCE = 256


def check_available() -> None:
    """Raises UserError where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "reading parquet needs pyarrow; install it (pip install 'hymeg[parquet]') or convert the file to .jsonl"
        )


def read_rows(
    path: str, file: BinaryIO, columns: tuple[str, ...] | None
) -> Iterator[tuple[int, dict | bytes, int, int]]:
    """Of each row, in order: its number, from 1; the row, as an object of what JSON knows, or the bytes of a text in it
    that is not UTF-8; what it takes in memory; how many bytes of the file the rows so far stand for.

    A struct has every key that any row's has, null where a row has none; what was null and what was not there cannot be
    told apart any more. So nulls inside of a column are left out.

    Args:
        columns: those that are wanted; None: all.

    Raises:
        UserError: it is no parquet file, is broken, or lacks a column.
    """
    import pyarrow.parquet

    num_bytes, number = os.fstat(file.fileno()).st_size, 0
    try:
        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
        names = parquet.schema_arrow.names
        if missing := [column for column in columns or () if column not in names]:
            raise UserError(
                f"{path}: no column {shown(missing[0])} among {shown(names)}; --json-keys names the columns to read"
            )
        if twice := [name for name in columns or names if names.count(name) > 1]:
            found = f"two columns are called {shown(twice[0])}, of which only one would be read"
            raise UserError(f"{path}: {found}; rename one")
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns and list(columns), use_threads=False):
            for row in (batch.slice(index, 1) for index in range(len(batch))):
                number += 1
                yield number, _as_object(row), row.nbytes, num_bytes * number // parquet.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path}: is no parquet file or a broken one: {reason.rstrip('.')}; copy or make it again"
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
