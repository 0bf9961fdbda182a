"""Experts without tokens are expected before a run, and named in it."""

import numpy as np
import pytest

from hymeg.training.metrics import StarvedExperts, told
from hymeg.training.preflight import idle_share


def test_idle_share_is_what_random_choices_give():
    random = np.random.default_rng(0)
    idle = []
    for _ in range(400):
        chosen = {expert for _ in range(12) for expert in random.permutation(16)[:3]}
        idle.append(1 - len(chosen) / 16)
    assert idle_share(12, 3, 16) == pytest.approx(np.mean(idle), abs=0.01)


def test_an_expert_is_named_once_after_100_steps_and_again_after_it_has_had_tokens():
    starved, counts = StarvedExperts(), np.array([[0, 0, 0], [60, 0, 120], [9, 9, 9]])
    assert [starved.after(counts, 40) for _ in range(4)] == [{}, {}, {1: [1]}, {}]
    assert starved.after(counts + 1, 40) == {}
    assert [starved.after(counts, 50) for _ in range(3)] == [{}, {1: [1]}, {}]
    assert told({1: [1, 5], 3: [0]}) == "layer 1: 1, 5; layer 3: 0"


def test_where_an_even_share_would_be_few_tokens_none_is_starved():
    starved = StarvedExperts()
    assert [starved.after(np.array([[2, 0, 0, 0]]), 100) for _ in range(199)] == [{}] * 199
    assert starved.after(np.array([[2, 0, 0, 0]]), 100) == {0: [1, 2, 3]}
