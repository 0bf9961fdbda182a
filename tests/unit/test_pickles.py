"""Pickles of a checkpoint whose memo would take the machine's memory are refused before they are read."""

import pickle
import pickletools
from pathlib import Path

import pytest

from hymeg.checkpoint.metadata_file import stored_places, stored_shapes
from hymeg.checkpoint.pickles import _check_memo
from hymeg.errors import UserError

# Three kinds of everything: longer than a byte tells, than two; on both sides of zero; shared.
SHARED = ["shared"] * 3
VALUES = [
    {f"key {number}": (number, SHARED) for number in range(400)},
    ["x" * 300, "é" * 70_000, b"y" * 300, b"z" * 70_000, bytearray(b"w" * 300)],
    [0, 255, 256, 70_000, -1, 1 << 40, 1 << 3000, 1.5, None, True, (1,), (1, 2), (1, 2, 3), frozenset([1]), {2}],
    [Path("a/b"), pickle.PickleError, Path],
]
FAR = 1 << 24  # a quarter of a gigabyte, should it not be refused


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_pickle_writes_is_taken(protocol):
    for value in VALUES:
        _check_memo(pickle.dumps(value, protocol))
    _check_memo(pickle.dumps(VALUES, protocol))


@pytest.mark.parametrize("protocol", range(4))  # later ones number the places by themselves
def test_a_place_too_far_is_refused_wherever_it_is_named(protocol):
    good, refused = pickle.dumps(VALUES, protocol), 0
    for opcode, argument, position in pickletools.genops(good):
        if opcode.name == "LONG_BINPUT":
            bad = good[: position + 1] + FAR.to_bytes(4, "little") + good[position + 5 :]
        elif opcode.name == "PUT":
            bad = good[: position + 1] + str(FAR).encode() + good[position + 1 + len(str(argument)) :]
        else:
            continue
        with pytest.raises(ValueError, match=f"a pickle of .* names place {FAR:,} of its memo"):
            _check_memo(bad)
        refused += 1
    assert refused > 100


def test_no_place_is_looked_for_in_what_is_no_opcode():
    far = b"r" + FAR.to_bytes(4, "little")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for text in (far * 3, far.decode("latin-1") * 100, "p99999999\n"):
            _check_memo(pickle.dumps([text, {text: text}], protocol))
    _check_memo(pickle.dumps(1) + far)  # after the pickle's end


@pytest.mark.parametrize("read", [stored_shapes, stored_places])
@pytest.mark.parametrize("bad", [b"r" + FAR.to_bytes(4, "little"), b"p%d\n" % FAR], ids=["binary", "text"])
def test_a_folder_with_such_metadata_is_refused_in_one_line(tmp_path, read, bad):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02}" + bad + b".")
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/.metadata: not a checkpoint's metadata (ValueError: a pickle of ")
    assert str(error.value).endswith("that names place 16,777,216 of its memo); copy the checkpoint again")


def test_a_place_behind_an_old_instance_is_seen_too():
    with pytest.raises(ValueError, match="of its memo"):
        _check_memo(b"(imodule\nname\nr" + FAR.to_bytes(4, "little") + b".")
