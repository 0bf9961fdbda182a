"""Conversations and translations, tokenised once: an index beside the file, memory-mapped by every process.

FOLDER/NAME-FINGERPRINT/ holds `tokens.bin` (int32, row after row; a token that is trained is stored as its bitwise
complement, a negative number), `starts.npy` (int64 `[rows + 1]`), `lines.npy` (int64 `[rows]`, from 1) and
`index.json`, and in folders of their own what `cached` keeps. The fingerprint is taken over the file's size, time and
ends, the tokenizer, the chat template and the prompts. A killed build leaves a hidden `.partial` folder, which nothing
reads.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hymeg.data.chat import ChatEncoder, Tokens
from hymeg.data.rows import RowReader
from hymeg.data.text_files import Batch, read_batches
from hymeg.data.workers import encode_all
from hymeg.errors import UserError
from hymeg.hf.files import fsync_folder, read_json, written_whole

_VERSION = 1
_END_BYTES = 1 << 20  # at each end of the file
_SUMMARY = "index.json"
_NAME_LENGTH = 48  # characters of the file's name in the folder's


class Progress(NamedTuple):
    """How far the tokenising has come."""

    path: str
    total_bytes: int  # of the file as it lies on disk
    num_bytes: int
    num_rows: int
    num_tokens: int


class RowIndex:
    """A built index, memory-mapped."""

    def __init__(self, folder: Path):
        self.folder = folder
        summary = read_json(folder / _SUMMARY)
        self.path: str = summary["path"]
        self.num_trained: int = summary["num_trained"]
        self.content: str = summary["content"]
        self.starts = np.load(folder / "starts.npy", mmap_mode="r")
        self.lines = np.load(folder / "lines.npy", mmap_mode="r")
        self._stored = np.memmap(folder / "tokens.bin", np.int32, mode="r")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, row: int) -> Tokens:
        stored = self._stored[self.starts[row] : self.starts[row + 1]]
        trained = stored < 0
        return Tokens(np.where(trained, ~stored, stored), trained)

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(self.starts)

    def is_cached(self, name: str) -> bool:
        return bool(_arrays(self.folder / name))

    def cached(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays kept beside the index under `name`, made when they are not there."""
        folder = self.folder / name
        if not self.is_cached(name):
            shutil.rmtree(folder, ignore_errors=True)
            with _built_beside(folder) as partial:
                for key, array in make().items():
                    np.save(partial / f"{key}.npy", array)
        return _arrays(folder)


class RowEncoder:
    """Rows of a batch -> `[n]` int32 as stored, the number of tokens of each row, the line of each row."""

    def __init__(self, tokenizer_dir: str, vocab_size: int | None, prompts: str | None):
        self._reader = RowReader(prompts)
        self._encoder = ChatEncoder(tokenizer_dir, vocab_size)
        self.fingerprint = f"{self._encoder.fingerprint} {self._reader.fingerprint}"

    def __call__(self, batch: Batch) -> tuple[np.ndarray, list[int], list[int], int]:
        lines = [number for number, _ in batch.rows]
        conversations = [self._reader.parse(batch.path, number, row) for number, row in batch.rows]
        encoded = self._encoder.encode_batch(conversations)
        stored = [np.where(tokens.trained, ~tokens.token_ids, tokens.token_ids) for tokens in encoded]
        return (
            np.concatenate(stored) if stored else np.empty(0, np.int32),
            [len(row) for row in stored],
            lines,
            batch.num_bytes_read,
        )


def index_folder(path: str, cache: Path, fingerprint: str) -> Path:
    """Where the index of the file `path` belongs."""
    name = hashlib.sha256(f"{_state(path)} {fingerprint}".encode()).hexdigest()[:16]
    return cache / f"{Path(path).name[:_NAME_LENGTH]}-{name}"


def _state(path: str) -> str:
    return f"{_content(path)} {os.stat(path).st_mtime_ns}"


def _content(path: str) -> str:
    """Tells files apart without reading them whole."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(f"{_VERSION} {size} ".encode() + file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()[:16]


def is_built(folder: Path) -> bool:
    """Whether there is an index, with all its tokens."""
    if not (folder / _SUMMARY).is_file():
        return False
    try:
        index = RowIndex(folder)
    except (UserError, OSError, EOFError, ValueError, LookupError, TypeError):
        return False
    return len(index.starts) == len(index) + 1 and (folder / "tokens.bin").stat().st_size == index.starts[-1] * 4


def build_index(
    path: str,
    folder: Path,
    settings: tuple,
    num_workers: int = 1,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Tokenise the file `path` into `folder`, which appears whole or not at all.

    Args:
        settings: those of `RowEncoder`.
        num_workers: processes that tokenise; 1: this one, with the tokenizer's own threads.
        report: called after each batch of rows.

    Raises:
        UserError: the file cannot be read, changes while it is read, a row is wrong, no row is in it, the folder cannot
            be written.
    """
    state = _state(path)
    total_bytes, num_bytes, num_tokens, num_trained = os.path.getsize(path), 0, 0, 0
    lengths, lines = array("q"), array("q")
    if not is_built(folder):
        shutil.rmtree(folder, ignore_errors=True)
    with _built_beside(folder) as partial, open(partial / "tokens.bin", "wb") as file:
        for stored, row_lengths, row_lines, num_bytes_read in encode_all(
            read_batches(path), RowEncoder, settings, num_workers
        ):
            file.write(stored.tobytes())
            lengths.extend(row_lengths)
            lines.extend(row_lines)
            num_bytes += num_bytes_read
            num_trained += int(np.count_nonzero(stored < 0))
            num_tokens += len(stored)
            report(Progress(path, total_bytes, num_bytes, len(lines), num_tokens))
        if not lines:
            raise UserError(f"{path}: holds no row; give a file with conversations or translations, one a line")
        if _state(path) != state:
            raise UserError(f"{path}: has changed while it was read; start again once it is complete")
        np.save(partial / "starts.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(partial / "lines.npy", np.array(lines, dtype=np.int64))
        with written_whole(partial / _SUMMARY) as summary:
            summary.write(
                json.dumps(
                    {
                        "path": os.path.abspath(path),
                        "num_tokens": num_tokens,
                        "num_trained": num_trained,
                        "content": _content(path),
                    }
                ).encode()
            )


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays in `folder`, memory-mapped; none where it is damaged or not there."""
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    except (OSError, EOFError, ValueError):
        return {}


@contextlib.contextmanager
def _built_beside(folder: Path) -> Iterator[Path]:
    """A folder of its own to write to, which becomes `folder` on success. Who comes second finds the first one's, which
    is the same.
    """
    mine = f".{folder.name}.{socket.gethostname()}."
    partial = folder.with_name(f"{mine}{os.getpid()}.partial")
    try:
        for leftover in folder.parent.glob(f"{glob.escape(mine)}*.partial"):
            if not Path("/proc", leftover.suffixes[-2][1:]).exists():
                shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        fsync_folder(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}; give --data-cache-path, a folder with room that "
            "can be"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
