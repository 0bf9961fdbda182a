"""`.metadata` of a distributed checkpoint, and the flags beside it, read without trust: nothing in them is imported or
run.
"""

import contextlib
import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hymeg.checkpoint.dist_files import METADATA
from hymeg.checkpoint.mapping import Shape
from hymeg.checkpoint.pickles import unpickled
from hymeg.checksums import Damaged, open_verified
from hymeg.errors import UserError
from hymeg.files import are_sizes, opened, shown

_MAX_BYTES = 4 << 30


def stored_shapes(folder: str | os.PathLike) -> dict[str, Shape | None]:
    """The global shape of everything that an iteration's folder holds, optimizer state included, by key; None for what
    is no tensor.

    Of the files only `.metadata` is read, and nothing in it is run.

    Raises:
        UserError: it is missing, broken or hostile.
    """
    path = Path(folder) / METADATA
    with damage_told(path):
        entries = read_metadata(path).get("state_dict_metadata")
        shapes = {
            key: tuple(entry.state["size"]) if is_a(entry, "TensorStorageMetadata") else None
            for key, entry in entries.items()
        }
        if not all(shape is None or are_sizes(shape) for shape in shapes.values()):
            raise ValueError("a shape is none")
        return shapes


def stored_places(folder: str | os.PathLike) -> list[tuple[str, str, int, int]]:
    """Key, file, position and length of everything that an iteration's folder holds, checksums or not. Raises as
    `stored_shapes` does.
    """
    path = Path(folder) / METADATA
    with damage_told(path):
        places = [
            (index.get("fqn"), info.get("relative_path"), info.get("offset"), info.get("length"))
            for index, info in read_metadata(path, opened).get("storage_data").items()
        ]
        if not all(type(key) is type(file) is str and are_sizes(place) for key, file, *place in places):
            raise ValueError("a place is none")
        return places


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Make a UserError of what is raised inside where metadata are not formed as they should be."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None


class Record:
    """Stands for any object in a pickle: its state is kept, none of its code is run."""

    def __init__(self, *arguments: Any, **_: Any):
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


@functools.cache
def _record_class(name: str) -> type[Record]:
    return type(name, (Record,), {})


def is_a(value: Any, *names: str) -> bool:
    return isinstance(value, Record) and type(value).__name__ in names


# What Megatron's flags put into `.metadata` are records of these two packages, plans of every rank among them.
_RECORDS = re.compile(r"(torch\.distributed\.checkpoint|megatron\.core\.dist_checkpointing)\.[\w.]+")
_FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): lambda *parts: parts,
    ("pathlib._local", "PosixPath"): lambda *parts: parts,
}
_DTYPE_NAME = re.compile(r"(bfloat16|u?int(8|16|32|64)|float(16|32|64|8_\w+)|bool|complex(64|128))")


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and _DTYPE_NAME.fullmatch(name):
            return name
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if _RECORDS.fullmatch(module):
            return _record_class(name)
        found = shown(f"{module}.{name}")
        raise UserError(f"it names {found}, which has no place in a checkpoint's metadata: do not load this file")


def read_metadata(path: Path, opened: Callable[[Path], BinaryIO] = open_verified) -> Record:
    try:
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                raise UserError(f"larger than {_MAX_BYTES >> 30} GiB; this is not a checkpoint's metadata")
            metadata = unpickled(file.read(), _MetadataReader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; copy the checkpoint again") from None
    except Damaged:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever unpickling a broken file raises; nothing of the file's own is run
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a checkpoint's metadata ({reason}); copy the checkpoint again") from None
    if not is_a(metadata, "Metadata", "MCoreMetadata"):
        raise UserError(f"{path}: not a checkpoint's metadata: it holds {shown(type(metadata).__name__)}")
    entries = metadata.get("state_dict_metadata")
    if type(entries) is not dict or not all(type(key) is str for key in entries):
        raise UserError(f"{path}: damaged: its state_dict_metadata maps no names; copy the checkpoint again")
    return metadata


def flags_of(pickled: bytes) -> Any:
    """Megatron's flags of a run, from the pickle of its common state, every object a `Record`. Raises whatever a broken
    pickle makes the unpickler raise."""
    return unpickled(pickled, _FlagsReader)[0]["args"]


class _FlagsReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _record_class(name)

    def persistent_load(self, pid: Any) -> Any:
        return None
