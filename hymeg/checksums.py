"""Checksums: taken while bytes are written, kept beside the files, compared while bytes are read.

A folder's MANIFEST (of some of its files: PREFIX.MANIFEST) is an SFV file, which `rhash -c`, `cksfv -f` and 7-Zip
check: a line `NAME CRC32` for each file. Comments hold what lets a part of a file be checked, and the pieces of a file
be written in any order by several processes: `; SIZE BLOCKS NAME`, where BLOCKS are the CRC-32 of each BLOCK_BYTES of
the file, little-endian, in base64. The last line is the CRC-32 of the lines above it. CRC-32 is the one of zip and gzip
(ISO 3309): it finds every single bit that flips, every burst of up to 32 bits, and all but one of 2^32 other accidents.
It is no protection from somebody who changes a file on purpose.
"""

import base64
import functools
import io
import os
import re
import stat
from collections.abc import Buffer, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from isal import isal_zlib

from hymeg.errors import UserError
from hymeg.files import os_errors, write_whole

MANIFEST = "checksums.sfv"
BLOCK_BYTES = 1 << 20
_VERSION_LINE = f"; hymeg checksums 1: CRC-32 of every file, and of each {BLOCK_BYTES} bytes of it"
_LAST = "; lines above: "
_MUCH = 8 * BLOCK_BYTES
_MAX_MANIFEST_BYTES = 4 << 30


class Damaged(UserError):
    """What is read is not what was written.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike, message: str):
        super().__init__(f"{path}: damaged: {message}")
        self.path, self.what = str(path), message

    def __reduce__(self):
        return Damaged, (self.path, self.what)

    def reading(self, name: str) -> "Damaged":
        """The same, found when `name` was read."""
        return Damaged(self.path, f"{self.what} (found when reading {name})")


class FileSum(NamedTuple):
    """A file's length, its CRC-32 and those of its blocks, 4 bytes each, little-endian."""

    size: int
    crc: int
    blocks: bytes

    def block(self, number: int) -> int:
        return int.from_bytes(self.blocks[4 * number : 4 * number + 4], "little")


class Piece(NamedTuple):
    """Consecutive bytes of one block."""

    position: int
    length: int
    crc: int


class Summer:
    """Takes the checksums of what goes to one file, piece after piece, each at its position."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def add(self, position: int, data: Buffer) -> int:
        """`data` goes to `position`; its CRC-32."""
        whole, data = 0, memoryview(data).cast("B")
        while data:
            part = data[: BLOCK_BYTES - position % BLOCK_BYTES]
            crc = isal_zlib.crc32(part)
            whole = isal_zlib.crc32_combine(whole, crc, len(part))
            last = self.pieces[-1] if self.pieces else Piece(0, 0, 0)
            if position % BLOCK_BYTES and last.position + last.length == position:
                joined = isal_zlib.crc32_combine(last.crc, crc, len(part))
                self.pieces[-1] = Piece(last.position, last.length + len(part), joined)
            else:
                self.pieces.append(Piece(position, len(part), crc))
            position, data = position + len(part), data[len(part) :]
        return whole

    def result(self) -> FileSum:
        return joined(self.pieces)


def joined(pieces: Iterable[Piece]) -> FileSum:
    """The sums of the file that consists of these pieces.

    Raises:
        ValueError: they leave a gap, or overlap.
    """
    blocks, end, crc = [], 0, 0
    for piece in sorted(pieces):
        if piece.position != end:
            raise ValueError(f"{end} bytes and then a piece at {piece.position}")
        if end % BLOCK_BYTES == 0:
            blocks.append(0)
        blocks[-1] = isal_zlib.crc32_combine(blocks[-1], piece.crc, piece.length)
        crc = isal_zlib.crc32_combine(crc, piece.crc, piece.length)
        end += piece.length
    return FileSum(end, crc, b"".join(block.to_bytes(4, "little") for block in blocks))


def sum_of(data: Buffer) -> FileSum:
    summer = Summer()
    summer.add(0, data)
    return summer.result()


def sum_of_file(path: str | os.PathLike) -> FileSum:
    """Of a small file that was written elsewhere."""
    return sum_of(Path(path).read_bytes())


class SummingStream(io.RawIOBase):
    """A buffered file opened for writing from its beginning on, whose checksums are taken by `summer`: of much at once
    in a thread, while it is written.
    """

    def __init__(self, file: io.BufferedIOBase, summer: Summer):
        self._file, self._summer = file, summer

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        position, data = self._file.tell(), memoryview(data).cast("B")
        if len(data) < _MUCH:
            self._summer.add(position, data)
            return self._file.write(data)
        with ThreadPoolExecutor(1) as beside:  # a thread of its own: the process may have been forked since the last
            summed = beside.submit(self._summer.add, position, data)
            written = self._file.write(data)
            summed.result()
        return written

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()


# ---- the manifest


def write_manifest(path: str | os.PathLike, files: Mapping[str, FileSum]) -> None:
    """Raises UserError where it cannot be written."""
    lines = [_VERSION_LINE]
    for name, found in sorted(files.items()):
        lines.append(f"; {found.size} {base64.b64encode(found.blocks).decode() or '-'} {name}")
        lines.append(f"{name} {found.crc:08X}")
    text = "\n".join([*lines, ""]).encode()
    write_whole(path, text + f"{_LAST}{isal_zlib.crc32(text):08X}\n".encode())


def expected_sum(path: str | os.PathLike) -> FileSum | None:
    """What the manifest of its folder, if any, says of the file `path`. Raises as `read_manifest` does."""
    manifest = read_manifest(os.path.join(os.path.dirname(path) or ".", MANIFEST))
    return manifest.get(os.path.basename(path)) if manifest else None


def read_manifest(path: str | os.PathLike) -> Mapping[str, FileSum] | None:
    """The sums of files by their name in the manifest's folder; None: there is no manifest.

    Raises:
        Damaged: it is not what was written.
        UserError: it cannot be read.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_MANIFEST_BYTES:
        raise Damaged(path, "no manifest of checksums; remove it, and what is in the folder is not verified")
    return _parsed(os.fspath(path), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _parsed(path: str, changed: int, size: int) -> Mapping[str, FileSum]:
    with os_errors(path, "read"):
        text = Path(path).read_bytes()
    above, _, below = text.rpartition(_LAST.encode())
    if not re.fullmatch(rb"[0-9A-F]{8}\n", below) or int(below, 16) != isal_zlib.crc32(above):
        raise Damaged(path, "its lines do not have the checksum that its last line names; copy it again")
    lines = above.decode().split("\n")[:-1]
    if lines[0] != _VERSION_LINE:
        raise UserError(f"{path}: another version of hymeg wrote these checksums; {_VERSION_LINE!r} is needed")
    files = {}
    for about, line in zip(lines[1::2], lines[2::2], strict=True):
        _, length, blocks, name = about.split(" ", 3)
        crc = line[len(name) + 1 :]
        files[name] = FileSum(int(length), int(crc, 16), b"" if blocks == "-" else base64.b64decode(blocks))
    return files


# ---- reading


class Latest:
    """What was made or asked for last, by key: up to `max_bytes`, but the last one in any case."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._num_bytes, self._kept = max_bytes, 0, {}

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def get[T](self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, which has `nbytes`, or gave when this key was last asked for."""
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)  # the latest comes last
            return self._kept[key]
        made = make()
        self._num_bytes += made.nbytes
        while self._kept and self._num_bytes > self._max_bytes:
            self._num_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        self._kept[key] = made
        return made


class ReadFile:
    """A file opened for reading at any position. Where its sums are `expected`, each block is compared with its own
    before any of it is handed out.

    A block that is read in parts is kept in `blocks`, which several files may share: read from beginning to end,
    whatever the pieces, each byte is read once.

    Raises:
        Damaged: it has another length than it had when it was written.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, expected: FileSum | None, blocks: Latest | None = None):
        self.path, self._expected, self._blocks = path, expected, blocks or Latest(_MUCH)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size
        if expected and self.size != expected.size:
            self.close()
            raise Damaged(path, f"{self.size} bytes, {expected.size} were written; copy it again")

    def close(self) -> None:
        os.close(self.descriptor)

    def read_into(self, position: int, into: memoryview) -> int:
        """Fill `into`, as far as the file goes, from `position` on; how many bytes that are.

        Raises:
            Damaged: a block is not what was written.
            OSError: it cannot be read.
        """
        if not self._expected:
            return _read_at(self.descriptor, position, into)
        into = into[: max(self.size - position, 0)]
        total = len(into)
        while into:
            number, skip = divmod(position, BLOCK_BYTES)
            length = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
            if skip == 0 and len(into) >= length and (self, number) not in self._blocks:
                self._verified(number, into[:length])
                part = length
            else:
                read = functools.partial(self._verified, number, length=length)
                block = self._blocks.get((self, number), read)
                part = min(length - skip, len(into))
                into[:part] = block[skip : skip + part]
            position, into = position + part, into[part:]
        return total

    def _verified(self, number: int, into: memoryview | None = None, length: int = 0) -> memoryview:
        """Block `number`, in memory of its own without an `into`."""
        block = memoryview(bytearray(length)) if into is None else into
        count = _read_at(self.descriptor, number * BLOCK_BYTES, block)
        if count < len(block):
            end = number * BLOCK_BYTES + count
            raise Damaged(self.path, f"ends at byte {end}, {self.size} were written; copy it again")
        check_block(self.path, self._expected, number, block)
        return block


def _read_at(descriptor: int, position: int, into: memoryview) -> int:
    """Fill `into`, as far as the file goes, whatever the system gives at once."""
    total = 0
    while total < len(into) and (count := os.preadv(descriptor, [into[total:]], position + total)):
        total += count
    return total


def check_block(path: str | os.PathLike, expected: FileSum, number: int, block: Buffer) -> None:
    """Raises Damaged: `block`, read at number * BLOCK_BYTES, is not what was written there."""
    if isal_zlib.crc32(block) != expected.block(number):
        first = number * BLOCK_BYTES
        raise Damaged(
            path, f"bytes {first} to {first + len(memoryview(block).cast('B')) - 1} are not those that were written"
        )


def damaged_blocks(
    path: str | os.PathLike, expected: FileSum, report: Callable[[int], None] = lambda num_bytes: None
) -> list[range]:
    """The bytes of a file that are not those that were written; what is missing at its end is one of them.

    Raises:
        UserError: it cannot be read.
    """
    wrong, position = [], 0
    buffer = memoryview(bytearray(min(BLOCK_BYTES, max(expected.size, 1))))
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while position < min(size, expected.size):
            block = buffer[: min(BLOCK_BYTES, expected.size - position)]
            count = _read_at(file.fileno(), position, block)
            if isal_zlib.crc32(block[:count]) != expected.block(position // BLOCK_BYTES):
                wrong.append(range(position, position + len(block)))
            position += len(block)
            report(count)
    if size != expected.size:
        wrong.append(range(min(size, expected.size), max(size, expected.size)))
    return wrong


class FilePart(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, file: ReadFile, start: int, length: int):
        self._file, self._start, self.length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if position < 0:
            raise ValueError("a position before the beginning")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, into: Buffer) -> int:
        into = memoryview(into).cast("B")[: max(self.length - self._position, 0)]
        count = self._file.read_into(self._start + self._position, into)
        self._position += count
        return count

    def read(self, size: int | None = -1) -> bytes:
        rest = max(
            self.length - self._position, 0
        )  # RawIOBase would take the memory for all that a broken file asks for
        return super().read(rest if size is None or size < 0 else min(size, rest))

    def read_at(self, position: int, size: int) -> bytes:
        self.seek(position)
        return self.read(size)


class _WholeFile(FilePart):
    def fileno(self) -> int:
        return self._file.descriptor

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_verified(path: str | os.PathLike, expected: FileSum | None = None) -> BinaryIO:
    """The file opened for reading; where its sums are `expected`, or its folder's manifest has them, verified as it is
    read.

    Raises:
        Damaged: it has another length than it had when it was written; so do reads of damaged blocks.
        OSError: it cannot be read.
    """
    expected = expected or expected_sum(path)
    if expected is None:
        return open(path, "rb")
    return io.BufferedReader(_WholeFile(ReadFile(path, expected), 0, expected.size))
