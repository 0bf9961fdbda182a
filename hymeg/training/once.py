"""Long work on files before the process groups are there, and so before their timeouts: done by one rank, waited for by
all.
"""

import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, rendezvous

from hymeg.errors import UserError

_FOREVER = timedelta(days=7)  # the launcher ends who waits for a rank that died
_SECONDS_TO_APPEAR = 5.0  # a shared file system may show another node's files late


def once_per_node(what: str, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
    """Have rank 0 `make` what is not there, and after it the first rank of every node that does not see the result. All
    ranks call it.

    Args:
        what: names the work; no two pieces of work of a run share one name.
        is_done: whether this rank sees the result.

    Raises:
        UserError: what `make` raised on rank 0, on every rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if not is_done():
            make()
        return
    store = PrefixStore(f"hymeg/{what}", _store())
    if os.environ["RANK"] == "0":
        store.set("rank 0", _made(is_done, make))
    failure = _wait(store, "rank 0")
    if failure:
        raise UserError(failure)
    node = f"node {os.environ.get('GROUP_RANK', '0')}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if not _appears(is_done):
            make()
        store.set(node, "")
    _wait(store, node)


@functools.cache  # without a launcher's store, rank 0's serves all: it must outlive this call
def _store() -> Store:
    return next(rendezvous("env://", timeout=_FOREVER))[0]


def _made(is_done: Callable[[], bool], make: Callable[[], None]) -> str:
    """What went wrong, or nothing."""
    try:
        if not is_done():
            make()
    except UserError as error:
        return str(error)
    return ""


def _wait(store, key: str) -> str:
    store.wait([key], _FOREVER)
    return store.get(key).decode()


def _appears(is_done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not (done := is_done()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return done
