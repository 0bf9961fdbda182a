"""A model in this process gives its weights as files hold them, and takes them from files; tests/distributed has the
layouts.
"""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file
from single_process import build

from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.live import _fill, export_weights, load_weights
from hymeg.checkpoint.mapping import hf_entries
from hymeg.checkpoint.row_tensors import TensorReader
from hymeg.checkpoint.sources import live_model, open_dist
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

ODD = HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1025})  # padded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    write_tiny_checkpoint(folder / "hub", ODD, dtype="fp32", num_mtp_layers=1)
    write_tiny_checkpoint(folder / "bf16", ODD, dtype="bf16", num_mtp_layers=1)
    write_tiny_checkpoint(folder / "trunk", ODD, dtype="fp32")
    hf_to_dist(folder / "hub", folder / "dist")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return HyConfig.from_dir(folder / "hub")


@pytest.fixture(scope="module")
def model(folder):
    return build(folder / "hub")


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("batch_bytes", [100, 5000, 1 << 20])
def test_a_model_gives_what_it_was_loaded_from_in_batches_of_any_size(folder, config, model, monkeypatch, batch_bytes):
    monkeypatch.setattr(live_model, "BATCH_BYTES", batch_bytes)
    given = list(export_weights([model], config))
    assert_same(dict(given), weights(folder / "hub"))
    assert len(given) == len(weights(folder / "hub"))
    batches = live_model.LiveModel([model], config)._batches(hf_entries(config, "hub"))
    sizes = [sum(span.num_rows * span.entry.hf_shape[-1] * 4 for span in batch) for batch in batches]
    assert max(sizes) <= max(batch_bytes, 128 * 4)  # one row of the widest matrix


def test_weights_come_in_another_dtype_and_the_expert_bias_in_fp32(folder, config, model):
    expected = {
        name: tensor if name.endswith("expert_bias") else tensor.bfloat16()
        for name, tensor in weights(folder / "hub").items()
    }
    assert_same(dict(export_weights([model], config, dtype="BF16")), expected)


def test_weights_given_away_are_not_the_models_own(config, model):
    for _, tensor in export_weights([model], config):
        tensor.zero_()
    assert all(tensor.any() for name, tensor in export_weights([model], config) if "bias" not in name)


@pytest.mark.parametrize("source", ["hub", "dist"])
def test_a_model_is_filled_from_a_folder_in_place(folder, config, source):
    model = build(folder / "hub", weights=False)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "bias" in name)):
            tensor.fill_(torch.nan)
    load_weights([model], config, folder / source)
    assert_same(dict(export_weights([model], config)), weights(folder / "hub"))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert len(model.embedding.word_embeddings.weight) > 1025
    assert not model.embedding.word_embeddings.weight[1025:].any()


@pytest.mark.parametrize(("axis", "part"), [(0, 1), (1, 0), (1, 1), (2, 1)])
def test_a_shard_of_all_experts_is_filled_with_its_rows_and_columns(folder, axis, part):
    """As under expert, and under expert tensor parallelism: rows of many experts, one run after the other."""
    tensors = open_dist(folder / "dist").tensors
    key = next(key for key in tensors if key.endswith(".experts.experts.linear_fc2.weight"))
    tensor = tensors[key]
    whole = torch.zeros(tensor.shape)
    with TensorReader() as reader:
        _fill(_shard(key, whole, tensor.shape, (0,) * 3), tensor, reader)
        assert whole.all()
        expected = whole.chunk(2, axis)[part]
        found = torch.full(expected.shape, torch.nan)
        offset = tuple(part * expected.shape[axis] if a == axis else 0 for a in range(3))
        _fill(_shard(key, found, tensor.shape, offset), tensor, reader)
    assert torch.equal(found, expected)


def _shard(key: str, data: torch.Tensor, global_shape: tuple, offset: tuple) -> ShardedTensor:
    fragments = tuple(of // own for of, own in zip(global_shape, data.shape, strict=True))
    return ShardedTensor(key, data, data.dtype, tuple(data.shape), global_shape, offset, fragments)


def test_a_bf16_model_takes_fp32_weights_rounded_and_keeps_the_bias(folder, config):
    model = build(folder / "bf16", "--bf16", weights=False)
    load_weights([model], config, folder / "hub")
    expected = {
        name: tensor if name.endswith("expert_bias") else tensor.bfloat16()
        for name, tensor in weights(folder / "hub").items()
    }
    assert_same(dict(export_weights([model], config)), expected)


def test_another_models_config_or_folder_is_refused(folder, config, model):
    with pytest.raises(UserError, match=r"unexpected \(mtp.layers.0"):
        next(export_weights([model], HyConfig.from_dir(folder / "trunk")))
    with pytest.raises(UserError, match=rf"{folder}/trunk: .*missing \(mtp.layers.0"):
        load_weights([model], config, folder / "trunk")
    with pytest.raises(UserError, match="no such folder"):
        load_weights([model], config, folder / "nowhere")
