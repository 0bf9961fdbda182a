"""Small files in and out: JSON read with errors a person can act on; files that appear whole or not at all."""

import contextlib
import ctypes
import errno
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hymeg.errors import UserError

_libc = ctypes.CDLL(None, use_errno=True)
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems answer that cannot do a thing
_WITHOUT_TRUNCATING = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
_repr = reprlib.Repr(maxstring=160, maxlist=8, maxtuple=8, maxother=160)


def opened(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading."""
    return open(path, "rb")


@contextlib.contextmanager
def os_errors(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Make an OSError that is raised inside a UserError: `path` cannot be `what` ("read", "written")."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be {what}: {error.strerror or error}") from error


def shown(value: Any) -> str:
    """`value`, whatever a file may hold, on one line of bounded length for a message."""
    return json.dumps(value) if value is None or isinstance(value, bool) else _repr.repr(value)


def are_sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def is_file_name(value: Any) -> bool:
    """Whether it names a file in the folder where it is found, and none elsewhere."""
    return type(value) is str and value not in ("", ".", "..") and not re.search(r"[/\\\0]", value)


def parse_bytes(text: str) -> int:
    """The number of bytes in "5GB", "500MB", "2GiB" or "1000000". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    num_bytes = 0
    if match:
        number, prefix, binary = match.groups()
        num_bytes = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0))
    if num_bytes < 1:
        raise UserError(f"size {shown(text)}: a number of bytes such as 5GB, 500MB, 2GiB or 1000000 is needed")
    return num_bytes


def some(items: Iterable[Any], most: int) -> str:
    """The first of them, for a message, and whether there are more."""
    listed = [str(item) for item in items]
    return ", ".join(listed[:most] + ["..."] * (len(listed) > most))


def read_json(path: str | os.PathLike, opened: Callable[[Any], BinaryIO] = opened) -> Any:
    """The JSON value in the file `path`. Raises UserError where the file is missing, unreadable or not JSON (with line
    and column).
    """
    try:
        with os_errors(path, "read"), opened(path) as file:
            return json.loads(file.read())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, brackets thousands deep
        raise UserError(f"{path}: not valid JSON: {error}") from error


def parse_row(text: str, needed: str = "an object a line is needed, as jq -c writes it") -> Any:
    """The JSON value `text`, one line of a file or a part of it. Raises UserError for no JSON, which ends with what is
    `needed`, and for a key twice in one object.
    """
    try:
        return _ROW.decode(text)
    except json.JSONDecodeError as error:
        found = text[error.pos : error.pos + 20]
        reason = f"{error.msg} (column {error.colno}: {shown(found) if found else 'the end'})"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"not JSON: {reason}; {needed}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(
            f"the key {shown(twice)} stands twice in one object, of which only one would be read; leave one out"
        )
    return value


_ROW = json.JSONDecoder(object_pairs_hook=_unique)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success flush it to disk and rename it to `path`, on any
    failure remove it.

    Raises:
        UserError: the disk is full, the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors(path, "written"):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """`data` as the file `path`, whole or not at all. Raises UserError as `written_whole` does."""
    with written_whole(path) as file:
        file.write(data)


def write_start(path: str | os.PathLike, data: bytes) -> None:
    """`data` over the first bytes of the file `path`, made if absent, flushed to disk. Raises UserError where it cannot
    be written.
    """
    with os_errors(path, "written"), os.fdopen(os.open(path, _WITHOUT_TRUNCATING, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def reserve(path: str | os.PathLike, num_bytes: int) -> None:
    """Make the file `path` so long, what is new in it zeros, and have its disk space allotted where the file system
    can: writing it then neither finds the disk full nor has to look for space. (os.posix_fallocate would write into
    every block where it cannot.)

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """
    descriptor = os.open(path, _WITHOUT_TRUNCATING, 0o666)
    fallocate = getattr(_libc, "fallocate", None)  # Linux's
    given = ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(num_bytes)
    try:
        if num_bytes and (fallocate is None or fallocate(*given) != 0):
            code = 0 if fallocate is None else ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(code, os.strerror(code), str(path))
            os.ftruncate(descriptor, num_bytes)  # room beforehand is a convenience
    finally:
        os.close(descriptor)


def drop_from_cache(path: str | os.PathLike) -> None:
    """Have the next reader of the file, which is on disk, get it from there and not from memory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def fsync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's own entries, where its file system can: a rename then survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
