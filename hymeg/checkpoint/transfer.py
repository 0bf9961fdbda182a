"""Moves rows of tensors from one checkpoint's files to another's in several processes; each byte is read once and written once.

A transfer is planned to the byte beforehand: every task has its file and position. Workers take consecutive tasks of about equal bytes.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from hymeg.checkpoint.rows import Range, RowReader, RowTensor, converted
from hymeg.checkpoint.stored_tensor import Shape, envelope
from hymeg.checkpoint.workers import Progress, run
from hymeg.errors import UserError
from hymeg.hf.files import reserve

_SYNC_BYTES = 128 << 20  # after so many the disk is set to work; it is waited for at the end


class Task(NamedTuple):
    """Rows of a distributed tensor, to be written at `position` of `file`: bare, or, with `stored_shape`, as a stored tensor of that shape."""

    name: str  # of what is written, for messages
    tensor: RowTensor
    ranges: list[Range]
    dtype: str  # to write
    nbytes: int  # of elements, to write
    file: str
    position: int
    stored_shape: Shape | None = None


def write(folder: Path, sizes: Mapping[str, int], shares: Sequence[Iterable[Task]], progress: Progress, sync: bool = True) -> int:
    """Write all tasks into files of `folder`, each share in a process of its own, and flush them to disk.

    Args:
        sizes: the bytes that each of the files will have.
        sync: whether to wait for the disk; only a measurement goes without.

    Returns:
        The peak resident memory of the workers and of this process, added up, in bytes.

    Raises:
        UserError: a file cannot be read or written.
    """

    def work(share: Iterable[Task], report: Callable[[int], None]) -> None:
        with RowReader() as reader, ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as files:
            descriptors: dict[str, int] = {}
            written = _Written(report, pool if sync else None)
            try:
                for task in share:
                    if task.file not in descriptors:
                        descriptors[task.file] = os.open(folder / task.file, os.O_WRONLY | os.O_CLOEXEC)
                        files.callback(os.close, descriptors[task.file])
                    _write_task(reader, task, descriptors[task.file], written)
                written.wait()
                for descriptor in descriptors.values() if sync else ():
                    os.fsync(descriptor)
            except OSError as error:
                raise UserError(f"{folder / task.file}: cannot be written: {error.strerror or error}") from error

    for name, num_bytes in sizes.items():
        try:
            reserve(folder / name, num_bytes)
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be written: {error.strerror or error}") from error
    return run(work, shares, progress).peak_bytes


class _Written:
    """Told of all that a worker writes: reports it, and with a `pool` keeps the disk at work meanwhile."""

    def __init__(self, report: Callable[[int], None], pool: ThreadPoolExecutor | None):
        self._report, self._pool = report, pool
        self._num_bytes, self._flushes = 0, []

    def __call__(self, descriptor: int, num_bytes: int) -> None:
        self._report(num_bytes)
        self._num_bytes += num_bytes
        if self._pool and self._num_bytes >= _SYNC_BYTES:
            self._flushes.append(self._pool.submit(os.fdatasync, descriptor))
            self._num_bytes = 0

    def wait(self) -> None:
        """Raises OSError where the disk has failed."""
        for flush in self._flushes:
            flush.result()


def _write_task(reader: RowReader, task: Task, descriptor: int, written: _Written) -> None:
    position, crc = task.position, 0
    around = envelope(task.dtype, task.stored_shape) if task.stored_shape is not None else None
    pending = [around.before] if around else []
    start = position + (len(around.before) if around else 0)
    for block in reader.blocks(task.tensor, task.ranges):
        data = converted(block, task.tensor.dtype, task.dtype)
        if around:
            crc = isal_zlib.crc32(data, crc)
        position += _write_all(descriptor, [*pending, data], position)
        pending = []
        written(descriptor, len(data))
    assert position - start == task.nbytes, (task.name, position - start, task.nbytes)
    if around:
        _write_all(descriptor, [*pending, around.closed(crc)], position)


def _write_all(descriptor: int, buffers: list[bytes | memoryview], position: int) -> int:
    total = sum(map(len, buffers))
    written = os.pwritev(descriptor, buffers, position)
    if written < total:
        rest = memoryview(b"".join(buffers))
        while written < total:
            written += os.pwrite(descriptor, rest[written:], position + written)
    return total


def stored_length(task: Task) -> int:
    """Bytes that the task takes in its file."""
    if task.stored_shape is None:
        return task.nbytes
    around = envelope(task.dtype, task.stored_shape)
    return len(around.before) + task.nbytes + len(around.after)


def shares(tasks: Sequence[Task], workers: int) -> list[Sequence[Task]]:
    """At most `workers` runs of consecutive tasks, of about equal bytes."""
    total, done, cuts = sum(task.nbytes for task in tasks), 0, [0]
    for number, task in enumerate(tasks):
        if done * workers >= total * len(cuts) and number > cuts[-1] and len(cuts) < workers:
            cuts.append(number)
        done += task.nbytes
    return [tasks[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(tasks)], strict=True)]
