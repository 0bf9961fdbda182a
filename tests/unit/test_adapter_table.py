"""Adapters' names and shapes are those of transformers' projections, target by target."""

import pytest
from transformers import HYV3Config, HYV3ForCausalLM

from hymeg.checkpoint.adapter_table import (
    PROJECTIONS,
    adapter_modules,
    adapter_shapes,
    all_modules,
    check_adapter_tensors,
    full_shapes,
)
from hymeg.checkpoint.mapping import hf_entries
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

CONFIG = HyConfig.from_dict(TINY_CONFIG)
WITH_MTP = HyConfig.from_dict(TINY_CONFIG | {"num_nextn_predict_layers": 2})
RANK = 3


def test_modules_are_the_linear_maps_of_transformers():
    model = HYV3ForCausalLM(HYV3Config(**TINY_CONFIG))
    theirs = {}
    for name, parameter in model.named_parameters():
        name = name.removesuffix(".weight").replace("shared_experts", "shared_mlp")
        if name.endswith("experts.gate_up_proj"):
            num_experts, width, num_in = parameter.shape
            theirs[name.replace("gate_up_proj", "gate_proj")] = (num_in, width // 2, num_experts)
            theirs[name.replace("gate_up_proj", "up_proj")] = (num_in, width // 2, num_experts)
        elif name.endswith("experts.down_proj"):
            num_experts, num_out, num_in = parameter.shape
            theirs[name] = (num_in, num_out, num_experts)
        elif name.endswith(PROJECTIONS):
            theirs[name] = (parameter.shape[1], parameter.shape[0], None)
    assert {m.path: (m.num_in, m.num_out, m.num_experts) for m in all_modules(CONFIG)} == theirs


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("q_proj", {"self_attn.q_proj"}),
        ("self_attn.o_proj", {"self_attn.o_proj"}),
        ("gate_proj", {"mlp.gate_proj", "mlp.shared_mlp.gate_proj", "mlp.experts.gate_proj"}),
        ("mlp.gate_proj", {"mlp.gate_proj"}),
        ("shared_mlp.up_proj", {"mlp.shared_mlp.up_proj"}),
        ("experts.down_proj", {"mlp.experts.down_proj"}),
        ("mlp.experts.down_proj", {"mlp.experts.down_proj"}),
        ("mtp.k_proj", {"mtp.self_attn.k_proj"}),
        ("mtp.down_proj", {"mtp.mlp.shared_mlp.down_proj", "mtp.mlp.experts.down_proj"}),
    ],
)
def test_a_target_means(target, kinds):
    modules = adapter_modules(WITH_MTP, [target])
    assert {module.target for module in modules} == kinds
    layers = {int(module.path.split(".")[2]) for module in modules}
    dense = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    trunk = {0} if kinds <= dense else {0, 1, 2, 3} if "self_attn" in str(kinds) or kinds & dense else {1, 2, 3}
    assert layers == ({4, 5} if target.startswith("mtp.") else trunk)


def test_a_module_names_its_weights_as_the_hub_does():
    names = {entry.hf_name: entry.hf_shape for entry in hf_entries(WITH_MTP, "hub")}
    seen = set()
    for module in all_modules(WITH_MTP):
        for expert in range(module.num_experts) if module.num_experts else [None]:
            assert names[module.weight(expert)] == (module.num_out, module.num_in)
            seen.add(module.weight(expert))
    assert seen == {name for name in names if name.endswith("_proj.weight") and "eh_proj" not in name}


def test_shapes_are_the_contract():
    shapes = adapter_shapes(WITH_MTP, RANK, ["q_proj", "experts.gate_proj", "mlp.down_proj", "mtp.shared_mlp.up_proj"])
    assert shapes["adapter.model.layers.3.self_attn.q_proj.lora_A"] == (3, 64)
    assert shapes["adapter.model.layers.3.self_attn.q_proj.lora_B"] == (128, 3)
    assert shapes["adapter.model.layers.3.mlp.experts.gate_proj.lora_A"] == (8, 3, 64)
    assert shapes["adapter.model.layers.3.mlp.experts.gate_proj.lora_B"] == (8, 32, 3)
    assert shapes["adapter.model.layers.0.mlp.down_proj.lora_B"] == (64, 3)
    assert shapes["adapter.model.layers.5.mlp.shared_mlp.up_proj.lora_A"] == (3, 64)
    assert len(shapes) == 2 * (4 + 3 + 1 + 2)
    full = full_shapes(CONFIG, ["model.norm.weight"])
    assert full == {"adapter.model.norm.weight.full": (64,)}


@pytest.mark.parametrize(
    ("config", "targets", "said"),
    [
        (CONFIG, ["q_proj", "roj"], "'roj': means no module of this model; allowed are q_proj, k_proj"),
        (CONFIG, ["mtp.q_proj"], "the model has no MTP layers"),
        (WITH_MTP, ["mtp.mlp.gate_proj"], "mtp.q_proj and so on mean the MTP layers"),
        (CONFIG, [], "no targets"),
        (CONFIG, ["router.gate"], "allowed are .*shared_mlp.gate_proj.*experts.down_proj"),
    ],
)
def test_a_target_that_means_nothing_is_refused(config, targets, said):
    with pytest.raises(UserError, match=said):
        adapter_modules(config, targets)


def test_every_tensor_is_accounted_for():
    targets = ["q_proj", "experts.gate_proj"]
    shapes = adapter_shapes(CONFIG, RANK, targets, ["model.norm.weight"])
    check_adapter_tensors(CONFIG, RANK, targets, shapes, ["model.norm.weight"])
    key = "adapter.model.layers.3.self_attn.q_proj.lora_A"
    for wrong, said in (
        ({k: v for k, v in shapes.items() if k != key}, f"not those of its targets and rank: 1 missing \\({key}"),
        (shapes | {"adapter.x.lora_A": (3, 4)}, r"1 unexpected \(adapter.x.lora_A"),
        (shapes | {key: (4, 64)}, r"1 misshapen \(.*is \[4, 64\], \[3, 64\] is needed"),
    ):
        with pytest.raises(UserError, match=said):
            check_adapter_tensors(CONFIG, RANK, targets, wrong, ["model.norm.weight"])
    with pytest.raises(UserError, match="no parameter of this model"):
        full_shapes(CONFIG, ["model.norms.weight"])
