"""Every legal layout of a model on a number of GPUs, which of them fit, and in what order.

Legal is what `hymeg.planning.layout.check` accepts. For each layout the least recomputation that fits is taken; the
optimizer keeps fp32 numerics as long as any layout fits so, then bf16 gradients and moments are tried, then the
optimizer on the CPU.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout, check
from hymeg.planning.memory import GIB, Device, StageMemory, memory_by_stage
from hymeg.planning.network import Hardware
from hymeg.planning.settings import Settings
from hymeg.planning.splits import pipeline_splits
from hymeg.planning.stages import num_stages, stages
from hymeg.planning.step_time import StepModel, StepTime

_SELECTIVE = (
    ("moe_act",),
    ("moe_act", "layernorm"),
    ("moe_act", "layernorm", "shared_experts"),
    ("moe",),
    ("moe", "mlp"),
)
_PLAIN: dict[str, Any] = {}
_PRECISION_AWARE = {"use_precision_aware_optimizer": True}
OPTIMIZERS: tuple[tuple[dict[str, Any], ...], ...] = (
    (_PLAIN, _PRECISION_AWARE),  # both keep fp32 numerics
    (_PRECISION_AWARE | {"grads_in_fp32": False, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},),
    (_PRECISION_AWARE | {"optimizer_cpu_offload": True},),
)
"""Tried in this order: the next only where no layout fits with those before."""

NUM_REJECTED_TIMED = 200


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run is planned for."""

    num_gpus: int
    gpus_per_node: int
    device: Device
    hardware: Hardware
    network: float = 50.0
    """GB/s between nodes for each GPU."""


class Plan(NamedTuple):
    """A layout with what it takes. `time` is None for one that was rejected and not looked at closer."""

    layout: Layout
    settings: Settings
    memory: tuple[StageMemory, ...]  # of every pipeline rank
    time: StepTime | None

    @property
    def peak(self) -> int:
        """Bytes on the fullest GPU."""
        return max(stage.total for stage in self.memory)


class Found(NamedTuple):
    """Plans that fit, best first; and of those that do not, the fastest by estimate, or the smallest where nothing
    fits.
    """

    fitting: list[Plan]
    rejected: list[Plan]
    num_legal: int
    num_fitting: int


class Planner:
    """Plans for one model, machine and batch.

    Args:
        imbalance: tokens of the busiest expert-parallel rank over the mean.
        experts_across_nodes: let EP x ETP exceed a node's GPUs.
    """

    def __init__(self, config: HyConfig, machine: Machine, imbalance: float = 1.2, experts_across_nodes: bool = False):
        self.config, self.machine, self.imbalance, self.experts_across_nodes = (
            config,
            machine,
            imbalance,
            experts_across_nodes,
        )

    def plan(self, layout: Layout, settings: Settings) -> Plan:
        """One legal layout as it stands, exactly."""
        return Plan(
            layout,
            settings,
            memory_by_stage(self.config, layout, settings, self.imbalance),
            self._time(layout, settings),
        )

    def fits(self, plan: Plan) -> bool:
        return plan.peak <= self.machine.device.usable

    def search(self, fixed: Layout, free: set[str], settings: Settings, fixed_settings: set[str]) -> Found:
        """Look through all layouts.

        Args:
            fixed: the layout that holds where a field is not in `free`.
            free: fields of `Layout` to choose.
            settings: those that hold where nothing else is chosen.
            fixed_settings: fields of `Settings` not to choose.

        Raises:
            UserError: no legal layout has the fixed sizes; or none fits (one line: what the least would be).
        """
        structures = list(self._structures(fixed, free))
        if not structures:
            # Says what is wrong, where the given sizes alone are, whatever the batch.
            check(self.config, dataclasses.replace(fixed, global_batch_size=fixed.world_size * fixed.micro_batch_size))
            raise UserError(
                f"--gpus {fixed.world_size}: no legal layout has the sizes given, with experts in nodes of "
                f"{self.machine.gpus_per_node} GPUs and "
                f"--global-batch-size {fixed.global_batch_size}; free one of them, choose another number of GPUs, or "
                "add --experts-across-nodes"
            )
        rejected = []
        for optimizers in OPTIMIZERS:
            allowed = [one for one in optimizers if not fixed_settings & one.keys()] or (
                [_PLAIN] if optimizers is OPTIMIZERS[0] else []
            )
            fitting = []
            for layout in structures:
                for optimizer in allowed:
                    chosen = self._first_that_fits(
                        layout, dataclasses.replace(settings, **optimizer), fixed_settings, rejected
                    )
                    if chosen is not None:
                        fitting.append(chosen)
                        break
            if fitting:
                timed = [plan._replace(time=self._time(plan.layout, plan.settings)) for plan in fitting]
                timed.sort(key=_rank)
                return Found(timed, self._fastest_rejected(rejected), len(structures), len(timed))
        least = min(rejected, key=lambda plan: plan.peak)
        needed = (least.peak + self.machine.device.reserve) / GIB
        raise UserError(
            f"--gpu-memory {self.machine.device.gpu_memory:g}: no layout of {len(structures)} fits; the least needs "
            f"{needed:.1f} GiB a GPU "
            f"({describe(least)}); use more GPUs, or GPUs with more memory"
        )

    # ---- the space

    def _structures(self, fixed: Layout, free: set[str]) -> Iterator[Layout]:
        """Legal layouts."""

        def choices(field: str, values) -> list:
            return list(values) if field in free else [getattr(fixed, field)]

        world, node = fixed.world_size, self.machine.gpus_per_node
        powers = [2**i for i in range(11)]
        depth_fields = {"virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"}
        depth_free = (
            depth_fields <= free
            and fixed.decoder_first_pipeline_num_layers is None
            and fixed.decoder_last_pipeline_num_layers is None
        )
        for pp in choices(
            "pipeline_model_parallel_size", (p for p in range(1, self.config.num_hidden_layers + 1) if world % p == 0)
        ):
            for tp in choices("tensor_model_parallel_size", (p for p in powers if p <= node and world % (p * pp) == 0)):
                for cp in choices(
                    "context_parallel_size",
                    (p for p in powers if world % (p * tp * pp) == 0 and _worth(p, fixed.seq_length)),
                ):
                    yield from self._of_sizes(
                        fixed, pp, tp, cp, choices, pipeline_splits(self.config, pp) if depth_free else [{}]
                    )

    def _of_sizes(self, fixed: Layout, pp: int, tp: int, cp: int, choices, splits: list[dict]) -> Iterator[Layout]:
        world, node = fixed.world_size, self.machine.gpus_per_node
        sizes = {"pipeline_model_parallel_size": pp, "tensor_model_parallel_size": tp, "context_parallel_size": cp}
        for etp in choices("expert_tensor_parallel_size", sorted({1, tp})):
            largest = world // pp if self.experts_across_nodes else node
            experts = (
                p
                for p in range(1, self.config.num_experts + 1)
                if self.config.num_experts % p == 0 and p * etp <= largest
            )
            for ep, batch, split in itertools.product(
                choices("expert_model_parallel_size", (p for p in experts if world % (p * etp * pp) == 0)),
                choices("micro_batch_size", (1, 2, 4)),
                splits,
            ):
                changed = {
                    "expert_tensor_parallel_size": etp,
                    "expert_model_parallel_size": ep,
                    "micro_batch_size": batch,
                }
                layout = dataclasses.replace(fixed, **sizes, **changed, **split)
                if _is_legal(self.config, layout):
                    yield layout

    def _recomputations(self, layout: Layout, settings: Settings, fixed_settings: set[str]) -> Iterator[Settings]:
        """From the cheapest in time to the smallest."""
        if "recompute_granularity" in fixed_settings:
            yield settings
            return
        yield settings
        for modules in _SELECTIVE:
            yield dataclasses.replace(settings, recompute_granularity="selective", recompute_modules=modules)
        longest = max(len(chunk.layers) for chunks in stages(self.config, layout) for chunk in chunks)
        full = dataclasses.replace(settings, recompute_granularity="full", recompute_modules=())
        if longest > 1:
            yield dataclasses.replace(full, recompute_method="block", recompute_num_layers=-(-longest // 2))
        yield dataclasses.replace(full, recompute_method="uniform", recompute_num_layers=1)

    def _first_that_fits(
        self, layout: Layout, settings: Settings, fixed_settings: set[str], rejected: list[Plan]
    ) -> Plan | None:
        plan = None
        for choice in self._recomputations(layout, settings, fixed_settings):
            plan = Plan(layout, choice, memory_by_stage(self.config, layout, choice, self.imbalance, exact=False), None)
            if self.fits(plan):
                return plan
            if choice.recompute_granularity is None:
                rejected.append(plan)
        rejected.append(plan)
        return None

    # ---- order

    def _time(self, layout: Layout, settings: Settings) -> StepTime:
        machine = self.machine
        return StepModel(
            self.config, layout, settings, machine.hardware, machine.gpus_per_node, machine.network, self.imbalance
        ).step()

    def _fastest_rejected(self, rejected: list[Plan]) -> list[Plan]:
        nearest = sorted(rejected, key=lambda plan: plan.peak)[:NUM_REJECTED_TIMED]
        timed = [plan._replace(time=self._time(plan.layout, plan.settings)) for plan in nearest]
        return sorted(timed, key=_rank)


def _rank(plan: Plan) -> tuple:
    """The fastest first; of equals to 1 %, the one with fewer parts."""
    layout = plan.layout
    parts = (
        layout.pipeline_model_parallel_size,
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.expert_model_parallel_size,
    )
    return round(plan.time.total, 2 if plan.time.total > 1 else 4), plan.settings.use_precision_aware_optimizer, *parts


def _is_legal(config: HyConfig, layout: Layout) -> bool:
    try:
        check(config, layout)
    except UserError:
        return False
    return layout.num_microbatches >= layout.pipeline_model_parallel_size  # fewer leave stages idle for most of a step


def _worth(context_parallel: int, seq_length: int) -> bool:
    """Context parallelism is for sequences too long for one GPU: at least 8,192 tokens stay on each."""
    return context_parallel == 1 or seq_length // context_parallel >= 8192


def describe(plan: Plan) -> str:
    """`TP2 PP8x4 EP8 ETP1 CP1 DP16, micro-batch 1, recompute none, distributed Adam`; PP8x4 has four virtual stages."""
    layout, settings = plan.layout, plan.settings
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    if layout.pipeline_model_parallel_layout is not None:
        chunks = num_stages(layout.pipeline_model_parallel_layout) // layout.pipeline_model_parallel_size
    sizes = [
        f"TP{layout.tensor_model_parallel_size}",
        f"PP{layout.pipeline_model_parallel_size}"
        + (f"x{chunks}" if chunks > 1 else "")
        + ("*" if layout.pipeline_model_parallel_layout else ""),
        f"EP{layout.expert_model_parallel_size}",
        f"ETP{layout.expert_tensor_parallel_size}",
        f"CP{layout.context_parallel_size}",
        f"DP{layout.data_parallel_size}",
    ]
    gradients = "" if settings.grads_in_fp32 or not settings.bf16 else ", bf16 gradients"
    return f"{' '.join(sizes)}, micro-batch {layout.micro_batch_size}, recompute {settings.recompute_name}, {settings.optimizer_name}{gradients}"
