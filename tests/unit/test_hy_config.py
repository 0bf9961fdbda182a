"""HyConfig: every value from config.json, both spellings, lossless; what cannot be honoured is refused by name,
whatever the JSON.
"""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
from transformers import HYV3Config

from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

COMMON = {
    "architectures": ["HYV3ForCausalLM"],
    "model_type": "hy_v3",
    "vocab_size": 120832,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.006,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "qk_norm": True,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "router_scaling_factor": 2.826,
    "route_norm": True,
    "moe_router_use_sigmoid": True,
    "moe_router_enable_expert_bias": True,
    "enable_lm_head_fp32": True,
    "enable_attention_fp32_softmax": False,
    "enable_moe_fp32_combine": False,
    "bos_token_id": 120000,
    "eos_token_id": 120025,
    "pad_token_id": 120002,
    "use_cache": True,
    "dtype": "bfloat16",
}
HY3 = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts": 192,
    "moe_intermediate_size": 1536,
    "expert_hidden_dim": 1536,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
    "output_router_logits": True,
    "use_grouped_mm": False,
    "eod_token_id": 120026,
    "sep_token_id": 120007,
    "transformers_version": "5.6.0",
}
HY_MT2 = COMMON | {
    "hidden_size": 2048,
    "intermediate_size": 6912,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "expert_hidden_dim": 768,
    "rope_theta": 11158840.0,
    "rope_scaling": None,
}


def changed(base, *removed, **values):
    return {key: value for key, value in (base | values).items() if key not in removed}


@pytest.mark.parametrize("published", [HY3, HY_MT2], ids=["hy3", "hy_mt2"])
def test_published_configs_agree_with_transformers(published):
    config, oracle = HyConfig.from_dict(published), HYV3Config(**copy.deepcopy(published))
    names = {field.name for field in dataclasses.fields(HyConfig)} & HYV3Config().to_dict().keys() - {
        "mlp_layer_types",
        "dtype",
    }
    assert len(names) == 20
    for name in names:
        assert getattr(config, name) == getattr(oracle, name), name
    assert list(config.mlp_layer_types) == oracle.mlp_layer_types
    assert config.rope_theta == oracle.rope_parameters["rope_theta"]
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]


def test_fields_that_transformers_ignores():
    config = HyConfig.from_dict(HY3)
    assert (config.enable_lm_head_fp32, config.enable_attention_fp32_softmax, config.moe_router_enable_expert_bias) == (
        True,
        False,
        True,
    )
    assert config.num_nextn_predict_layers == 1 and list(config.mtp_layer_indices) == [80] and config.is_moe_layer(80)
    assert config.dtype == "bfloat16" and config.shared_expert_intermediate_size == 1536
    assert list(HyConfig.from_dict(HY_MT2).mtp_layer_indices) == []


def test_absent_switches_mean_what_transformers_means():
    config = HyConfig.from_dict(
        changed(HY_MT2, *[key for key in HY_MT2 if key.startswith("enable_")], "moe_router_enable_expert_bias")
    )
    assert config.enable_moe_fp32_combine is True is HYV3Config().enable_moe_fp32_combine
    assert (config.enable_lm_head_fp32, config.enable_attention_fp32_softmax, config.moe_router_enable_expert_bias) == (
        False,
        False,
        True,
    )


@pytest.mark.parametrize("published", [HY3, HY_MT2], ids=["hy3", "hy_mt2"])
def test_saving_loses_nothing(published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    config = HyConfig.from_dir(tmp_path)
    (tmp_path / "copy").mkdir()
    config.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["config.json"]
    config.to_dict()["vocab_size"] = 1
    assert config.to_dict() == published and list(config.to_dict()) == list(published)


def test_what_transformers_saves_is_read(tmp_path):
    HYV3Config(**copy.deepcopy(HY_MT2)).save_pretrained(tmp_path)
    assert HyConfig.from_dir(tmp_path) == HyConfig.from_dict(HY_MT2)


@pytest.mark.parametrize(
    "respelled",
    [
        changed(HY_MT2, "rope_theta", rope_parameters={"rope_theta": 11158840, "rope_type": "default"}),
        changed(HY_MT2, "moe_intermediate_size"),
        changed(HY_MT2, "expert_hidden_dim"),
        changed(HY_MT2, "first_k_dense_replace"),
        changed(HY_MT2, "first_k_dense_replace", mlp_layer_types=["dense"] + ["sparse"] * 47),
        changed(HY_MT2, mlp_layer_types=["dense"] + ["sparse"] * 47),
        changed(HY_MT2, "num_experts", num_local_experts=128),
        changed(HY_MT2, "dtype", torch_dtype="bfloat16"),
        changed(HY_MT2, architectures=["HyMT2ForCausalLM"]),
        changed(HY_MT2, "architectures", partial_rotary_factor=1.0, n_group=1, topk_group=1, sliding_window=None),
    ],
    ids=str,
)
def test_other_spellings_mean_the_same(respelled):
    assert HyConfig.from_dict(respelled) == HyConfig.from_dict(HY_MT2)


def test_dense_layers_need_not_come_first():
    types = ["sparse", "dense"] * 24
    assert HyConfig.from_dict(changed(HY_MT2, "first_k_dense_replace", mlp_layer_types=types)).mlp_layer_types == tuple(
        types
    )


# (what is changed in HY_MT2, what the message must name)
BAD = [
    (changed(HY_MT2, "hidden_size"), "hidden_size"),
    (changed(HY_MT2, "moe_intermediate_size", "expert_hidden_dim"), "moe_intermediate_size"),
    (changed(HY_MT2, "rope_theta"), "rope_theta"),
    (changed(HY_MT2, rms_norm_eps=None), "rms_norm_eps"),
    (changed(HY_MT2, hidden_size="2048"), "hidden_size"),
    (changed(HY_MT2, num_hidden_layers=True), "num_hidden_layers"),
    (changed(HY_MT2, num_hidden_layers=48.0), "num_hidden_layers"),
    (changed(HY_MT2, vocab_size=0), "vocab_size"),
    (changed(HY_MT2, head_dim=-128), "head_dim"),
    (changed(HY_MT2, head_dim=127), "head_dim"),
    (changed(HY_MT2, num_attention_heads=30), "num_attention_heads"),
    (changed(HY_MT2, num_experts_per_tok=129), "num_experts_per_tok"),
    (changed(HY_MT2, num_experts_per_tok=1), "num_experts_per_tok is 1; at least 2"),
    (changed(HY_MT2, enable_lm_head_fp32=1), "enable_lm_head_fp32"),
    (changed(HY_MT2, rope_theta=float("inf")), "rope_theta"),
    (changed(HY_MT2, rms_norm_eps=10**400), "rms_norm_eps"),
    (changed(HY_MT2, attention_dropout=1.0), "attention_dropout"),
    (changed(HY_MT2, dtype="int8"), "dtype"),
    (changed(HY_MT2, eos_token_id=[120025, "x"]), "eos_token_id"),
    (changed(HY_MT2, eos_token_id=[120025, 120832]), "eos_token_id"),
    (changed(HY_MT2, bos_token_id=-1), "bos_token_id"),
    (changed(HY_MT2, pad_token_id=120832), "pad_token_id"),
    (changed(HY_MT2, num_nextn_predict_layers=-1), "num_nextn_predict_layers"),
    (changed(HY_MT2, expert_hidden_dim=769), "expert_hidden_dim"),
    (changed(HY_MT2, num_local_experts=64), "num_local_experts"),
    (changed(HY_MT2, torch_dtype="float32"), "torch_dtype"),
    (changed(HY_MT2, rope_parameters={"rope_theta": 10000.0}), "rope_parameters.rope_theta"),
    (changed(HY_MT2, rope_parameters=[1]), "rope_parameters"),
    (changed(HY_MT2, first_k_dense_replace=49), "first_k_dense_replace"),
    (changed(HY_MT2, mlp_layer_types=["sparse"] * 48), "first_k_dense_replace"),
    (changed(HY_MT2, "first_k_dense_replace", mlp_layer_types=["sparse"] * 47), "mlp_layer_types"),
    (changed(HY_MT2, "first_k_dense_replace", mlp_layer_types=["moe"] * 48), "mlp_layer_types"),
    (changed(HY_MT2, "model_type"), "model_type"),
    (changed(HY_MT2, model_type="qwen3_moe"), "model_type"),
    (changed(HY_MT2, architectures=["Qwen3MoeForCausalLM"]), "architectures"),
    (changed(HY_MT2, architectures="HYV3ForCausalLM"), "architectures"),
    (changed(HY_MT2, rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_scaling"),
    (changed(HY_MT2, rope_parameters={"rope_type": "yarn"}), "rope_parameters.rope_type"),
    (changed(HY_MT2, partial_rotary_factor=0.5), "partial_rotary_factor"),
    (changed(HY_MT2, rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (changed(HY_MT2, attention_bias=True), "attention_bias"),
    (changed(HY_MT2, mlp_bias=True), "mlp_bias"),
    (changed(HY_MT2, hidden_act="gelu"), "hidden_act"),
    (changed(HY_MT2, route_norm=False), "route_norm"),
    (changed(HY_MT2, qk_norm=False), "qk_norm"),
    (changed(HY_MT2, moe_router_use_sigmoid=False), "moe_router_use_sigmoid"),
    (changed(HY_MT2, tie_word_embeddings=True), "tie_word_embeddings"),
    (changed(HY_MT2, sliding_window=4096), "sliding_window"),
    (changed(HY_MT2, quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (changed(HY_MT2, n_group=8), "n_group"),
    (changed(HY_MT2, topk_group=2), "topk_group"),
    ([1, 2], "object"),
    ("config", "object"),
]


@pytest.mark.parametrize(("bad", "named"), BAD, ids=range(len(BAD)))
def test_bad_configs_are_refused_by_name(bad, named):
    with pytest.raises(UserError) as error:
        HyConfig.from_dict(bad, source="some/config.json")
    message = str(error.value)
    assert message.startswith("some/config.json: ") and named in message and "\n" not in message and len(message) < 500


def test_any_json_value_anywhere_is_taken_or_refused_by_name():
    values = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2.5,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "x\ny",
        "x" * 10000,
        [],
        [None],
        [[]],
        {},
        {"rope_type": []},
    ]
    fields = [
        *HY3,
        "mlp_layer_types",
        "torch_dtype",
        "num_local_experts",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "n_group",
        "a\nb",
    ]
    for key in fields:
        for value in values:
            try:
                HyConfig.from_dict(HY3 | {key: value})
            except UserError as error:
                assert key in str(error), (key, value, str(error))
                assert "\n" not in str(error) and len(str(error)) < 500, (key, value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{\n  "vocab_size": 1,\n  oops\n}', "line 3, column 3"),
        (b"", "line 1, column 1"),
        (b"[1]", "object"),
        (b'{"a": "\xff"}', "JSON"),
        (b"[" * 200000, "JSON"),
        (b'{"vocab_size": ' + b"9" * 10000 + b"}", "JSON"),
        (b'{"a": ' * 900 + b"1" + b"}" * 900, "model_type"),
    ],
    ids=range(7),
)
def test_files_that_are_no_config(text, told, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError) as error:
        HyConfig.from_dir(tmp_path)
    assert (
        str(tmp_path / "config.json") in str(error.value) and told in str(error.value) and "\n" not in str(error.value)
    )


def test_deep_nesting_in_a_good_config(tmp_path):
    text = json.dumps(HY_MT2)[:-1] + ', "extra": ' + "[" * 900 + "]" * 900 + "}"
    (tmp_path / "config.json").write_text(text)
    try:
        assert HyConfig.from_dir(tmp_path).vocab_size == 120832
    except UserError as error:
        assert "nested" in str(error)  # depends on how deep the caller already is


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: cannot be read: No such file"):
        HyConfig.from_dir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        HyConfig.from_dir(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be written"):
        HyConfig.from_dict(HY3).save(tmp_path / "absent")


def test_config_needs_no_torch():
    heavy = "{'torch', 'megatron', 'numpy', 'transformers'}"
    code = f"import sys, hymeg.hf.config, hymeg.hf.safetensors_files; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
