"""Conversations as samples: cut where too long, packed, in an order that depends on nothing but the seed.

Sample i of a run is the same whatever the number of ranks, the micro-batch or the length of the run: epoch and place in
the epoch are divmod(i, sequences), and each epoch has its own permutation. A run that goes on at sample n therefore
goes on with the very next sample.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hymeg.data.chat import Tokens
from hymeg.data.packing import Packs, pack
from hymeg.data.row_index import RowIndex
from hymeg.data.text_files import place
from hymeg.errors import UserError


class Shape(NamedTuple):
    """What a sample looks like."""

    seq_length: int
    alignment: int
    """Every conversation of a packed sequence is padded to a multiple of this: 2 x context-parallel size."""
    packed: bool
    truncation: str
    """What happens to a conversation of more than `seq_length` + 1 tokens: one of `TRUNCATIONS`."""
    pad_token: int


class Counts(NamedTuple):
    """What became of the rows of a split."""

    rows: int
    truncated: int
    dropped: int
    tokens: int  # that the model is given


class Sequences:
    """The conversations of one split of one file, in sequences, which are kept beside the file's index.

    Args:
        rows: which of the index's rows are in the split: first, and one past the last.
        seed: of the packing.
    """

    def __init__(self, index: RowIndex, rows: tuple[int, int], shape: Shape, seed: int):
        self.index, self.rows, self.shape, self.seed = index, rows, shape, seed
        self.fingerprint = hashlib.sha256(f"{index.folder.name} {rows} {shape} {seed}".encode()).hexdigest()[:16]

    @property
    def is_made(self) -> bool:
        return self.index.is_cached(self.fingerprint)

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        make = functools.partial(_make_sequences, self.index, self.rows, self.shape, self.seed)
        return self.index.cached(self.fingerprint, make)

    @functools.cached_property
    def packs(self) -> Packs:
        """Raises UserError: a conversation is too long and `truncation` is "error"; none is left."""
        return Packs(self._arrays["order"], self._arrays["starts"])

    @property
    def counts(self) -> Counts:
        return Counts(*self._arrays["counts"].tolist())

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """`tokens`, `labels`, `position_ids`, `lengths` (int64) and `loss_mask` (fp32), each `[seq_length]`. The mask
        holds the weights of the tokens' losses. Positions restart with each conversation of a packed sequence, and with
        the padding at its end; where a conversation begins, `lengths` has its tokens."""
        sample, start = empty_sample(self.shape), 0
        for row in self.packs[number]:
            token_ids, weights = _cut(self.index[row], self.shape)
            length = len(token_ids) - 1
            here = slice(start, start + length)
            sample["lengths"][start] = length
            sample["tokens"][here] = token_ids[:-1]
            sample["labels"][here] = token_ids[1:]
            sample["loss_mask"][here] = weights[1:]
            if not self.shape.packed:
                return sample
            padded = _padded(length, self.shape.alignment)
            sample["position_ids"][start : start + padded] = np.arange(padded)
            start += padded
        sample["position_ids"][start:] = np.arange(self.shape.seq_length - start)
        return sample


def empty_sample(shape: Shape) -> dict[str, np.ndarray]:
    """A sample without a trained token."""
    return {
        "tokens": np.full(shape.seq_length, shape.pad_token, np.int64),
        "labels": np.full(shape.seq_length, shape.pad_token, np.int64),
        "loss_mask": np.zeros(shape.seq_length, np.float32),
        "position_ids": np.arange(shape.seq_length),
        "lengths": np.zeros(shape.seq_length, np.int64),
    }


def _make_sequences(index: RowIndex, rows: tuple[int, int], shape: Shape, seed: int) -> dict[str, np.ndarray]:
    lengths = index.lengths()[slice(*rows)] - 1  # the last token is a label only
    too_long = np.flatnonzero(lengths > shape.seq_length)
    if len(too_long) and shape.truncation == "error":
        first, worst = too_long[0], lengths.max() + 1
        raise UserError(
            f"{place(index.path, index.lines[rows[0] + first])}: a conversation of {lengths[first] + 1} tokens, more "
            f"than --seq-length {shape.seq_length} holds (rows as long: {len(too_long)}, the longest {worst} tokens); "
            f"give --seq-length {_padded(worst - 1, 128)}, or --sft-truncation right, left or drop"
        )
    keep = np.ones(len(lengths), bool)
    for row in too_long:
        keep[row] = shape.truncation != "drop" and _cut(index[rows[0] + row], shape)[1][1:].any()
    lengths, kept = np.minimum(lengths, shape.seq_length), np.flatnonzero(keep)
    if not len(kept):
        raise UserError(
            f"{index.path}: no conversation is left of {len(lengths)}: none has a trained token within --seq-length "
            f"{shape.seq_length}"
        )
    if shape.packed:
        units = _padded(lengths[kept], shape.alignment) // shape.alignment
        packs = pack(units, shape.seq_length // shape.alignment, seed)
    else:
        packs = Packs(np.arange(len(kept)), np.arange(len(kept) + 1))
    counts = Counts(len(lengths), int(keep[too_long].sum()), len(lengths) - len(kept), int(lengths[kept].sum()))
    return {"order": rows[0] + kept[packs.order], "starts": packs.starts, "counts": np.array(counts)}


def _cut(tokens: Tokens, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and weights: input and label need one token more than the sequence has positions."""
    kept = slice(-shape.seq_length - 1, None) if shape.truncation == "left" else slice(shape.seq_length + 1)
    return tokens.token_ids[kept], (tokens.trained if tokens.weights is None else tokens.weights)[kept]


def _padded(length, multiple: int):
    return -(-length // multiple) * multiple


class ConversationDataset(torch.utils.data.Dataset):
    """The samples of a run.

    Args:
        sources: whose sequences are drawn.
        num_samples: how many the run draws; None: each sequence once.
        split: Megatron's name of the split, for the sizes of its batches.
        seed: of the order; None: as the sequences come.
        weights: of the sources. None: every sequence of every source once an epoch.
        multiple_of: an epoch is filled up with empty samples to a multiple of this, so that batches of that size end
            where it ends.
    """

    def __init__(
        self,
        sources: Sequence[Sequences],
        num_samples: int | None,
        split,
        seed: int | None = None,
        weights: Sequence[float] | None = None,
        multiple_of: int = 1,
    ):
        self.sources, self.index_split, self.seed = sources, split, seed
        self._sizes = [len(source) for source in sources]
        self._epoch = _padded(sum(self._sizes), multiple_of)
        self._num_samples = self._epoch if num_samples is None else num_samples
        self._drawn = None if weights is None else _draw(weights, self._num_samples)
        self._permutation = functools.lru_cache(maxsize=2 * len(sources) + 2)(self._make_permutation)

    def __len__(self) -> int:
        return self._num_samples

    def sequence(self, sample: int) -> tuple[int, int] | None:
        """Which source, and which of its sequences, sample number `sample` of the run is; None for an empty one."""
        if self._drawn is not None:
            source, draw = (int(of[sample]) for of in self._drawn)
            epoch, place = divmod(draw, self._sizes[source])
            return source, int(self._permutation(epoch, source)[place])
        epoch, place = divmod(sample, self._epoch)
        if place >= sum(self._sizes):
            return None
        place = int(self._permutation(epoch, None)[place])
        source = int(np.searchsorted(np.cumsum(self._sizes), place, side="right"))
        return source, place - sum(self._sizes[:source])

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        found = self.sequence(sample)
        if found is None:
            return empty_sample(self.sources[0].shape) | {"dataset_id": 0}
        return self.sources[found[0]][found[1]] | {"dataset_id": found[0]}

    def _make_permutation(self, epoch: int, source: int | None) -> np.ndarray:
        size = sum(self._sizes) if source is None else self._sizes[source]
        if self.seed is None:
            return np.arange(size)
        return np.random.default_rng([self.seed, epoch, 0 if source is None else source + 1]).permutation(size)


def _draw(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """For each sample its source, and the how manieth draw of that source it is. The first n are the same for every
    number of samples: Megatron's helper gives each sample to the source that lags most behind its weight."""
    from megatron.core.datasets import helpers

    source, draw = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
    helpers.build_blending_indices(source, draw, np.array(weights) / sum(weights), len(weights), num_samples, False)
    return source, draw
