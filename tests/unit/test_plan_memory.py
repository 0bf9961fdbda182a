"""What the planner says of memory is what is: parameters, buffers and shards as Megatron builds them, activations as
autograd saves them.
"""

import dataclasses

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.training.arguments import validate_args
from published_models import PUBLISHED
from single_process import NEEDED, ensure_world

from hymeg.hf.config import HyConfig
from hymeg.hf.tiny_checkpoint import TINY_CONFIG
from hymeg.models import linear_cross_entropy
from hymeg.models.hy import construct
from hymeg.planning import activations
from hymeg.planning.activations import Activations
from hymeg.planning.construction import quiet
from hymeg.planning.layout import Layout
from hymeg.planning.memory import GIB, Device, memory_by_stage, optimizer_bytes, static_memory, unpadded_memory
from hymeg.planning.settings import Settings, settings_of
from hymeg.planning.stages import stages
from hymeg.training.arguments import parse
from hymeg.training.preflight import layout_of
from hymeg.training.run import model_config_from_args

HY3 = HyConfig.from_dict(
    TINY_CONFIG | PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1, "max_position_embeddings": 262144}
)
HY_MT2 = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy-MT2-30B-A3B"] | {"max_position_embeddings": 262144})


def test_without_padding_it_is_the_same_to_a_hundredth_of_a_percent():
    """The search counts without padding."""
    layout = Layout(
        256,
        4096,
        1024,
        pipeline_model_parallel_size=8,
        virtual_pipeline_model_parallel_size=2,
        expert_model_parallel_size=8,
    )
    for settings in (Settings(), Settings(train_mtp=False), Settings(use_distributed_optimizer=False)):
        for rank in range(8):
            exact, quick = static_memory(HY3, layout, settings, rank), unpadded_memory(HY3, layout, settings, rank)
            for part in ("weights", "gradients", "optimizer", "buffers"):
                assert getattr(quick, part) == pytest.approx(getattr(exact, part), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bf16": False}, 8),
        ({}, 4 + 4 + 4),
        ({"use_precision_aware_optimizer": True}, 2 + 4 + 4),
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 2 + 2 + 2),
        ({"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}, 0),
        ({"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25}, 9),
    ],
)
def test_bytes_of_the_optimizer_for_an_element(changes, expected):
    assert optimizer_bytes(dataclasses.replace(Settings(), **changes)) == expected


# ---- activations, measured

SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-method"
SMALL_VOCABULARY = {"vocab_size": 256}  # so that the head does not drown the layers
ACTIVATIONS = [  # changes of the tiny model, flags
    ({}, ""),
    ({}, "--bf16"),
    ({"enable_lm_head_fp32": False}, "--bf16"),
    ({}, "--bf16 --recompute-logits"),
    ({"num_experts": 32, "num_experts_per_tok": 4} | SMALL_VOCABULARY, "--bf16"),
    ({"hidden_size": 128, "head_dim": 32} | SMALL_VOCABULARY, "--bf16"),
    (
        {"num_shared_experts": 2, "moe_intermediate_size": 96, "expert_hidden_dim": 96, "intermediate_size": 320}
        | SMALL_VOCABULARY,
        "--bf16",
    ),
    ({"num_nextn_predict_layers": 1} | SMALL_VOCABULARY, ""),
    ({"num_nextn_predict_layers": 1} | SMALL_VOCABULARY, f"--bf16 {FULL} uniform --recompute-num-layers 1"),
    ({"num_nextn_predict_layers": 1} | SMALL_VOCABULARY, f"--bf16 {FULL} block --recompute-num-layers 2"),
    *((SMALL_VOCABULARY, f"{SELECTIVE} {names}") for names in ("core_attn", "mlp", "moe", "shared_experts")),
    *(
        (SMALL_VOCABULARY, f"--bf16 {SELECTIVE} {names}")
        for names in ("core_attn", "mlp", "moe", "shared_experts", "core_attn mlp shared_experts")
    ),
    *(
        (SMALL_VOCABULARY, f"--bf16 {FULL} {method} --recompute-num-layers {n}")
        for method, n in (("uniform", 1), ("uniform", 3), ("block", 1), ("block", 9))
    ),
]


@pytest.mark.parametrize(("seq_length", "batch"), [(64, 2), (96, 1)])
@pytest.mark.parametrize(
    ("changes", "flags"), ACTIVATIONS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_activations_are_what_autograd_saves(tmp_path, changes, flags, seq_length, batch):
    config = HyConfig.from_dict(TINY_CONFIG | changes)
    config.save(tmp_path)
    ensure_world()
    args, config = parse(
        [
            "--hf-model",
            str(tmp_path),
            "--seq-length",
            str(seq_length),
            "--micro-batch-size",
            str(batch),
            *NEEDED,
            *flags.split(),
        ]
    )
    layout, settings = layout_of(args), settings_of(args)
    ((chunk,),) = stages(config, layout)
    assert Activations(config, layout, settings).saved(chunk) == pytest.approx(
        _measured(args, config, batch, seq_length), rel=0.01
    )


def _measured(args, config, batch: int, seq_length: int) -> int:
    """Bytes of the storages that autograd holds after a forward pass, parameters and buffers left out, each counted
    once.
    """
    with quiet():
        validate_args(args)
    model = construct(model_config_from_args(args), ProcessGroupCollection.use_mpu_process_groups())
    model = Float16Module(model.config, model) if args.bf16 else model
    for module in model.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    kept = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() and storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, min(config.vocab_size, 256), (batch, seq_length))
    positions = torch.arange(seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, positions, None, labels=tokens, loss_mask=torch.ones(batch, seq_length)).sum()
    return sum(storage.nbytes() for storage in saved.values())


def test_the_heads_slices_are_those_of_the_model():
    assert activations.SLICE_ELEMENTS == linear_cross_entropy.SLICE_ELEMENTS


# ---- Transformer Engine's formula, against sums made another way


def test_a_layer_of_transformer_engine_by_its_tensors():
    """Hy-MT2's MoE layer on one GPU, tensor by tensor as docs/planning.md lists them."""
    layout = Layout(8, 4096, 8, expert_model_parallel_size=8)
    sizes = Activations(HY_MT2, layout, Settings())
    norms = (2048 * 2 + 4) + 2048 * 2 + (2048 * 2 + 4) + 2048 * 2
    attention = 2 * (4096 + 2 * 512) + 2 * 4096 + 4 * (32 + 4) + 2 * (4096 + 512) + 2 * 4096 + 4 * 32
    routing = 12 * 128 + 20 * 8 + 4
    experts = 8 * (2 * (2048 + 2 * 768 + 768) + 4)
    shared = 2 * 3 * 768
    assert sizes.layer(is_moe=True) == 4096 * (norms + attention + routing + experts + shared)


@pytest.mark.parametrize(
    "modules", [("moe_act",), ("layernorm",), ("shared_experts",), ("moe",), ("mlp",), ("core_attn",)]
)
@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
def test_recomputation_never_costs_memory(modules, implementation):
    layout = Layout(8, 4096, 8, expert_model_parallel_size=8)
    plain = Activations(HY_MT2, layout, Settings(transformer_impl=implementation))
    less = Activations(
        HY_MT2,
        layout,
        Settings(transformer_impl=implementation, recompute_granularity="selective", recompute_modules=modules),
    )
    assert less.layer(True) + less.layer(False) < plain.layer(True) + plain.layer(False) or (
        implementation,
        modules[0],
    ) == ("local", "layernorm")


def test_parallelism_divides_what_it_cuts():
    def layer(**sizes) -> float:
        return Activations(HY3, Layout(64, 8192, 64, **sizes), Settings()).layer(True)

    whole = layer()
    assert layer(context_parallel_size=2) == pytest.approx(whole / 2, rel=1e-9)
    # Sequence parallelism and the experts' own cut leave nothing whole.
    assert layer(tensor_model_parallel_size=4) == pytest.approx(whole / 4, rel=1e-3)
    assert layer(micro_batch_size=2) == pytest.approx(whole * 2)
    assert Activations(HY3, Layout(64, 8192, 64), Settings(), 1.5).layer(True) > whole


# ---- peers (FACTS, section 6: what others ran, and what does not fit)


def total(config: HyConfig, layout: Layout, **changes) -> float:
    return (
        max(stage.total for stage in memory_by_stage(config, layout, dataclasses.replace(Settings(), **changes), 1.0))
        / GIB
    )


QWEN3_30B = dataclasses.replace(
    HY_MT2, vocab_size=151936, num_shared_experts=0, mlp_layer_types=("sparse",) * 48, enable_lm_head_fp32=False
)
QWEN3_235B = dataclasses.replace(
    QWEN3_30B,
    hidden_size=4096,
    num_hidden_layers=94,
    num_attention_heads=64,
    moe_intermediate_size=1536,
    mlp_layer_types=("sparse",) * 94,
)
USABLE = Device(80).usable / GIB


def test_what_peers_run_fits():
    assert total(QWEN3_30B, Layout(16, 4096, 512, expert_model_parallel_size=16)) < USABLE
    split = "E" + "t*3|" * 30 + "t*2|t*2L"
    layout = Layout(256, 4096, 2048, 1, 2, 8, pipeline_model_parallel_layout=split, expert_model_parallel_size=32)
    assert total(QWEN3_235B, layout, use_precision_aware_optimizer=True) < USABLE


def test_what_does_not_fit_is_refused():
    """30B with EP8 on 8 GPUs of 80 GB takes 76 GB without activations; the publisher needed ZeRO-3 with offloading
    there, and on 32 for Hy3.
    """
    eight = Layout(8, 4096, 64, expert_model_parallel_size=8)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    static = static_memory(HY_MT2, eight, Settings(), 0)
    assert static.static / 1e9 == pytest.approx(76, abs=1)
    assert total(HY_MT2, eight) > 1.25 * USABLE
    assert USABLE - total(HY_MT2, eight, **full) < 1  # routing balanced to the last token, and nothing to spare
    layout = Layout(32, 4096, 64, pipeline_model_parallel_size=4, expert_model_parallel_size=8)
    assert total(HY3, layout, **full) > 2 * USABLE
    # 61 GB at EP8 PP8 on 128, by division of all parameters.
    layout = Layout(128, 4096, 128, pipeline_model_parallel_size=8, expert_model_parallel_size=8)
    middle = static_memory(dataclasses.replace(HY3, num_nextn_predict_layers=0), layout, Settings(), 3)
    assert middle.static / 1e9 == pytest.approx(61, abs=1.5)
