"""How a name is replaced: with a reason, on a list, and loudly when the name is gone."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """One replaced attribute: `owner.name`, and the call site in Megatron (or the lack in gloo) that needs it."""

    owner: Any
    name: str
    original: Any
    reason: str


INSTALLED: list[Patch] = []


def patch(owner: Any, name: str, new: Any, reason: str) -> None:
    """Replace `owner.name` by `new`.

    Raises:
        RuntimeError: `owner` has no such attribute: torch or Megatron changed, and whoever upgraded it must look at
            `reason`.
    """
    if not hasattr(owner, name):
        raise RuntimeError(f"patch target gone: {getattr(owner, '__name__', owner)}.{name} ({reason})")
    INSTALLED.append(Patch(owner, name, getattr(owner, name), reason))
    setattr(owner, name, new)


@contextlib.contextmanager
def patched(owner: Any, name: str, new: Any, reason: str) -> Iterator[None]:
    """`patch`, undone at the end."""
    patch(owner, name, new, reason)
    try:
        yield
    finally:
        setattr(owner, name, INSTALLED.pop().original)


def replaces(owner: Any, name: str, reason: str) -> Callable[[Callable], Callable]:
    """Decorator of a function that is called in the place of `owner.name`, with that as its first argument."""

    def install(function: Callable) -> Callable:
        patch(owner, name, _given_first(getattr(owner, name, None), function), reason)
        return function

    return install


def replaced(owner: Any, name: str, function: Callable, reason: str) -> contextlib.AbstractContextManager:
    """`replaces`, undone at the end."""
    return patched(owner, name, _given_first(getattr(owner, name), function), reason)


def _given_first(original: Callable, function: Callable) -> Callable:
    @functools.wraps(original)  # Megatron looks at the signature of some
    def replacement(*args, **kwargs):
        return function(original, *args, **kwargs)

    return replacement
