"""The indices of files of rows (`hymeg.data.row_index`), made by several processes, many files together."""

import contextlib
import functools
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from hymeg.checksums import MANIFEST, Summer, SummingStream, sum_of, write_manifest
from hymeg.data import row_index
from hymeg.data.chat import ChatEncoder
from hymeg.data.row_index import SUMMARY, BadRows
from hymeg.data.rows import Conversation, RowReader
from hymeg.data.text_files import Batch, read_batches
from hymeg.data.workers import encode_all
from hymeg.errors import UserError
from hymeg.files import write_whole
from hymeg.progress import Progress

_BYTES_PER_WORKER = 20_000_000  # of the files: less is not worth a process
_MAX_WORKERS = 64  # one process reads for all
_MAX_REASONS = 50  # that are told apart
_MAX_KEYS = 50  # that are kept of those which were left alone


class Encoded(NamedTuple):
    """The rows of a `Batch`."""

    path: str
    stored: np.ndarray  # int32, as in tokens.bin
    columns: dict[str, array]  # `_columns`
    num_without_weight: int  # rows that are left out: every turn has weight 0
    bad_rows: list[str]
    counts: Counter
    ignored: Counter  # rows by key that was left alone
    num_bytes_read: int


def _columns() -> dict[str, array]:
    """Of each row its tokens, its line and how many of its turns are trained; and of each such turn its weight."""
    return {"lengths": array("q"), "lines": array("q"), "num_turns": array("q"), "weights": array("f")}


class Done(NamedTuple):
    """Of all files, so far."""

    path: str = ""  # of the file that is under way
    num_bytes: int = 0  # of the files as they lie on disk
    num_rows: int = 0
    num_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.num_rows:,} rows, {self.num_tokens:,} tokens"


class RowEncoder:
    """Rows of a batch -> `Encoded`.

    Attributes:
        fingerprint: equal for encoders that make the same tokens of the same rows.
    """

    def __init__(self, tokenizer_dir: str, vocab_size: int | None = None, skip_bad_rows: bool = False):
        self._reader = RowReader()
        self._encoder = ChatEncoder(tokenizer_dir, vocab_size)
        self._skip_bad_rows = skip_bad_rows
        self.fingerprint = f"{self._encoder.fingerprint} {self._reader.fingerprint}"

    def __call__(self, batch: Batch) -> Encoded:
        """Raises UserError at the first bad row, unless they are to be skipped."""
        self._reader.ignored.clear()
        rows = [self._parsed(batch.path, number, raw) for number, raw in batch.rows]
        encoded = iter(self._encoder.encode_batch([row for row in rows if not isinstance(row, UserError)]))
        stored, columns, num_without_weight = [np.empty(0, np.int32)], _columns(), 0
        bad_rows, counts = [], Counter()
        for (number, _), row in zip(batch.rows, rows, strict=True):
            tokens = row if isinstance(row, UserError) else next(encoded)
            if isinstance(tokens, UserError):
                if not self._skip_bad_rows:
                    raise UserError(f"{tokens} (--sft-bad-rows skip leaves such rows out)")
                bad_rows.append(str(tokens))
            elif not tokens.trained.any():
                num_without_weight += 1
            else:
                stored.append(np.where(tokens.trained, ~tokens.token_ids, tokens.token_ids))
                weights = [weight for weight in _weights(row) if weight]
                columns["lengths"].append(len(stored[-1]))
                columns["lines"].append(number)
                columns["num_turns"].append(len(weights))
                columns["weights"].extend(weights)
                counts.update(_counted(row))
        ignored = self._reader.ignored.copy()
        stored = np.concatenate(stored)
        return Encoded(batch.path, stored, columns, num_without_weight, bad_rows, counts, ignored, batch.num_bytes_read)

    def _parsed(self, path: str, number: int, raw: bytes) -> Conversation | UserError:
        try:
            return self._reader.parse(path, number, raw)
        except UserError as error:
            return error


def _counted(conversation: Conversation) -> Iterator[str]:
    turns = [message for message in conversation.messages if message["role"] == "assistant"]
    for message, weight in zip(turns, _weights(conversation), strict=True):
        yield "turns"
        if weight != 1:
            yield "turns weighed" if weight else "turns not trained"
        if message.get("reasoning_content"):
            yield "turns with reasoning"
        elif conversation.reasoning_effort == "high":
            yield "turns of effort high without reasoning"
        if message.get("tool_calls"):
            yield "turns with calls"


def _weights(conversation: Conversation) -> tuple[float, ...]:
    """Of each of the assistant's turns."""
    return conversation.weights or tuple(1.0 for message in conversation.messages if message["role"] == "assistant")


def build_missing(folders: Mapping[str, Path], settings: tuple, stream: TextIO, num_workers: int | None = None) -> None:
    """`build_indices` where there is none of the file as it is now. Progress, and where indices of older files lie, is
    printed to `stream`.

    Args:
        num_workers: None: as many as this machine has cores and are worth starting.

    Raises:
        UserError: as `build_indices` does; two files of other content would have one folder.
    """
    first = {folder: path for path, folder in reversed(folders.items())}
    for path, folder in folders.items():
        other = first[folder]
        if other != path and row_index.content_digest(other) != row_index.content_digest(path):
            raise UserError(
                f"{path}: has the name, length, beginning and end of {other}, and would have its index too; rename one"
            )
    missing = {path: folder for path, folder in folders.items() if not row_index.is_built(folder, path)}
    if not missing:
        return
    num_workers = num_workers or worthwhile_workers(list(missing))
    with contextlib.closing(Progress("tokenizing rows", sum(map(os.path.getsize, missing)), stream)) as progress:

        def report(done: Done) -> None:
            progress.show(done.num_bytes, counts=lambda seconds: f"{done}, {done.num_tokens / seconds:,.0f} tokens/s")

        done = build_indices(missing, settings, num_workers, report)
    print(f"hymeg: indices made: {len(missing)}, {done}", file=stream)
    for path, folder in missing.items():
        if older := row_index.older_indices(folder, path):
            num_bytes = sum(file.stat().st_size for other in older for file in other.rglob("*") if file.is_file())
            print(
                f"hymeg: {path}: {len(older)} older indices, {num_bytes / 1e9:.1f} GB, to delete if no run uses them:",
                *older,
                file=stream,
                flush=True,
            )


def worthwhile_workers(paths: list[str]) -> int:
    """How many processes are worth starting to tokenize the files on this machine."""
    num_cores, num_bytes = len(os.sched_getaffinity(0)), sum(map(os.path.getsize, paths))
    return max(1, min(_MAX_WORKERS, num_cores, num_bytes // _BYTES_PER_WORKER))


def build_indices(
    folders: Mapping[str, Path],
    settings: tuple,
    num_workers: int = 1,
    report: Callable[[Done], None] = lambda done: None,
) -> Done:
    """Tokenize files, each into a folder, which appears whole or not at all.

    Args:
        folders: of each file's path (`hymeg.data.row_index.index_folder`).
        settings: those of `RowEncoder`.
        num_workers: processes that tokenize; 1: this one, with the tokenizer's own threads.
        report: called after each batch of rows.

    Raises:
        UserError: a file cannot be read, changes while it is read, a row is wrong, no good row is in it, a folder
            cannot be written.
    """
    states = {path: row_index.file_state(path) for path in folders}
    done = Done()
    batches = chain.from_iterable(map(read_batches, folders))
    with contextlib.closing(encode_all(batches, RowEncoder, settings, num_workers)) as encoded:
        for path, parts in groupby(encoded, key=lambda part: part.path):
            is_good = functools.partial(row_index.is_built, folders[path], path)
            with row_index.built_beside(folders[path], is_good) as partial:
                done = _write(partial, path, parts, done, report)
                if row_index.file_state(path) != states[path]:
                    raise UserError(f"{path}: has changed while it was read; start again once it is complete")
                row_index.note_seen(partial, path, states[path])
    return done


def _write(folder: Path, path: str, parts: Iterator[Encoded], done: Done, report: Callable[[Done], None]) -> Done:
    """The index of one file; how far all has come with it."""
    columns, counts, ignored, num_without_weight = _columns(), Counter(), Counter(), 0
    bad_rows: dict[str, BadRows] = {}
    summer = Summer()
    with open(folder / "tokens.bin", "wb") as file:
        summing = SummingStream(file, summer)
        for part in parts:
            summing.write(part.stored.tobytes())
            for name, values in part.columns.items():
                columns[name].extend(values)
            num_without_weight += part.num_without_weight
            counts.update(part.counts)
            ignored.update(part.ignored)
            for message in part.bad_rows:
                _count_bad_row(bad_rows, path, message)
            num_rows, num_tokens = len(part.columns["lines"]), len(part.stored)
            done = Done(
                path, done.num_bytes + part.num_bytes_read, done.num_rows + num_rows, done.num_tokens + num_tokens
            )
            report(done)
    if not columns["lines"]:
        if bad_rows:
            first, num_rows = next(iter(bad_rows.values())).first, sum(entry.count for entry in bad_rows.values())
            raise UserError(f"{path}: no row can be trained on, of {num_rows:,}; the first: {first}")
        if num_without_weight:
            what = "every turn of every row has weight 0 (or train: false); nothing is left to train on"
        else:
            what = "holds no row; give a file with conversations or translations, one a line"
        raise UserError(f"{path}: {what}")
    arrays = {
        "starts": np.cumsum([0, *columns["lengths"]], dtype=np.int64),
        "lines": np.array(columns["lines"]),
    }
    is_weighted = any(weight != 1 for weight in columns["weights"])
    if is_weighted:
        arrays["weights"] = np.array(columns["weights"])
        arrays["turns"] = np.cumsum([0, *columns["num_turns"]], dtype=np.int64)
    summary = {
        "is_weighted": is_weighted,
        "without_weight": num_without_weight,
        "digest": row_index.content_digest(path),
        "bad_rows": list(bad_rows.values()),
        "counts": counts,
        "ignored": dict(ignored.most_common(_MAX_KEYS)),
    }
    text = json.dumps(summary).encode()
    write_whole(folder / SUMMARY, text)
    sums = row_index.save_arrays(folder, arrays) | {"tokens.bin": summer.result(), SUMMARY: sum_of(text)}
    write_manifest(folder / MANIFEST, sums)
    return done


def _count_bad_row(bad_rows: dict[str, BadRows], path: str, message: str) -> None:
    """A reason is what was found, without the place and without numbers and long texts."""
    reason = message.removeprefix(f"{path}: ").partition(": ")[2].partition(";")[0]
    reason = re.sub(r"\bmessage \d+", "a message", reason)
    reason = re.sub(r"'[^']{24,}'|\[.*|\{.*|\d+", "...", reason)
    if reason not in bad_rows and len(bad_rows) >= _MAX_REASONS:
        reason = "other reasons"
    before = bad_rows.get(reason, BadRows(reason, 0, message))
    bad_rows[reason] = before._replace(count=before.count + 1)


def told_bad_rows(bad_rows: list[BadRows], num_good: int) -> list[str]:
    """How many rows are left out and why, the most frequent reason first, in lines."""
    if not bad_rows:
        return []
    total, most_frequent = sum(entry.count for entry in bad_rows), sorted(bad_rows, key=lambda entry: -entry.count)
    return [
        f"{total:,} of {total + num_good:,} rows cannot be trained on and are left out",
        *(f"  {entry.count:,}: {entry.reason} (the first: {entry.first})" for entry in most_frequent[:10]),
    ]
