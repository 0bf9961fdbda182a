"""Every legal layout of a model on a number of GPUs, which of them fit, and in what order.

Legal is what `hymeg.planning.layout.check` accepts. For each layout the recomputation that costs the least time and
fits is taken; the optimizer keeps fp32 numerics as long as any layout fits so, then bf16 gradients and moments are
tried, then the optimizer on the CPU.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hymeg.checkpoint import workers
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout, check
from hymeg.planning.measured import Calibration
from hymeg.planning.memory import GIB, HostMemory, StageMemory, host_memory, memory_by_stage
from hymeg.planning.network import Machine
from hymeg.planning.settings import Settings
from hymeg.planning.stages import pipeline_splits, stages
from hymeg.planning.step_time import StepModel, StepTime

_SELECTIVE = (
    ("moe_act",),
    ("moe_act", "layernorm"),
    ("moe_act", "layernorm", "shared_experts"),
    ("moe",),
    ("moe", "mlp"),
)
_PRECISION_AWARE = {"use_precision_aware_optimizer": True}
OPTIMIZERS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, _PRECISION_AWARE),  # both keep fp32 numerics, and take the same time
    (_PRECISION_AWARE | {"grads_in_fp32": False, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},),
    (_PRECISION_AWARE | {"optimizer_cpu_offload": True},),
)
"""Tried in this order: the next only where no layout fits with those before."""

NUM_REJECTED_TIMED = 200
LAYOUTS_A_PROCESS = 200
NO_CALIBRATION = Calibration()


class Plan(NamedTuple):
    """A layout with what it takes. `time` is None for one that was rejected and not looked at closer."""

    layout: Layout
    settings: Settings
    memory: tuple[StageMemory, ...]  # of every pipeline rank
    time: StepTime | None = None

    @property
    def peak(self) -> int:
        """Bytes on the fullest GPU."""
        return max(stage.total for stage in self.memory)

    @property
    def fullest(self) -> int:
        """The pipeline rank of that GPU."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)


class Found(NamedTuple):
    """Plans that fit, best first; and the smallest of those that do not, the fastest by estimate first."""

    fitting: list[Plan]
    rejected: list[Plan]
    num_legal: int
    num_fitting: int


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans for one model, machine and batch."""

    config: HyConfig
    machine: Machine
    imbalance: float = 1.2  # tokens of the busiest expert-parallel rank over the mean
    experts_across_nodes: bool = False  # let EP x ETP exceed a node's GPUs
    attended: float | None = None
    """Tokens of the row that a token lies in, in the mean over tokens (sum of squared lengths over sum of lengths);
    None where a sample is one row."""
    margin: float = 0  # bytes that stay free beside the reserve
    calibration: Calibration = NO_CALIBRATION  # what runs have shown of the estimates

    def plan(self, layout: Layout, settings: Settings) -> Plan:
        """One legal layout as it stands."""
        return self._timed(self._untimed(layout, settings))

    def fits(self, plan: Plan) -> bool:
        return plan.peak + self.margin <= self.machine.device.usable

    def host(self, plan: Plan) -> HostMemory:
        """Bytes of the fullest node's host memory."""
        return host_memory(self.config, plan.layout, plan.settings, self.machine.gpus_per_node)

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
        structures = list(self._structures(fixed, free, settings))
        if not structures:
            # Says what is wrong, where the given sizes alone are, whatever the batch.
            check(
                self.config,
                dataclasses.replace(fixed, global_batch_size=fixed.world_size * fixed.micro_batch_size),
                dataclasses.replace(settings, overlap_moe_expert_parallel_comm=False),
            )
            overlap = ", --overlap-moe-expert-parallel-comm" if settings.overlap_moe_expert_parallel_comm else ""
            raise UserError(
                f"--gpus {fixed.world_size}: no legal layout has the sizes given, with experts in nodes of "
                f"{self.machine.gpus_per_node} GPUs{overlap} and --global-batch-size {fixed.global_batch_size}; free "
                "one of them, choose another number of GPUs, or add --experts-across-nodes"
            )
        rejected = []
        for optimizers in OPTIMIZERS:
            allowed = [one for one in optimizers if not fixed_settings & one.keys()]
            choices = [dataclasses.replace(settings, **optimizer) for optimizer in allowed]
            choices = [choice for choice in choices if _has_optimizer(choice)]
            found = self._on_all_cores(structures, choices, fixed_settings)
            rejected += itertools.chain.from_iterable(spurned for _, spurned in found)
            if fitting := sorted((plan for plan, _ in found if plan is not None), key=_rank):
                nearest = sorted(rejected, key=lambda plan: plan.peak)[:NUM_REJECTED_TIMED]
                return Found(fitting, sorted(map(self._timed, nearest), key=_rank), len(structures), len(fitting))
        if not rejected:
            raise UserError(
                "the recomputation that is asked for is legal in none of the layouts left; free --recompute-granularity"
            )
        least = min(rejected, key=lambda plan: plan.peak)
        needed = (least.peak + self.machine.device.reserve + self.margin) / GIB
        raise UserError(
            f"--gpu-memory {self.machine.device.gpu_memory:g}: no layout of {len(structures)} fits; the least needs "
            f"{needed:.1f} GiB a GPU ({describe(least)}); use more GPUs, or GPUs with more memory"
        )

    # ---- the space

    def _structures(self, fixed: Layout, free: set[str], settings: Settings) -> Iterator[Layout]:
        """Legal layouts, for some recomputation."""
        unrecomputed = dataclasses.replace(settings, recompute_granularity=None, recompute_modules=())
        world, node, length = fixed.world_size, self.machine.gpus_per_node, fixed.seq_length
        powers, num_experts = [2**i for i in range(11)], self.config.num_experts
        ends = fixed.decoder_first_pipeline_num_layers, fixed.decoder_last_pipeline_num_layers
        is_depth_free = free >= {"virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"}

        def choices(field: str, values: Iterable[int]) -> Iterable[int]:
            return values if field in free else [getattr(fixed, field)]

        stages_that_divide = (p for p in range(1, self.config.num_hidden_layers + 1) if world % p == 0)
        for pp in choices("pipeline_model_parallel_size", stages_that_divide):
            splits = pipeline_splits(self.config, pp) if is_depth_free and ends == (None, None) else [{}]
            for tp in choices("tensor_model_parallel_size", (p for p in powers if p <= node and world % (p * pp) == 0)):
                # Context parallelism is for sequences too long for one GPU: at least 8,192 tokens stay on each.
                contexts = [p for p in powers if world % (p * tp * pp) == 0 and (p == 1 or length // p >= 8192)]
                for cp, etp in itertools.product(
                    choices("context_parallel_size", contexts), choices("expert_tensor_parallel_size", sorted({1, tp}))
                ):
                    most = (world // pp if self.experts_across_nodes else node) // etp
                    experts = [p for p in range(1, most + 1) if num_experts % p == 0 and world % (p * etp * pp) == 0]
                    for ep, batch, split in itertools.product(
                        choices("expert_model_parallel_size", experts), choices("micro_batch_size", (1, 2, 4)), splits
                    ):
                        layout = dataclasses.replace(
                            fixed,
                            micro_batch_size=batch,
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            context_parallel_size=cp,
                            expert_model_parallel_size=ep,
                            expert_tensor_parallel_size=etp,
                            **split,
                        )
                        if _is_legal(self.config, layout, unrecomputed):
                            yield layout

    def _recomputations(self, layout: Layout, settings: Settings, fixed_settings: set[str]) -> Iterator[Settings]:
        """Legal ones, from the cheapest in time to the smallest."""
        found = [settings]
        if "recompute_granularity" not in fixed_settings:
            most = max(len(chunk.layers) for chunks in stages(self.config, layout) for chunk in chunks)
            found = _all_recomputations(settings, max(1, -(-most // 2)))
        for choice in found:
            is_certain = not (choice.overlap_moe_expert_parallel_comm or choice.moe_shared_expert_overlap)
            if is_certain or _is_legal(self.config, layout, choice):
                yield choice

    def _on_all_cores(
        self, structures: list[Layout], choices: list[Settings], fixed_settings: set[str]
    ) -> list[tuple[Plan | None, list[Plan]]]:
        """`_cheapest_that_fits` of each, in their order."""
        cores = min(len(os.sched_getaffinity(0)), len(structures) // LAYOUTS_A_PROCESS) or 1

        def work(share: list[Layout], report: Any = None) -> list[tuple[Plan | None, list[Plan]]]:
            return [self._cheapest_that_fits(layout, choices, fixed_settings) for layout in share]

        if cores == 1:
            return work(structures)
        dealt = workers.run(work, [structures[n::cores] for n in range(cores)]).results
        return [dealt[n % cores][n // cores] for n in range(len(structures))]

    def _cheapest_that_fits(
        self, layout: Layout, choices: list[Settings], fixed_settings: set[str]
    ) -> tuple[Plan | None, list[Plan]]:
        """Over optimizers that take the same time (`choices`, the plainest first) and recomputation; and what was
        rejected. Recomputed logits cost some time on one stage only: they are taken where they spare more than that.
        """
        each = [self._recomputations(layout, one, fixed_settings) for one in choices]
        tried = list(zip(*each, strict=True))
        if not tried:
            return None, []
        plain = self._first_that_fits(layout, tried)
        found = [plain]
        if "hy_recompute_logits" not in fixed_settings and not choices[0].cross_entropy_loss_fusion:
            spared = itertools.takewhile(lambda of: plain is None or plain.settings not in of, tried)
            found.append(self._first_that_fits(layout, [list(map(_with_logits, of)) for of in spared]))
        timed = [self._timed(plan) for plan in found if plan is not None]
        # What would be the fastest is told beside the answers.
        rejected = [
            self._untimed(layout, of[-1])
            for of in (tried[:1] if timed else tried[:1] + tried[1:][-1:])
            if plain is None or plain.settings not in of
        ]
        return min(timed, key=lambda plan: plan.time.total, default=None), rejected

    def _first_that_fits(self, layout: Layout, tried: Sequence[Sequence[Settings]]) -> Plan | None:
        """`tried` from the cheapest to the smallest: where the last does not fit, none does."""
        if not tried or not self.fits(self._untimed(layout, tried[-1][-1])):
            return None
        return next(plan for of in tried for one in of if self.fits(plan := self._untimed(layout, one)))

    def _untimed(self, layout: Layout, settings: Settings) -> Plan:
        return Plan(layout, settings, memory_by_stage(self.config, layout, settings, self.imbalance))

    def _timed(self, plan: Plan) -> Plan:
        model = StepModel(self.config, plan.layout, plan.settings, self.machine, self.imbalance, self.attended)
        return plan._replace(time=self.calibration.applied(model.step()))


@functools.lru_cache(maxsize=256)
def _all_recomputations(settings: Settings, half: int) -> list[Settings]:
    selective = dataclasses.replace(settings, recompute_granularity="selective")
    full = dataclasses.replace(settings, recompute_granularity="full", recompute_modules=())
    return [
        settings,
        *(dataclasses.replace(selective, recompute_modules=modules) for modules in _SELECTIVE),
        dataclasses.replace(full, recompute_method="block", recompute_num_layers=half),
        dataclasses.replace(full, recompute_method="uniform", recompute_num_layers=1),
    ]


@functools.lru_cache(maxsize=1024)
def _with_logits(settings: Settings) -> Settings:
    return dataclasses.replace(settings, hy_recompute_logits=True)


def _rank(plan: Plan) -> tuple:
    """The fastest first; of those equal to a hundredth of a second, the one with fewer parts."""
    layout = plan.layout
    parts = layout.pp, layout.tp, layout.cp, layout.ep
    return round(plan.time.total, 2 if plan.time.total > 1 else 4), plan.settings.use_precision_aware_optimizer, *parts


def _is_legal(config: HyConfig, layout: Layout, settings: Settings) -> bool:
    try:
        check(config, layout, settings)
    except UserError:
        return False
    accounted = layout.account_for_embedding_in_pipeline_split or layout.account_for_loss_in_pipeline_split
    if layout.pp == 1 and accounted:  # without effect, and so refused by the run
        return False
    return layout.num_microbatches >= layout.pp  # fewer leave stages idle for most of a step


def _has_optimizer(settings: Settings) -> bool:
    """Whether Megatron has it (optimizer_config.py:432, arguments.py:1804)."""
    is_aware = settings.use_precision_aware_optimizer
    return (settings.use_distributed_optimizer or not is_aware) and (is_aware or not settings.optimizer_cpu_offload)


def describe(plan: Plan) -> str:
    """`TP2 PP8x4 EP8 ETP1 CP1 DP16, micro-batch 1, recompute none, distributed Adam`; PP8x4 has four virtual stages."""
    layout, settings = plan.layout, plan.settings
    virtual = f"x{layout.num_virtual_stages}" if layout.num_virtual_stages > 1 else ""
    uneven = "*" if layout.pipeline_model_parallel_layout else ""
    gradients = ", bf16 gradients" if settings.gradient == 2 else ""
    return (
        f"TP{layout.tp} PP{layout.pp}{virtual}{uneven} EP{layout.ep} ETP{layout.etp} CP{layout.cp} "
        f"DP{layout.data_parallel_size}, micro-batch {layout.micro_batch_size}, recompute {settings.recompute_name}, "
        f"{settings.optimizer_name}{gradients}"
    )
