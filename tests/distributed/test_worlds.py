"""A case that fails says which rank did, where, and harms no other case."""

import pytest


@pytest.mark.parametrize(
    ("manner", "seconds", "said"),
    [
        ("raises", 60, r"(?s)rank 1 Traceback.*in goes_wrong.*JSONDecodeError"),
        ("dies", 60, "rank 1 died: exit code 7"),
        ("sleeps", 1, r"(?s)rank 1 has not answered.*checks.py\", line \d+ in goes_wrong"),
    ],
)
def test_a_failing_rank_is_named_and_the_next_case_is_well(worlds, manner, seconds, said):
    with pytest.raises(AssertionError, match=said):
        worlds.run(2, [manner], "goes_wrong", seconds)
    assert len(worlds.run(2, [manner], "gloo_collectives")["ranks"]) == 2
