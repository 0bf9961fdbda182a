"""Tests may import Megatron at their top, in any order: the platform comes first. Megatron reads the help of its flags
from its own sources for every parser; here once for all."""

from hymeg import platform

platform.install()

import pytest  # noqa: E402
from corpora import udhr_texts  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402

from hymeg.hf.tokenizer import train_tiny_tokenizer  # noqa: E402

_read, _found = ArgumentGroupFactory._get_field_docstrings, {}


def _read_once(factory: ArgumentGroupFactory, source: type) -> dict[str, str]:
    if source not in _found:
        _found[source] = _read(factory, source)
    return _found[source]


ArgumentGroupFactory._get_field_docstrings = _read_once


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Of 600 tokens, trained on two languages of the example data."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tiny_tokenizer(udhr_texts("en") + udhr_texts("zh"), vocab_size=600).save_pretrained(directory)
    return directory
