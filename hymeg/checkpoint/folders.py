"""Folders that appear whole or not at all, and the small files (config.json, tokenizer) that travel with a checkpoint.

A conversion works in FOLDER.partial beside FOLDER and renames it when everything is on disk. What makes a folder a
checkpoint, tracker or config.json, is written last there too: nothing accepts a FOLDER.partial that a killed conversion
left, unless all of it was there and only the rename was not. The next conversion to FOLDER removes it.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hymeg.errors import UserError
from hymeg.hf.config import CONFIG_FILE
from hymeg.hf.files import fsync_folder, written_whole

GENERATION_CONFIG = "generation_config.json"
_CARRIED = re.compile(
    r"generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template.*"
    r"|.*\.tiktoken|(configuration|modeling|tokenization)_.*\.py|(LICENSE|NOTICE|Notice|License).*"
)
_MARK = ".unfinished"
_MAX_CARRIED_BYTES = 256 << 20
_SECONDS_TO_WAIT = 10.0  # for the workers of a killed conversion to notice


def carried_files(folder: Path) -> list[Path]:
    """What goes along with the weights of a Hugging Face folder, config.json excepted: generation config, tokenizer,
    chat template, code, licence.
    """
    found = sorted(path for path in folder.iterdir() if _CARRIED.fullmatch(path.name) and path.is_file())
    for path in found:
        if path.stat().st_size > _MAX_CARRIED_BYTES:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, more than a tokenizer's file can have ({_MAX_CARRIED_BYTES}); "
                "move it elsewhere"
            )
    return found


def carry(files: list[Path], folder: Path) -> None:
    """Copy `files` into `folder`, each whole. Raises UserError where one cannot be read or written."""
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        with written_whole(folder / path.name) as file:
            file.write(data)


def check_target(target: Path, num_bytes: int, overwrite: bool, replaceable: re.Pattern) -> None:
    """Whether a folder of `num_bytes` can be made at `target`.

    Args:
        overwrite: whether a folder that is there and not empty may be replaced.
        replaceable: names of all files and folders that may be lost with it.

    Raises:
        UserError: it cannot, or must not.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: is no folder; give a folder that is empty or does not exist yet")
    if target.is_dir():
        names = sorted(os.listdir(target))
        if names and not overwrite:
            raise UserError(
                f"{target}: not empty (it holds {', '.join(names[:3])}); give another folder, or --overwrite to "
                "replace it"
            )
        if foreign := [
            name for name in names if not replaceable.fullmatch(name) and not _CARRIED.fullmatch(name) and name != _MARK
        ]:
            raise UserError(
                f"{target}: --overwrite would lose {', '.join(foreign[:3])}, which no conversion wrote; give another "
                "folder"
            )
        if os.path.ismount(target):
            raise UserError(f"{target}: is a mount point, which cannot be replaced as a whole; give a folder inside it")
    existing = next(folder for folder in (target.parent, *target.absolute().parents) if folder.exists())
    if (
        not existing.is_dir()
        or not os.access(existing, os.W_OK | os.X_OK)
        or os.statvfs(existing).f_flag & os.ST_RDONLY
    ):
        raise UserError(f"{target}: {existing} is not writable; give a folder elsewhere")
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{target}: {num_bytes / 1e9:,.3f} GB are needed and {free / 1e9:,.3f} GB are free on that disk; make room "
            "or give a folder elsewhere"
        )


def partial_of(target: Path) -> Path:
    """Where a conversion to `target` works."""
    return target.with_name(target.name + ".partial")


@contextlib.contextmanager
def built_beside(target: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """An empty folder to write to, which becomes `target` on success, replacing what is there, and is removed on
    failure.

    Raises:
        UserError: it cannot be made, or another conversion is writing to it.
    """
    target = target.absolute()
    partial = partial_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftover(partial, say)
        partial.mkdir()
        lock = os.open(partial / _MARK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror or error}; give a folder elsewhere") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        fsync_folder(partial)
        _swap(partial, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):
            _remove(partial)


def _swap(partial: Path, target: Path) -> None:
    old = target.with_name(target.name + ".replaced")
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(partial, target)
    fsync_folder(target.parent)
    (target / _MARK).unlink()
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
        deadline = time.monotonic() + _SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{partial}: another conversion is writing there; wait for it, or give another folder"
                    ) from None
                time.sleep(0.1)
    _remove(partial)
    say(f"{partial}: removed, an earlier conversion did not finish; starting anew")


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


assert not _CARRIED.fullmatch(CONFIG_FILE)
