"""Moves rows of tensors from one checkpoint's files to another's in several processes; each byte is read once and
written once.

A sink plans its files to the byte beforehand: every task has its file and position. Workers take shares of consecutive
tasks, of about equal bytes.
"""

import collections
import itertools
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from hymeg.checkpoint.mapping import Range, Shape
from hymeg.checkpoint.rounding import converted
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader
from hymeg.checkpoint.stored_tensor import envelope
from hymeg.checkpoint.workers import Outcome, dealt, run
from hymeg.checksums import MANIFEST, FileSum, Piece, Summer, joined, sum_of, write_manifest
from hymeg.files import os_errors, reserve, write_start, write_whole
from hymeg.hf.dtypes import ITEM_SIZES
from hymeg.progress import Progress

_SYNC_BYTES = 128 << 20  # after so many the disk is set to work; it is waited for at the end
_MAX_FLUSHES = 64  # that are waited for at a time, each with an open file
_SEVERAL = 4  # files for each worker: enough to deal them whole
_MIN_FILE_BYTES = 64 << 20  # of several, where their number is free
_TASKS_AT_A_TIME = 64


class Task(NamedTuple):
    """Rows of a distributed tensor, to be written at `position` of `file`: bare, or, with `stored_shape`, as a stored
    tensor of that shape.
    """

    tensor: RowTensor
    rows: Sequence[Range]
    dtype: str  # to write
    file: str
    position: int
    stored_shape: Shape | None = None

    @property
    def nbytes(self) -> int:
        """Of elements, to write."""
        num_rows = sum(stop - start for start, stop in self.rows)
        return num_rows * self.tensor.num_columns * ITEM_SIZES[self.dtype]

    @property
    def stored_length(self) -> int:
        """Bytes that the task takes in its file."""
        if self.stored_shape is None:
            return self.nbytes
        around = envelope(self.dtype, self.stored_shape)
        return len(around.before) + self.nbytes + len(around.after)


class FilesToWrite(NamedTuple):
    """What a sink puts into a folder, planned to the byte."""

    sizes: dict[str, int]  # of the files that tensors go to
    turns: list[list[bytes]]  # of tasks, some at a time: what a worker moves when it is its turn
    beside: dict[str, bytes]  # further files
    last: dict[str, bytes]  # what makes all of them valid: first bytes of files, written when the rest is on disk
    num_tasks: int
    num_bytes: int  # of elements


def files_to_write(
    tasks: Sequence[Task], workers: int, beside: Mapping[str, bytes], last: Mapping[str, bytes]
) -> FilesToWrite:
    """`tasks`, those of a file one after the other, made ready for so many workers.

    They are kept pickled, each with no more of its tensor than it needs: as objects the tasks of a large checkpoint
    would be most of a conversion's memory, and be copied by each worker that looks at them.
    """
    sizes: dict[str, int] = {}
    for task in tasks:
        sizes[task.file] = max(sizes.get(task.file, 0), task.position + task.stored_length)
    ready = [
        [
            pickle.dumps([task._replace(tensor=task.tensor.only(task.rows)) for task in some], pickle.HIGHEST_PROTOCOL)
            for some in itertools.batched(turn, _TASKS_AT_A_TIME)
        ]
        for turn in turns(tasks, workers)
    ]
    num_bytes = sum(task.nbytes for task in tasks)
    return FilesToWrite(sizes, ready, dict(beside), dict(last), len(tasks), num_bytes)


def unpacked(some_at_a_time: Iterable[bytes]) -> Iterator[Task]:
    for some in some_at_a_time:
        yield from pickle.loads(some)


def write(folder: Path, files: FilesToWrite, workers: int, progress: Progress) -> Outcome:
    """Write all files into `folder`, with a manifest of their checksums, and flush them to disk; of `files` what is no
    task is used up. The results are the `sums` of each worker's reader.

    Raises:
        UserError: a file cannot be read or written.
    """

    def work(dealt_turns: Iterator[list[bytes]], report: Callable[[int], None]) -> tuple[dict, dict]:
        with TensorReader() as reader, _Writer(folder) as writer:
            for turn in dealt_turns:
                for task in unpacked(turn):
                    _write_task(reader, task, writer, report)
            return writer.pieces, reader.sums

    sums = _reserve(folder, files)
    outcome = run(work, [dealt(files.turns)] * min(workers, len(files.turns)), progress)
    _complete(folder, files, sums, [pieces for pieces, _ in outcome.results])
    return outcome._replace(results=[sums for _, sums in outcome.results])


def _reserve(folder: Path, files: FilesToWrite) -> dict[str, FileSum]:
    """Room for the tensors, and what lies beside them, whose checksums are returned."""
    for name, num_bytes in files.sizes.items():
        with os_errors(folder / name, "written"):
            reserve(folder / name, num_bytes)
    sums: dict[str, FileSum] = {}
    while files.beside:
        name, data = files.beside.popitem()
        sums[name] = sum_of(data)
        write_whole(folder / name, data)
    return sums


def _complete(
    folder: Path, files: FilesToWrite, sums: Mapping[str, FileSum], pieces: Sequence[Mapping[str, list[Piece]]]
) -> None:
    """What makes valid what is on disk now: the checksums, and the files' last bytes."""
    of_files: dict[str, list[Piece]] = collections.defaultdict(list)
    for of_worker in pieces:
        for name, some in of_worker.items():
            of_files[name] += some
    for name, data in files.last.items():
        start = Summer()
        start.add(0, data)
        of_files[name] += start.pieces
    write_manifest(folder / MANIFEST, {**sums, **{name: joined(some) for name, some in of_files.items()}})
    while files.last:
        name, data = files.last.popitem()
        write_start(folder / name, data)


def write_in_order(folder: Path, files: FilesToWrite, pieces: Iterable[tuple[str, int, memoryview]]) -> None:
    """As `write`, in this process: `pieces` are (file, position, bytes), those of a file one after the other, each used
    before the next is asked for.

    Raises:
        UserError: a file cannot be written.
    """
    sums = _reserve(folder, files)
    with _Writer(folder) as writer:
        for name, position, data in pieces:
            writer.write(name, [data], position)
    _complete(folder, files, sums, [writer.pieces])


class _Writer:
    """Writes into the files of a folder, one after the other, and keeps the disk at work meanwhile. A context manager:
    at its end all is on disk.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(1)  # one: a file is closed after what was asked for before
        self._flushes: collections.deque[tuple[str, Future]] = collections.deque()
        self._name, self._descriptor, self._unflushed = "", -1, 0
        self._summers: dict[str, Summer] = collections.defaultdict(Summer)

    @property
    def pieces(self) -> dict[str, list[Piece]]:
        """Checksums of what was written, by file."""
        return {name: summer.pieces for name, summer in self._summers.items()}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self._leave()
            while self._flushes and not kind:
                self._wait()
        finally:
            self._pool.shutdown()

    def write(self, name: str, buffers: list[bytes | memoryview], position: int) -> int:
        """Write them one after the other into the file `name`, which exists, from `position` on, whatever the system
        takes at once; the CRC-32 of the last.
        """
        crc, end, summer = 0, position, self._summers[name]
        for buffer in buffers:
            crc = summer.add(end, buffer)
            end += len(buffer)
        with os_errors(self._folder / name, "written"):
            if name != self._name:
                self._leave()
                self._name, self._descriptor = name, os.open(self._folder / name, os.O_WRONLY | os.O_CLOEXEC)
            written = position + os.pwritev(self._descriptor, buffers, position)
            if written < end:
                rest = memoryview(b"".join(buffers))
                while written < end:
                    written += os.pwrite(self._descriptor, rest[written - position :], written)
        self._unflushed += end - position
        if self._unflushed >= _SYNC_BYTES:
            self._later(os.fdatasync)
        return crc

    def _leave(self) -> None:
        if self._descriptor >= 0:
            self._later(_fsync_and_close)
            self._descriptor = -1

    def _later(self, flush: Callable[[int], None]) -> None:
        self._flushes.append((self._name, self._pool.submit(flush, self._descriptor)))
        self._unflushed = 0
        while len(self._flushes) > _MAX_FLUSHES:
            self._wait()

    def _wait(self) -> None:
        name, flush = self._flushes.popleft()
        with os_errors(self._folder / name, "written"):
            flush.result()


def _fsync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_task(reader: TensorReader, task: Task, writer: _Writer, report: Callable[[int], None]) -> None:
    position, crc = task.position, 0
    around = envelope(task.dtype, task.stored_shape) if task.stored_shape is not None else None
    buffers = [around.before] if around else []
    for block in reader.blocks(task.tensor, task.rows):
        data = converted(block, task.tensor.dtype, task.dtype)
        buffers.append(data)
        crc = isal_zlib.crc32_combine(crc, writer.write(task.file, buffers, position), len(data))
        position += sum(map(len, buffers))
        buffers.clear()
        report(len(data))
    if around:
        buffers.append(around.closed(crc))
        writer.write(task.file, buffers, position)
        position += sum(map(len, buffers))
    assert position - task.position == task.stored_length, (task.tensor.key, task.rows, position)


def shares[T](tasks: Sequence[T], workers: int) -> list[Sequence[T]]:
    """At most `workers` runs of consecutive tasks, or of whatever has `nbytes`, of about equal bytes."""
    total, done, cuts = sum(task.nbytes for task in tasks), 0, [0]
    for number, task in enumerate(tasks):
        if done * workers >= total * len(cuts) and number > cuts[-1] and len(cuts) < workers:
            cuts.append(number)
        done += task.nbytes
    return [tasks[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(tasks)], strict=True)]


def turns(tasks: Sequence[Task], workers: int) -> list[Sequence[Task]]:
    """Shares for `write` to deal to so many workers. Whole files where there are several for each: cores and disks are
    not equally fast, and two that write to one file wait for each other."""
    files = [list(tasks_of_file) for _, tasks_of_file in itertools.groupby(tasks, key=lambda task: task.file)]
    return files if len(files) >= _SEVERAL * workers else shares(tasks, workers)


def num_files(num_bytes: int, workers: int) -> int:
    """Into how many files so many workers best write so many bytes, where that is free: several for each, but none too
    small to be worth it.
    """
    several = 2 * _SEVERAL * workers
    return several if num_bytes >= several * _MIN_FILE_BYTES else workers
