"""What the planner says of memory is what is: parameters, buffers and shards as Megatron builds them, activations as
autograd saves them.
"""

import dataclasses
import operator

import exact_memory
import pytest
import torch
from construction import quiet
from exact_memory import ExactSettings
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.training.arguments import validate_args
from published_models import PUBLISHED
from single_process import NEEDED, ensure_world

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.hf.config import HyConfig
from hymeg.models import linear_cross_entropy
from hymeg.models.hy import construct
from hymeg.planning import activations
from hymeg.planning.activations import Activations
from hymeg.planning.layout import Layout
from hymeg.planning.memory import GIB, Device, StageMemory, host_memory, memory_by_stage, optimizer_bytes
from hymeg.planning.parameters import optimizer_ranks
from hymeg.planning.settings import Settings, settings_of
from hymeg.planning.stages import Chunk, micro_batches_held, stages
from hymeg.training.arguments import parse
from hymeg.training.preflight import layout_of
from hymeg.training.run import model_config_from_args

HY3 = HyConfig.from_dict(
    TINY_CONFIG | PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1, "max_position_embeddings": 262144}
)
HY_MT2 = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy-MT2-30B-A3B"] | {"max_position_embeddings": 262144})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_mtp": False},
        {"use_distributed_optimizer": False},
        {"grads_in_fp32": False, "use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"},
        {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.parametrize(
    "sizes",
    [
        {"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 2, "expert_model_parallel_size": 8},
        {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4, "expert_tensor_parallel_size": 2},
        {"expert_model_parallel_size": 16, "context_parallel_size": 2, "num_distributed_optimizer_instances": 4},
    ],
    ids=("EP8", "TP4-ETP2", "instances"),
)
def test_what_a_rank_keeps_is_what_megatron_allocates_but_for_padding(sizes, changes):
    layout = Layout(256, 4096, 1024, **sizes)
    for rank in range(layout.pipeline_model_parallel_size):
        exact = exact_memory.static_memory(HY3, layout, ExactSettings(**changes), rank)
        found = memory_by_stage(HY3, layout, Settings(**changes), 1.0)[rank]
        for part in ("weights", "gradients", "optimizer", "buffers"):
            assert getattr(found, part) == pytest.approx(getattr(exact, part), rel=1e-4)


def test_a_stage_needs_the_sum_of_its_parts():
    memory = StageMemory(1, 2, 4, 8, 16, 32)
    assert (memory.static, memory.total) == (1 + 2 + 4 + 8, 63)


def test_the_largest_operation_of_a_stage_of_multi_token_prediction_is_that_of_a_mixture_of_experts():
    sizes = Activations(dataclasses.replace(HY3, vocab_size=1024), Layout(1, 4096, 1), Settings())
    of_experts = sizes.working(Chunk((True,), 0, False, False, False))
    assert sizes.working(Chunk((), 1, False, False, False)) == of_experts
    assert sizes.working(Chunk((False,), 0, False, False, False)) < of_experts


def test_ranks_that_share_the_optimizer():
    """64 GPUs, TP4 and PP2: eight of data parallelism; EP4 and ETP2: four hold the same experts."""
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    layout = Layout(64, 4096, 64, **sizes, expert_model_parallel_size=4, expert_tensor_parallel_size=2)
    assert optimizer_ranks(layout) == (8, 4)
    assert optimizer_ranks(dataclasses.replace(layout, num_distributed_optimizer_instances=2)) == (4, 2)


def test_optimizer_instances_keep_a_copy_each():
    """Two instances share the ranks: every rank's part of the state is twice as large."""
    layout = Layout(64, 4096, 64, expert_model_parallel_size=8)
    one, two = (
        memory_by_stage(HY_MT2, dataclasses.replace(layout, num_distributed_optimizer_instances=n), Settings(), 1.0)[0]
        for n in (1, 2)
    )
    assert two.optimizer == pytest.approx(2 * one.optimizer) and two.weights == one.weights


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
        _measured(args, config, batch, seq_length), rel=0.001
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
        model(tokens, positions, None, labels=tokens.clone(), loss_mask=torch.ones(batch, seq_length)).sum()
    return sum(storage.nbytes() for storage in saved.values())


def test_the_heads_slices_are_those_of_the_model():
    assert activations.SLICE_ELEMENTS["local"] == linear_cross_entropy.SLICE_ELEMENTS


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
    ("implementation", "module"),
    [
        (implementation, module)
        for implementation in ("transformer_engine", "local")
        for module in ("moe_act", "layernorm", "shared_experts", "moe", "mlp", "core_attn")
        if (implementation, module) != ("local", "layernorm")  # whose norm's output cannot be made again
    ],
)
def test_recomputation_saves_memory(implementation, module):
    layout = Layout(8, 4096, 8, expert_model_parallel_size=8)
    plain = Activations(HY_MT2, layout, Settings(transformer_impl=implementation))
    less = Activations(
        HY_MT2,
        layout,
        Settings(transformer_impl=implementation, recompute_granularity="selective", recompute_modules=(module,)),
    )
    assert less.layer(True) + less.layer(False) < plain.layer(True) + plain.layer(False)


def test_parallelism_divides_what_it_cuts():
    def layer(**sizes) -> float:
        return Activations(HY3, Layout(64, 8192, 64, **sizes), Settings()).layer(True)

    whole = layer()
    assert layer(context_parallel_size=2) == pytest.approx(whole / 2, rel=1e-9)
    # Sequence parallelism and the experts' own cut leave nothing whole.
    assert layer(tensor_model_parallel_size=4) == pytest.approx(whole / 4, rel=1e-3)
    assert layer(micro_batch_size=2) == pytest.approx(whole * 2)


def test_imbalance_only_counts_where_tokens_can_go_to_another_rank():
    """One expert-parallel rank has exactly its own tokens, k copies of each, however they are routed."""
    alone, spread = (Layout(64, 8192, 64, expert_model_parallel_size=ep) for ep in (1, 8))
    assert Activations(HY3, alone, Settings(), 1.5).expert_tokens == 8192 * 8
    assert Activations(HY3, alone, Settings(), 1.5).layer(True) == Activations(HY3, alone, Settings()).layer(True)
    assert Activations(HY3, spread, Settings(), 1.5).expert_tokens == 8192 * 8 * 1.5


# ---- what one operation needs for a moment, on Hy-MT2's shape, each tensor by hand

MOE_LAYERS, DENSE_LAYER = Chunk((True,) * 3, 0, False, False, False), Chunk((False,), 0, False, False, False)
HEAD = Chunk((), 0, False, True, True)
EIGHT_EXPERT_RANKS = Layout(8, 4096, 8, expert_model_parallel_size=8)


def working(chunk: Chunk, layout: Layout = EIGHT_EXPERT_RANKS, **changes) -> float:
    return Activations(HY_MT2, layout, Settings(**changes)).working(chunk)


def test_a_moe_layers_backward_pass_holds_the_gradients_of_permuted_tokens_and_activation():
    """bf16, of 4,096 tokens 8 copies: as they came and as they left (2,048), activation and its two inputs (768)."""
    assert working(MOE_LAYERS) == 4096 * 8 * 2 * (2048 + 2048 + 3 * 768)
    assert working(DENSE_LAYER) == 4096 * 2 * 3 * 6912


def test_a_recomputed_layer_lies_there_as_a_whole_while_it_goes_back():
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    layer = Activations(HY_MT2, EIGHT_EXPERT_RANKS, Settings()).layer(is_moe=True)
    assert working(MOE_LAYERS, **full) == working(MOE_LAYERS) + 2 * layer
    moe = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}
    routing, experts, shared = 12 * 128 + 20 * 8 + 4, 8 * (2 * (2048 + 3 * 768) + 4), 2 * 3 * 768
    assert working(MOE_LAYERS, **moe) == working(MOE_LAYERS) + 4096 * (routing + experts + shared)


def test_the_head_holds_two_slices_of_fp32_logits_and_its_gradients():
    """The weight's gradient in bf16, the input's in fp32; cut by tensor parallelism, but for the input's."""
    for tp in (1, 2):
        layout = Layout(8, 4096, 8, tensor_model_parallel_size=tp)
        slices = 2 * 256 * 2**20
        assert working(HEAD, layout) == slices + 2 * 2048 * 120832 / tp + 4 * 2048 * 4096
    fused = working(HEAD, cross_entropy_loss_fusion=True)
    assert fused == working(HEAD) + 2 * 4096 * 120832


def test_the_embeddings_gradient_counts():
    assert working(Chunk((), 0, True, False, False)) == 2 * 2048 * 120832


# ---- micro-batches in flight


def test_what_a_schedule_holds_follows_overlap_and_group():
    """Hy-MT2 over 8 stages of 2: 23 chunk-micro-batches; 24 with the experts' all-to-all hidden, 31 in groups of 16."""
    layout = Layout(
        64,
        4096,
        512,
        pipeline_model_parallel_size=8,
        virtual_pipeline_model_parallel_size=2,
        expert_model_parallel_size=8,
    )
    of_a_chunk = Activations(HY_MT2, layout, Settings()).layer(True) * 3

    def held(layout: Layout, **changes) -> float:
        return memory_by_stage(HY_MT2, layout, Settings(**changes), 1.0)[1].activations / of_a_chunk

    # Stage 1 is stage 0's schedule two forward passes shorter, and all its layers are alike.
    assert held(layout) == pytest.approx(21, rel=1e-6)
    assert held(layout, overlap_moe_expert_parallel_comm=True) == pytest.approx(22, rel=1e-6)
    assert held(dataclasses.replace(layout, microbatch_group_size_per_vp_stage=16)) == pytest.approx(29, rel=1e-6)


def test_a_stage_of_unlike_virtual_stages_holds_the_most_that_its_schedule_comes_to():
    """The last rank's second virtual stage has the head and no layer: what counts is the most of the first."""
    sizes = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 8}
    layout = Layout(16, 4096, 64, **sizes, pipeline_model_parallel_layout="Et*16|t*16|t*16|L")
    activations, (_, chunks) = Activations(HY_MT2, layout, Settings()), stages(HY_MT2, layout)
    saved = [activations.saved(chunk) for chunk in chunks]
    held = [sum(map(operator.mul, saved, counts)) for counts in micro_batches_held(1, 2, 2, layout.num_microbatches)]
    assert len(held) > 1 and min(held) < max(held)
    assert memory_by_stage(HY_MT2, layout, Settings(), 1.0)[1].activations == round(max(held))


# ---- a node's memory at a save and a load


def host(config: HyConfig, layout: Layout, **changes):
    return host_memory(config, layout, Settings(**changes), 8)


PLAIN_CHECKPOINT = {"distrib_optim_fully_reshardable_mem_efficient": False}


def test_a_save_takes_what_was_measured():
    """A run of the tiny Hy-MT2 in two processes, two of expert parallelism, bf16: the bytes of the tensors that
    Megatron's get_parameter_state_dp_zero returned on each, dense parameters and experts.
    """
    dense, expert = 3_103_488, 884_736
    config, layout = HyConfig.from_dict(TINY_CONFIG), Layout(2, 64, 2, expert_model_parallel_size=2)
    assert host(config, layout, **PLAIN_CHECKPOINT).save == pytest.approx(2 * (dense + expert), rel=2e-3)
    # Memory-efficient: the second process gathered no dense parameter, and has experts of its own.
    assert host(config, layout).save == pytest.approx(dense + 2 * expert, rel=2e-3)


def test_a_checkpoint_asks_for_twelve_bytes_an_element_where_its_format_gathers():
    """Hy-MT2 over 16 GPUs, two of tensor parallelism, eight of experts: two nodes of one stage. Elements of a rank by
    division of the published count: 30.3e9 - what is no expert, by eight.
    """
    layout = Layout(16, 4096, 64, tensor_model_parallel_size=2, expert_model_parallel_size=8)
    dense, expert = _elements(layout)
    plain, lean = host(HY_MT2, layout, **PLAIN_CHECKPOINT), host(HY_MT2, layout)
    everywhere = 8 * 12 * (dense + expert)
    assert plain.save == plain.load == lean.load == pytest.approx(everywhere, rel=1e-6)
    # Only the first of the data-parallel ranks gathers: of dense parameters the first two ranks, of experts eight.
    assert lean.save == pytest.approx(12 * (2 * dense + 8 * expert), rel=1e-6)
    assert plain.gpu_at_save == pytest.approx(4 * expert * 1.5, rel=1e-6) and lean.gpu_at_save == 0
    cut = dataclasses.replace(layout, expert_model_parallel_size=4, expert_tensor_parallel_size=2)
    assert _elements(cut) == (dense, expert) and host(HY_MT2, cut).save == lean.save
    own = host(HY_MT2, layout, dist_ckpt_optim_fully_reshardable=False)
    assert own.save == own.load == pytest.approx(8 * 12 * (dense / 8 + expert / 2), rel=1e-6)
    half = host(HY_MT2, layout, optimizer_cpu_offload=True, optimizer_offload_fraction=0.5)
    assert half.offloaded == pytest.approx(8 * 8 * (dense / 8 + expert / 2), rel=1e-6)
    assert half.most == pytest.approx(half.load + half.offloaded) and plain.offloaded == 0


def _elements(layout: Layout) -> tuple[float, float]:
    exact = exact_memory.chunk_parameters(HY_MT2, layout, ExactSettings(), stages(HY_MT2, layout)[0][0])
    return tuple(sum(one.numel for one in exact if one.is_expert == kind) for kind in (False, True))


def test_a_node_of_several_stages_holds_them_all():
    """Four stages in one node: each of its ranks gathers its own stage's part."""
    layout = Layout(8, 4096, 64, pipeline_model_parallel_size=4)
    one = Layout(2, 4096, 64)
    assert host(HY_MT2, layout, **PLAIN_CHECKPOINT).save == pytest.approx(host(HY_MT2, one, **PLAIN_CHECKPOINT).save)
    # Two optimizer instances gather twice.
    twice = Layout(16, 4096, 64, expert_model_parallel_size=2, num_distributed_optimizer_instances=4)
    once = dataclasses.replace(twice, num_distributed_optimizer_instances=1)
    dense, expert = _elements(twice)
    assert host(HY_MT2, once).save == pytest.approx(12 * (dense + 2 * expert), rel=1e-6)
    assert host(HY_MT2, twice).save == pytest.approx(12 * (2 * dense + 4 * expert), rel=1e-6)


# ---- peers: what others ran, and what does not fit


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
    static = memory_by_stage(HY_MT2, eight, Settings(), 1.0)[0]
    assert static.static / 1e9 == pytest.approx(76, abs=1)
    assert total(HY_MT2, eight) > 1.25 * USABLE
    assert USABLE - total(HY_MT2, eight, **full) < 1  # routing balanced to the last token, and nothing to spare
    layout = Layout(32, 4096, 64, pipeline_model_parallel_size=4, expert_model_parallel_size=8)
    assert total(HY3, layout, **full) > 2 * USABLE
    # 61 GB at EP8 PP8 on 128, by division of all parameters.
    layout = Layout(128, 4096, 128, pipeline_model_parallel_size=8, expert_model_parallel_size=8)
    middle = memory_by_stage(dataclasses.replace(HY3, num_nextn_predict_layers=0), layout, Settings(), 1.0)[3]
    assert middle.static / 1e9 == pytest.approx(61, abs=1.5)
