"""Tests may import Megatron at their top, in any order: the platform comes first. Megatron reads the help of its flags from its own sources for every
parser; here once for all."""

from hymeg import platform

platform.install()

from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402

_read, _found = ArgumentGroupFactory._get_field_docstrings, {}


def _read_once(factory: ArgumentGroupFactory, source: type) -> dict[str, str]:
    if source not in _found:
        _found[source] = _read(factory, source)
    return _found[source]


ArgumentGroupFactory._get_field_docstrings = _read_once
