"""Samples of pre-training text are what the file says, whatever was read before."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from single_process import ensure_world

from hymeg.data.pretraining import TextDataset

PAD = 7


@pytest.fixture
def dataset(tmp_path):
    """Sequences of 8 tokens from documents, the first sample with the padding token in it."""
    ensure_world()
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    for start in range(0, 400, 40):
        builder.add_document(
            np.where(np.arange(start, start + 40) % 3 == 0, PAD, np.arange(start, start + 40) + 10), [40]
        )
    builder.finalize(str(tmp_path / "text.idx"))
    tokenizer = SimpleNamespace(vocab_size=1000, eod=0, pad=PAD, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        split="100,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    low_level = IndexedDataset(str(tmp_path / "text"))
    return TextDataset(low_level, str(tmp_path / "text"), np.arange(10), 40, Split.train, config)


def test_masked_tokens_of_one_sample_do_not_mask_another(dataset):
    alone = {index: dataset[index] for index in (3, 5)}
    for index in range(20):
        sample = dataset[index]
        # Labels that were padding are written as 0, which no document holds.
        assert torch.equal(sample["loss_mask"] == 0, sample["labels"] == 0)
    for index, sample in alone.items():
        assert torch.equal(dataset[index]["loss_mask"], sample["loss_mask"])
