"""Distributed checkpoints of other trainers are exported to the bit, and nothing in them is dropped in silence."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from dcp_files import save_in_chunks
from fp8_folders import weights
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from single_process import build

from hymeg.checkpoint.adapter import HyStateDictAdapter
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.sources.dist_folder import open_dist
from hymeg.checkpoint.sources.foreign_keys import Part, our_parts
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "hf"
    config = HyConfig.from_dict(TINY_CONFIG | {"num_hidden_layers": 2, "num_experts": 4})
    write_tiny_checkpoint(folder, config, dtype="fp32", num_mtp_layers=1)
    return folder


@pytest.fixture(scope="module")
def tensors(hf) -> dict[str, torch.Tensor]:
    return HyStateDictAdapter(HyConfig.from_dir(hf)).from_hf(weights(hf))


def each_expert(tensors, name):
    """`name(expert, "linear_fc1")` in place of the stack."""
    made = {}
    for key, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.mlp\.experts\.)experts\.(linear_fc[12])\.weight", key):
            made |= {found[1] + name(e, found[2]): tensor[e] for e in range(len(tensor))}
        else:
            made[key] = tensor
    return made


def halves(tensors):
    made = {}
    for key, tensor in tensors.items():
        if re.search(r"mlp\.(shared_experts\.)?linear_fc1\.weight$|experts\.\d+\.linear_fc1\.weight$", key):
            made[f"{key}_w"], made[f"{key}_v"] = tensor.chunk(2)
        else:
            made[key] = tensor
    return made


def renamed(tensors, pattern, by):
    return {re.sub(pattern, by, key): tensor for key, tensor in tensors.items()}


STYLES = {
    "stock local spec": lambda t: renamed(t, r"(?<=\.)pre_mlp_layernorm\.weight", "mlp.linear_fc1.layer_norm_weight"),
    "norms apart": lambda t: renamed(
        renamed(t, r"self_attention\.linear_qkv\.layer_norm_weight", "input_layernorm.weight"),
        r"mlp\.linear_fc1\.layer_norm_weight", "pre_mlp_layernorm.weight",
    ),
    "sequential experts": lambda t: each_expert(t, lambda e, name: f"experts.{e}.{name}.weight"),
    "sequential experts as modules": lambda t: each_expert(t, lambda e, name: f"local_experts.{e}.{name}.weight"),
    "grouped experts as modules": lambda t: each_expert(t, lambda e, name: f"{name}.weight{e}"),
    "singleton shards": lambda t: halves(each_expert(t, lambda e, name: f"experts.{e}.{name}.weight")),
    "Megatron-Bridge": lambda t: renamed(t, r"transformer_layer", "mtp_model_layer"),
    "NeMo 2": lambda t: {f"module.{key}": tensor for key, tensor in t.items()},
    "all of them": lambda t: {
        f"module.{key}": tensor
        for key, tensor in halves(
            each_expert(renamed(t, r"transformer_layer", "mtp_model_layer"), lambda e, n: f"experts.{e}.{n}.weight")
        ).items()
    },
}  # fmt: skip


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_in_chunks(folder, {key: (tensor, max(tensor.dim() - 2, 0)) for key, tensor in tensors.items()})


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_read_to_the_bit(hf, tensors, tmp_path, style):
    theirs = STYLES[style](tensors)
    assert theirs.keys() != tensors.keys()
    save(tmp_path / "iter_0000003", theirs)
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    source = open_dist(tmp_path)
    num = len(theirs.keys() - tensors.keys())
    assert re.match(f"read under another trainer's names: {num} tensors", source.notes[-1])
    assert {key: tensor.shape for key, tensor in source.tensors.items()} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    assert compare_checkpoints(hf, tmp_path) == []


def test_an_export_of_another_trainers_checkpoint_is_whole(hf, tensors, tmp_path):
    """As NeMo 2 lays its folders out."""
    save(tmp_path / "nemo" / "weights", STYLES["all of them"](tensors))
    dist_to_hf(tmp_path / "nemo", tmp_path / "out", base_hf=hf, verify=True)
    assert compare_checkpoints(hf, tmp_path / "out") == []


def test_megatrons_own_keys_for_singleton_shards_are_known(hf, tmp_path):
    model = build(hf)
    state = model.sharded_state_dict(metadata={"singleton_local_shards": True, "dp_cp_group": None})
    (tmp_path / "iter_0000001").mkdir()
    dist_checkpointing.save(state, tmp_path / "iter_0000001")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    assert "mlp.experts.experts.3.linear_fc1.weight_v" in (tmp_path / "iter_0000001" / ".metadata").read_text(
        errors="replace"
    )
    assert compare_checkpoints(hf, tmp_path) == []


def test_the_stock_local_specs_norms_are_megatrons():
    theirs = get_gpt_layer_local_spec(num_experts=4).submodules.sharded_state_dict_keys_map
    stored = theirs["pre_mlp_layernorm."] + "weight"
    keys = [f"decoder.layers.{n}.{name}" for n, name in ((1, stored), (1, "mlp.router.weight"), (0, stored))]
    assert list(our_parts(keys).values()) == [
        Part("decoder.layers.1.pre_mlp_layernorm.weight"),
        Part("decoder.layers.1.mlp.router.weight"),
        Part("decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
    ]


SPOILED = {
    "an expert": (
        lambda t: t.pop("decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight_w"),
        "gate of expert 2 is m",
    ),
    "a half": (lambda t: t.pop("decoder.layers.0.mlp.linear_fc1.weight_v"), "fc1.weight: the up projection is missing"),
    "two names": (
        lambda t: t.update({"decoder.layers.0.mlp.linear_fc1.weight": torch.ones(256, 64)}),
        "names that do not go together",
    ),
    "shapes": (
        lambda t: t.update({"decoder.layers.1.mlp.experts.experts.0.linear_fc2.weight": torch.ones(64, 8)}),
        "its parts are of several shapes",
    ),
    "an unknown key": (lambda t: t.update({"vision.weight": torch.ones(2, 2)}), r"1 tensors that .* not know \(vision"),
    "an unknown part": (
        lambda t: t.update({"decoder.layers.1.mlp.experts.experts.2.bias": torch.ones(2, 2)}),
        r"1 unexpected \(decoder\.layers\.1\.mlp\.experts\.experts\.2\.bias\)",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_missing_or_unknown_is_named(hf, tensors, tmp_path, case):
    spoil, message = SPOILED[case]
    theirs = STYLES["singleton shards"](tensors)
    spoil(theirs)
    save(tmp_path / "iter_0000003", theirs)
    with pytest.raises(UserError, match=message):
        dist_to_hf(tmp_path / "iter_0000003", tmp_path / "out", base_hf=hf)


def test_an_unknown_object_is_named(hf, tensors, tmp_path):
    from torch.distributed.checkpoint import metadata as dcp

    save(tmp_path / "iter_0000003", tensors)
    path = tmp_path / "iter_0000003" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for key in (
        "sampler/shard_0_1",
        "rng_state/shard_0.0_1.1",
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1",
    ):
        metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    said = []
    dist_to_hf(tmp_path / "iter_0000003", tmp_path / "out", base_hf=hf, say=said.append)
    assert "not taken along, objects of unknown names: sampler/shard_0_1" in said
    assert "not known" not in describe(tmp_path / "iter_0000003")
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["iteration"] == 3
