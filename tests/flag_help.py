"""Megatron reads the help of its flags from its own sources, for every parser anew: here once for all."""

import functools

from megatron.training.argument_utils import ArgumentGroupFactory


def read_once() -> None:
    read, found = ArgumentGroupFactory._get_field_docstrings, {}

    @functools.wraps(read)
    def read_new(factory: ArgumentGroupFactory, source: type) -> dict[str, str]:
        if source not in found:
            found[source] = read(factory, source)
        return found[source]

    ArgumentGroupFactory._get_field_docstrings = read_new
