"""Conversations and translations, tokenized once: an index beside the file, memory-mapped by every process.

FOLDER/NAME-FINGERPRINT/ holds `tokens.bin` (int32, row after row; a token that is trained is stored as its bitwise
complement, a negative number), `starts.npy` (int64 `[rows + 1]`), `lines.npy` (int64 `[rows]`, from 1); where a turn
has another weight than 0 and 1, `weights.npy` (fp32, of each turn that is trained) and `turns.npy` (int64 `[rows + 1]`,
where in it each row's begin); `index.json` (a digest of the file, rows that could not be trained on, counts), in
`seen/` the times that files of that content were found with, and in folders of their own what `cached` keeps. The
fingerprint is taken over the file's size and ends, the tokenizer, the chat template and hymeg's rules. `checksums.sfv`
lets all of it be verified as it is read.
`hymeg.data.index_building` makes it. A killed build leaves a hidden `.partial` folder and its `.lock`, which
nothing reads and the next build removes.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hymeg import checksums
from hymeg.checksums import BLOCK_BYTES, MANIFEST, Damaged, FileSum
from hymeg.data.chat import Tokens
from hymeg.errors import UserError
from hymeg.files import fsync_folder, read_json, write_whole

SUMMARY = "index.json"
_VERSION = 3
_END_BYTES = 1 << 20  # at each end of the file
_LOCK, _PARTIAL = ".lock", ".partial"  # of a build: its lock, what it writes
_NAME_LENGTH = 48  # characters of the file's name in the folder's
_BROKEN = (UserError, OSError, EOFError, ValueError, LookupError, TypeError)  # what reading a damaged index raises


class BadRows(NamedTuple):
    """Rows that cannot be trained on, for one reason."""

    reason: str
    count: int
    first: str  # the message about the first of them, which begins with its place


class RowIndex:
    """A built index of the file `path`, memory-mapped."""

    def __init__(self, folder: Path, path: str):
        self.folder, self.path = folder, path
        summary = read_json(folder / SUMMARY, checksums.open_verified)
        self.digest: str = summary["digest"]
        self.bad_rows = [BadRows(*entry) for entry in summary["bad_rows"]]
        self.counts: dict[str, int] = summary["counts"]
        self.ignored: dict[str, int] = summary["ignored"]  # rows by key that has no meaning in them, most first
        self.num_without_weight: int = summary["without_weight"]  # rows that are left out: every turn has weight 0
        self._is_weighted: bool = summary["is_weighted"]
        self.starts, self.lines = (_verified_array(folder / f"{name}.npy") for name in ("starts", "lines"))
        if self._is_weighted:
            self._turns, self._weights = (_verified_array(folder / f"{name}.npy") for name in ("turns", "weights"))
        self.stored = np.memmap(folder / "tokens.bin", np.int32, mode="r")
        self._expected = checksums.expected_sum(folder / "tokens.bin")
        self._bytes = memoryview(self.stored).cast("B")
        self._verified = bytearray(-(-len(self._bytes) // BLOCK_BYTES))  # blocks of the tokens: 1 where it was compared
        if len(self.starts) != len(self.lines) + 1 or len(self.stored) != self.starts[-1]:
            raise self._damaged(f"{len(self._bytes)} bytes")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, row: int) -> Tokens:
        start, stop = int(self.starts[row]), int(self.starts[row + 1])
        self._verify(4 * start, 4 * stop)
        stored = self.stored[start:stop]
        trained = stored < 0
        token_ids = np.where(trained, ~stored, stored)
        if not self._is_weighted:
            return Tokens(token_ids, trained)
        weights = np.zeros(len(stored), np.float32)
        # Of the turn that each trained token is in: the token that opens a turn is not trained.
        begins = trained & ~np.concatenate([[False], trained[:-1]])
        weights[trained] = self._weights[self._turns[row] : self._turns[row + 1]][np.cumsum(begins)[trained] - 1]
        return Tokens(token_ids, trained, weights)

    def _verify(self, start: int, stop: int) -> None:
        """Compare the blocks of the tokens that hold these bytes with their checksums, each once in a process."""
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) if self._expected else ():
            if not self._verified[number]:
                block = self._bytes[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                try:
                    checksums.check_block(self.folder / "tokens.bin", self._expected, number, block)
                except Damaged as error:
                    raise self._damaged(error.what) from None
                self._verified[number] = 1

    def _damaged(self, what: str) -> Damaged:
        return Damaged(self.folder / "tokens.bin", f"{what}; remove {self.folder}, and it is made again")

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(self.starts)

    def is_cached(self, name: str) -> bool:
        return bool(_arrays(self.folder / name))

    def cached(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays kept beside the index under `name`, made when they are not there."""
        folder = self.folder / name
        if not self.is_cached(name):
            with built_beside(folder, lambda: self.is_cached(name)) as partial:
                checksums.write_manifest(partial / MANIFEST, save_arrays(partial, make()))
        return _arrays(folder)


def index_folder(path: str, cache: str | None, fingerprint: str) -> Path:
    """Where the index of the file `path` belongs: in `cache`, or beside the file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(f"{_VERSION} {fingerprint} {size} ".encode() + file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return Path(cache or f"{path}.cache") / f"{Path(path).name[:_NAME_LENGTH]}-{digest.hexdigest()[:16]}"


def is_built(folder: Path, path: str) -> bool:
    """Whether there is an index with all its tokens, and it is that of the file as it is now. A file with other times
    than before is read and compared.
    """
    try:
        index = RowIndex(folder, path)
        seen = _seen(folder, path)
        if seen.is_file() and seen.read_text() == file_state(path):
            return True
        if index.digest != content_digest(path):
            return False
    except _BROKEN:
        return False
    with contextlib.suppress(UserError, OSError):  # where it cannot be kept the file is compared each time
        note_seen(folder, path, file_state(path))
    return True


def file_state(path: str) -> str:
    """Changes with every write to the file: the time of the last change of the inode cannot be set back."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def note_seen(folder: Path, path: str, state: str) -> None:
    """Remember in the index in `folder` that the file `path`, in this state, has its content."""
    seen = _seen(folder, path)
    seen.parent.mkdir(exist_ok=True)
    write_whole(seen, state.encode())


def _seen(folder: Path, path: str) -> Path:
    return folder / "seen" / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]


def content_digest(path: str) -> str:
    """Of the whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def older_indices(folder: Path, path: str) -> list[Path]:
    """Indices of files of that name which the index in `folder` has taken the place of, or which are another run's."""
    pattern = f"{glob.escape(Path(path).name[:_NAME_LENGTH])}-{'[0-9a-f]' * 16}"
    return sorted(other for other in folder.parent.glob(pattern) if other != folder)


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays in `folder`, memory-mapped; none where it is damaged or not there."""
    try:
        return {path.stem: _verified_array(path) for path in folder.glob("*.npy")}
    except _BROKEN:
        return {}


def _verified_array(path: Path) -> np.ndarray:
    """Memory-mapped. Raises Damaged where the file is not what was written."""
    if (expected := checksums.expected_sum(path)) and (wrong := checksums.damaged_blocks(path, expected)):
        raise Damaged(path, f"bytes {wrong[0].start} to {wrong[0].stop - 1} are not those that were written")
    return np.load(path, mmap_mode="r")


def save_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, FileSum]:
    """Each as FOLDER/KEY.npy, as np.save does; the files' checksums by name."""
    sums = {}
    for key, array in arrays.items():
        summer = checksums.Summer()
        with open(folder / f"{key}.npy", "wb") as file:
            np.save(checksums.SummingStream(file, summer), array)
        sums[f"{key}.npy"] = summer.result()
    return sums


@contextlib.contextmanager
def built_beside(folder: Path, is_good: Callable[[], bool]) -> Iterator[Path]:
    """A folder of its own to write to, which becomes `folder` on success, in place of one that is not good. Who comes
    second keeps the first one's, which is the same.
    """
    mine = f".{folder.name}.{socket.gethostname()}."
    partial = folder.with_name(f"{mine}{os.getpid()}{_PARTIAL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent, mine)
        with _locked(partial.with_suffix(_LOCK)):
            partial.mkdir()
            yield partial
            for path in partial.rglob("*.*"):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                if not is_good():
                    shutil.rmtree(folder, ignore_errors=True)
                    partial.rename(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}; give --data-cache-path, a folder with room that "
            "can be"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is there before and after what it stands for; at the end it is gone."""
    while True:
        with open(path, "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    continue
            except FileNotFoundError:  # taken for a leftover before it was locked
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _remove_leftovers(parent: Path, mine: str) -> None:
    """Of builds that were killed: a process, in whatever container, holds the lock of what it is writing."""
    found = [path for path in parent.glob(f"{glob.escape(mine)}*") if path.suffix in (_LOCK, _PARTIAL)]
    for lock in {path.with_suffix(_LOCK) for path in found}:
        partial = lock.with_suffix(_PARTIAL)
        try:
            with open(lock, "r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
                lock.unlink()
        except FileNotFoundError:
            shutil.rmtree(partial, ignore_errors=True)
        except OSError:  # under way, or it cannot be told
            continue
