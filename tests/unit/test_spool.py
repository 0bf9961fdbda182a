"""What is planned aside and handed on through a file: whole, in order, to several at once, and gone from memory."""

import errno
import os

import pytest

from hymeg.checkpoint.rows import Band, Piece, RowTensor
from hymeg.checkpoint.spool import Spool
from hymeg.checkpoint.workers import aside, run
from hymeg.errors import UserError


def test_parts_are_read_as_they_were_added_by_several_at_once():
    spool = Spool()
    objects = [[(number, "x" * (number * 37 % 5000)) for number in range(share, 2000, 3)] for share in range(3)]
    parts, _ = aside(lambda: [spool.add(share) for share in objects])  # by another process

    def work(share, report):
        return list(share)

    assert run(work, [spool.read(part) for part in parts]).results == objects
    # By two in one process, in turns.
    first, second = spool.read(parts[0]), spool.read(parts[1])
    assert [pair for turn in zip(first, second, strict=False) for pair in turn] == [
        pair for turn in zip(*objects[:2], strict=False) for pair in turn
    ]
    empty = spool.add([])
    assert list(spool.read(empty)) == [] and list(spool.read(spool.add([None, 0]))) == [None, 0]


def test_a_full_disk_of_temporary_files_is_told(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spool = Spool()
    with open("/dev/full", "wb", buffering=0) as file:
        monkeypatch.setattr(spool, "_file", file)
        with pytest.raises(UserError, match=r"No space left on device; set TMPDIR"):
            spool.add(["x" * 100_000])
        monkeypatch.undo()
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left on device; set TMPDIR"):
        Spool()


def test_what_is_done_aside_takes_no_memory_here():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    result, peak = aside(lambda: len(bytearray(os.urandom(1)) * (300 << 20)))
    assert result == 300 << 20 and peak > before + (300 << 20)
    assert resident() < before + (100 << 20)


def test_a_tensor_is_handed_on_with_the_bands_that_the_rows_need():
    bands = tuple(Band(start, start + 10, (Piece("file", start, 0, (10, 4), 0, 0, 4),)) for start in range(0, 100, 10))
    tensor = RowTensor("key", "F32", (100, 4), bands)
    assert tensor.only([(20, 30)]).bands == bands[2:3]
    assert tensor.only([(29, 31)]).bands == bands[2:4]
    assert tensor.only([(5, 6), (41, 50)]).bands == bands[:5]
    assert tensor.only([(0, 100)]) == tensor
