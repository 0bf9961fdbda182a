"""Samples of pre-training text are what the file says, whatever was read before."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from single_process import ensure_world

from hymeg.data import pretraining
from hymeg.data.pretraining import TextDataset, WithEnd
from hymeg.hf.tokenizer import load_tokenizer

PAD = 7


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, SimpleNamespace(vocab_size=1000, eod=0, pad=PAD, unique_identifiers={}))


def make_dataset(tmp_path, tokenizer, eod_mask_loss=False, length=40, cache=None):
    """Sequences of 8 tokens from documents, the first sample with the padding token in it."""
    ensure_world()
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    tmp_path.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    for start in range(0, 10 * length, length):
        tokens = np.arange(start, start + length)
        builder.add_document(np.where(tokens % 3 == 0, PAD, tokens + 10), [length])
    builder.finalize(str(tmp_path / "text.idx"))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        split="100,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        path_to_cache=cache,
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


def test_a_data_set_that_is_written_anew_is_not_cut_as_the_old_one_was(tmp_path):
    """In the cache lies where that was cut, under the path of both."""
    tokenizer = SimpleNamespace(vocab_size=1000, eod=0, pad=PAD, unique_identifiers={})
    first, again, anew = (
        make_dataset(tmp_path / name, tokenizer, length=length, cache=str(tmp_path / "cache"))
        for name, length in (("a", 32), ("a", 48), ("b", 48))
    )
    assert len(first) != len(again) == len(anew)
    assert all(torch.equal(again[index]["tokens"], anew[index]["tokens"]) for index in range(len(anew)))


def test_the_loss_is_masked_at_the_token_that_ends_documents(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text('{"eod_token_id": 50}')
    megatrons = SimpleNamespace(vocab_size=1000, eod=tokenizer.eos_token_id, pad=PAD, unique_identifiers={})
    given = WithEnd(megatrons, str(tmp_path / "hf"))
    assert (given.eod, given.pad, given.vocab_size) == (50, PAD, 1000)
    dataset = make_dataset(tmp_path, given, eod_mask_loss=True)
    ends = 0
    for sample in (dataset[index] for index in range(len(dataset))):
        is_end = sample["tokens"] == 50
        assert not sample["loss_mask"][is_end].any()
        assert torch.equal(sample["loss_mask"] == 0, is_end | (sample["labels"] == 0))
        ends += int(is_end.sum())
    assert ends


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_that_masks_the_ends_of_documents_looks_for_that_token(tmp_path, tokenizer_dir, monkeypatch, masked):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eod_token_id": 50}')
    monkeypatch.setattr(pretraining, "GPTDatasetConfig", SimpleNamespace)
    monkeypatch.setattr(pretraining, "get_blend_and_blend_per_split", lambda args: (None, None))
    monkeypatch.setattr(
        pretraining,
        "BlendedMegatronDatasetBuilder",
        lambda kind, sizes, is_reader, config: SimpleNamespace(build=lambda: (config, None, None)),
    )
    sizes = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    args = Mock(eod_mask_loss=masked, hf_model=str(tmp_path), **sizes)
    wrapper = SimpleNamespace(eod=tokenizer.eos_token_id)
    config, _, _ = pretraining.build_datasets(args, wrapper, (1, 0, 0), lambda: True)
    assert config.tokenizer.eod == (50 if masked else tokenizer.eos_token_id)
