"""The mapping agrees with transformers on names and shapes, with the published models on counts, and accounts for every
tensor.
"""

import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import HYV3Config, HYV3ForCausalLM

from hymeg.checkpoint.mapping import (
    HF_LAYOUTS,
    check_distributed_tensors,
    detect_layout,
    distributed_shapes,
    hf_entries,
    match_hf_tensors,
    num_parameters,
    row_ranges,
)
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

TINY = {
    "model_type": "hy_v3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "router_scaling_factor": 2.826,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
}
HY_MT2 = TINY | {  # tencent/Hy-MT2-30B-A3B, what its shapes depend on
    "vocab_size": 120832,
    "hidden_size": 2048,
    "intermediate_size": 6912,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
HY3 = TINY | {  # tencent/Hy3
    "vocab_size": 120832,
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "num_nextn_predict_layers": 1,
}
SHAPES = {
    "first layer dense": {},
    "dense and sparse mixed": {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]},
    "no dense layer": {"mlp_layer_types": ["sparse"] * 4},
    "one head per group": {"num_key_value_heads": 8},
    "one group": {"num_key_value_heads": 1},
    "two shared experts": {"num_shared_experts": 2},
}


def hf_shapes(config: HyConfig, layout: str) -> dict[str, tuple[int, ...]]:
    return {entry.hf_name: entry.hf_shape for entry in hf_entries(config, layout)}


def make_config(**changes) -> HyConfig:
    return HyConfig.from_dict(TINY | changes)


def transformers_model(config: HyConfig, device: str) -> HYV3ForCausalLM:
    names = [name for name in TINY if name not in ("model_type", "rope_theta")]
    with torch.device(device):
        return HYV3ForCausalLM(
            HYV3Config(**{name: getattr(config, name) for name in names}, mlp_layer_types=list(config.mlp_layer_types))
        )


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_fused_names_and_shapes_are_those_of_transformers_in_memory(changes):
    config = make_config(**changes)
    in_memory = {name: tuple(tensor.shape) for name, tensor in transformers_model(config, "meta").state_dict().items()}
    assert hf_shapes(config, "fused") == in_memory


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_hub_names_and_shapes_are_those_that_transformers_saves(changes, tmp_path):
    config = make_config(**changes)
    transformers_model(config, "cpu").save_pretrained(tmp_path)
    on_disk = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            on_disk |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert hf_shapes(config, "hub") == on_disk


def test_distributed_keys_are_those_that_megatron_stores():
    """The keys and global shapes of a GPTModel's sharded_state_dict, megatron-core 0.19.2, with this config."""
    config = make_config(num_hidden_layers=2, num_nextn_predict_layers=1)
    attention = {
        "self_attention.linear_qkv.layer_norm_weight": (64,),
        "self_attention.linear_qkv.weight": (192, 64),
        "self_attention.q_layernorm.weight": (16,),
        "self_attention.k_layernorm.weight": (16,),
        "self_attention.linear_proj.weight": (64, 128),
    }
    dense = attention | {
        "mlp.linear_fc1.layer_norm_weight": (64,),
        "mlp.linear_fc1.weight": (160, 64),
        "mlp.linear_fc2.weight": (64, 80),
    }
    moe = attention | {
        "pre_mlp_layernorm.weight": (64,),
        "mlp.router.weight": (8, 64),
        "mlp.router.expert_bias": (8,),
        "mlp.experts.experts.linear_fc1.weight": (8, 48, 64),
        "mlp.experts.experts.linear_fc2.weight": (8, 64, 24),
        "mlp.shared_experts.linear_fc1.weight": (48, 64),
        "mlp.shared_experts.linear_fc2.weight": (64, 24),
    }
    mtp = {"enorm.weight": (64,), "hnorm.weight": (64,), "eh_proj.weight": (64, 128), "final_layernorm.weight": (64,)}
    expected = {
        "embedding.word_embeddings.weight": (96, 64),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (96, 64),
    }
    prefixed = (
        ("decoder.layers.0.", dense),
        ("decoder.layers.1.", moe),
        ("mtp.layers.0.", mtp),
        ("mtp.layers.0.transformer_layer.", moe),
    )
    for prefix, tensors in prefixed:
        expected |= {prefix + name: shape for name, shape in tensors.items()}
    assert distributed_shapes(config) == expected
    padded = expected | {"embedding.word_embeddings.weight": (128, 64), "output_layer.weight": (128, 64)}
    assert distributed_shapes(config, padded_vocab_size=128) == padded


@pytest.mark.parametrize("layout", HF_LAYOUTS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_places_fill_every_distributed_tensor_exactly_once(changes, layout):
    config = make_config(**changes, num_nextn_predict_layers=2)
    times_filled = {key: np.zeros(shape, int) for key, shape in distributed_shapes(config).items()}
    for entry in hf_entries(config, layout):
        rows = times_filled[entry.dist_key].reshape(-1, entry.dist_shape[-1])
        assert times_filled[entry.dist_key].shape == entry.dist_shape and entry.hf_shape[-1] == rows.shape[1]
        assert sum(stop - start for start, stop in entry.rows) == math.prod(entry.hf_shape[:-1])
        for start, stop in entry.rows:
            rows[start:stop] += 1
    assert all((times == 1).all() for times in times_filled.values())


@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5)])
def test_the_rows_of_a_block_are_those_that_numpy_finds(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    rows = np.arange(math.prod(shape[:-1])).repeat(shape[-1]).reshape(shape)
    for corners in itertools.product(*(itertools.combinations(range(length + 1), 2) for length in shape)):
        block = tuple(slice(*corner) for corner in corners)
        offset, extent = zip(*((start, stop - start) for start, stop in corners), strict=True)
        found = [row for start, stop in row_ranges(shape, offset, extent) for row in range(start, stop)]
        assert found == sorted(set(rows[block].ravel())) and numbers[block].size == len(found) * extent[-1]


def test_only_q_k_and_v_are_more_than_one_range_of_rows():
    for entry in hf_entries(make_config(), "hub"):
        assert (len(entry.rows) > 1) == bool(re.search(r"\.[qkv]_proj", entry.hf_name)), entry


def test_published_counts():
    hy3, hy_mt2 = HyConfig.from_dict(HY3), HyConfig.from_dict(HY_MT2)
    assert num_parameters(hy3.without_mtp()) == 295_033_528_320
    assert num_parameters(hy3, include_expert_bias=True) == 298_786_155_776
    assert num_parameters(hy3) == 298_786_155_776 - 80 * 192
    assert num_parameters(hy_mt2) == num_parameters(hy_mt2.without_mtp()) == 30_064_719_872
    tensors = hf_entries(hy3, "hub")
    assert len(tensors) == 47_138
    assert sum(math.prod(entry.hf_shape) * (4 if entry.is_fp32_buffer else 2) for entry in tensors) == 597_572_342_272


@pytest.mark.parametrize("published", [HY_MT2, HY3], ids=["Hy-MT2-30B-A3B", "Hy3"])
def test_trunk_count_is_transformers_parameter_count(published):
    config = HyConfig.from_dict(published)
    model = transformers_model(config, "meta")
    assert num_parameters(config.without_mtp()) == sum(parameter.numel() for parameter in model.parameters())


def test_expert_bias_is_the_only_fp32_buffer_and_goes_with_its_switch():
    assert {entry.hf_name for entry in hf_entries(make_config(), "hub") if entry.is_fp32_buffer} == {
        f"model.layers.{i}.mlp.expert_bias" for i in (1, 2, 3)
    }
    assert not any(
        "bias" in entry.hf_name for entry in hf_entries(make_config(moe_router_enable_expert_bias=False), "hub")
    )


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["model.layers.1.mlp.experts.7.up_proj.weight"], "hub"),
        (["model.embed_tokens.weight", "model.layers.80.mlp.expert_bias"], "hub"),
        (["model.layers.1.mlp.experts.down_proj"], "fused"),
        (["model.layers.1.mlp.gate.weight"], "fused"),
        (["model.layers.0.mlp.gate_proj.weight", "lm_head.weight"], "hub"),
        (["model.layers.1.mlp.gate.wg.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"], "fused"),
        ([], "hub"),
    ],
)
def test_layout_is_told_by_names(names, layout):
    assert detect_layout(names) == layout


def test_mixed_layouts_are_refused():
    with pytest.raises(
        UserError,
        match=r"mix two layouts: model\.layers\.1\.mlp\.expert_bias is a hub name, model\.layers\.2\.mlp\.gate\.weight",
    ):
        detect_layout(["model.layers.2.mlp.gate.weight", "model.layers.1.mlp.expert_bias"])


def test_unknown_layout_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="inner"):
        hf_entries(make_config(), "inner")


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_complete_checkpoint_matches_its_hf_entries(layout):
    config = make_config(num_nextn_predict_layers=1)
    match = match_hf_tensors(config, hf_shapes(config, layout))
    assert (match.layout, match.entries, match.dropped) == (layout, hf_entries(config, layout), [])


@pytest.mark.parametrize(("layout", "name"), [("hub", "mlp.router.gate.weight"), ("fused", "mlp.gate.weight")])
def test_older_router_name_is_read(layout, name):
    config = make_config()
    shapes = hf_shapes(config, layout)
    shapes["model.layers.2.mlp.gate.wg.weight"] = shapes.pop(f"model.layers.2.{name}")
    match = match_hf_tensors(config, shapes)
    assert match.layout == layout
    assert {entry.hf_name for entry in match.entries} == set(shapes)
    (entry,) = (entry for entry in match.entries if entry.hf_name == "model.layers.2.mlp.gate.wg.weight")
    assert (entry.dist_key, entry.rows) == ("decoder.layers.2.mlp.router.weight", ((0, 8),))


def test_copies_of_the_trunk_in_mtp_layers_are_dropped_and_named():
    config = make_config(num_nextn_predict_layers=1)
    copies = {
        "model.layers.4.embed_tokens.weight": (96, 64),
        "model.layers.4.shared_head.head.weight": (96, 64),
        "model.layers.4.shared_head.norm.weight": (64,),
    }
    match = match_hf_tensors(config, copies | hf_shapes(config, "hub"))
    assert match.dropped == list(copies)
    assert match.entries == hf_entries(config, "hub")


def remove(*names):
    return lambda shapes: [shapes.pop(name) for name in names]


def add(**tensors):
    return lambda shapes: shapes.update(tensors)


def change(name, shape):
    return lambda shapes: shapes.__setitem__(name, shape)


def remove_expert(shapes):
    for name in [name for name in shapes if name.startswith("model.layers.3.mlp.experts.")]:
        del shapes[name]


ROUTER, OLD_ROUTER = "model.layers.1.mlp.router.gate.weight", "model.layers.1.mlp.gate.wg.weight"
FAULTS = {
    "missing": (remove("lm_head.weight"), "1 missing (lm_head.weight)"),
    "empty": (dict.clear, f"{len(hf_shapes(make_config(), 'hub'))} missing (model.embed_tokens.weight, "),
    "unexpected": (
        add(**{"model.layers.0.self_attn.q_proj.bias": (128,)}),
        "1 unexpected (model.layers.0.self_attn.q_proj.bias)",
    ),
    "an expert too many": (
        add(**{"model.layers.1.mlp.experts.8.up_proj.weight": (24, 64)}),
        "1 unexpected (model.layers.1.mlp.experts.8.up_proj.weight)",
    ),
    "misshapen": (change("model.norm.weight", (63,)), "1 misshapen (model.norm.weight is [63], [64] is needed)"),
    "transposed": (change("lm_head.weight", (64, 96)), "1 misshapen (lm_head.weight is [64, 96], [96, 64] is needed)"),
    "both router names": (add(**{OLD_ROUTER: (8, 64)}), f"1 unexpected ({OLD_ROUTER})"),
    "older router name, misshapen": (
        lambda shapes: (shapes.pop(ROUTER), shapes.update({OLD_ROUTER: (9, 64)})),
        f"1 misshapen ({OLD_ROUTER} is [9, 64], [8, 64] is needed)",
    ),
    "MTP copy without MTP": (
        add(**{"model.layers.4.embed_tokens.weight": (96, 64)}),
        "1 unexpected (model.layers.4.embed_tokens.weight)",
    ),
    "first ten": (
        remove_expert,
        "24 missing (model.layers.3.mlp.experts.0.gate_proj.weight, model.layers.3.mlp.experts.1.gate_proj.weight, ",
    ),
    "ten and no more": (remove_expert, "model.layers.3.mlp.experts.1.up_proj.weight, and 14 more)"),
    "three kinds": (
        lambda shapes: (shapes.pop("lm_head.weight"), shapes.update({"x": (1,), "y": (2,), "model.norm.weight": (1,)})),
        "1 missing (lm_head.weight); 2 unexpected (x, y); 1 misshapen (model.norm.weight is [1], [64] is needed)",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS)
def test_hf_tensors_that_do_not_fit_are_told_in_one_line(break_it, message):
    config = make_config()
    shapes = hf_shapes(config, "hub")
    break_it(shapes)
    with pytest.raises(UserError) as raised:
        match_hf_tensors(config, shapes)
    assert message in str(raised.value)
    assert str(raised.value).count("\n") == 0
    assert len(re.findall(r"[\w.]+\.weight", str(raised.value))) <= 10


@pytest.mark.parametrize(("in_config", "in_file"), [(1, 0), (0, 1), (2, 1)])
def test_disagreement_on_mtp_names_the_field_to_mend(in_config, in_file):
    shapes = hf_shapes(make_config(num_nextn_predict_layers=in_file), "hub")
    with pytest.raises(
        UserError, match=rf"All belong to MTP layers: make num_nextn_predict_layers \({in_config} in config.json\)"
    ):
        match_hf_tensors(make_config(num_nextn_predict_layers=in_config), shapes)
    keys = distributed_shapes(make_config(num_nextn_predict_layers=in_file))
    with pytest.raises(UserError, match="All belong to MTP layers"):
        check_distributed_tensors(make_config(num_nextn_predict_layers=in_config), keys)


def test_padding_rows_of_the_vocabulary_are_the_only_freedom_of_distributed_shapes():
    config = make_config()
    check_distributed_tensors(config, distributed_shapes(config, padded_vocab_size=128))
    for key, shape in (
        ("embedding.word_embeddings.weight", (95, 64)),
        ("output_layer.weight", (128, 65)),
        ("output_layer.weight", (96,)),
    ):
        with pytest.raises(
            UserError, match=rf"1 misshapen \({key} is \[{', '.join(map(str, shape))}\], \[96, 64\] is needed\)"
        ):
            check_distributed_tensors(config, distributed_shapes(config) | {key: shape})
    with pytest.raises(UserError, match="1 misshapen"):
        check_distributed_tensors(
            config, distributed_shapes(config) | {"decoder.layers.0.mlp.linear_fc2.weight": (65, 80)}
        )


def test_distributed_tensors_missing_or_unexpected():
    config = make_config()
    shapes = distributed_shapes(config)
    del shapes["decoder.layers.1.mlp.router.expert_bias"]
    shapes["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"] = shapes.pop(
        "decoder.layers.1.pre_mlp_layernorm.weight"
    )
    told = r"2 missing \(decoder.layers.1.pre_mlp_layernorm.weight, .*expert_bias\); 1 unexpected \(decoder.*linear_fc1"
    with pytest.raises(UserError, match=told):
        check_distributed_tensors(config, shapes)


def test_a_part_of_a_model_needs_only_what_is_required():
    config = make_config()
    part = {"output_layer.weight": (96, 64)}
    check_distributed_tensors(config, part, required=part)
    with pytest.raises(UserError, match=r"1 missing \(decoder.final_layernorm.weight\)"):
        check_distributed_tensors(config, part, required=["output_layer.weight", "decoder.final_layernorm.weight"])


def test_mapping_needs_neither_torch_nor_megatron():
    heavy = "{'torch', 'megatron', 'transformers', 'numpy'}"
    code = f"import sys, hymeg.checkpoint.mapping; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
