"""The parameters that a rank holds, in the order of Megatron's modules, and the bytes that they, their gradients and
the optimizer take.

Shapes come from the table of the converter (`hymeg.checkpoint.mapping`); here stands how a rank cuts them. Exact: tests
hold it equal to the real model, built on the meta device, and to what real runs allocate. How DDP pads its buffers is
read from megatron-core 0.19.2.
"""

import bisect
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hymeg.checkpoint.mapping import distributed_shapes
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout
from hymeg.planning.settings import Settings
from hymeg.planning.stages import ByValue, Chunk, stages

WHOLE, TENSOR_CUT, EXPERT_CUT, NO_PARAMETER = "whole", "tp", "ep x etp", "buffer"
_CUT = {  # the end of a distributed key -> how many ways a rank's share is cut
    "word_embeddings.weight": TENSOR_CUT,
    "output_layer.weight": TENSOR_CUT,
    "linear_qkv.weight": TENSOR_CUT,
    "linear_proj.weight": TENSOR_CUT,
    "eh_proj.weight": TENSOR_CUT,
    "mlp.linear_fc1.weight": TENSOR_CUT,
    "mlp.linear_fc2.weight": TENSOR_CUT,
    "shared_experts.linear_fc1.weight": TENSOR_CUT,
    "shared_experts.linear_fc2.weight": TENSOR_CUT,
    "experts.experts.linear_fc1.weight": EXPERT_CUT,
    "experts.experts.linear_fc2.weight": EXPERT_CUT,
    "expert_bias": NO_PARAMETER,
    "norm.weight": WHOLE,  # input_layernorm, q_layernorm, ...
    "layer_norm_weight": WHOLE,
    "router.weight": WHOLE,
}
# The order of Megatron's modules. Transformer Engine's linear layers hold the norm before them; the local spec has it
# as a module of its own.
_ORDER = {
    "transformer_engine": "linear_proj.weight linear_qkv.layer_norm_weight linear_qkv.weight q_layernorm.weight k_layernorm.weight "
    "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.weight mlp.linear_fc2.weight "
    "router.weight "
    "experts.experts.linear_fc1.weight experts.experts.linear_fc2.weight shared_experts.linear_fc1.weight "
    "shared_experts.linear_fc2.weight",
    "local": "linear_qkv.layer_norm_weight linear_proj.weight linear_qkv.weight q_layernorm.weight k_layernorm.weight pre_mlp_layernorm.weight "
    "mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.weight mlp.linear_fc2.weight router.weight "
    "experts.experts.linear_fc1.weight experts.experts.linear_fc2.weight shared_experts.linear_fc1.weight "
    "shared_experts.linear_fc2.weight",
}


class Parameter(NamedTuple):
    """One of a rank's own."""

    numel: int
    is_expert: bool  # reduced over the expert-data-parallel group
    is_trained: bool = True
    is_shared_embedding: bool = (
        False  # the two copies of the embedding under multi-token prediction: each gets a bucket of its own
    )


def padded_vocab_size(config: HyConfig, layout: Layout, settings: Settings) -> int:
    """Rows of embedding and head (megatron/training/vocab_utils.py): the next multiple of
    --make-vocab-size-divisible-by x TP.
    """
    multiple = settings.make_vocab_size_divisible_by * layout.tensor_model_parallel_size
    return -(-config.vocab_size // multiple) * multiple


@functools.lru_cache(maxsize=4096)
def layer_parameters(
    config_key: ByValue, layer: str, vocab_rows: int, tp: int, ep: int, etp: int, implementation: str
) -> tuple[Parameter, ...]:
    """Those of one layer, or of the multi-token-prediction layer's own parts, or of one part of a stage.

    Args:
        layer: the prefix of its distributed keys, such as "decoder.layers.3." or "output_layer".
        vocab_rows: of embedding and head, with padding.
    """
    config = config_key.config
    shapes = {key: shape for key, shape in _global_shapes(config_key, vocab_rows).items() if key.startswith(layer)}
    order = _ORDER[implementation].split()
    ordered = sorted(shapes, key=lambda key: next((i for i, end in enumerate(order) if key.endswith(end)), -1))
    found, experts = [], []
    for key in ordered:
        cut = _cut_of(key)
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


def _cut_of(key: str) -> str:
    return next(cut for end, cut in _CUT.items() if key.endswith(end))


@functools.lru_cache(maxsize=64)
def _global_shapes(config_key: ByValue, vocab_rows: int) -> dict[str, tuple[int, ...]]:
    return distributed_shapes(config_key.config, vocab_rows)


def chunk_parameters(config: HyConfig, layout: Layout, settings: Settings, chunk: Chunk) -> list[Parameter]:
    """What a rank holds of `chunk`, in the order of the model's modules."""
    sizes = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    key, vocab_rows = ByValue(config), padded_vocab_size(config, layout, settings)

    def of(prefix: str) -> tuple[Parameter, ...]:
        return layer_parameters(key, prefix, vocab_rows, *sizes, settings.transformer_impl)

    found: list[Parameter] = []
    if chunk.has_embedding or chunk.num_mtp_layers:
        # Under multi-token prediction over a pipeline the embedding exists twice (language_module.py:265-284).
        shared = config.num_nextn_predict_layers > 0 and layout.pipeline_model_parallel_size > 1
        found += [parameter._replace(is_shared_embedding=shared) for parameter in of("embedding.")]
    for layer in chunk.layers:
        found += of(f"decoder.layers.{_like(config, layer)}.")
    if chunk.has_final_norm:
        found += of("decoder.final_layernorm")
    if chunk.num_mtp_layers:
        found += [parameter._replace(is_trained=settings.train_mtp) for parameter in _mtp(of) * chunk.num_mtp_layers]
    return found + list(of("output_layer.") if chunk.has_head else ())


def chunk_numel(
    config: HyConfig, layout: Layout, settings: Settings, chunk: Chunk, without_mtp: bool = False
) -> tuple[int, int]:
    """Elements of what a rank holds of `chunk`: dense parameters, experts."""
    sizes = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    key, vocab_rows = ByValue(config), padded_vocab_size(config, layout, settings)
    kinds = [config.is_moe_layer(layer) for layer in chunk.layers]
    counts = {
        f"decoder.layers.{config.mlp_layer_types.index(name)}.": kinds.count(name == "sparse")
        for name in set(config.mlp_layer_types)
    }
    counts |= {
        "embedding.": chunk.has_embedding or chunk.num_mtp_layers > 0,
        "mtp.layers.0.": 0 if without_mtp else chunk.num_mtp_layers,
    }
    counts |= {"decoder.final_layernorm": chunk.has_final_norm, "output_layer.": chunk.has_head}
    total = [0, 0]
    for prefix, count in counts.items():
        if count:
            for is_expert, numel in enumerate(_numel(key, prefix, vocab_rows, *sizes)):
                total[is_expert] += count * numel
    return total[0], total[1]


@functools.lru_cache(maxsize=4096)
def _numel(*key) -> tuple[int, int]:
    parameters = layer_parameters(*key, "local")
    return tuple(
        sum(parameter.numel for parameter in parameters if parameter.is_expert == is_expert)
        for is_expert in (False, True)
    )


def _mtp(of) -> list[Parameter]:
    prefix = "mtp.layers.0."
    around = [of(f"{prefix}{name}.") for name in ("enorm", "hnorm", "eh_proj")]
    return [
        *(parameter for part in around for parameter in part),
        *of(f"{prefix}transformer_layer."),
        *of(f"{prefix}final_layernorm."),
    ]


def _like(config: HyConfig, layer: int) -> int:
    """The first layer of the same kind: one entry of the cache for all of them."""
    return config.mlp_layer_types.index(config.mlp_layer_types[layer])


# ---- DDP's buffers and the optimizer's shards


class Buffer(NamedTuple):
    """DDP's buffer of one chunk's parameters of one kind, in elements."""

    numel: int  # with padding
    shards: tuple[tuple[int, int], ...]  # per bucket: its length, and how much of its end is padding
    parameter_ranges: tuple[tuple[int, int], ...]  # of every parameter, from the buffer's start
    num_ranks: int  # of its data-parallel group
    is_expert: bool


def buffer_of(parameters: Sequence[Parameter], settings: Settings, num_ranks: int, bucket_size: int | None) -> Buffer:
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
    config: HyConfig, layout: Layout, settings: Settings, chunk: Chunk, pipeline_rank: int, virtual_stage: int
) -> Iterator[Buffer]:
    """The dense parameters' buffer and the experts', where there are any. Only the first chunk of the first stage is
    cut into buckets (training.py:1860)."""
    groups = {False: dense_ranks(layout), True: expert_ranks(layout)}
    parameters = chunk_parameters(config, layout, settings, chunk)
    bucket_size = None
    if settings.overlap_grad_reduce and pipeline_rank == 0 and virtual_stage == 0:
        bucket_size = _bucket_size(config, layout, settings)
    for is_expert, num_ranks in groups.items():
        trained = [parameter for parameter in parameters if parameter.is_trained and parameter.is_expert == is_expert]
        if trained:
            yield buffer_of(trained, settings, num_ranks, bucket_size)


def _bucket_size(config: HyConfig, layout: Layout, settings: Settings) -> int:
    """Elements (training.py:1552, resolve_ddp_bucket_size)."""
    if settings.ddp_num_buckets is not None:
        held = (chunk_parameters(config, layout, settings, chunk) for chunk in stages(config, layout)[0])
        return sum(parameter.numel for parameters in held for parameter in parameters) // settings.ddp_num_buckets
    over = layout.world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    return settings.ddp_bucket_size or max(40_000_000, 1_000_000 * over)


def dense_ranks(layout: Layout) -> int:
    """Ranks that share the optimizer of what is no expert: data x context parallel, of one optimizer instance."""
    over = layout.world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    return over // layout.num_distributed_optimizer_instances


def expert_ranks(layout: Layout) -> int:
    """Ranks that share the optimizer of an expert: expert-data parallel, of one optimizer instance."""
    product = (
        layout.expert_model_parallel_size * layout.expert_tensor_parallel_size * layout.pipeline_model_parallel_size
    )
    return layout.world_size // product // layout.num_distributed_optimizer_instances
