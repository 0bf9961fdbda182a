"""Packing puts every row into one sequence, never beyond its end, and wastes little."""

import numpy as np
import pytest

from hymeg.data.packing import WINDOW, pack


def translation_lengths(num_rows: int) -> np.ndarray:
    """Like the tokens of translation rows: most around a hundred, some over a thousand."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(120), 0.7, num_rows).astype(np.int64), 10, 4096)


@pytest.mark.parametrize("num_rows", [1, 50, WINDOW - 1, 2 * WINDOW + 7])
@pytest.mark.parametrize("capacity", [64, 4096])
def test_every_row_is_in_one_sequence_that_has_room_for_it(num_rows, capacity):
    lengths = np.random.default_rng(num_rows).integers(1, capacity + 1, num_rows)
    packs = pack(lengths, capacity, seed=3)
    assert np.array_equal(np.sort(packs.order), np.arange(num_rows))
    assert packs.starts[0] == 0 and packs.starts[-1] == num_rows and (np.diff(packs.starts) > 0).all()
    assert all(lengths[packs[number]].sum() <= capacity for number in range(len(packs)))


def test_translations_fill_sequences_of_4096_to_98_percent():
    lengths = translation_lengths(50_000)
    assert lengths.sum() / (len(pack(lengths, 4096, seed=1)) * 4096) >= 0.98


def test_no_sequence_could_take_in_another_but_for_the_bounds_of_windows():
    lengths = np.random.default_rng(1).integers(1, 65, 2000)
    packs = pack(lengths, 64, seed=1)
    rooms = sorted(64 - lengths[packs[number]].sum() for number in range(len(packs)))
    smallest = sorted(lengths[packs[number]].sum() for number in range(len(packs)))
    assert smallest[0] > max(room for room in rooms if room != 64 - smallest[0])


def test_the_same_seed_gives_the_same_sequences():
    lengths = translation_lengths(3000) // 4
    first, again, other = (pack(lengths, 1024, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.order, again.order) and np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.order, other.order)
