"""Before the process groups are there, and so before their timeouts: long work on files, done by one rank and waited
for by all; and what ranks tell each other.
"""

import functools
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch import distributed
from torch.distributed import PrefixStore, Store, rendezvous

from hymeg.errors import UserError

_FOREVER = timedelta(days=7)  # the launcher ends who waits for a rank that died
_SECONDS_TO_APPEAR = 5.0  # a shared file system may show another node's files late


def rank() -> int:
    """This process's, whoever launched it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def once_per_node(what: str, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
    """Have rank 0 `make` what is not there, and after it a rank of every node that does not see it. All ranks call it.

    Args:
        what: names the work; no two pieces of work of a run share one name.
        is_done: whether this rank sees the result.

    Raises:
        UserError: what `make` raised on rank 0, on every rank.
    """
    if world_size() > 1:
        once(_store_of(what), rank() == 0, _node(), is_done, make)
    elif not is_done():
        make()


def by_rank_0(what: str, make: Callable[[], None]) -> None:
    """Have rank 0 `make` what all nodes see, while the others wait for it; nothing in a world of one. All ranks call
    it, and all raise the UserError that `make` raised.
    """
    if world_size() > 1:
        _made_by_first(_store_of(what), rank() == 0, lambda: False, make)


def told_by_all(what: str, text: str) -> list[str]:
    """Every rank's `text`, with process groups or before them. All ranks call it; `what` as in `once_per_node`."""
    texts = [text] * world_size()
    if distributed.is_initialized():
        distributed.all_gather_object(texts, text)
    elif world_size() > 1:
        store = _store_of(what)
        store.set(str(rank()), text)
        texts = [_wait(store, str(other)) for other in range(world_size())]
    return texts


def once(store: Store, is_first: bool, node: str, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
    """`once_per_node` over a store, for a rank of a node."""
    _made_by_first(store, is_first, is_done, make)
    # The first to come: bare srun gives no rank within a node.
    if store.add(f"{node} has come", 1) == 1:
        if not _appears(is_done):
            make()
        store.set(node, "")
    _wait(store, node)


def _made_by_first(store: Store, is_first: bool, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
    if is_first:
        failure = ""
        try:
            if not is_done():
                make()
        except UserError as error:
            failure = str(error)
        store.set("rank 0", failure)
    if failure := _wait(store, "rank 0"):
        raise UserError(failure)


def _node() -> str:
    """What this rank's files are shared with: its machine, or one of several containers there."""
    number = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", ""))
    return f"node {socket.gethostname()} {number}"


@functools.cache  # without a launcher's store, rank 0's serves all: it must outlive this call
def job_store() -> Store:
    """Which all ranks of the job share, from their start on."""
    return next(rendezvous("env://", timeout=_FOREVER))[0]


def _store_of(what: str) -> Store:
    return PrefixStore(f"hymeg/{what}", job_store())


def _wait(store: Store, key: str) -> str:
    store.wait([key], _FOREVER)
    return store.get(key).decode()


def _appears(is_done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not (done := is_done()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return done
