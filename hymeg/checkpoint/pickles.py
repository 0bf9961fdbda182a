"""Pickles from files that are not trusted, and parts of pickles written out by hand: a pickler would import torch, at a
cost of seconds and of half a gigabyte, to look names up.
"""

import io
import pickle
import pickletools
from typing import Any

_ARGUMENT_BYTES = {ord(opcode.code): opcode.arg.n if opcode.arg else 0 for opcode in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PUT, _LONG_BINPUT, _STOP, _OF_TWO_LINES = ord("p"), ord("r"), ord("."), b"ci"


def plain(value: Any) -> bytes:
    """A plain value, pickled, to stand inside another pickle."""
    return pickle.dumps(value, 2)[2:-1]  # without the mark of protocol 2 in front and the full stop


def called(function: str, *arguments: bytes) -> bytes:
    """The call of a function, with its module's name, of pickled arguments."""
    module, _, name = function.rpartition(".")
    return b"".join([f"c{module}\n{name}\n(".encode(), *arguments, b"tR"])


def unpickled(data: bytes, reader: type[pickle.Unpickler]) -> Any:
    """What `reader`, which says what names stand for, makes of `data`, in memory that the length of `data` explains.

    Raises:
        ValueError: it would take more.
        Exception: whatever a broken pickle makes the unpickler raise.
    """
    _check_memo(data)
    return reader(io.BytesIO(data)).load()


def _check_memo(data: bytes) -> None:
    """Refuse a pickle that asks for more places in the memo than it has bytes: the unpickler makes room for all that
    come before the one that is named, 34 GB for ten bytes, or for one bit that has flipped.
    """
    at = 0
    while at < len(data):
        opcode, at = data[at], at + 1
        size = _ARGUMENT_BYTES.get(opcode)
        if size is None or opcode == _STOP:
            return  # the unpickler comes no further either
        begin = at
        if size >= 0:
            at += size
        elif size == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if opcode in _OF_TWO_LINES else 1):
                at = data.find(b"\n", at) + 1 or len(data)
        else:
            width = _LENGTH_BYTES[size]
            at += width + int.from_bytes(data[at : at + width], "little")
        if opcode in (_PUT, _LONG_BINPUT):
            place = int.from_bytes(data[begin:at], "little") if opcode == _LONG_BINPUT else int(data[begin:at])
            if place > len(data):
                raise ValueError(f"a pickle of {len(data):,} bytes that names place {place:,} of its memo")
