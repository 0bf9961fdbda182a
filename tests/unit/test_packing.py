"""Packing puts every row into one sequence, never beyond its end, and wastes little."""

import numpy as np
import pytest

from hymeg.data import packing
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


def test_rows_come_in_an_order_of_each_seed():
    """Rows that fill a sequence each show the order in which they are taken: by no seed is it the file's."""
    orders = [pack(np.full(100, 64), 64, seed).order.tolist() for seed in range(5)]
    assert all(sorted(order) == list(range(100)) != order for order in orders)
    assert len(set(map(tuple, orders))) == 5


def test_so_many_sequences_stay_open_for_the_next_window_and_no_more(monkeypatch):
    """64 rows of 33 fill half of a sequence each; of the 64 rows of 31 in the next window four find one open, and the
    others share theirs by twos."""
    monkeypatch.setattr(packing, "WINDOW", 64)
    monkeypatch.setattr(packing, "_MAX_OPEN", 4)
    first = pack(np.full(128, 64), 64, seed=1).order[:64]
    lengths = np.full(128, 31)
    lengths[first] = 33
    packs = pack(lengths, 64, seed=1)
    assert len(packs) == 64 + 60 // 2
    assert sum(lengths[packs[number]].sum() == 64 for number in range(len(packs))) == 4


def test_the_same_seed_gives_the_same_sequences():
    lengths = translation_lengths(3000) // 4
    first, again, other = (pack(lengths, 1024, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.order, again.order) and np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.order, other.order)
