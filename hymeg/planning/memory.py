"""The memory of every pipeline stage by part: exact for what a rank keeps all the time, by formula (`activations`) for
what a step needs.
"""

import dataclasses
from typing import NamedTuple

from hymeg.hf.config import HyConfig
from hymeg.planning.activations import Activations
from hymeg.planning.layout import Layout
from hymeg.planning.parameters import (
    Buffer,
    buffers_of_chunk,
    chunk_numel,
    chunk_parameters,
    dense_ranks,
    expert_ranks,
    shard_numel,
)
from hymeg.planning.settings import Settings
from hymeg.planning.stages import Chunk, micro_batches_held, stages

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class StageMemory(NamedTuple):
    """Bytes of a rank of one pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int  # the router's counts and biases
    activations: int  # saved for the backward pass, of all micro-batches in flight
    working: int  # what the largest single operation needs beside that

    @property
    def static(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> int:
        return self.static + self.activations + self.working


def optimizer_bytes(settings: Settings) -> float:
    """Bytes on the device for each element whose state a rank keeps.

    fp32 training: two moments. bf16: an fp32 master copy and two moments (distrib_optimizer.py:347). Precision-aware:
    the moments in their dtypes, and of the master copy the 16 bits that the bf16 weight lacks (Transformer Engine's
    FusedAdam, store_param_remainders; lossless), or an fp16 copy. Offloaded: nothing of the offloaded fraction, and the
    rest in fp32 (hybrid_optimizer.py, param_update_in_fp32).
    """
    if settings.optimizer_cpu_offload:
        return 12 * (1 - settings.optimizer_offload_fraction)
    if not settings.use_precision_aware_optimizer:
        return 12 if settings.bf16 else 8
    return (2 if settings.bf16 else 4) + BYTES[settings.exp_avg_dtype] + BYTES[settings.exp_avg_sq_dtype]


def static_memory(
    config: HyConfig, layout: Layout, settings: Settings, pipeline_rank: int, ranks: tuple[int, int] = (0, 0)
) -> StageMemory:
    """What a rank of the stage keeps all the time; activations are 0.

    Args:
        ranks: its place among the ranks that share the optimizer of the dense parameters, and of the experts. The first
            keep the most: padding lies
        at
            the end.
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


def _kept(buffer: Buffer, settings: Settings, rank: int) -> int:
    if not settings.use_distributed_optimizer:
        return buffer.numel
    return shard_numel(buffer, rank)


def unpadded_memory(config: HyConfig, layout: Layout, settings: Settings, pipeline_rank: int) -> StageMemory:
    """`static_memory` without what pads buffers, some kilobytes a bucket: fast enough for a search."""
    weights = gradients = optimizer = 0.0
    element, gradient = (2 if settings.bf16 else 4), (4 if settings.grads_in_fp32 or not settings.bf16 else 2)
    shards = (dense_ranks(layout), expert_ranks(layout)) if settings.use_distributed_optimizer else (1, 1)
    buffers = 0
    for chunk in stages(config, layout)[pipeline_rank]:
        held = chunk_numel(config, layout, settings, chunk)
        trained = held if settings.train_mtp else chunk_numel(config, layout, settings, chunk, without_mtp=True)
        weights += element * sum(held)
        gradients += gradient * sum(trained)
        optimizer += optimizer_bytes(settings) * sum(
            numel / ranks for numel, ranks in zip(trained, shards, strict=True)
        )
        buffers += _router_bytes(config, chunk)
    return StageMemory(round(weights), round(gradients), round(optimizer), buffers, 0, 0)


def _router_bytes(config: HyConfig, chunk: Chunk) -> int:
    """Per MoE layer and expert: tokens counted for the log (int64), and with an expert bias that (fp32) and the counts
    behind it (fp32).
    """
    num_moe = sum(config.is_moe_layer(layer) for layer in chunk.layers) + chunk.num_mtp_layers
    return num_moe * config.num_experts * (8 + (8 if config.moe_router_enable_expert_bias else 0))


def memory_by_stage(
    config: HyConfig, layout: Layout, settings: Settings, imbalance: float, exact: bool = True
) -> tuple[StageMemory, ...]:
    """Static parts and activations of a rank of every pipeline stage.

    Args:
        imbalance: tokens of the busiest expert-parallel rank over the mean; 1.0 is perfect balance.
        exact: count the padding of buffers too.
    """
    activations = Activations(config, layout, settings, imbalance)
    pp = layout.pipeline_model_parallel_size
    found, known = [], {}
    for rank, chunks in enumerate(stages(config, layout)):
        held = micro_batches_held(rank, pp, len(chunks), layout.num_microbatches)
        kinds = tuple((sum(map(config.is_moe_layer, chunk.layers)), len(chunk.layers), *chunk[1:]) for chunk in chunks)
        key = kinds, rank == 0
        if key not in known:
            static = (static_memory if exact else unpadded_memory)(config, layout, settings, rank)
            working = max(activations.working(chunk) for chunk in chunks)
            known[key] = static._replace(working=round(working)), [activations.saved(chunk) for chunk in chunks]
        stage, saved = known[key]
        peak = max(sum(count * size for count, size in zip(counts, saved, strict=True)) for counts in held)
        found.append(stage._replace(activations=round(peak)))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU's memory: what its name promises, and what a run can have of it."""

    gpu_memory: float
    """GiB, as in the name: 80 for an H100, 141 for an H200."""

    @property
    def reserve(self) -> int:
        """Bytes that are not the run's: 3 GiB for driver, CUDA context, NCCL's buffers and the workspaces of cuBLAS and
        Transformer Engine, and 4 % for what the allocator cannot use. An assumption, not a measurement."""
        return round((3 + 0.04 * self.gpu_memory) * GIB)

    @property
    def usable(self) -> int:
        return round(self.gpu_memory * GIB) - self.reserve
