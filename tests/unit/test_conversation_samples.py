"""Samples of conversations, held against the tokens they are made of; what happens to long ones; the order."""

from types import SimpleNamespace

import numpy as np
import pytest

from hymeg.data.chat import Tokens
from hymeg.data.conversations import ConversationDataset, Sequences, Shape
from hymeg.errors import UserError
from hymeg.training.data_paths import check_split, parse_blend
from hymeg.training.row_data import set_evaluation

SEQ_LENGTH, PAD = 32, 9
LENGTHS = (12, 33, 7, 20, 5, 28, 3, 15, 9, 30)


class FakeIndex:
    """Row n: tokens 100 n, 100 n + 1, ..., the second half trained."""

    def __init__(self, lengths=LENGTHS):
        self.path, self.folder, self._lengths, self.lines = (
            "rows.jsonl",
            SimpleNamespace(name="index"),
            np.array(lengths),
            np.arange(len(lengths)) * 2 + 1,
        )

    def __getitem__(self, row):
        length = self._lengths[row]
        return Tokens(np.arange(100 * row, 100 * row + length, dtype=np.int32), np.arange(length) >= length // 2)

    def lengths(self):
        return self._lengths

    def is_cached(self, name):
        return False

    def cached(self, name, make):
        return {key: np.asarray(value) for key, value in make().items()}


def sequences(packed=True, truncation="error", alignment=1, lengths=LENGTHS, rows=None, seed=1) -> Sequences:
    return Sequences(
        FakeIndex(lengths), rows or (0, len(lengths)), Shape(SEQ_LENGTH, alignment, packed, truncation, PAD), seed
    )


@pytest.mark.parametrize("alignment", [1, 4])
def test_a_packed_sample_is_its_conversations_one_after_the_other(alignment):
    made = sequences(alignment=alignment)
    seen = []
    for number in range(len(made)):
        sample, start = made[number], 0
        for row in made.packs[number]:
            seen.append(row)
            tokens = made.index[row]
            length = len(tokens.token_ids) - 1
            here, padded = slice(start, start + length), -(-length // alignment) * alignment
            assert np.array_equal(sample["tokens"][here], tokens.token_ids[:-1])
            assert np.array_equal(sample["labels"][here], tokens.token_ids[1:])
            assert np.array_equal(sample["loss_mask"][here], tokens.trained[1:])
            assert np.array_equal(sample["position_ids"][start : start + padded], np.arange(padded))
            assert sample["lengths"][start] == length
            assert (sample["tokens"][start + length : start + padded] == PAD).all()
            start += padded
        rest = slice(start, None)
        assert (sample["tokens"][rest] == PAD).all() and not sample["loss_mask"][rest].any()
        assert np.array_equal(sample["position_ids"][rest], np.arange(SEQ_LENGTH - start))
        assert sample["loss_mask"].sum() == sum(made.index[row].trained[1:].sum() for row in made.packs[number])
        assert (sample["lengths"] > 0).sum() == len(made.packs[number])
        assert all(value.shape == (SEQ_LENGTH,) for value in sample.values())
    assert sorted(seen) == list(range(len(LENGTHS)))


@pytest.mark.parametrize(("truncation", "first"), [("error", 0), ("left", 67)])
def test_the_loss_mask_holds_weights(truncation, first):
    weights = np.arange(100, dtype=np.float32) / 7
    index = FakeIndex((33 if truncation == "error" else 100,))
    index.__class__ = type("Weighed", (FakeIndex,), {"__getitem__": lambda index, row: of_row(len(weights))})
    of_row = lambda length: Tokens(np.arange(length, dtype=np.int32), weights > 0, weights)  # noqa: E731
    weights = weights[: index.lengths()[0]]
    [sample] = Sequences(index, (0, 1), Shape(SEQ_LENGTH, 1, True, truncation, PAD), 1)
    assert sample["loss_mask"].dtype == np.float32
    assert np.array_equal(sample["loss_mask"], weights[first + 1 : first + 1 + SEQ_LENGTH])


def test_apart_each_conversation_has_a_sample_of_its_own():
    made = sequences(packed=False)
    assert len(made) == len(LENGTHS)
    for row, length in enumerate(LENGTHS):
        sample, tokens = made[row], made.index[row]
        assert np.array_equal(
            sample["tokens"], np.concatenate([tokens.token_ids[:-1], np.full(SEQ_LENGTH - length + 1, PAD)])
        )
        assert np.array_equal(sample["position_ids"], np.arange(SEQ_LENGTH))
        assert sample["loss_mask"].sum() == tokens.trained[1:].sum()


def test_too_long_a_conversation_is_an_error_that_says_what_to_do():
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl: line 5: .* 40 tokens, .*--seq-length 32 .*"
        r"rows as long: 2, the longest 150 tokens.*--seq-length 256",
    ):
        assert sequences(lengths=(12, 33, 40, 150)).packs


@pytest.mark.parametrize(
    ("truncation", "counts", "first", "last"),
    [("right", (3, 1, 1, 43), 100, 132), ("left", (3, 2, 0, 75), 167, 199), ("drop", (3, 0, 2, 11), None, None)],
)
def test_truncation(truncation, counts, first, last):
    """Row 1 has 100 tokens, row 2 has 150: of the first 33 of either none is trained but one that is made so."""
    made = sequences(truncation=truncation, lengths=(12, 100, 150))
    trained = FakeIndex.__getitem__

    def some_trained_early(index, row):
        tokens = trained(index, row)
        return Tokens(tokens.token_ids, tokens.trained | (np.arange(len(tokens.trained)) == 20)) if row == 1 else tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeIndex, "__getitem__", some_trained_early)
        assert made.counts == counts
        if first is not None:
            rows = {int(row): made[number] for number in range(len(made)) for row in made.packs[number]}
            assert rows[1]["tokens"][0] == first and rows[1]["labels"][SEQ_LENGTH - 1] == last


def test_when_nothing_is_left_it_is_said():
    with pytest.raises(UserError, match="no conversation is left of 2"):
        assert sequences(truncation="drop", lengths=(100, 200)).packs


@pytest.mark.parametrize(
    "split",
    [
        "",
        "abc",
        "0,100,0",
        "0,0,0",
        "-1,2,0",
        "1,2,3,4",
        "nan,1,0",
        "inf,1",
        "1.5.2,3",
        "1e-9,1,0",
        "99,1,x",
        "90,10,",
        ".",
    ],
)
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(
        UserError,
        match=r"^--split .*: weights for training, validation and test are needed, the first above 0, such as",
    ):
        check_split(split)


@pytest.mark.parametrize("split", ["97, 3, 0", "969,30,1", "1", "2,1", ".5,.5", "90/10/0"])
def test_a_split_is_weights(split):
    check_split(split)


@pytest.mark.parametrize("weights", [("-1", "2"), ("0", "0"), ("nan", "1"), ("inf", "1"), ("1e308", "1e308")])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(
        UserError,
        match=rf"^--data-path: found the weights {' '.join(weights)}; they must not be negative, nor all zero, and",
    ):
        parse_blend("--data-path", [weights[0], "a.jsonl", weights[1], "b.jsonl"])


def test_evaluation_that_is_asked_for_needs_data():
    args = SimpleNamespace(explicit={"eval_iters": ("--eval-iters", "")}, eval_iters=3, split="100,0,0")
    with pytest.raises(
        UserError, match=r"--eval-iters 3: --split 100,0,0 leaves no data for validation; give some, or --eval-iters 0"
    ):
        set_evaluation(args, [], print)


def test_a_split_has_its_own_rows_only():
    made = sequences(rows=(3, 7))
    assert sorted(made.packs.order) == [3, 4, 5, 6] and made.counts.rows == 4


class TestOrder:
    def test_it_depends_on_the_seed_and_not_on_the_length_of_the_run(self):
        short, long = (ConversationDataset([sequences()], number, None, seed=5) for number in (10, 40))
        assert len(short) == 10 and len(long) == 40
        assert [short.sequence(i) for i in range(10)] == [long.sequence(i) for i in range(10)]
        other = ConversationDataset([sequences()], 40, None, seed=6)
        assert [other.sequence(i) for i in range(40)] != [long.sequence(i) for i in range(40)]

    def test_every_epoch_has_every_sequence_once(self):
        sources = [sequences(), sequences(lengths=(9, 30, 14))]
        size = sum(map(len, sources))
        data = ConversationDataset(sources, 3 * size, None, seed=5)
        epochs = [[data.sequence(i) for i in range(start, start + size)] for start in range(0, 3 * size, size)]
        everything = [(source, number) for source in (0, 1) for number in range(len(sources[source]))]
        assert all(sorted(epoch) == everything for epoch in epochs)
        assert len(set(map(tuple, epochs))) == 3

    def test_weights_are_kept_from_the_start_and_each_source_has_its_epochs(self):
        sources = [sequences(), sequences(lengths=(9, 30, 14))]
        short, long = (ConversationDataset(sources, number, None, seed=5, weights=[3, 1]) for number in (20, 400))
        drawn = [long.sequence(i) for i in range(400)]
        assert [short.sequence(i) for i in range(20)] == drawn[:20]
        for end in (40, 100, 400):
            assert sum(source == 0 for source, _ in drawn[:end]) == pytest.approx(0.75 * end, abs=1)
        second = [number for source, number in drawn if source == 1]
        size = len(sources[1])
        assert all(
            sorted(second[start : start + size]) == list(range(size)) for start in range(0, len(second) - size, size)
        )

    def test_each_source_of_a_blend_has_an_order_of_its_own(self):
        sources = [sequences(packed=False), sequences(packed=False)]
        data = ConversationDataset(sources, 40, None, seed=5, weights=[1, 1])
        orders = [[number for of, number in map(data.sequence, range(40)) if of == source] for source in (0, 1)]
        epochs = [order[start : start + 10] for order in orders for start in (0, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == 4

    def test_whole_passes_are_filled_up_with_samples_that_train_nothing(self):
        source = sequences()
        data = ConversationDataset([source], None, None, multiple_of=8)
        assert len(source) % 8 != 0 and len(data) == -(-len(source) // 8) * 8
        assert [data.sequence(i) for i in range(len(source))] == [(0, i) for i in range(len(source))]
        for i in range(len(source), len(data)):
            assert data.sequence(i) is None and not data[i]["loss_mask"].any()
        again = ConversationDataset([source], 3 * len(data), None, multiple_of=8)
        assert [again.sequence(i) for i in range(len(data), 2 * len(data))] == [
            data.sequence(i) for i in range(len(data))
        ]
