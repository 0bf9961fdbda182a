"""Work on files is done by rank 0, and again by the first rank of a node that does not see its result."""

import pytest
from torch.distributed import HashStore

from hymeg.errors import UserError
from hymeg.training import once


@pytest.fixture
def rank(monkeypatch):
    """Runs `once_per_node` as this rank of two nodes with two each; one rank after the other."""
    store = HashStore()
    monkeypatch.setattr(once, "job_store", lambda: store)
    monkeypatch.setattr(once, "_SECONDS_TO_APPEAR", 0.0)

    def run(rank, is_done, make):
        for name, value in {"WORLD_SIZE": 4, "RANK": rank, "LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2}.items():
            monkeypatch.setenv(name, str(value))
        once.once_per_node("work", is_done, make)

    return run


def on(made, node):
    return lambda: node in made, lambda: made.append(node)


def test_without_a_shared_disk_each_node_has_one_rank_work(rank):
    made = []
    for number in range(4):
        rank(number, *on(made, number // 2))
    assert made == [0, 1]


def test_on_a_shared_disk_one_rank_works(rank):
    made = []
    for number in range(4):
        rank(number, *on(made, "shared"))
    assert made == ["shared"]


def test_what_is_there_is_not_made(rank):
    made = ["shared"]
    for number in range(4):
        rank(number, *on(made, "shared"))
    assert made == ["shared"]


def test_what_rank_0_could_not_do_ends_every_rank(rank):
    def fail():
        raise UserError("no room")

    for number in range(4):
        with pytest.raises(UserError, match=r"^no room$"):
            rank(number, lambda: False, fail)


@pytest.fixture
def of_four(rank, monkeypatch):
    """Runs `by_rank_0` as this rank of four; none may pass the time."""
    monkeypatch.setattr(once, "_SECONDS_TO_APPEAR", 5.0)
    monkeypatch.setattr(once.time, "sleep", lambda seconds: pytest.fail("rank 0 waits for what it has made itself"))

    def run(number, make):
        monkeypatch.setenv("RANK", str(number))
        once.by_rank_0("work", make)

    monkeypatch.setenv("WORLD_SIZE", "4")
    return run


def test_what_rank_0_makes_for_all_it_makes_once(of_four):
    """Whichever rank of its node is the first to go on."""
    made = []
    for number in range(4):
        of_four(number, lambda: made.append("index"))
    assert made == ["index"]


def test_what_rank_0_could_not_make_for_all_ends_every_rank(of_four):
    def fail():
        raise UserError("no room")

    for number in range(4):
        with pytest.raises(UserError, match=r"^no room$"):
            of_four(number, fail)


def test_a_process_alone_needs_no_store(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(once, "job_store", None)
    made = []
    for _ in range(2):
        once.once_per_node("work", *on(made, "here"))
    assert made == ["here"]


def test_every_rank_is_told_what_all_say(rank, monkeypatch):
    """Through the store, rank by rank: the last one has nobody to wait for."""
    monkeypatch.setattr(once, "_wait", lambda store, key: store.get(key).decode() if store.check([key]) else "")
    monkeypatch.setattr(once.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for number, told in enumerate((["0", "", ""], ["0", "1", ""], ["0", "1", "2"])):
        monkeypatch.setenv("RANK", str(number))
        assert once.told_by_all("work", str(number)) == told
