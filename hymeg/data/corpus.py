"""Plain text for pre-training: files of documents in, Megatron's indexed dataset (.bin, .idx) out, and its checksums
beside it (.checksums.sfv).

Memory is bounded by a few batches of rows, plus some tens of bytes a document for Megatron's index. Training on a
dataset is Megatron's business.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hymeg import platform
from hymeg.checksums import MANIFEST, Summer, SummingStream, sum_of_file, write_manifest
from hymeg.data.fields import not_text, wrong
from hymeg.data.text_files import Batch, check_given_once, check_name, is_text, place, read_batches
from hymeg.data.workers import encode_all
from hymeg.errors import UserError, located
from hymeg.files import fsync_folder, parse_row, shown
from hymeg.hf.tokenizer import end_of_document_id, load_tokenizer, text_tokenizer

_SUFFIXES = ("bin", MANIFEST, "idx")  # in the order in which a dataset's files appear


class Encoded(NamedTuple):
    """The documents of one `Batch`."""

    documents: list[tuple[np.ndarray, list[int]]]  # for each key: token ids, one document after another; tokens in each
    num_empty: int
    bad_rows: list[str]
    num_bytes_read: int


@dataclass
class Counts:
    """What has been done so far; at the end, the summary."""

    total_bytes: int  # of all input files as they lie on disk
    end: str | None  # the token that documents end with
    num_bytes_read: int = 0
    num_documents: int = 0  # of all keys together
    num_tokens: int = 0  # end-of-document tokens included
    num_empty: int = 0  # texts without a single token: left out
    num_bad_rows: int = 0
    first_bad_row: str | None = None  # what is wrong with it
    prefixes: list[str] = field(default_factory=list)  # for --data-path, one for each key; set once the files are there

    def add(self, batch: Encoded) -> None:
        self.num_bytes_read += batch.num_bytes_read
        self.num_documents += sum(len(lengths) for _, lengths in batch.documents)
        self.num_tokens += sum(len(token_ids) for token_ids, _ in batch.documents)
        self.num_empty += batch.num_empty
        self.num_bad_rows += len(batch.bad_rows)
        self.first_bad_row = self.first_bad_row or next(iter(batch.bad_rows), None)


def preprocess(
    inputs: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    tokenizer_dir: str | os.PathLike,
    *,
    json_keys: tuple[str, ...] = ("text",),
    append_eod: bool = True,
    num_workers: int = 1,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    report: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Tokenize files into OUTPUT_KEY_document.bin and .idx for each key, the names that Megatron-LM's own tool gives,
    and their checksums, OUTPUT_KEY_document.checksums.sfv.

    Files appear whole or not at all. Documents keep the order of the files and of the rows in them. No special token is
    in them but the end-of-document token: text that looks like one is text.

    Args:
        inputs: files as `hymeg.data.text_files` reads them, UTF-8. A row of JSON lines is an object with a string under
            each key.
        output: prefix of the files to write; missing folders are made.
        tokenizer_dir: the checkpoint's folder. Token ids are stored as uint16 where the vocabulary is below 65500, else
            as int32.
        json_keys: the keys of a row to tokenize, a dataset for each.
        append_eod: end each document with the model's end-of-document token (`end_of_document_id`).
        num_workers: 1: this process tokenizes, with the tokenizer's own threads. More: so many processes. The files are
            the same, to the byte.
        skip_bad_rows: count rows that are not UTF-8, not JSON or lack a string under a key, instead of stopping at the
            first.
        overwrite: replace files of the same names.
        report: called before the first batch and after each.

    Raises:
        UserError: an input cannot be read, a row is bad, nothing is left to write, the tokenizer cannot be loaded or
            has no token to end documents with, the output exists or cannot be written.
    """
    if num_workers < 1:
        raise UserError(f"--workers is {num_workers}; at least 1 is needed")
    paths = [check_name(path) for path in inputs]
    check_given_once("--input", paths)
    if len(json_keys) > 1 and (text_file := next(filter(is_text, paths), None)):
        raise UserError(
            f"{text_file}: a text file has no keys; with several --json-keys ({', '.join(json_keys)}) only JSON lines "
            "can be read"
        )
    prefixes = _prefixes(os.fspath(output), json_keys, overwrite)
    settings = (str(tokenizer_dir), tuple(json_keys), append_eod, skip_bad_rows)
    encoder = Encoder(*settings)
    counts = Counts(sum(os.path.getsize(path) for path in paths), encoder.end)
    batches = chain.from_iterable(read_batches(path, json_keys) for path in paths)
    with contextlib.closing(encode_all(batches, Encoder, settings, num_workers)) as encoded:
        _write(encoded, prefixes, encoder.vocab_size, counts, report)
    counts.prefixes = [f"{os.fspath(output)}_{key}_document" for key in json_keys]
    return counts


def _prefixes(output: str, json_keys: tuple[str, ...], overwrite: bool) -> dict[str, Path]:
    if len(set(json_keys)) != len(json_keys):
        raise UserError(f"--json-keys names a key twice: {', '.join(json_keys)}")
    if os.path.isdir(output) or not os.path.basename(output):
        raise UserError(
            f"--output {output}: is a folder; a prefix for the files is needed, such as {Path(output) / 'corpus'}"
        )
    if slashed := [key for key in json_keys if "/" in key]:
        raise UserError(
            f"--json-keys {shown(slashed[0])}: holds a '/', which no file can have in its name; rename the key in the "
            "input"
        )
    prefixes = {key: Path(f"{output}_{key}_document") for key in json_keys}
    for path in (f"{prefix}.{suffix}" for prefix in prefixes.values() for suffix in ("bin", "idx")):
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; give another --output")
        if os.path.exists(path) and not overwrite:
            raise UserError(f"{path}: exists already; give another --output, or --overwrite to replace it")
    return prefixes


class Encoder:
    """Turns a `Batch` into an `Encoded`. Raises UserError where the tokenizer cannot be loaded or has no token to end
    documents with.
    """

    def __init__(self, tokenizer_dir: str, json_keys: tuple[str, ...], append_eod: bool, skip_bad_rows: bool):
        tokenizer = load_tokenizer(tokenizer_dir)
        end = end_of_document_id(tokenizer_dir, tokenizer) if append_eod else None
        if append_eod and end is None:
            raise UserError(
                f"{tokenizer_dir}: no token ends documents: neither eod_token_id in config.json nor eos_token in "
                "tokenizer_config.json; name one, or give --no-append-eod"
            )
        self.end = tokenizer.convert_ids_to_tokens(end) if append_eod else None
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._end = [end] if append_eod else []
        self._tokenizer = text_tokenizer(tokenizer)
        self._json_keys = json_keys
        self._skip_bad_rows = skip_bad_rows

    def __call__(self, batch: Batch) -> Encoded:
        """Raises UserError at the first bad row, unless they are to be skipped."""
        rows, bad_rows = [], []
        for number, row in batch.rows:
            try:
                rows.append(self._texts(batch.path, number, row))
            except UserError as error:
                if not self._skip_bad_rows:
                    raise
                bad_rows.append(str(error))
        datasets, num_empty = [], 0
        for index in range(len(self._json_keys)):
            encodings = self._tokenizer.encode_batch_fast([texts[index] for texts in rows], add_special_tokens=False)
            documents = [encoding.ids + self._end for encoding in encodings if len(encoding)]
            num_empty += len(encodings) - len(documents)
            lengths = list(map(len, documents))
            datasets.append((np.fromiter(chain.from_iterable(documents), np.int32, sum(lengths)), lengths))
        return Encoded(datasets, num_empty, bad_rows, batch.num_bytes_read)

    def _texts(self, path: str, number: int, row: bytes | dict) -> list[str]:
        """The text under each key."""
        if isinstance(row, bytes):
            try:
                row = row.decode()
            except UnicodeDecodeError as error:
                number += error.object.count(b"\n", 0, error.start) if is_text(path) else 0
                raise UserError(f"{place(path, number)}: {not_text(error)}") from error
            if is_text(path):
                return [row]
        with located(place(path, number)):
            record = parse_row(row) if isinstance(row, str) else row
            if not isinstance(record, dict):
                raise UserError(f"holds {shown(record)}; an object with the key {shown(self._json_keys[0])} is needed")
            return [_text(record, key) for key in self._json_keys]


def _text(record: dict, key: str) -> str:
    if key not in record:
        raise UserError(f"no key {shown(key)} among {shown(list(record))}; --json-keys names the keys to read")
    if not isinstance(record[key], str):
        raise wrong(record, key, "a string is needed")
    try:
        record[key].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{shown(key)} {not_text(error)}") from error
    return record[key]


class _Dataset:
    """That of one key, under way in `folder`; its checksums are taken as it is written."""

    def __init__(self, folder: Path, name: str, vocab_size: int):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.paths = self._bin, self._sums, self._idx = [folder / f"{name}.{suffix}" for suffix in _SUFFIXES]
        self._builder = IndexedDatasetBuilder(str(self._bin), DType.optimal_dtype(vocab_size))
        self._file, self._summer = self._builder.data_file, Summer()
        self._builder.data_file = SummingStream(self._file, self._summer)

    def __len__(self) -> int:
        return len(self._builder.sequence_lengths)

    def add(self, token_ids: np.ndarray, lengths: list[int]) -> None:
        start = 0
        for length in lengths:
            self._builder.add_document(token_ids[start : start + length], [length])
            start += length

    def finish(self) -> None:
        """To the disk."""
        self._builder.data_file = self._file
        self._builder.finalize(str(self._idx))
        write_manifest(self._sums, {self._bin.name: self._summer.result(), self._idx.name: sum_of_file(self._idx)})
        for path in (self._bin, self._idx):
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _write(
    encoded: Iterable[Encoded],
    prefixes: dict[str, Path],
    vocab_size: int,
    counts: Counts,
    report: Callable[[Counts], None],
) -> None:
    """Write a dataset for each key in a folder of its own, then give the files their places, the .idx files last."""
    with warnings.catch_warnings(action="ignore"):  # of optional packages: nothing here needs them
        platform.install()
        import megatron.core.datasets.indexed_dataset  # noqa: F401
    first = next(iter(prefixes.values()))
    folder, partial = first.parent, first.with_name(f".{first.name}.{os.getpid()}.tmp")
    is_new_folder = not folder.exists()
    try:
        with _write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            datasets = {key: _Dataset(partial, prefix.name, vocab_size) for key, prefix in prefixes.items()}
        report(counts)
        for batch in encoded:
            with _write_errors(folder):
                for dataset, documents in zip(datasets.values(), batch.documents, strict=True):
                    dataset.add(*documents)
            counts.add(batch)
            report(counts)
        for key, dataset in datasets.items():
            if not len(dataset):
                bad_row = f", the first: {counts.first_bad_row}" if counts.num_bad_rows else ""
                raise UserError(
                    f"nothing to write: the input holds no document with a token under {shown(key)} "
                    f"({counts.num_empty} empty texts, {counts.num_bad_rows} bad rows{bad_row})"
                )
        with _write_errors(folder):
            for dataset in datasets.values():
                dataset.finish()
            for prefix in prefixes.values():
                prefix.with_name(f"{prefix.name}.idx").unlink(missing_ok=True)  # over new tokens it would be read
            for paths in zip(*(dataset.paths for dataset in datasets.values()), strict=True):
                for path in paths:
                    path.rename(folder / path.name)
            fsync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new_folder:
            with contextlib.suppress(OSError):  # it holds the files
                folder.rmdir()


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; make room there, or give "
            "another --output"
        ) from error
