"""Ranks that come at the same time: work before the process groups is done once a node, and every rank waits for it."""

import threading
import time

import pytest
from torch.distributed import HashStore

from hymeg.errors import UserError
from hymeg.training import once as module
from hymeg.training.once import once


class Ranks:
    """Threads that stand for the ranks of several nodes: what each has made, and when it went on."""

    def __init__(self, nodes: list[str], shared: bool, fails: bool = False):
        self.shared, self.fails = shared, fails
        self.made: list[tuple[int, str]] = []
        self.errors: list[str] = []
        self.went_on: list[set[str]] = []  # the nodes that had the result when a rank went on
        store = HashStore()
        ranks = [threading.Thread(target=self.run, args=(store, rank, node)) for rank, node in enumerate(nodes)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()

    def run(self, store, rank: int, node: str) -> None:
        try:
            once(store, rank == 0, node, lambda: self.is_done(node), lambda: self.make(rank, node))
            self.went_on.append({node for _, node in self.made})
            assert self.is_done(node)
        except UserError as error:
            self.errors.append(f"{rank}: {error}")

    def is_done(self, node: str) -> bool:
        return any(self.shared or where == node for _, where in self.made)

    def make(self, rank: int, node: str) -> None:
        time.sleep(0.2)
        if self.fails:
            raise UserError("no space")
        self.made.append((rank, node))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_TO_APPEAR", 0.1)


def test_on_a_shared_file_system_rank_0_alone_makes_it():
    ranks = Ranks(["a", "a", "b", "b"], shared=True)
    assert ranks.made == [(0, "a")] and len(ranks.went_on) == 4 and ranks.errors == []


def test_on_other_nodes_without_it_one_rank_each_makes_it_and_theirs_wait_for_it():
    ranks = Ranks(["a", "b", "b", "b", "c"], shared=False)
    assert ranks.made[0] == (0, "a") and sorted(node for _, node in ranks.made) == ["a", "b", "c"]
    assert len(ranks.went_on) == 5 and ranks.errors == []


def test_what_is_wrong_on_rank_0_is_wrong_on_all():
    ranks = Ranks(["a", "a", "b"], shared=True, fails=True)
    assert sorted(ranks.errors) == ["0: no space", "1: no space", "2: no space"] and ranks.made == []


@pytest.mark.parametrize("variable", ["GROUP_RANK", "SLURM_NODEID"])  # torchrun's, bare srun's
def test_nodes_are_told_apart(monkeypatch, variable):
    for name in ("GROUP_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    names = set()
    for number in ("0", "1"):
        monkeypatch.setenv(variable, number)
        names.add(module._node())
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert len(names | {module._node()}) == 3
