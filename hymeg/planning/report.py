"""Plans as text and as data: the list, one plan stage by stage, a recipe, a job."""

import dataclasses
import math
from typing import Any

from hymeg.checkpoint.adapter_table import adapter_shapes
from hymeg.checkpoint.mapping import num_parameters
from hymeg.planning.layout import Layout
from hymeg.planning.memory import GIB, StageMemory
from hymeg.planning.network import Machine
from hymeg.planning.search import Found, Plan, Planner, describe
from hymeg.planning.settings import Settings


def table(rows: list[dict[str, str]]) -> list[str]:
    """Columns as wide as they must be, under their keys. Numbers to the right."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = 0  # text, to the left
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def assumptions(planner: Planner) -> list[str]:
    """What an estimate rests on that nobody has measured."""
    device = planner.machine.device
    rows = "" if planner.attended is None else f"rows of {planner.attended:,.0f} tokens in packed samples; "
    return [
        f"Assumed: {planner.imbalance:.3g} x the mean tokens on the busiest expert-parallel rank; {rows}"
        f"{device.reserve / GIB:.1f} GiB of reserve for driver, NCCL, workspaces and fragments.",
        "Not measured on any GPU: activations under Transformer Engine, working memory, times (docs/planning.md).",
    ]


def listed(found: Found, planner: Planner, top: int) -> list[str]:
    """The best plans and the best of those that do not fit."""
    machine, device = planner.machine, planner.machine.device
    margin = f" and {planner.margin / GIB:g} GiB of margin" if planner.margin else ""
    lines = [
        f"{found.num_legal} legal layouts, {found.num_fitting} fit {machine.num_gpus} x {machine.hardware.name} with "
        f"{device.gpu_memory:g} GiB ({device.usable / GIB:.1f} GiB after {device.reserve / GIB:.1f} GiB of reserve"
        f"{margin}). Times are estimates.",
        "",
    ]
    best = {str(number): plan for number, plan in enumerate(found.fitting[:top], 1)}
    lines += table([{"": number} | _figures(plan, planner) for number, plan in best.items()])
    if found.rejected:
        lines += ["", "Not enough memory for these, by estimate the next:"]
        lines += table(
            [
                {
                    "GiB": f"{plan.peak / GIB:.1f}",
                    "too much": f"{(plan.peak + planner.margin - device.usable) / GIB:.1f}",
                    "s/step": f"{plan.time.total:.2f}",
                    "where, and the largest part": why(plan),
                    "layout": describe(plan),
                }
                for plan in found.rejected[:3]
            ]
        )
    uneven = {number: plan.layout.pipeline_model_parallel_layout for number, plan in best.items()}
    if any(uneven.values()):
        lines += ["", "* stages of unequal length: --pipeline-model-parallel-layout"]
        lines += [f"  {number}: {layout}" for number, layout in uneven.items() if layout]
    return [*lines, "", "host: GiB of a node's memory that the optimizer's state needs at a save or a load."]


def _figures(plan: Plan, planner: Planner) -> dict[str, str]:
    time = plan.time
    return {
        "GiB": f"{plan.peak / GIB:.1f}",
        "margin": f"{(planner.machine.device.usable - plan.peak) / GIB:.1f}",
        "host": f"{planner.host(plan).most / GIB:.0f}",
        "s/step": f"{time.total:.2f}",
        "tokens/s/GPU": f"{time.tokens_per_gpu:,.0f}",
        "TFLOP/s": f"{time.tflops_per_gpu:.0f}",
        "MFU": f"{time.mfu:.1%}",
        "bubble": f"{time.bubble / time.total:.1%}",
        "comm.": f"{(time.communication + time.gradients) / time.total:.1%}",
        "layout": describe(plan),
    }


def why(plan: Plan) -> str:
    """The fullest stage and what fills it: `stage 0: activations 44.1 GiB`."""
    stage = plan.memory[plan.fullest]
    part = max(StageMemory._fields, key=lambda part: getattr(stage, part))
    return f"stage {plan.fullest}: {part} {getattr(stage, part) / GIB:.1f} GiB"


def explained(plan: Plan, planner: Planner) -> list[str]:
    """Memory of every stage by part, of a node's host, and where a step's time goes."""
    time, usable = plan.time, planner.machine.device.usable
    lines = [describe(plan)]
    if plan.layout.pipeline_model_parallel_layout:
        lines.append(f"--pipeline-model-parallel-layout {plan.layout.pipeline_model_parallel_layout}")
    lines += adapter_lines(plan, planner)
    by_stage = []
    for rank, stage in enumerate(plan.memory):
        sizes = stage._asdict() | {"total": stage.total, "margin": usable - stage.total}
        by_stage.append({"stage": str(rank)} | {part: f"{size / GIB:.2f}" for part, size in sizes.items()})
    lines += ["", "GiB of a GPU, by pipeline stage:", *table(by_stage), "", *host_lines(plan, planner)]
    spent = ("compute", "communication", "bubble", "gradients", "optimizer", "total")
    step = {part: f"{getattr(time, part):.3f}" for part in spent}
    step |= {"tokens/s/GPU": f"{time.tokens_per_gpu:,.0f}", "MFU": f"{time.mfu:.1%}"}
    return [*lines, "", "Seconds of a step (estimate; gradients: with the gathering of parameters):", *table([step])]


def adapter_lines(plan: Plan, planner: Planner) -> list[str]:
    """What adapters change on the fullest stage, against the same plan with all weights trained."""
    settings = plan.settings
    if settings.lora_rank is None:
        return []
    trained = sum(map(math.prod, adapter_shapes(planner.config, settings.lora_rank, settings.lora_targets).values()))
    total = num_parameters(planner.config)
    whole = planner.plan(plan.layout, dataclasses.replace(settings, lora_rank=None, lora_targets=()))
    ours, theirs = plan.memory[plan.fullest], whole.memory[plan.fullest]
    changes = [
        f"{part} {getattr(ours, part) / GIB:.2f} GiB instead of {getattr(theirs, part) / GIB:.2f}"
        for part in StageMemory._fields
        if getattr(ours, part) != getattr(theirs, part)
    ]
    return [
        f"Adapters of rank {settings.lora_rank} in {', '.join(settings.lora_targets)}: {trained:,} parameters trained "
        f"beside {total:,} frozen ones ({trained / total:.2%}).",
        f"Against training all of them, on stage {plan.fullest}: {', '.join(changes)}; "
        f"{plan.time.total:.2f} s a step instead of {whole.time.total:.2f}.",
    ]


def host_lines(plan: Plan, planner: Planner) -> list[str]:
    host, settings = planner.host(plan), plan.settings
    kind = "dp_reshardable, Megatron's"
    if settings.dist_ckpt_optim_fully_reshardable:
        is_lean = settings.distrib_optim_fully_reshardable_mem_efficient
        kind = f"fully reshardable{', memory-efficient' if is_lean else ''}"
    lines = [
        f"Host GiB a node for the optimizer's state ({kind} checkpoints): at a save {host.save / GIB:.0f}, at a load "
        f"{host.load / GIB:.0f}, offloaded {host.offloaded / GIB:.0f}."
    ]
    if host.gpu_at_save:
        lines.append(f"On each GPU a save gathers up to {host.gpu_at_save / GIB:.1f} GiB beside what it keeps.")
    return lines


def warnings(plan: Plan, planner: Planner, host_gib: float | None) -> list[str]:
    """Where a checkpoint asks for more than a node or a GPU has; `host_gib` is a node's memory, None where unknown."""
    host, found = planner.host(plan), []
    if host_gib is not None and host.most > host_gib * GIB:
        instead = ""
        if plan.settings.dist_ckpt_optim_fully_reshardable and host.offloaded < host_gib * GIB:
            instead = (
                "; --no-dist-ckpt-optim-fully-reshardable keeps the optimizer's state in its shards, for the same TP, "
                "PP and EP"
            )
        found.append(
            f"--host-memory {host_gib:g}: a node needs {host.most / GIB:.0f} GiB for the optimizer's state at a "
            f"{'save' if host.save > host.load else 'load'}{instead}"
        )
    at_save = max(stage.static for stage in plan.memory) + host.gpu_at_save
    if host.gpu_at_save and at_save > planner.machine.device.usable:
        found.append(
            f"a save gathers up to {host.gpu_at_save / GIB:.1f} GiB on each GPU, {at_save / GIB:.1f} with what it "
            "keeps: add --distrib-optim-fully-reshardable-mem-efficient"
        )
    return [f"warning: {line}" for line in found]


def as_data(found: Found, planner: Planner, top: int) -> dict[str, Any]:
    """All that the list and --explain say, for json: bytes, seconds, and the flags of each plan."""
    machine = planner.machine

    def of(plan: Plan) -> dict[str, Any]:
        return {
            "layout": describe(plan),
            "flags": flags_of(plan.layout, plan.settings),
            "fits": planner.fits(plan),
            "peak_bytes": plan.peak,
            "margin_bytes": machine.device.usable - plan.peak,
            "stages": [stage._asdict() | {"total": stage.total} for stage in plan.memory],
            "host_bytes_a_node": planner.host(plan)._asdict(),
            "time": plan.time._asdict(),
        }

    return {
        "machine": dataclasses.asdict(machine)
        | {"reserve_bytes": machine.device.reserve, "usable_bytes": machine.device.usable},
        "assumptions": {
            "imbalance": planner.imbalance,
            "attended": planner.attended,
            "margin_bytes": planner.margin,
            "unmeasured": ["activations", "working", "time"],
        },
        "num_legal": found.num_legal,
        "num_fitting": found.num_fitting,
        "plans": [of(plan) for plan in found.fitting[:top]],
        "too_large": [of(plan) for plan in found.rejected[:3]],
    }


def comment(plan: Plan, planner: Planner) -> list[str]:
    """The lines of a recipe that say what the planner says of it."""
    time, rows = plan.time, ""
    if planner.attended is not None:
        rows = f" with rows of {planner.attended:,.0f} tokens"
    return [
        f"# tools/plan.py: fullest GPU {plan.peak / GIB:.1f} of {planner.machine.device.usable / GIB:.1f} GiB (stage "
        f"{plan.fullest}), {planner.host(plan).most / GIB:.0f} GiB of host memory a node;",
        f"# about {time.total:.1f} s a step, {time.tokens_per_gpu:,.0f} tokens/s/GPU, MFU {time.mfu:.0%}{rows}.",
        f"# {describe(plan)}",
    ]


def flags_of(layout: Layout, settings: Settings) -> dict[str, Any]:
    """The flags that make a run of this plan, by name without dashes; True for switches. Defaults are left out."""
    found = _changed(
        layout,
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size",
    )
    if layout.etp != layout.tp:
        found["expert_tensor_parallel_size"] = layout.etp
    if layout.virtual_pipeline_model_parallel_size and layout.pipeline_model_parallel_layout is None:
        found["num_virtual_stages_per_pipeline_rank"] = layout.virtual_pipeline_model_parallel_size
    found |= _changed(
        layout,
        "pipeline_model_parallel_layout decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers",
    )
    switches = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    found |= {name: True for name in switches if getattr(settings, name)}
    found |= {name: getattr(layout, name) for name in ("seq_length", "micro_batch_size", "global_batch_size")}
    found |= {"bf16": True} if settings.bf16 else {}
    found |= _changed(
        settings,
        "use_precision_aware_optimizer optimizer_cpu_offload exp_avg_dtype exp_avg_sq_dtype recompute_granularity",
    )
    if settings.recompute_granularity == "selective":
        found["recompute_modules"] = list(settings.recompute_modules)
    if settings.recompute_granularity == "full":
        found |= {"recompute_method": settings.recompute_method, "recompute_num_layers": settings.recompute_num_layers}
    if settings.gradient == 2:
        aware = settings.use_precision_aware_optimizer
        found |= {"main_grads_dtype": "bf16"} if aware else {"grad_reduce_in_bf16": True}
    found |= {"recompute_logits": True} if settings.hy_recompute_logits else {}
    return {name.replace("_", "-"): value for name, value in found.items()}


def _changed(of: Layout | Settings, names: str) -> dict[str, Any]:
    """Those of the fields, named with spaces between, that are not at their defaults."""
    return {name: getattr(of, name) for name in names.split() if getattr(of, name) != getattr(type(of), name)}


def job(recipe_path: str, machine: Machine, hf: str) -> str:
    """A job for `sbatch`: as many nodes as the plan has, and examples/slurm/train.sbatch for the rest."""
    nodes = math.ceil(machine.num_gpus / machine.gpus_per_node)
    per_node = min(machine.num_gpus, machine.gpus_per_node)
    return (
        "#!/bin/bash\n"
        f"# {machine.num_gpus} GPUs. Run it from the project's folder with bash: it submits itself. Further flags of "
        "sbatch go into SBATCH_FLAGS,\n"
        "# those of the training on this command line.\n"
        f"exec sbatch --nodes {nodes} --gpus-per-node {per_node} ${{SBATCH_FLAGS:-}} examples/slurm/train.sbatch "
        f'{recipe_path} --hf-model {hf} "$@"\n'
    )
