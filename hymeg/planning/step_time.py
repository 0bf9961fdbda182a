"""How long a training step takes: a roofline over each stage's work with fixed efficiencies, and the communication that
cannot hide behind it.

An estimate to rank layouts by. docs/planning.md says where each constant comes from and how far the estimate is off
published figures.
"""

import collections
import dataclasses
import functools
from typing import NamedTuple

from hymeg.hf.config import HyConfig
from hymeg.planning.activations import Activations
from hymeg.planning.flops import packed_training_flops
from hymeg.planning.layout import Layout
from hymeg.planning.memory import optimizer_bytes, optimizer_shards
from hymeg.planning.network import Links, Machine, groups
from hymeg.planning.parameters import chunk_numel, layer_adapters, trained_numel
from hymeg.planning.settings import Settings
from hymeg.planning.stages import Chunk, stages

# Shares of the peak that a kernel reaches. Assumed, and checked against published runs (docs/planning.md).
GEMM, GROUPED_GEMM, ATTENTION, HBM, NVLINK, NETWORK = 0.70, 0.60, 0.50, 0.80, 0.75, 0.80
HALF_SPEED_TOKENS = 64
"""Tokens an expert at which a grouped GEMM reaches half of GROUPED_GEMM, unless its weights' traffic bounds it."""
TRAFFIC = 8
"""How often what a layer saves goes through memory in norms, RoPE, activations, permutations, both ways."""
LAYER_OVERHEAD = 1.5e-4
"""Seconds a layer and micro-batch, both ways: kernel launches, the synchronisation for an expert's number of tokens."""
STAGE_OVERHEAD = 4e-4
"""Seconds a virtual stage and micro-batch, both ways, in a pipeline: messages' latency and the waiting for them."""
OVERLAPPED_EXPERTS = 0.3
"""What stays visible of the all-to-all under --overlap-moe-expert-parallel-comm."""
CPU_ADAM = 1.2e9
"""Elements a second that a GPU's share of the host's cores updates when offloaded, PCIe transfers included."""


class StepTime(NamedTuple):
    """Seconds of one step unless a name says otherwise."""

    total: float
    compute: float  # of the busiest stage, recomputation included
    communication: float  # visible, of the busiest stage; without the two below
    bubble: float
    gradients: float  # visible reduction of gradients and gathering of parameters
    optimizer: float
    tokens_per_gpu: float  # a second
    tflops_per_gpu: float
    mfu: float

    @property
    def computing(self) -> float:
        """Seconds that follow the GPU's speed; the rest follows the links'. Stages that wait do so for both."""
        return self.compute + self.optimizer + self.bubble * self.compute / (self.compute + self.communication)


class _Work(NamedTuple):
    """Seconds of one micro-batch on one stage."""

    forward: float
    backward: float
    communication: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.communication


class StepModel:
    """
    Args:
        imbalance: tokens of the busiest expert-parallel rank over the mean.
        attended: tokens of the row that a token lies in, in the mean over tokens; None where a sample is one row.
    """

    def __init__(
        self,
        config: HyConfig,
        layout: Layout,
        settings: Settings,
        machine: Machine,
        imbalance: float,
        attended: float | None = None,
    ):
        self.config, self.layout, self.settings, hardware = config, layout, settings, machine.hardware
        self.links = Links(machine.gpus_per_node, hardware.nvlink * 1e9 * NVLINK, machine.network * 1e9 * NETWORK)
        self.groups = groups(layout)
        self.sizes = Activations(config, layout, settings, imbalance)
        # What flows through memory, whatever is kept.
        self.unspared = Activations(config, layout, dataclasses.replace(settings, recompute_modules=()), imbalance)
        self.attended = layout.seq_length if attended is None else attended
        self.peak, self.hbm = hardware.peak_tflops * 1e12, hardware.hbm * 1e9 * HBM
        self.is_frozen = settings.lora_rank is not None
        # Asked for stage by stage, and the same on all.
        self._layer = functools.cache(self._layer)
        self._layer_communication = functools.cache(self._layer_communication)

    def step(self) -> StepTime:
        pp, count, by_rank = self.layout.pp, self.layout.num_microbatches, stages(self.config, self.layout)
        works = [self._stage(chunks) for chunks in by_rank]
        work, chunks = max(zip(works, by_rank, strict=True), key=lambda one: one[0].total)
        idle = (pp - 1) / len(chunks) * sum(one.total for one in works) / pp
        gradients, optimizer = self._update(chunks, work)
        total = count * work.total + idle + gradients + optimizer
        tokens = self.layout.global_batch_size * self.layout.seq_length
        flops = packed_training_flops(self.config, tokens, tokens * self.attended, is_frozen=self.is_frozen)
        flops /= total * self.layout.world_size
        return StepTime(
            total,
            compute=(work.forward + work.backward) * count,
            communication=work.communication * count,
            bubble=idle,
            gradients=gradients,
            optimizer=optimizer,
            tokens_per_gpu=tokens / total / self.layout.world_size,
            tflops_per_gpu=flops / 1e12,
            mfu=flops / self.peak,
        )

    # ---- compute

    def _stage(self, chunks: tuple[Chunk, ...]) -> _Work:
        forward = backward = communication = 0.0
        for chunk in chunks:
            for is_moe, whole, count in self._kinds(chunk):
                once, moved = self._layer(is_moe), self._layer_communication(is_moe)
                repeated = self._repeated_share(is_moe, whole)
                forward += count * once
                backward += count * ((2 + repeated) * once - self._ungraded(is_moe) + LAYER_OVERHEAD)
                communication += count * moved * (1 + repeated / 2)
            heads = chunk.has_head + chunk.num_mtp_layers
            head = heads * self.head_flops() / (self.peak * GEMM)
            forward += head
            backward += STAGE_OVERHEAD if self.groups["pp"].size > 1 else 0.0
            backward += (2 - self.is_frozen + self.settings.hy_recompute_logits) * head
        # A message forward and one backward for each chunk, of which half overlaps.
        communication += 2 * len(chunks) * self.links.neighbour(self.groups["pp"], self.sizes.hidden()) / 2
        return _Work(forward, backward, communication)

    def _kinds(self, chunk: Chunk) -> list[tuple[bool, bool, int]]:
        """(is MoE, runs forward twice as a whole, how many) of the chunk's layers."""
        settings, again = self.settings, 0
        if settings.recompute_granularity == "full":
            is_uniform = settings.recompute_method == "uniform"
            again = len(chunk.layers) if is_uniform else min(settings.recompute_num_layers, len(chunk.layers))
        counts = collections.Counter((is_moe, number < again) for number, is_moe in enumerate(chunk.layers))
        counts[True, again > 0 and settings.recompute_method == "uniform"] += chunk.num_mtp_layers
        return [(*kind, count) for kind, count in counts.items() if count]

    def _repeated_share(self, is_moe: bool, whole: bool) -> float:
        """The share of a layer's forward pass that its backward pass runs again."""
        if whole:
            return 1.0
        recomputes, parts = self.sizes.recomputes, self.flops(is_moe)
        names = {
            "core_attn": ("scores",),
            "mlp": ("dense_mlp",),
            "shared_experts": ("shared_experts",),
            "moe": ("routed_experts", "shared_experts"),
        }
        again = {part for name, of in names.items() if recomputes[name] for part in of}
        share = sum(parts.get(part, 0.0) for part in again) / sum(parts.values())
        return share + 0.02 * (recomputes["moe_act"] + recomputes["layernorm"])  # no products, but traffic

    def flops(self, is_moe: bool) -> dict[str, float]:
        """Of one forward pass of a layer on this rank; over all ranks the sum is `hymeg.planning.flops`'."""
        sizes, hidden = self.sizes, self.config.hidden_size
        found = {
            "projections": 2 * sizes.tokens * hidden * (2 * sizes.q + 2 * sizes.kv),
            "scores": 2 * sizes.tokens * self.attended * sizes.q,
        }
        if not is_moe:
            return found | {"dense_mlp": 6 * sizes.tokens * hidden * sizes.dense}
        return found | {
            "shared_experts": 6 * sizes.tokens * hidden * sizes.shared,
            "router": 2 * sizes.shared_tokens * hidden * self.config.num_experts,
            "routed_experts": 6 * sizes.expert_tokens * hidden * sizes.expert,
        }

    def head_flops(self) -> float:
        return 2 * self.sizes.tokens * self.config.hidden_size * self.sizes.vocab

    def _layer(self, is_moe: bool) -> float:
        """Seconds of a forward pass: products at their efficiencies, a third of the memory traffic of both ways."""
        traffic = TRAFFIC * self.unspared.layer(is_moe) / 3 + self._adapter_traffic(is_moe)
        return sum(self._products(is_moe).values()) + traffic / self.hbm

    def _ungraded(self, is_moe: bool) -> float:
        """Seconds that frozen weights save in a layer's backward pass, in which they have no gradients."""
        if not self.is_frozen:
            return 0.0
        return sum(seconds for part, seconds in self._products(is_moe).items() if part != "scores")

    def _adapter_traffic(self, is_moe: bool) -> float:
        """Bytes that adapters read and write in a forward pass: their input, and their layer's output to add to. Thin
        as they are, this bounds their products."""
        total, sizes = 0.0, self.sizes
        for module in layer_adapters(self.config, self.settings.lora_targets, "sparse" if is_moe else "dense"):
            is_dense = module.num_experts is None
            tokens, cut = (sizes.tokens, self.layout.tp) if is_dense else (sizes.expert_tokens, self.layout.etp)
            total += tokens * sizes.a * (module.num_in + 2 * module.num_out) / cut
        return total

    def _products(self, is_moe: bool) -> dict[str, float]:
        """Seconds of a forward pass's products, by part; those of experts no less than it takes their weights to go
        through memory for one micro-batch: read forward and backward, gradients added to.
        """
        experts = self.config.num_experts / self.layout.ep
        per_expert = self.sizes.expert_tokens / experts
        shares = {"scores": ATTENTION, "routed_experts": GROUPED_GEMM * per_expert / (per_expert + HALF_SPEED_TOKENS)}
        products = {part: flops / (self.peak * shares.get(part, GEMM)) for part, flops in self.flops(is_moe).items()}
        if is_moe:
            gradient, passes = (0, 2) if self.is_frozen else (self.settings.gradient, 3)
            numel = experts * 3 * self.config.hidden_size * self.sizes.expert
            weights = numel * 2 * (self.sizes.a + gradient) / self.hbm
            products["routed_experts"] = max(products["routed_experts"], weights / passes)
        return products

    # ---- communication

    def _layer_communication(self, is_moe: bool) -> float:
        """Visible seconds of a layer's collectives, forward and backward."""
        sizes, links, group = self.sizes, self.links, self.groups
        row = sizes.a * self.config.hidden_size
        # Attention, and the MLP or the shared experts: gathered before and scattered after, forward and backward; and
        # the weight's gradient, if it has one, needs the input gathered again.
        seconds = links.ring(group["tp"], 2 * (5 - self.is_frozen) * sizes.tokens * row)
        if is_moe:
            seconds += links.ring(group["etp"], 4 * sizes.expert_tokens * row)
            experts = links.all_to_all(group["ep"], 4 * sizes.expert_tokens / self.layout.etp * row)
            seconds += experts * (OVERLAPPED_EXPERTS if self.settings.overlap_moe_expert_parallel_comm else 1)
        # Keys and values go round while attention works on those that are there.
        attention = 3 * self.flops(is_moe)["scores"] / (self.peak * ATTENTION)
        keys_and_values = 3 * 2 * sizes.a * sizes.kv * sizes.tokens * self.layout.cp
        return seconds + max(0.0, links.ring(group["cp"], keys_and_values) - attention)

    def _update(self, chunks: tuple[Chunk, ...], work: _Work) -> tuple[float, float]:
        """Visible seconds of gradients and parameters over the data-parallel ranks, and seconds of the optimizer."""
        settings = self.settings
        gradient, element = settings.gradient, settings.element
        of_chunk = trained_numel if self.is_frozen else chunk_numel
        counts = [of_chunk(self.config, self.layout, settings, chunk) for chunk in chunks]
        dense, expert = (sum(of) for of in zip(*counts, strict=True))
        reduce, gather = (
            self.links.ring(self.groups["dp"], dense * size) + self.links.ring(self.groups["edp"], expert * size)
            for size in (gradient, element)
        )
        # A step's last backward and first forward pass of one micro-batch hide them; buckets only exist on the first
        # stage, but stages wait for it.
        reduce = max(0.1 * reduce, reduce - work.backward) if settings.overlap_grad_reduce else reduce
        gather = max(0.1 * gather, gather - work.forward) if settings.overlap_param_gather else gather
        shards = optimizer_shards(self.layout, settings)
        kept = dense / shards[0] + expert / shards[1]
        traffic = 2 * optimizer_bytes(settings) + 2 * gradient + element
        optimizer = kept * traffic / self.hbm
        if settings.optimizer_cpu_offload:
            optimizer += kept * settings.optimizer_offload_fraction / CPU_ADAM
        return reduce + gather, optimizer
