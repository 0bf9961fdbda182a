"""Rows of tensors, whatever holds them: bands one after the other, pieces side by side, several dtypes, any block."""

import numpy as np
import pytest

from hymeg.checkpoint import row_tensors
from hymeg.checkpoint.row_functions import Mean
from hymeg.checkpoint.row_tensors import Band, Piece, RowTensor, TensorReader, stacked
from hymeg.errors import UserError

NUMBERS = np.arange(12 * 6, dtype="<f4").reshape(12, 6)


@pytest.fixture
def tensor(tmp_path) -> RowTensor:
    """[12, 6]: rows 0 to 5 in one file, the others as columns 0 to 2 in fp16 and 2 to 6 in fp32, after other bytes."""
    (tmp_path / "a").write_bytes(NUMBERS[:5].tobytes())
    (tmp_path / "b").write_bytes(b"header" + NUMBERS[5:, :2].astype("<f2").tobytes() + NUMBERS[5:, 2:].tobytes())
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    whole = Piece(a, 0, 0, (5, 6), 0, 0, 6, "F32")
    left, right = Piece(b, 6, 0, (7, 2), 0, 0, 2, "F16"), Piece(b, 6 + 28, 0, (7, 4), 0, 2, 4, "F32")
    return RowTensor("x", "F32", (12, 6), (Band(0, 5, (whole,)), Band(5, 12, (left, right))))


def read(tensor: RowTensor, ranges, height=None) -> np.ndarray:
    with TensorReader() as reader:
        blocks = [bytes(block) for block in reader.blocks(tensor, ranges, height)]
    assert height is None or max(map(len, blocks)) <= height * tensor.row_bytes
    return np.frombuffer(b"".join(blocks), "<f4").reshape(-1, 6)


@pytest.mark.parametrize("height", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("ranges", [[(0, 12)], [(4, 6)], [(7, 12), (0, 2)], [(5, 5), (11, 12)]])
def test_any_rows_are_read_in_blocks_of_any_height(tensor, ranges, height):
    expected = np.concatenate([NUMBERS[start:stop] for start, stop in ranges])
    assert np.array_equal(read(tensor, ranges, height), expected)
    assert np.array_equal(read(tensor.only(ranges), ranges, height), expected)


def test_only_the_bands_that_are_needed_are_handed_on(tensor):
    assert [band.start for band in tensor.only([(1, 5)]).bands] == [0]
    assert [band.start for band in tensor.only([(5, 6)]).bands] == [5]
    assert [band.start for band in tensor.only([(4, 6)]).bands] == [0, 5]
    assert tensor.first_byte(4)[1] == 0 and tensor.first_byte(5)[1] == 6 and len(tensor.files()) == 2


def test_a_mean_is_made_of_the_rows_of_each(tensor):
    made = RowTensor("x", "F32", (12, 6), (), Mean((tensor, tensor, tensor)))
    assert np.array_equal(read(made, [(3, 8)], 2), (NUMBERS + NUMBERS + NUMBERS)[3:8] / np.float32(3))
    assert made.dtype_kept == "F32" and made.files() == tensor.files()


def test_a_file_that_ends_early_is_named(tensor, tmp_path):
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(UserError, match=r"a: ends at byte 5, inside x"):
        read(tensor, [(0, 1)])
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match=r"a: cannot be read: No such file"):
        read(tensor, [(0, 1)])


def test_what_is_asked_for_again_is_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(row_tensors, "_MAX_KEPT_BYTES", 2 * 80)
    made = []

    def make(key: str) -> np.ndarray:
        made.append(key)
        return np.full(10, len(made), "<f8")

    with TensorReader() as reader:
        for key in "aabab":
            assert reader.kept(key, lambda key=key: make(key))[0] == {"a": 1, "b": 2}[key]
        for key in "acadba":  # the limit is passed by one: what was asked for last stays
            reader.kept(key, lambda key=key: make(key))
    assert made == list("abcdba")


@pytest.mark.parametrize("dtypes", [("BF16", "F32"), ("F32", "BF16"), ("BF16", "F16"), ("BF16", "BF16")])
def test_a_stack_of_several_dtypes_is_in_fp32(dtypes):
    parts = [RowTensor(f"part {n}", dtype, (2, 4), ()) for n, dtype in enumerate(dtypes)]
    assert stacked("x", parts, 2).dtype == ("BF16" if dtypes == ("BF16", "BF16") else "F32")
