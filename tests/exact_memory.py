"""The oracle of the planner's static memory: parameters in the order of Megatron's modules, DDP's buffers with their
padding, the optimizer's shards, to the element.

It is held equal to Megatron's own objects (`construction`) and to what real runs allocate (tests/distributed), and
`hymeg.planning.memory.memory_by_stage`, which leaves the padding out, is held to it.
"""

import argparse
import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hymeg.checkpoint.mapping import distributed_shapes
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout
from hymeg.planning.memory import StageMemory, optimizer_bytes
from hymeg.planning.parameters import EXPERT_CUT, NO_PARAMETER, TENSOR_CUT, cut_of, optimizer_ranks, padded_vocab_size
from hymeg.planning.settings import Settings, settings_of
from hymeg.planning.stages import Chunk, stages


@dataclasses.dataclass(frozen=True)
class ExactSettings(Settings):
    """With those that decide about padding only."""

    ddp_bucket_size: int | None = None
    ddp_num_buckets: int | None = None
    ddp_pad_buckets_for_high_nccl_busbw: bool = False


def exact_settings_of(args: argparse.Namespace) -> ExactSettings:
    """As `settings_of`."""
    added = {field.name for field in dataclasses.fields(ExactSettings)} - vars(settings_of(args)).keys()
    return ExactSettings(**vars(settings_of(args)), **{name: getattr(args, name) for name in added})


# The order of Megatron's modules. Transformer Engine's linear layers hold the norm before them; the local spec has it
# as a module of its own.
_LAYER = """
    linear_qkv.weight q_layernorm.weight k_layernorm.weight pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight
    mlp.linear_fc1.weight mlp.linear_fc2.weight router.weight experts.experts.linear_fc1.weight
    experts.experts.linear_fc2.weight shared_experts.linear_fc1.weight shared_experts.linear_fc2.weight
"""
_ORDER = {
    "transformer_engine": f"linear_proj.weight linear_qkv.layer_norm_weight {_LAYER}".split(),
    "local": f"linear_qkv.layer_norm_weight linear_proj.weight {_LAYER}".split(),
}


class Parameter(NamedTuple):
    """One of a rank's own."""

    numel: int
    is_expert: bool  # reduced over the expert-data-parallel group
    is_trained: bool = True
    is_shared_embedding: bool = (
        False  # the two copies of the embedding under multi-token prediction: each gets a bucket of its own
    )


@functools.lru_cache(maxsize=4096)
def layer_parameters(
    config: HyConfig, layer: str, vocab_rows: int, tp: int, ep: int, etp: int, implementation: str
) -> tuple[Parameter, ...]:
    """Those of one layer, or of the multi-token-prediction layer's own parts, or of one part of a stage.

    Args:
        layer: the prefix of its distributed keys, such as "decoder.layers.3." or "output_layer".
        vocab_rows: of embedding and head, with padding.
    """
    shapes = {key: shape for key, shape in _global_shapes(config, vocab_rows).items() if key.startswith(layer)}
    order = _ORDER[implementation]
    ordered = sorted(shapes, key=lambda key: next((i for i, end in enumerate(order) if key.endswith(end)), -1))
    found, experts = [], []
    for key in ordered:
        cut = cut_of(key)
        if cut == NO_PARAMETER:
            continue
        if cut == EXPERT_CUT:
            experts.append(Parameter(math.prod(shapes[key][1:]) // etp, True))
            if len(experts) == 2:
                found += _experts_in_order(experts, config.num_experts // ep, implementation)
            continue
        found.append(Parameter(math.prod(shapes[key]) // (tp if cut == TENSOR_CUT else 1), False))
    return tuple(found)


def _experts_in_order(one: list[Parameter], count: int, implementation: str) -> list[Parameter]:
    """The local spec has one module an expert; Transformer Engine's grouped layer has all of fc1, then all of fc2."""
    return one * count if implementation == "local" else [one[0]] * count + [one[1]] * count


@functools.lru_cache(maxsize=64)
def _global_shapes(config: HyConfig, vocab_rows: int) -> dict[str, tuple[int, ...]]:
    return distributed_shapes(config, vocab_rows)


def chunk_parameters(config: HyConfig, layout: Layout, settings: ExactSettings, chunk: Chunk) -> list[Parameter]:
    """What a rank holds of `chunk`, in the order of the model's modules."""
    sizes = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    vocab_rows = padded_vocab_size(config, layout, settings)

    def of(prefix: str) -> tuple[Parameter, ...]:
        return layer_parameters(config, prefix, vocab_rows, *sizes, settings.transformer_impl)

    found: list[Parameter] = []
    if chunk.has_embedding or chunk.num_mtp_layers:
        # Under multi-token prediction over a pipeline the embedding exists twice (language_module.py:265-284).
        shared = config.num_nextn_predict_layers > 0 and layout.pipeline_model_parallel_size > 1
        found += [parameter._replace(is_shared_embedding=shared) for parameter in of("embedding.")]
    for is_moe in chunk.layers:
        found += of(f"decoder.layers.{_like(config, is_moe)}.")
    if chunk.has_final_norm:
        found += of("decoder.final_layernorm")
    if chunk.num_mtp_layers:
        found += [parameter._replace(is_trained=settings.train_mtp) for parameter in _mtp(of) * chunk.num_mtp_layers]
    return found + list(of("output_layer.") if chunk.has_head else ())


def _mtp(of) -> list[Parameter]:
    prefix = "mtp.layers.0."
    around = [of(f"{prefix}{name}.") for name in ("enorm", "hnorm", "eh_proj")]
    return [
        *(parameter for part in around for parameter in part),
        *of(f"{prefix}transformer_layer."),
        *of(f"{prefix}final_layernorm."),
    ]


def _like(config: HyConfig, is_moe: bool) -> int:
    """The first layer of the kind: one entry of the cache for all of them."""
    return config.mlp_layer_types.index("sparse" if is_moe else "dense")


# ---- DDP's buffers and the optimizer's shards


class Buffer(NamedTuple):
    """DDP's buffer of one chunk's parameters of one kind, in elements."""

    numel: int  # with padding
    shards: tuple[tuple[int, int], ...]  # per bucket: its length, and how much of its end is padding
    parameter_ranges: tuple[tuple[int, int], ...]  # of every parameter, from the buffer's start
    num_ranks: int  # of its data-parallel group
    is_expert: bool


def buffer_of(
    parameters: Sequence[Parameter], settings: ExactSettings, num_ranks: int, bucket_size: int | None
) -> Buffer:
    """How Megatron lays parameters of one kind out: in reverse, and with the distributed optimizer each at a multiple
    of 64 elements and every bucket's end at one of lcm(ranks, 128), or of 65,536 too (distrib_optimizer.py:506,
    param_layout.py:23)."""
    sharded = settings.use_distributed_optimizer
    divisor = math.lcm(num_ranks, 128, 2**16 if settings.ddp_pad_buckets_for_high_nccl_busbw else 1)
    position = bucket_start = end = 0
    buckets, ranges = [], []

    def close() -> int:
        stop = _up(end, divisor) if sharded else end
        buckets.append((stop - bucket_start, stop - end))
        return stop

    for parameter in reversed(parameters):
        position = _up(position, 64) if sharded else position
        alone = sharded and parameter.is_shared_embedding
        if alone and position > bucket_start:
            end = position
            position = bucket_start = close()
        end = position + parameter.numel
        ranges.append((position, end))
        position = end
        if alone or (bucket_size is not None and end - bucket_start >= bucket_size):
            position = bucket_start = close()
    if position > bucket_start:
        close()
    return Buffer(
        sum(length for length, _ in buckets), tuple(buckets), tuple(ranges), num_ranks, parameters[0].is_expert
    )


def shard_numel(buffer: Buffer, rank: int) -> int:
    """Elements whose optimizer state rank `rank` of the group keeps: its part of every bucket, without padding
    (distrib_optimizer.py:134).
    """
    total = start = 0
    for length, _ in buffer.shards:
        low = start + rank * (length // buffer.num_ranks)
        high = low + length // buffer.num_ranks
        index = bisect.bisect_right(buffer.parameter_ranges, low, key=lambda stretch: stretch[1])
        while index < len(buffer.parameter_ranges) and buffer.parameter_ranges[index][0] < high:
            begin, stop = buffer.parameter_ranges[index]
            total += min(stop, high) - max(begin, low)
            index += 1
        start += length
    return total


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def buffers_of_chunk(
    config: HyConfig, layout: Layout, settings: ExactSettings, chunk: Chunk, pipeline_rank: int, virtual_stage: int
) -> Iterator[Buffer]:
    """The dense parameters' buffer and the experts', where there are any. Only the first chunk of the first stage is
    cut into buckets (training.py:1860)."""
    groups = dict(zip((False, True), optimizer_ranks(layout), strict=True))
    parameters = chunk_parameters(config, layout, settings, chunk)
    bucket_size = None
    if settings.overlap_grad_reduce and pipeline_rank == 0 and virtual_stage == 0:
        bucket_size = _bucket_size(config, layout, settings)
    for is_expert, num_ranks in groups.items():
        trained = [parameter for parameter in parameters if parameter.is_trained and parameter.is_expert == is_expert]
        if trained:
            yield buffer_of(trained, settings, num_ranks, bucket_size)


def _bucket_size(config: HyConfig, layout: Layout, settings: ExactSettings) -> int:
    """Elements (training.py:1552, resolve_ddp_bucket_size)."""
    if settings.ddp_num_buckets is not None:
        held = (chunk_parameters(config, layout, settings, chunk) for chunk in stages(config, layout)[0])
        return sum(parameter.numel for parameters in held for parameter in parameters) // settings.ddp_num_buckets
    over = layout.world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    return settings.ddp_bucket_size or max(40_000_000, 1_000_000 * over)


def static_memory(
    config: HyConfig, layout: Layout, settings: ExactSettings, pipeline_rank: int, ranks: tuple[int, int] = (0, 0)
) -> StageMemory:
    """What a rank of the stage keeps all the time; activations are 0.

    Args:
        ranks: its place among the ranks that share the optimizer of the dense parameters, and of the experts. The first
            keep the most: padding lies at the end.
    """
    weights = gradients = optimizer = buffers = 0
    element, gradient = (2 if settings.bf16 else 4), (4 if settings.grads_in_fp32 or not settings.bf16 else 2)
    for virtual_stage, chunk in enumerate(stages(config, layout)[pipeline_rank]):
        untrained = sum(
            parameter.numel
            for parameter in chunk_parameters(config, layout, settings, chunk)
            if not parameter.is_trained
        )
        weights += untrained * element
        for buffer in buffers_of_chunk(config, layout, settings, chunk, pipeline_rank, virtual_stage):
            weights += buffer.numel * element
            gradients += buffer.numel * gradient
            optimizer += round(_kept(buffer, settings, ranks[buffer.is_expert]) * optimizer_bytes(settings))
        buffers += _router_bytes(config, chunk)
    return StageMemory(weights, gradients, optimizer, buffers, 0, 0)


def _kept(buffer: Buffer, settings: ExactSettings, rank: int) -> int:
    if not settings.use_distributed_optimizer:
        return buffer.numel
    return shard_numel(buffer, rank)


def _router_bytes(config: HyConfig, chunk: Chunk) -> int:
    """Per MoE layer and expert: tokens counted for the log (int64), and with an expert bias that (fp32) and the counts
    behind it (fp32).
    """
    num_moe = sum(chunk.layers) + chunk.num_mtp_layers
    return num_moe * config.num_experts * (8 + (8 if config.moe_router_enable_expert_bias else 0))
