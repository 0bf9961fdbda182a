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
from hymeg.files import write_whole

MANIFEST = "checksums.sfv"
BLOCK_BYTES = 1 << 20
_VERSION_LINE = f"; hymeg checksums 1: CRC-32 of every file, and of each {BLOCK_BYTES} bytes of it"
_LAST = "; lines above: "
_MAX_BLOCKS_KEPT = 8
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
    blocks, end, crc, of_block = bytearray(), 0, 0, 0
    for piece in sorted(pieces):
        if piece.position != end:
            raise ValueError(f"{end} bytes and then a piece at {piece.position}")
        if end % BLOCK_BYTES == 0 and end:
            blocks += of_block.to_bytes(4, "little")
            of_block = 0
        of_block = isal_zlib.crc32_combine(of_block, piece.crc, piece.length)
        crc = isal_zlib.crc32_combine(crc, piece.crc, piece.length)
        end += piece.length
    if end:
        blocks += of_block.to_bytes(4, "little")
    return FileSum(end, crc, bytes(blocks))


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


class Manifest(NamedTuple):
    """A folder's: the sums of its files by their name in it."""

    path: Path
    files: Mapping[str, FileSum]


def manifest_text(files: Mapping[str, FileSum]) -> bytes:
    lines = [_VERSION_LINE]
    for name, found in sorted(files.items()):
        lines.append(f"; {found.size} {base64.b64encode(found.blocks).decode() or '-'} {name}")
        lines.append(f"{name} {found.crc:08X}")
    text = "\n".join([*lines, ""]).encode()
    return text + f"{_LAST}{isal_zlib.crc32(text):08X}\n".encode()


def write_manifest(path: str | os.PathLike, files: Mapping[str, FileSum]) -> None:
    """Raises UserError where it cannot be written."""
    write_whole(path, manifest_text(files))


def expected_sum(path: str | os.PathLike) -> FileSum | None:
    """What the manifest of its folder says of the file `path`; None where there is none. Raises as `read_manifest`."""
    manifest = read_manifest(os.path.join(os.path.dirname(path) or ".", MANIFEST))
    return manifest.files.get(os.path.basename(path)) if manifest else None


def read_manifest(path: str | os.PathLike) -> Manifest | None:
    """None: there is none.

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
def _parsed(path: str, changed: int, size: int) -> Manifest:
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    above, _, below = text.rpartition(_LAST.encode())
    if not re.fullmatch(rb"[0-9A-F]{8}\n", below) or int(below, 16) != isal_zlib.crc32(above):
        raise Damaged(path, "its lines do not have the checksum that its last line names; copy it again")
    lines = above.decode().splitlines()
    if lines[0] != _VERSION_LINE:
        raise UserError(f"{path}: another version of hymeg wrote these checksums; {_VERSION_LINE!r} is needed")
    files = {}
    for about, line in zip(lines[1::2], lines[2::2], strict=True):
        _, length, blocks, name = about.split(" ", 3)
        crc = line[len(name) + 1 :]
        files[name] = FileSum(int(length), int(crc, 16), b"" if blocks == "-" else base64.b64decode(blocks))
    return Manifest(Path(path), files)


# ---- reading


class BlockCache:
    """The verified blocks, of whatever files, that were read in parts last."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[object, int], memoryview] = {}

    def get(self, file: object, number: int) -> memoryview | None:
        block = self._blocks.pop((file, number), None)
        if block is not None:
            self._blocks[file, number] = block  # the last one now
        return block

    def keep(self, file: object, number: int, block: memoryview) -> None:
        while len(self._blocks) >= _MAX_BLOCKS_KEPT:
            del self._blocks[next(iter(self._blocks))]
        self._blocks[file, number] = block


class VerifiedFile:
    """Reads a file, block by block, and compares each block with its sum before any of it is handed out.

    A block that is read in parts is kept in `cache`: read from beginning to end, whatever the pieces, each byte is read
    once.
    """

    def __init__(self, path: str | os.PathLike, descriptor: int, expected: FileSum, cache: BlockCache | None = None):
        self.path, self.descriptor, self.expected, self._cache = path, descriptor, expected, cache or BlockCache()
        found = os.fstat(descriptor).st_size
        if found != expected.size:
            raise Damaged(path, f"{found} bytes, {expected.size} were written; copy it again")

    def read_into(self, position: int, into: memoryview) -> int:
        """Fill `into`, as far as the file goes, from `position` on; how many bytes that are.

        Raises:
            Damaged: a block is not what was written.
            OSError: it cannot be read.
        """
        into = into[: max(self.expected.size - position, 0)]
        total = len(into)
        while into:
            number, skip = divmod(position, BLOCK_BYTES)
            length = min(BLOCK_BYTES, self.expected.size - number * BLOCK_BYTES)
            block = self._cache.get(self, number)
            if block is None and skip == 0 and len(into) >= length:
                part = length
                self._fill(number, into[:length])
            else:
                if block is None:
                    block = memoryview(bytearray(length))
                    self._fill(number, block)
                    self._cache.keep(self, number, block)
                part = min(length - skip, len(into))
                into[:part] = block[skip : skip + part]
            position, into = position + part, into[part:]
        return total

    def _fill(self, number: int, block: memoryview) -> None:
        position, rest = number * BLOCK_BYTES, block
        while rest:
            count = os.preadv(self.descriptor, [rest], position)
            if count == 0:
                raise Damaged(self.path, f"ends at byte {position}, {self.expected.size} were written; copy it again")
            position, rest = position + count, rest[count:]
        check_block(self.path, self.expected, number, block)


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
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while position < min(size, expected.size):
                block = buffer[: min(BLOCK_BYTES, expected.size - position)]
                count = 0
                while count < len(block) and (more := file.readinto(block[count:])):
                    count += more
                if isal_zlib.crc32(block[:count]) != expected.block(position // BLOCK_BYTES):
                    wrong.append(range(position, position + len(block)))
                position += len(block)
                report(count)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size != expected.size:
        wrong.append(range(min(size, expected.size), max(size, expected.size)))
    return wrong


class VerifiedStream(io.RawIOBase):
    """A file opened for reading, as an unbuffered binary file, verified as it is read. Closes it at its end."""

    def __init__(self, path: str | os.PathLike, expected: FileSum):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._verified = VerifiedFile(path, self._file.fileno(), expected)
        except BaseException:
            self._file.close()
            raise
        self._position, self._size = 0, expected.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, into: Buffer) -> int:
        count = self._verified.read_into(self._position, memoryview(into).cast("B"))
        self._position += count
        return count

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


def open_verified(path: str | os.PathLike) -> BinaryIO:
    """The file opened for reading; where its folder's manifest has its sums, verified as it is read.

    Raises:
        Damaged: it has another length than it had when it was written; so do reads of damaged blocks.
        OSError: it cannot be read.
    """
    expected = expected_sum(path)
    if expected is None:
        return open(path, "rb")
    return io.BufferedReader(VerifiedStream(path, expected))
