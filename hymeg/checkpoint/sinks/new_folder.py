"""Folders that appear whole or not at all.

A conversion works in FOLDER.partial beside FOLDER and renames it when everything is on disk. What makes a folder a
checkpoint, tracker or config.json, is written last there too: nothing accepts a FOLDER.partial that a killed conversion
left, unless all of it was there and only the rename was not. The next conversion to FOLDER removes it. Nothing else is
ever removed, but what a conversion wrote, on request: it leaves a RECORD of where it came from and of its files.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hymeg import __version__
from hymeg.checkpoint import workers
from hymeg.checkpoint.dist_files import SOURCE_FILE
from hymeg.checksums import MANIFEST, FileSum, read_manifest, sum_of, sum_of_file, write_manifest
from hymeg.errors import UserError, located
from hymeg.files import fsync_folder, os_errors, read_json, write_whole

RECORD = "conversion.json"
_MARK = ".unfinished"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # as of Lustre mounted without flock
_SECONDS_TO_WAIT = 10.0  # for the workers of a killed conversion to notice


def partial_of(target: Path) -> Path:
    """Where a conversion to `target` works."""
    return target.with_name(target.name + ".partial")


@contextlib.contextmanager
def new_folder(
    target: Path, num_bytes: int, overwrite: bool, record: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Path]:
    """An empty folder to write to, which becomes `target` on success and is removed on failure, SIGTERM and SIGHUP
    included.

    Args:
        num_bytes: that will be written.
        overwrite: replace a conversion that is there.
        record: where it came from, to leave in RECORD.

    Raises:
        UserError: it cannot be made, something else is there, or comes there meanwhile, or another conversion is
            writing to it.
    """
    target = target.resolve() if target.is_symlink() else target.absolute()
    check_target(target, num_bytes, overwrite)
    partial = partial_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftover(partial, say)
        for old in sorted(target.parent.glob(f"{glob.escape(target.name)}.old-*")):
            say(f"{old}: kept, it was {target.name} until a conversion that replaced it was killed; remove it yourself")
        partial.mkdir()
        mark = os.open(partial / _MARK, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror or error}; give a folder elsewhere") from error
    try:
        with os_errors(target, "written"), _tidy_end():
            _lock(mark, 0)
            check_target(target, 0, overwrite)  # the conversion that was waited for may have finished
            yield partial
            files = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.name != _MARK} | {MANIFEST}
            text = json.dumps({"hymeg": __version__, **record, "files": sorted(files)}, indent=1).encode()
            write_whole(partial / RECORD, text)
            write_manifest(partial / MANIFEST, _sums(partial) | {RECORD: sum_of(text)})
            fsync_folder(partial)
            _appear(partial, target, overwrite)
    finally:
        os.close(mark)
        with contextlib.suppress(OSError):
            _remove(partial)


def check_target(target: Path, num_bytes: int, overwrite: bool) -> None:
    """Whether a folder of `num_bytes` can be made at `target`. Raises UserError where it cannot, or must not."""
    with located(target):
        if target.is_dir():
            names = sorted(os.listdir(target))
            if names and not overwrite:
                found = ", ".join(names[:3])
                raise UserError(f"not empty (it holds {found}); give another folder, or --overwrite to replace it")
            if names:
                _check_replaceable(target)
            if os.path.ismount(target):
                raise UserError("is a mount point, which cannot be replaced as a whole; give a folder inside it")
        elif target.exists():
            raise UserError("is no folder; give a folder that is empty or does not exist yet")
        existing = next(folder for folder in (target.parent, *target.absolute().parents) if folder.exists())
        is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        if not is_writable or os.statvfs(existing).f_flag & os.ST_RDONLY:
            raise UserError(f"{existing} is not writable; give a folder elsewhere")
        free = shutil.disk_usage(existing).free
        if free < num_bytes:
            needed = f"{num_bytes / 1e9:,.3f} GB are needed and {free / 1e9:,.3f} GB are free on that disk"
            raise UserError(f"{needed}; make room or give a folder elsewhere")


def _check_replaceable(folder: Path) -> None:
    """Whether `folder` holds what a conversion wrote, and nothing else."""
    try:
        written = set(read_json(folder / RECORD)["files"])
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"--overwrite replaces what a conversion wrote, and no {RECORD} in it says that one did; give another "
            "folder, or remove this one yourself"
        ) from None
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    if foreign := sorted(found - written - {RECORD, SOURCE_FILE, _MARK}):
        lost = ", ".join(foreign[:3])
        raise UserError(f"--overwrite would lose {lost}, which no conversion wrote; give another folder")


def _sums(folder: Path) -> dict[str, FileSum]:
    """Of all files in `folder` that no manifest of a folder inside it has. Those of tensors were taken while they were
    written; what came along from elsewhere is small."""
    manifests = {path.parent: read_manifest(path) for path in folder.rglob(MANIFEST)}
    known = manifests.get(folder, {})
    names = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in (_MARK, MANIFEST)
        and (path.parent == folder or path.parent not in manifests)
    ]
    return {name: known.get(name) or sum_of_file(folder / name) for name in names}


def _appear(partial: Path, target: Path, overwrite: bool) -> None:
    old = None
    if overwrite and target.is_dir() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f"{target.name}.old-", dir=target.parent))
        os.rename(target, old)
    try:
        if old is not None:
            with located(target):
                _check_replaceable(old)
        os.rename(partial, target)  # onto nothing or an empty folder: POSIX refuses another
    except BaseException as error:
        if old is not None:
            os.rename(old, target)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(
                f"{target}: something was written there meanwhile, which was left as it is; convert to another folder"
            ) from None
        raise
    fsync_folder(target.parent)
    (target / _MARK).unlink()
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftover(partial: Path, say: Callable[[str], None]) -> None:
    """Remove what a killed conversion left, once its workers are gone too."""
    if not partial.exists():
        return
    if not (partial / _MARK).is_file():
        if not partial.is_dir() or any(partial.iterdir()):
            raise UserError(f"{partial}: is in the way, and no conversion made it; move it elsewhere")
        partial.rmdir()
        return
    with open(partial / _MARK) as mark:
        locked = _lock(mark.fileno(), _SECONDS_TO_WAIT)
        if locked is None:
            raise UserError(
                f"{partial}: there already, and whether another conversion is writing there cannot be told, as this "
                "file system has no locks; remove it if none is"
            )
        if not locked:
            raise UserError(f"{partial}: another conversion is writing there; wait for it, or give another folder")
        with contextlib.suppress(FileNotFoundError):  # it has finished meanwhile
            if os.path.samestat(os.fstat(mark.fileno()), os.stat(partial / _MARK)):
                _remove(partial)
                say(f"{partial}: removed, an earlier conversion did not finish; starting anew")


def _lock(descriptor: int, seconds: float) -> bool | None:
    """Whether the file is locked for this process now; None: there are no locks on this file system."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None


def _remove(partial: Path) -> None:
    """The mark goes last: whoever is killed here leaves a folder that the next conversion still knows for its own."""
    if not partial.exists():
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _MARK:
            path.unlink()
    (partial / _MARK).unlink(missing_ok=True)
    partial.rmdir()


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in this process, unless it does something about them already."""
    is_main = threading.current_thread() is threading.main_thread()
    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        workers.told_to_end.clear()


def _exit(number: int, _: Any) -> None:
    workers.told_to_end.append(number)
    raise SystemExit(128 + number)
