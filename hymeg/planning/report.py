"""Plans as text: the list, one plan stage by stage, a recipe, a job."""

import math
from typing import Any

from hymeg.planning.layout import Layout
from hymeg.planning.memory import GIB, StageMemory
from hymeg.planning.search import Found, Machine, Plan, describe
from hymeg.planning.settings import Settings

PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "working")
KINDS = {
    "tp": "tensor",
    "cp": "context",
    "ep": "expert",
    "etp": "expert-tensor",
    "dp": "data",
    "edp": "expert-data",
    "pp": "pipeline",
}


def table(rows: list[list[str]]) -> list[str]:
    """Columns as wide as they must be; the first row is the head. Numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # text, to the left
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def listed(found: Found, machine: Machine, top: int) -> list[str]:
    """The best plans and the best of those that do not fit."""
    device = machine.device
    lines = [
        f"{found.num_legal} legal layouts, {found.num_fitting} fit {machine.num_gpus} x {machine.hardware.name} with "
        f"{device.gpu_memory:g} GiB "
        f"({device.usable / GIB:.1f} GiB after {device.reserve / GIB:.1f} GiB of reserve). Times are estimates.",
        "",
    ]
    head = ["", "GiB", "margin", "s/step", "tokens/s/GPU", "TFLOP/s", "MFU", "bubble", "comm.", "layout"]
    rows = [head] + [
        [str(number), *_figures(plan, machine), describe(plan)] for number, plan in enumerate(found.fitting[:top], 1)
    ]
    lines += table(rows)
    if found.rejected:
        lines += ["", "Not enough memory for these, by estimate the next:"]
        rows = [["GiB", "too much", "s/step", "where, and the largest part", "layout"]]
        for plan in found.rejected[:3]:
            sizes = f"{plan.peak / GIB:.1f}", f"{(plan.peak - device.usable) / GIB:.1f}", f"{plan.time.total:.2f}"
            rows.append([*sizes, why(plan), describe(plan)])
        lines += table(rows)
    if any(plan.layout.pipeline_model_parallel_layout for plan in found.fitting[:top]):
        lines += ["", "* stages of unequal length: --pipeline-model-parallel-layout"]
        for number, plan in enumerate(found.fitting[:top], 1):
            if plan.layout.pipeline_model_parallel_layout:
                lines.append(f"  {number}: {plan.layout.pipeline_model_parallel_layout}")
    return lines


def _figures(plan: Plan, machine: Machine) -> list[str]:
    time = plan.time
    return [
        f"{plan.peak / GIB:.1f}",
        f"{(machine.device.usable - plan.peak) / GIB:.1f}",
        f"{time.total:.2f}",
        f"{time.tokens_per_gpu:,.0f}",
        f"{time.tflops_per_gpu:.0f}",
        f"{time.mfu:.1%}",
        f"{time.bubble / time.total:.1%}",
        f"{(time.communication + time.gradients) / time.total:.1%}",
    ]


def why(plan: Plan) -> str:
    """The fullest stage and what fills it: `stage 0: activations 44.1 GiB`."""
    rank = max(range(len(plan.memory)), key=lambda rank: plan.memory[rank].total)
    part = max(PARTS, key=lambda part: getattr(plan.memory[rank], part))
    return f"stage {rank}: {part} {getattr(plan.memory[rank], part) / GIB:.1f} GiB"


def explained(plan: Plan, machine: Machine) -> list[str]:
    """Memory of every stage by part, where a step's time goes, and what is sent over which link."""
    time, usable = plan.time, machine.device.usable
    lines = [describe(plan)]
    if plan.layout.pipeline_model_parallel_layout:
        lines.append(f"--pipeline-model-parallel-layout {plan.layout.pipeline_model_parallel_layout}")
    lines += ["", "GiB of a GPU, by pipeline stage:"]
    rows = [["stage", *PARTS, "total", "margin"]]
    rows += [
        [str(rank), *_stage_row(stage), f"{(usable - stage.total) / GIB:.2f}"] for rank, stage in enumerate(plan.memory)
    ]
    lines += table(rows)
    lines += ["", "Seconds of a step (estimate):"]
    lines += table(
        [
            [
                "compute",
                "communication",
                "bubble",
                "gradients, parameters",
                "optimizer",
                "total",
                "tokens/s/GPU",
                "MFU",
            ],
            [
                f"{value:.3f}"
                for value in (time.compute, time.communication, time.bubble, time.gradients, time.optimizer, time.total)
            ]
            + [f"{time.tokens_per_gpu:,.0f}", f"{time.mfu:.1%}"],
        ]
    )
    lines += ["", "GB that a GPU of the slowest stage sends in a step:"]
    rows = [["kind", "inside the node", "across nodes"]]
    for kind, name in KINDS.items():
        inside, across = (time.volumes.get((kind, link), 0.0) for link in ("inside", "across"))
        if inside or across:
            rows.append([name, f"{inside / 1e9:.2f}", f"{across / 1e9:.2f}"])
    return lines + (table(rows) if len(rows) > 1 else ["nothing"])


def _stage_row(stage: StageMemory) -> list[str]:
    return [f"{getattr(stage, part) / GIB:.2f}" for part in (*PARTS, "total")]


def summary(plan: Plan, machine: Machine) -> str:
    """A recipe's comment: `fullest GPU 70.9 of 73.8 GiB; about 5.6 s a step, 11,697 tokens/s/GPU, MFU 28 %`."""
    device, time = machine.device, plan.time
    return (
        f"fullest GPU {plan.peak / GIB:.1f} of {device.usable / GIB:.1f} GiB (stage "
        f"{max(range(len(plan.memory)), key=lambda rank: plan.memory[rank].total)}); "
        f"about {time.total:.1f} s a step, {time.tokens_per_gpu:,.0f} tokens/s/GPU, MFU {time.mfu:.0%}"
    )


def flags_of(layout: Layout, settings: Settings) -> dict[str, Any]:
    """The flags that make a run of this plan, by name without dashes; True for switches. Defaults are left out."""
    found: dict[str, Any] = {}
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if getattr(layout, name) > 1:
            found[name] = getattr(layout, name)
    if layout.expert_tensor_parallel_size != layout.tensor_model_parallel_size:
        found["expert_tensor_parallel_size"] = layout.expert_tensor_parallel_size
    if layout.virtual_pipeline_model_parallel_size and layout.pipeline_model_parallel_layout is None:
        found["num_virtual_stages_per_pipeline_rank"] = layout.virtual_pipeline_model_parallel_size
    for name in (
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    ):
        if getattr(layout, name) is not None:
            found[name] = getattr(layout, name)
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(settings, name):
            found[name] = True
    found |= {
        "seq_length": layout.seq_length,
        "micro_batch_size": layout.micro_batch_size,
        "global_batch_size": layout.global_batch_size,
    }
    return {name.replace("_", "-"): value for name, value in (found | _memory_flags(settings)).items()}


def _memory_flags(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {"bf16": True} if settings.bf16 else {}
    plain = Settings()
    for name in (
        "use_precision_aware_optimizer",
        "optimizer_cpu_offload",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
        "recompute_granularity",
    ):
        if getattr(settings, name) != getattr(plain, name):
            found[name] = getattr(settings, name)
    if settings.recompute_granularity == "selective":
        found["recompute_modules"] = list(settings.recompute_modules)
    if settings.recompute_granularity == "full":
        found |= {"recompute_method": settings.recompute_method, "recompute_num_layers": settings.recompute_num_layers}
    if settings.bf16 and not settings.grads_in_fp32:
        found["main_grads_dtype" if settings.use_precision_aware_optimizer else "grad_reduce_in_bf16"] = (
            "bf16" if settings.use_precision_aware_optimizer else True
        )
    if settings.hy_recompute_logits:
        found["recompute_logits"] = True
    return found


def comment(plan: Plan, machine: Machine) -> list[str]:
    """The first lines of a recipe: for which GPUs, and what the planner says of it."""
    return [
        f"# {machine.num_gpus} GPUs, {machine.hardware.name} with {machine.device.gpu_memory:g} GiB, "
        f"{machine.gpus_per_node} a node. tools/plan.py: "
        f"{summary(plan, machine)}.",
        f"# {describe(plan)}",
    ]


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
        f"{recipe_path} "
        f'--hf-model {hf} "$@"\n'
    )
