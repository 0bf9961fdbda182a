"""The memory of every pipeline stage by part, and of a node's host: arithmetic for what is kept all the time, a formula
(`activations`) for what a step needs.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from hymeg.hf.config import HyConfig
from hymeg.planning.activations import Activations
from hymeg.planning.layout import Layout
from hymeg.planning.parameters import chunk_numel, optimizer_ranks, trained_numel
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


def optimizer_shards(layout: Layout, settings: Settings) -> tuple[int, int]:
    """Ranks that share the optimizer's state: of dense parameters, of experts."""
    return optimizer_ranks(layout) if settings.use_distributed_optimizer else (1, 1)


def _static(config: HyConfig, layout: Layout, settings: Settings, chunk: Chunk) -> tuple[float, ...]:
    """Bytes of weights, gradients, optimizer and buffers for one virtual stage. The router's buffers per MoE layer and
    expert: tokens counted for the log (int64), and with an expert bias that (fp32) and the counts behind it (fp32). DDP
    pads its buffers by some kilobytes a bucket, which are left out.
    """
    trained, shards = trained_numel(config, layout, settings, chunk), optimizer_shards(layout, settings)
    held = sum(chunk_numel(config, layout, settings, chunk)) + (sum(trained) if settings.lora_rank is not None else 0)
    own = sum(numel / ranks for numel, ranks in zip(trained, shards, strict=True))
    experts = (sum(chunk.layers) + chunk.num_mtp_layers) * config.num_experts
    buffers = experts * (16 if config.moe_router_enable_expert_bias else 8)
    return settings.element * held, settings.gradient * sum(trained), optimizer_bytes(settings) * own, buffers


@functools.lru_cache(maxsize=256)
def memory_by_stage(config: HyConfig, layout: Layout, settings: Settings, imbalance: float) -> tuple[StageMemory, ...]:
    """Of a rank of every pipeline stage.

    Args:
        imbalance: tokens of the busiest expert-parallel rank over the mean; 1.0 is perfect balance.
    """
    activations = Activations(config, layout, settings, imbalance)
    group, overlap = layout.microbatch_group_size_per_vp_stage, settings.overlap_moe_expert_parallel_comm
    kinds, ranks = _by_kind(stages(config, layout), layout.num_microbatches, group, overlap)
    static = [_static(config, layout, settings, kind) for kind in kinds]
    saved, working = [activations.saved(kind) for kind in kinds], [activations.working(kind) for kind in kinds]

    kept, most = {}, {}
    for own in {own for own, _ in ranks}:
        kept[own] = [round(sum(part)) for part in zip(*(static[kind] for kind in own), strict=True)]
        most[own] = round(max(working[kind] for kind in own))
    peaks = (round(max([math.sumprod(counts, saved) for counts in held])) for _, held in ranks)
    return tuple(StageMemory(*kept[own], peak, most[own]) for (own, _), peak in zip(ranks, peaks, strict=True))


@functools.lru_cache(maxsize=4096)
def _by_kind(
    ranks: tuple[tuple[Chunk, ...], ...], num_microbatches: int, group: int | None, overlap: bool
) -> tuple[tuple[Chunk, ...], list[tuple[tuple[int, ...], set[tuple[int, ...]]]]]:
    """The virtual stages that differ; and for every pipeline rank the kinds of its own, and how many micro-batches of
    each kind it may hold at once.
    """
    kinds, found = tuple(dict.fromkeys(chunk for chunks in ranks for chunk in chunks)), []
    for rank, chunks in enumerate(ranks):
        own, held = tuple(map(kinds.index, chunks)), set()
        for counts in micro_batches_held(rank, len(ranks), len(chunks), num_microbatches, group, overlap):
            by_kind = [0] * len(kinds)
            for kind, count in zip(own, counts, strict=True):
                by_kind[kind] += count
            held.add(tuple(by_kind))
        found.append((own, held))
    return kinds, found


class HostMemory(NamedTuple):
    """Bytes that the optimizer's state takes of the fullest node's host, and of a GPU while a checkpoint is written."""

    save: int
    load: int
    offloaded: int  # all the time, under --optimizer-cpu-offload
    gpu_at_save: int

    @property
    def most(self) -> int:
        return self.offloaded + max(self.save, self.load)


def host_memory(config: HyConfig, layout: Layout, settings: Settings, gpus_per_node: int) -> HostMemory:
    """Of the checkpoint formats of the distributed optimizer (distrib_optimizer.py, get_parameter_state_dp_zero and
    sharded_param_state_fully_reshardable).

    Fully reshardable: fp32 copies of weight and two moments of all that a rank's model holds, 12 bytes an element, not
    divided by data parallelism: on every rank as it loads, and as it saves; memory-efficient, only on the first rank
    of each data-parallel group as it saves. Otherwise a whole buffer is gathered on every GPU, 4 bytes an element: an
    upper bound on the first chunk of the first stage, which is cut into buckets. dp_reshardable: a rank's own shard.
    Offloaded (hybrid_optimizer.py): beside these three the gradient, 16 bytes.
    """
    shards, strides = optimizer_ranks(layout), (layout.tp, layout.ep * layout.etp)
    held = [[trained_numel(config, layout, settings, chunk) for chunk in chunks] for chunks in stages(config, layout)]
    whole = [tuple(map(sum, zip(*chunks, strict=True))) for chunks in held]
    shard = [sum(numel / ranks for numel, ranks in zip(of, shards, strict=True)) for of in whole]
    offloaded = 16 * settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 0.0
    is_gathered = settings.use_distributed_optimizer and settings.dist_ckpt_optim_fully_reshardable
    is_lean = settings.distrib_optim_fully_reshardable_mem_efficient

    def of_rank(rank: int) -> tuple[float, float, float]:
        """At a save, at a load, offloaded."""
        stage, place = divmod(rank, layout.world_size // layout.pp)  # in the order tp-cp-ep-dp
        kept = offloaded * (shard[stage] if settings.use_distributed_optimizer else sum(whole[stage]))
        if not is_gathered:
            return 12 * shard[stage], 12 * shard[stage], kept
        saves = [not is_lean or place // stride % ranks == 0 for stride, ranks in zip(strides, shards, strict=True)]
        return 12 * math.sumprod(whole[stage], saves), 12 * sum(whole[stage]), kept

    nodes = itertools.batched(map(of_rank, range(layout.world_size)), gpus_per_node)
    by_node = [[sum(parts) for parts in zip(*node, strict=True)] for node in nodes]
    gathered = 0.0
    if is_gathered and not is_lean:
        largest = [max(of) for of in zip(*(numel for chunks in held for numel in chunks), strict=True)]
        gathered = max(4 * numel * (1 + 1 / ranks) for numel, ranks in zip(largest, shards, strict=True))
    return HostMemory(*(round(max(parts)) for parts in zip(*by_node, strict=True)), round(gathered))


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
