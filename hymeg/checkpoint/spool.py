"""Objects in an unnamed temporary file: made by one process, read a few at a time by others, held whole by none.

What grows with the number of tensors is planned in a process that then ends, so that the memory of those that move
bytes does not depend on it.
"""

import io
import itertools
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from hymeg.errors import UserError

Part = tuple[int, int]  # bytes [start, stop) of the file

_NUM_TOGETHER = 64  # objects in one pickle, where what they share stands once


class Spool:
    """Make it before forking: the processes share the file. Parts can be read by several at once; only one may add."""

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
        except OSError as error:
            raise _unusable(error) from error

    def add(self, objects: Iterable[Any]) -> Part:
        """Write them behind what is there. Raises UserError where the disk of temporary files is full."""
        try:
            start = self._file.seek(0, os.SEEK_END)
            for some in itertools.batched(objects, _NUM_TOGETHER):
                pickle.dump(some, self._file, pickle.HIGHEST_PROTOCOL)
            self._file.flush()
            return start, self._file.tell()
        except OSError as error:
            raise _unusable(error) from error

    def read(self, part: Part) -> Iterator[Any]:
        """The objects of a part, in their order."""
        with io.BufferedReader(_Window(self._file.fileno(), *part)) as window:
            while window.peek(1):
                yield from pickle.load(window)


class _Window(io.RawIOBase):
    """Bytes of a file that others read too: without a position of its own in the kernel."""

    def __init__(self, descriptor: int, start: int, stop: int):
        self._descriptor, self._position, self._stop = descriptor, start, stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: self._stop - self._position]
        count = os.preadv(self._descriptor, [room], self._position) if room else 0
        self._position += count
        return count


def _unusable(error: OSError) -> UserError:
    return UserError(
        f"{tempfile.gettempdir()}: cannot be written: {error.strerror or error}; set TMPDIR to a folder with room for "
        "temporary files"
    )
