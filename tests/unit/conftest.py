"""Tests may import Megatron at their top, in any order: the platform comes first."""

from hymeg import platform

platform.install()

import flag_help  # noqa: E402
import pytest  # noqa: E402
from corpora import udhr_texts  # noqa: E402

from hymeg.hf.tokenizer import train_tiny_tokenizer  # noqa: E402

flag_help.read_once()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Of 600 tokens, trained on two languages of the example data."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tiny_tokenizer(udhr_texts("en") + udhr_texts("zh"), vocab_size=600).save_pretrained(directory)
    return directory
