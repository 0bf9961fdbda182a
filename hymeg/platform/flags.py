"""Whether flags are judged for this machine or for another."""

import contextlib
from collections.abc import Iterator

from hymeg import platform

_elsewhere = False


@contextlib.contextmanager
def for_gpus() -> Iterator[None]:
    """While the context is open, flags are judged as on a machine with CUDA: they are a plan's or a recipe's, to run
    elsewhere.
    """
    global _elsewhere
    _elsewhere = True
    try:
        yield
    finally:
        _elsewhere = False


def judged_for_cpu() -> bool:
    return platform.is_cpu() and not _elsewhere
