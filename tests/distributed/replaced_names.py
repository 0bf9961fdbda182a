"""Which of the names that the platform replaces are called: a name that nobody calls need not be replaced."""

import functools
import types

from hymeg.platform import patches

CALLED: set[str] = set()


def watch() -> None:
    """Before the platform is installed: from then on CALLED grows by every replaced name that is called."""
    patches.patch = functools.partial(_patch, patches.patch)


def _patch(patch, owner, name: str, new, reason: str) -> None:
    label = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if isinstance(new, type):
        new = type(new.__name__, (new,), {"__init__": _noting(label, new.__init__)})
    elif isinstance(new, types.FunctionType | functools.partial):
        new = _noting(label, new)
    else:
        CALLED.add(label)  # a value is read, which nobody sees
    patch(owner, name, new, reason)


def _noting(label: str, function):
    @functools.wraps(function)  # Megatron looks at the signature of some
    def noting(*args, **kwargs):
        CALLED.add(label)
        return function(*args, **kwargs)

    return noting
