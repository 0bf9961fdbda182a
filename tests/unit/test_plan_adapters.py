"""What the planner says of adapters: parameters counted another way, and what a frozen base no longer needs."""

import dataclasses
import math

import pytest
from published_models import PUBLISHED

from hymeg.checkpoint.adapter_table import adapter_shapes
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.hf.config import HyConfig
from hymeg.planning.activations import Activations
from hymeg.planning.flops import forward_flops_by_part, packed_training_flops
from hymeg.planning.layout import Layout
from hymeg.planning.memory import Device, memory_by_stage
from hymeg.planning.network import HARDWARE
from hymeg.planning.parameters import chunk_numel, trained_numel
from hymeg.planning.report import adapter_lines
from hymeg.planning.search import Machine, Planner
from hymeg.planning.settings import Settings
from hymeg.planning.stages import stages

HY3 = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1})
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mtp.experts.up_proj")
ATTENTION = EVERY[:4]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 4096, 8),
        Layout(8, 4096, 8, pipeline_model_parallel_size=8, expert_tensor_parallel_size=1),
        Layout(64, 4096, 64, expert_model_parallel_size=64),
    ],
)
def test_the_ranks_of_one_copy_hold_every_adapter_once(layout):
    """Without tensor parallelism, which repeats the half that is not cut."""
    settings = Settings(lora_rank=8, lora_targets=EVERY)
    held = [trained_numel(HY3, layout, settings, chunk) for chunks in stages(HY3, layout) for chunk in chunks]
    dense, expert = (sum(of) for of in zip(*held, strict=True))
    wanted = {key: math.prod(shape) for key, shape in adapter_shapes(HY3, 8, EVERY).items()}
    routed = sum(numel for key, numel in wanted.items() if ".experts." in key)
    assert (dense, expert * layout.expert_model_parallel_size) == (sum(wanted.values()) - routed, routed)


def test_tensor_parallelism_cuts_the_half_that_lies_along_the_cut():
    settings, layout = Settings(lora_rank=8, lora_targets=("q_proj", "experts.down_proj")), Layout(8, 4096, 8)
    cut = dataclasses.replace(layout, tensor_model_parallel_size=4, expert_tensor_parallel_size=2)
    [[chunk]] = stages(HY3, layout)
    dense, expert = trained_numel(HY3, cut, settings, chunk)
    hidden, width = HY3.hidden_size, HY3.num_attention_heads * HY3.head_dim
    assert dense == 80 * 8 * (hidden + width // 4)
    assert expert == 79 * 192 * 8 * (HY3.moe_intermediate_size // 2 + hidden)


def test_the_base_has_weights_only():
    layout, settings = Layout(8, 4096, 8, expert_model_parallel_size=8), Settings()
    [[chunk]] = stages(HY3, layout)
    frozen = dataclasses.replace(settings, lora_rank=16, lora_targets=ATTENTION)
    ours = memory_by_stage(HY3, layout, frozen, 1.0)[0]
    adapters = sum(trained_numel(HY3, layout, frozen, chunk))
    assert ours.weights == 2 * (sum(chunk_numel(HY3, layout, settings, chunk)) + adapters)
    assert ours.gradients == 4 * adapters
    assert ours.optimizer == 12 * adapters / 8


def test_activations_are_kept_for_adapters_only():
    """By the difference that a target makes: its layer's input and what comes out of A."""
    layout = Layout(1, 1000, 1)

    def kept(*targets: str, **more) -> float:
        return Activations(HY3, layout, Settings(lora_rank=8, lora_targets=targets, **more)).layer(is_moe=True)

    hidden, expert, tokens = HY3.hidden_size, HY3.moe_intermediate_size, 1000
    chosen = HY3.num_experts_per_tok * tokens
    nothing = kept("mlp.gate_proj")
    assert kept("mlp.gate_proj", "experts.gate_proj") - nothing == 2 * chosen * (hidden + 8)
    assert kept("mlp.gate_proj", "experts.down_proj") - nothing == 2 * chosen * (expert + 8)
    assert kept("mlp.gate_proj", "q_proj", "v_proj") - nothing == 2 * tokens * (hidden + 2 * 8)
    assert kept("mlp.gate_proj", "o_proj") - nothing == 2 * tokens * 8  # attention keeps its output itself
    queries, local = HY3.num_attention_heads * HY3.head_dim, {"transformer_impl": "local"}  # a copy in another order
    assert kept("mlp.gate_proj", "o_proj", **local) - kept("mlp.gate_proj", **local) == 2 * tokens * (queries + 8)
    assert kept("q_proj", lora_dropout=0.1) - kept("q_proj") == 3 * tokens * hidden
    everything = Activations(HY3, layout, Settings()).layer(is_moe=True)
    inner = 7 * tokens + 3 * chosen
    assert kept(*EVERY) == pytest.approx(everything + 2 * 8 * inner)
    assert nothing == pytest.approx(everything - 2 * (tokens * (hidden + expert) + chosen * (hidden + expert)))


def test_frozen_weights_have_two_products_and_attention_three():
    parts = forward_flops_by_part(HY3, 4096, 4096**2)
    wanted = 2 * sum(parts.values()) + parts["attention_scores"]
    assert packed_training_flops(HY3, 4096, 4096**2, is_frozen=True) == pytest.approx(wanted)


def test_a_step_with_adapters_is_smaller_and_faster_and_says_by_how_much():
    layout = Layout(64, 8192, 64, pipeline_model_parallel_size=8, expert_model_parallel_size=8)
    planner = Planner(HY3, Machine(64, 8, Device(141), HARDWARE["H200"]), attended=512)
    whole = planner.plan(layout, Settings())
    ours = planner.plan(layout, Settings(lora_rank=8, lora_targets=EVERY[:7]))
    assert ours.peak < 0.8 * whole.peak
    assert 0.5 * whole.time.compute < ours.time.compute < 0.9 * whole.time.compute
    assert ours.time.optimizer < 0.1 * whole.time.optimizer
    said = "\n".join(adapter_lines(ours, planner))
    stage = whole.memory[ours.fullest]
    assert (
        f"gradients {ours.memory[ours.fullest].gradients / 2**30:.2f} GiB instead of {stage.gradients / 2**30:.2f}"
        in said
    )
    assert adapter_lines(whole, planner) == []
    assert memory_by_stage(HY3, layout, ours.settings, 1.2) == ours.memory
