"""How a name is replaced: with a reason, on a list, and loudly when the name is gone."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Patch:
    """One replaced attribute: `owner.name`, and the call site in Megatron (or the lack in gloo) that needs it."""

    owner: Any
    name: str
    original: Any
    reason: str

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}: {self.reason}"


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
