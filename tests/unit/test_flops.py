"""The FLOPs count agrees with counts made another way: torch's own counter on transformers' model, and the published
models' parameter counts.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HYV3Config, HYV3ForCausalLM

from hymeg.hf.config import HyConfig
from hymeg.planning.flops import (
    forward_flops_by_part,
    packed_training_flops,
    peak_tflops,
    training_flops,
)

BATCH, LENGTH = 2, 48

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 40,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
HY_MT2 = {
    "vocab_size": 120832,
    "hidden_size": 2048,
    "intermediate_size": 6912,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 768,
    "mlp_layer_types": ["dense"] + ["sparse"] * 47,
}
HY3 = {
    "vocab_size": 120832,
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "mlp_layer_types": ["dense"] + ["sparse"] * 79,
}
HY3_MTP_PARAMETERS = 298_786_155_776 - 295_033_528_320  # as published: with and without the MTP layer


def hy_config(shape, **extra):
    numerics = {
        "router_scaling_factor": 2.826,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.006,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
    }
    return HyConfig.from_dict({"model_type": "hy_v3", **shape, **numerics, **extra})


@pytest.fixture(scope="module")
def counted():
    """(forward, forward and backward) FLOPs of the tiny model as torch counts them. Eager attention computes every pair
    of positions, twice as many as are counted.
    """
    torch.manual_seed(0)
    model = HYV3ForCausalLM(HYV3Config(**TINY, attn_implementation="eager", experts_implementation="eager")).float()
    input_ids = torch.randint(TINY["vocab_size"], (BATCH, LENGTH))
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids).logits
    with FlopCounterMode(display=False) as backward:
        logits.square().mean().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def test_forward_agrees_with_torchs_counter(counted):
    expected, _ = counted
    parts = forward_flops_by_part(hy_config(TINY), BATCH * LENGTH, BATCH * LENGTH**2)
    assert sum(parts.values()) + parts["attention_scores"] == pytest.approx(expected, rel=0.01)


def test_a_training_step_agrees_with_torchs_counter(counted):
    _, expected = counted
    scores = forward_flops_by_part(hy_config(TINY), BATCH * LENGTH, BATCH * LENGTH**2)["attention_scores"]
    assert training_flops(hy_config(TINY), BATCH, LENGTH) + 3 * scores == pytest.approx(expected, rel=0.01)


def active_matmul_parameters(shape):
    """Parameters that one token is multiplied with, from the tensors of transformers' model: all matrices but the
    embedding, top-k of the experts.
    """
    with torch.device("meta"):
        model = HYV3ForCausalLM(HYV3Config(**shape))
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or parameter.dim() < 2:
            continue
        total += (
            parameter.numel() * shape["num_experts_per_tok"] // shape["num_experts"]
            if ".experts." in name
            else parameter.numel()
        )
    return total


@pytest.mark.parametrize("shape", [HY_MT2, HY3], ids=["Hy-MT2", "Hy3"])
@pytest.mark.parametrize("seq_length", [4096, 65536])
def test_published_models_agree_with_six_times_the_active_parameters(shape, seq_length):
    # Causal attention: every one of s positions meets s / 2 others on average, in two products of head_dim
    # multiply-adds, forward and twice backward.
    attention = 6 * shape["num_hidden_layers"] * shape["num_attention_heads"] * 2 * shape["head_dim"] * seq_length / 2
    expected = seq_length * (6 * active_matmul_parameters(shape) + attention)
    assert training_flops(hy_config(shape), 1, seq_length) == pytest.approx(expected, rel=1e-6)


def test_the_mtp_layer_agrees_with_hy3s_published_size():
    seq_length = 4096
    inactive = (HY3["num_experts"] - HY3["num_experts_per_tok"]) * 3 * HY3["hidden_size"] * HY3["moe_intermediate_size"]
    head = HY3["vocab_size"] * HY3["hidden_size"]
    attention = HY3["num_attention_heads"] * 2 * HY3["head_dim"] * seq_length / 2
    expected = 2 * (HY3_MTP_PARAMETERS - inactive + head + attention)
    with_mtp, without = (
        training_flops(hy_config(HY3, num_nextn_predict_layers=layers), 1, seq_length) for layers in (1, 0)
    )
    added = (with_mtp - without) / 3 / seq_length
    assert added == pytest.approx(expected, rel=1e-4)  # the published size holds norms and expert biases too


def test_without_shared_experts_and_dense_layer_hy3_would_be_8_percent_too_low():
    parts = forward_flops_by_part(hy_config(HY3), 1, 0)
    assert (parts["shared_experts"] + parts["dense_mlp"]) / sum(parts.values()) == pytest.approx(0.08, abs=0.005)


def test_packed_documents_attend_only_within_themselves():
    config = hy_config(HY_MT2)
    assert (
        packed_training_flops(config, 8192, 4096**2 + 4096**2)
        == training_flops(config, 2, 4096)
        < training_flops(config, 1, 8192)
    )
    lengths = [1000, 96, 3000]
    separate = sum(training_flops(config, 1, length) for length in lengths)
    assert packed_training_flops(config, sum(lengths), sum(length**2 for length in lengths)) == pytest.approx(separate)


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(device_name, expected):
    assert peak_tflops(device_name) == expected
