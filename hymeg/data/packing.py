"""Which conversations share a sequence: best fit over a window.

Rows are taken in a seeded order, a window of them at a time, the longest first; each goes where it leaves the least
room. Sequences that are not full stay open for the rows of the next windows. (Best-fit decreasing: Johnson,
Near-optimal bin packing algorithms, 1973.)
"""

from typing import NamedTuple

import numpy as np

WINDOW = 16384  # rows
TRUNCATIONS = ("error", "left", "right", "drop")
"""What may happen to a conversation that is too long: stop, lose its beginning or its end, be left out."""
_MAX_OPEN = 4096  # sequences


class Packs(NamedTuple):
    """Sequences of whole rows."""

    order: np.ndarray
    """`[rows]`, int64: row numbers, sequence by sequence."""
    starts: np.ndarray
    """`[packs + 1]`, int64: where in `order` each sequence begins, and the end."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The row numbers of one sequence."""
        return self.order[self.starts[index] : self.starts[index + 1]]


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Put every row into one sequence of at most `capacity`. The same arguments give the same sequences.

    Args:
        lengths: of each row, in the unit of `capacity`, from 1 to `capacity`.
    """
    rows = np.random.default_rng(seed).permutation(len(lengths))
    packs, open_packs = [], _Open(capacity)
    for start in range(0, len(rows), WINDOW):
        window = rows[start : start + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        for row, length in zip(window.tolist(), lengths[window].tolist(), strict=True):
            open_packs.add(row, length)
        packs += open_packs.close(_MAX_OPEN)
    packs += open_packs.close(0)
    order = np.fromiter((row for rows in packs for row in rows), np.int64, len(rows))
    return Packs(order, np.cumsum([0, *map(len, packs)], dtype=np.int64))


class _Open:
    """Sequences with room left. One bit for each size of room tells whether there is a sequence with just that: the
    best fit is the lowest bit.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.by_room: dict[int, list[list[int]]] = {}
        self.rooms = 0

    def add(self, row: int, length: int) -> None:
        fitting = self.rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = self._take(room)
        else:
            room, pack = self.capacity, []
        pack.append(row)
        self.by_room.setdefault(room - length, []).append(pack)
        self.rooms |= 1 << (room - length)

    def close(self, num_open: int) -> list[list[int]]:
        """Take out the full sequences, and of the others the fullest, until `num_open` are left."""
        closed = self.by_room.pop(0, [])
        self.rooms &= ~1
        surplus = sum(map(len, self.by_room.values())) - num_open
        for room in sorted(self.by_room):
            while surplus > 0 and self.rooms >> room & 1:
                closed.append(self._take(room))
                surplus -= 1
        return closed

    def _take(self, room: int) -> list[int]:
        packs = self.by_room[room]
        pack = packs.pop()
        if not packs:
            del self.by_room[room]
            self.rooms &= ~(1 << room)
        return pack
