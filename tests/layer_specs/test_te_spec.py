"""The two layer specs are one model: local modules on a CPU, Transformer Engine's on a GPU, the same tensors under the
same keys in a checkpoint.

Transformer Engine is its own Python sources over a stand-in for the compiled part (stand_in.py): its model is
constructed, loaded and saved by the trainer, and cannot run.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from building import LOCAL, SPECS, TE, work
from safetensors.torch import load_file

from hymeg.checkpoint.mapping import distributed_shapes
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.hf.config import HyConfig

MOE_LAYERS = [*(f"decoder.layers.{layer}" for layer in (1, 2, 3)), "mtp.layers.0.mtp_model_layer"]
RANKS = (
    1,
    6,
)  # of 8 in TP2 PP2 DP2, EP2: one on each stage, of either tensor-parallel rank, with either half of the experts

# Where Transformer Engine's fused and grouped modules keep what the local spec keeps in modules of its own.
TE_TO_LOCAL = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.linear_(fc1|fc2)\.weight(\d+)$", r"mlp.experts.local_experts.\2.linear_\1.weight"),
)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint with a multi-token-prediction layer."""
    folder = tmp_path_factory.mktemp("hf") / "mtp"
    write_tiny_checkpoint(folder, num_mtp_layers=1)
    return folder


@pytest.fixture(scope="module")
def config(hf_folder) -> HyConfig:
    return HyConfig.from_dir(str(hf_folder))


@pytest.fixture(scope="module")
def made(te_site, hf_folder, tmp_path_factory) -> dict[str, dict]:
    """What worker.py wrote down: the local spec trains two steps and saves, Transformer Engine's loads and saves again,
    the local one loads that.
    """
    folder = tmp_path_factory.mktemp("specs")
    common = f"--hf-model {hf_folder} --bf16 --mock-data --seq-length 32 --train-iters 2 --lr 1e-3"
    one = f"{common} --global-batch-size 1 --eval-iters 0 --use-distributed-optimizer"
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    layout += " --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    fresh = f"{common} --global-batch-size 2 --init-from-scratch"
    ranks = {f"rank {rank}": {"argv": f"{fresh} {layout}", "rank": rank, "world_size": 8} for rank in RANKS}
    fp8 = {
        recipe: {"argv": fresh, "rank": 0, "world_size": 1, "gpu": {"fp8": "hybrid", "fp8_recipe": recipe}}
        for recipe in ("delayed", "blockwise")
    }
    of_local, of_te = folder / "of_local", folder / "of_te"

    results = work(
        LOCAL,
        {"trained": {"argv": f"{one} --load {hf_folder} --save {of_local} --save-interval 1000"}, **ranks},
        folder,
    )
    jobs = {
        "from hf": {"argv": f"{one} --load {hf_folder} --skip-train"},
        "frozen": {"argv": f"{one} --load {hf_folder} --skip-train --mtp-loss-scaling-factor 0"},
        "from local": {"argv": f"{one} --load {of_local} --save {of_te} --save-interval 1000"},
    }
    results |= work(TE, jobs | ranks | fp8, folder, te_site)
    results |= work(LOCAL, {"from te": {"argv": f"{one} --load {of_te}"}}, folder)
    return results


def local_name(name: str) -> str:
    for pattern, replacement in TE_TO_LOCAL:
        name = re.sub(pattern, replacement, name)
    return name


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", [f"{LOCAL} trained", f"{TE} from hf"])
def test_a_checkpoint_holds_exactly_the_tensors_of_the_mapping(made, config, model):
    """Names and shapes are the table's that the converter goes by; everything is bf16 but the expert bias."""
    expected = {
        key: (shape, torch.float32 if key.endswith("expert_bias") else torch.bfloat16)
        for key, shape in distributed_shapes(config).items()
    }
    assert {shard["key"]: (shard["global_shape"], shard["dtype"]) for shard in made[model]["stored"]} == expected


def test_both_specs_store_the_same_shards(made):
    """Key, dtype, global shape, the piece's offset and shape, and which replica writes it."""
    assert made[f"{TE} from hf"]["stored"] == made[f"{LOCAL} trained"]["stored"]


@pytest.mark.parametrize("rank", RANKS)
def test_both_specs_store_the_same_shards_of_a_layout(made, rank):
    """On a rank of TP2 PP2 EP2, where tensors are cut and experts are counted over ranks."""
    stored = made[f"{TE} rank {rank}"]
    assert any(shard["local_shape"] != shard["global_shape"] for shard in stored)
    assert stored == made[f"{LOCAL} rank {rank}"]


def test_only_the_norms_of_transformer_engine_have_an_extra_state_more_and_all_are_empty(made):
    """Why `sharded_state_dict` may leave them out: what Megatron would store without that is the same but for these,
    and none says anything.
    """
    objects = {
        spec: {s["key"]: s["size"] for s in made[model]["megatron_stores"] if s["dtype"] is None}
        for spec, model in _one_of_each().items()
    }
    layers = [f"decoder.layers.{layer}" for layer in range(4)] + ["mtp.layers.0.transformer_layer"]
    norms = [f"{layer}.self_attention.{norm}_layernorm" for layer in layers for norm in "qk"]
    norms += [f"{layer}.pre_mlp_layernorm" for layer in layers[1:]]
    norms += ["decoder.final_layernorm", *(f"mtp.layers.0.{norm}" for norm in ("enorm", "hnorm", "final_layernorm"))]
    assert objects[TE].keys() - objects[LOCAL].keys() == {f"{norm}._extra_state" for norm in norms}
    assert objects[LOCAL].keys() < objects[TE].keys()
    assert set(objects[TE].values()) == {0} and set(objects[LOCAL].values()) == {None}


def _one_of_each() -> dict[str, str]:
    return {LOCAL: f"{LOCAL} trained", TE: f"{TE} from hf"}


def test_both_specs_have_the_parameters_of_the_mapping(made, config):
    """The same number, by arithmetic on shapes; and the same names, but for those that fused and grouped modules
    give.
    """
    parameters = {spec: made[model]["trainable"] for spec, model in _one_of_each().items()}
    assert {local_name(name) for name in parameters[TE]} == parameters[LOCAL]
    expected = sum(
        math.prod(shape) for key, shape in distributed_shapes(config).items() if not key.endswith("expert_bias")
    )
    for spec, model in _one_of_each().items():
        assert sum(made[model]["tensors"][name].numel() for name in parameters[spec]) == expected


def test_what_the_local_spec_saved_transformer_engine_loads(made):
    """By the trainer's own --load and its default strictness: every tensor, and the optimizer's state, in the module
    where it belongs.
    """
    saved, loaded = made[f"{LOCAL} trained"], made[f"{TE} from local"]
    assert_same({local_name(name): tensor for name, tensor in loaded["tensors"].items()}, saved["tensors"])
    assert saved["optimizer"].keys() == {local_name(name) for name in loaded["optimizer"]}
    for name, states in loaded["optimizer"].items():
        assert states.keys() == {"param", "exp_avg", "exp_avg_sq"} and states["exp_avg"].any()
        assert_same(states, saved["optimizer"][local_name(name)])


def test_what_transformer_engine_saved_the_local_spec_loads(made):
    """Through both: what the local spec saved at first comes back unchanged."""
    saved, loaded = made[f"{LOCAL} trained"], made[f"{LOCAL} from te"]
    assert_same(loaded["tensors"], saved["tensors"])
    assert loaded["optimizer"].keys() == saved["optimizer"].keys()
    for name, states in loaded["optimizer"].items():
        assert_same(states, saved["optimizer"][name])


@pytest.mark.parametrize("spec", SPECS)
def test_loading_says_nothing_of_keys(made, spec):
    """Megatron answers a strict load that fails by a lax one, and each rank prints the names of what was missing:
    thousands, in a large model.
    """
    assert "successfully loaded checkpoint" in made[f"{spec} log"]
    assert "load_return" not in made[f"{spec} log"] and "Unexpected keys" not in made[f"{spec} log"]


def test_only_recipes_that_keep_a_state_store_one(made):
    """FP8's delayed scaling resumes from the history in `_extra_state`; block scaling has none to keep."""
    linear = "decoder.layers.1.self_attention.linear_proj"
    keys = {recipe: {shard["key"] for shard in made[f"{TE} {recipe}"]} for recipe in ("delayed", "blockwise")}
    assert {f"{linear}.weight", f"{linear}._extra_state"} <= keys["delayed"]
    assert keys["blockwise"] == {key for key in keys["delayed"] if not key.endswith("._extra_state")}


def test_the_adapter_fills_and_reads_transformer_engines_model(made, hf_folder):
    """load_into and gather_from of the tests, on grouped experts and fused norms: every bit of the
    files comes back.
    """
    files = {name: tensor for file in hf_folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert_same(made[f"{TE} from hf"]["hf"], files)
    assert_same(made[f"{TE} from local"]["hf"], made[f"{LOCAL} trained"]["hf"])


@pytest.mark.parametrize("model", [f"{LOCAL} trained", f"{TE} from hf"])
def test_a_lost_weight_is_missed(made, model):
    """`load_state_dict` without any `_extra_state` and one weight misses the weight and nothing else: the tolerance is
    for `_extra_state` alone.
    """
    assert made[model]["missed"] == ["mtp.layers.0.enorm.weight"]


def test_the_te_spec_is_transformer_engines_with_our_router(made):
    """Attention, norms and grouped experts are Transformer Engine's; the router is ours in every MoE layer, that of
    multi-token prediction too.
    """
    modules = made[f"{TE} from hf"]["modules"]
    extensions = "megatron.core.extensions.transformer_engine"
    for layer in MOE_LAYERS:
        assert modules[f"{layer}.mlp.router"] == "hymeg.models.router.Router"
        assert modules[f"{layer}.self_attention.core_attention"] == f"{extensions}.TEDotProductAttention"
        assert modules[f"{layer}.mlp.experts.linear_fc1"] == f"{extensions}.TEColumnParallelGroupedLinear"
        assert modules[f"{layer}.pre_mlp_layernorm"] == "transformer_engine.pytorch.module.rmsnorm.RMSNorm"
    assert [name for name, kind in modules.items() if kind.endswith("Router")] == [
        f"{layer}.mlp.router" for layer in MOE_LAYERS
    ]


def test_te_experts_are_reduced_over_their_own_group(made):
    """Exactly the grouped experts' weights carry `allreduce = False`, although EP is 1."""
    expected = {
        f"{layer}.mlp.experts.linear_{fc}.weight{expert}"
        for layer in MOE_LAYERS
        for fc in ("fc1", "fc2")
        for expert in range(8)
    }
    assert made[f"{TE} from hf"]["not_allreduced"] == expected


def test_the_te_specs_head_computes_fp32_logits(made):
    """config.json says enable_lm_head_fp32, and the weights are bf16."""
    head = made[f"{TE} from hf"]["head"]
    assert head["weight"].dtype == torch.bfloat16
    exact = head["hidden"].double() @ head["weight"].double().T
    assert (head["logits"] - exact).abs().max() < 1e-5 < (exact.bfloat16() - exact).abs().max()


def test_mtp_is_frozen_under_the_te_spec_when_its_loss_does_not_count(made):
    """--mtp-loss-scaling-factor 0: the multi-token-prediction layer keeps its weights, everything else trains."""
    every, trainable = made[f"{TE} from hf"]["trainable"], made[f"{TE} frozen"]["trainable"]
    assert every - trainable == {name for name in every if name.startswith("mtp.")} != set()
