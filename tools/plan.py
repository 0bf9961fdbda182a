#!/usr/bin/env python
"""Which layouts of a model fit on a cluster, how fast each would be, and what to submit: without a GPU.

    python tools/plan.py --hf DIR --gpus 64 --seq-length 4096 --global-batch-size 1024
    python tools/plan.py --hf DIR --config recipe.yaml --gpus 64

Any flag of pretrain_hy.py may follow: it is kept. With a recipe that recipe is judged as it stands; with --search it
fixes what it says, and the rest is chosen.
"""

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hymeg import platform
from hymeg.errors import UserError, exit_on_user_error

CHOSEN = {  # field of Layout -> destinations of the flags that fix it
    "tensor_model_parallel_size": ("tensor_model_parallel_size",),
    "pipeline_model_parallel_size": ("pipeline_model_parallel_size",),
    "context_parallel_size": ("context_parallel_size",),
    "expert_model_parallel_size": ("expert_model_parallel_size",),
    "expert_tensor_parallel_size": ("expert_tensor_parallel_size",),
    "micro_batch_size": ("micro_batch_size",),
    "virtual_pipeline_model_parallel_size": (
        "num_virtual_stages_per_pipeline_rank",
        "num_layers_per_virtual_pipeline_stage",
    ),
    "pipeline_model_parallel_layout": ("pipeline_model_parallel_layout",),
}
ASSUMED = ("bf16", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
"""On where a search is free to choose."""
IMBALANCE = 1.2
ROW_LENGTH = 512
"""Tokens of a packed row where nobody says: chat and translation rows are far shorter than a sample."""


def own_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = _error

    def number(name: str, default: float | None, metavar: str, help: str, kind: type = float) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=help)

    parser.add_argument("--hf", metavar="DIR", help="folder with the model's config.json")
    parser.add_argument("--config", metavar="FILE.yaml", help="a recipe, judged as it stands")
    parser.add_argument("--search", action="store_true", help="with --config: choose what the recipe does not set")
    parser.add_argument("--gpus", type=int, metavar="N", required=True, help="GPUs of the job")
    number("--gpus-per-node", 8, "N", "of them in one node, joined by NVLink (default: 8)", int)
    number("--gpu-memory", None, "GIB", "of one GPU, as in its name (default: that of --gpu)")
    parser.add_argument("--gpu", metavar="NAME", help="A100, H100, H200, ... (default: by --gpu-memory, or H100)")
    number("--network-gbps", 400, "X", "Gbit/s between nodes for each GPU (default: 400)")
    number("--host-memory", None, "GIB", "of one node: warn where a checkpoint needs more (default: not checked)")
    number("--imbalance", None, "X", f"tokens of the busiest expert-parallel rank over the mean (default: {IMBALANCE})")
    parser.add_argument(
        "--measured",
        nargs="+",
        default=[],
        metavar="RUN",
        help="--save or --tensorboard-dir of runs on such GPUs: fit times, --imbalance and --margin to them",
    )
    number("--margin", 0, "GIB", "of a GPU that a layout must leave free beside the reserve (default: 0)")
    parser.add_argument(
        "--row-length",
        metavar="MEAN[:RMS]",
        help=f"--sft: tokens of a row, and their root mean square, for attention's work (default: {ROW_LENGTH})",
    )
    parser.add_argument("--experts-across-nodes", action="store_true", help="let expert parallelism leave the node")
    number("--top", 5, "N", "layouts to list (default: 5)", int)
    parser.add_argument("--explain", type=int, nargs="?", const=1, metavar="K", help="the K-th layout, stage by stage")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--write", metavar="FILE.yaml", help="write the best layout, or the explained one, as a recipe")
    parser.add_argument("--sbatch", metavar="FILE", help="with --write: write the job too")
    return parser


def _error(message: str) -> None:
    raise UserError(f"{message.removeprefix('argument ')} (plan.py --help lists the planner's flags)")


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        own, rest = own_arguments().parse_known_args(argv)
        _check(own)
        platform.install()
        plan(own, rest)


def _check(own: argparse.Namespace) -> None:
    for name, least in (
        ("gpus", 1),
        ("gpus_per_node", 1),
        ("gpu_memory", 4),
        ("host_memory", 1),
        ("network_gbps", 1e-9),
        ("imbalance", 1),
        ("margin", 0),
        ("top", 1),
    ):
        value = getattr(own, name)
        if value is not None and not least <= value < 1e6:
            needed = "a positive number" if 0 < least < 1 else f"{least} or more"
            raise UserError(f"--{name.replace('_', '-')} {value:g}: {needed} is needed")
    if own.gpus > own.gpus_per_node and own.gpus % own.gpus_per_node:
        below = own.gpus // own.gpus_per_node * own.gpus_per_node
        raise UserError(
            f"--gpus {own.gpus}: whole nodes of {own.gpus_per_node} are needed; use {below} or "
            f"{below + own.gpus_per_node}"
        )
    if own.hf is None and own.config is None:
        raise UserError("--hf is missing: give the folder that holds the model's config.json")
    if own.sbatch is not None and own.write is None:
        raise UserError(f"--sbatch {own.sbatch}: a job needs a recipe; add --write FILE.yaml")
    if own.search and own.config is None:
        raise UserError("--search goes with --config: without a recipe it is what plan.py does; leave it out")


def plan(own: argparse.Namespace, rest: list[str]) -> None:
    from hymeg.planning import report
    from hymeg.planning.measured import Calibration, fit
    from hymeg.planning.memory import GIB, Device
    from hymeg.planning.network import hardware_of
    from hymeg.planning.search import Machine, Planner
    from hymeg.planning.settings import unmodelled
    from hymeg.platform import for_gpus
    from hymeg.training.arguments import naming_lines, parse
    from hymeg.training.observed import observe, told

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(own.gpus)}
    source = [*(["--hf-model", own.hf] if own.hf else []), *(["--config", own.config] if own.config else [])]
    try:
        with for_gpus():
            args, config = parse([*source, *rest], is_whole=False)
    except UserError as error:
        raise UserError(str(error).replace("--hf-model", "--hf") if own.hf else str(error)) from error
    if args.fp16:
        raise UserError("--fp16 is not planned for: leave it out for bf16, or give --no-bf16 for fp32")
    hardware = hardware_of(own.gpu, own.gpu_memory)
    device = Device(own.gpu_memory or hardware.memory_gib)
    machine = Machine(own.gpus, own.gpus_per_node, device, hardware, own.network_gbps / 8)
    attended = _attended(own, args)
    observations = [observe(folder, own.hf, machine, attended or ROW_LENGTH) for folder in own.measured]
    calibration = fit(observations) if observations else Calibration()
    imbalance = own.imbalance or calibration.imbalance or IMBALANCE
    margin = own.margin * GIB + max(calibration.excess or 0, 0)
    planner = Planner(config, machine, imbalance, own.experts_across_nodes, attended, margin, calibration)
    with naming_lines(args.explicit):
        found = _found(own, args, planner)
    number = own.explain or 1
    if not 1 <= number <= len(found.fitting):
        raise UserError(f"--explain {number}: there are {len(found.fitting)} layouts; use 1 to {len(found.fitting)}")
    chosen, unknown = found.fitting[number - 1], [_said(args, name) for name in unmodelled(args)]
    warnings = report.warnings(chosen, planner, own.host_memory)
    if own.json:
        data = {"not_modelled": unknown, "warnings": warnings} | report.as_data(found, planner, max(own.top, number))
        if observations:
            data["measured"] = calibration._asdict()
        print(json.dumps(data, indent=2))
    else:
        if unknown:
            print(f"Not modelled, so neither in GiB nor in seconds: {', '.join(unknown)}\n")
        if observations:
            print("\n".join([*told(observations, calibration), ""]))
        lines = report.listed(found, planner, own.top)
        if own.explain is not None:
            lines += ["", *report.explained(chosen, planner)]
        print("\n".join([*lines, *report.assumptions(planner), *warnings]))
    _write_files(own, args, planner, chosen)
    _say_whether_it_fits(planner, found.fitting[0])


def _said(args: argparse.Namespace, name: str) -> str:
    """`--fp8-format hybrid`, as it was typed."""
    from hymeg.training.flag_names import flag

    option = args.explicit[name][0] if name in args.explicit else flag(name)
    value = args.said.get(option.removeprefix("--"), getattr(args, name))
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return option if isinstance(value, bool) else f"{option} {value}"


def _attended(own: argparse.Namespace, args: argparse.Namespace) -> float | None:
    """Tokens of the row that a token lies in, in the mean over tokens; None where a sample is one row."""
    if own.row_length is None:
        return min(ROW_LENGTH, args.seq_length or ROW_LENGTH) if args.packed else None
    said = f"--row-length {own.row_length}"
    if not args.packed:
        raise UserError(f"{said} is for conversations packed into samples; add --sft, or leave it out")
    try:
        mean, _, rms = own.row_length.partition(":")
        mean, rms = float(mean), float(rms or mean)
    except ValueError:
        mean = rms = 0.0
    longest = args.seq_length or 1e9
    if not 1 <= mean <= rms <= longest or rms**2 / mean > longest:
        raise UserError(
            f"{said}: give the rows' mean length in tokens, and after a colon the root mean square where they differ "
            f"(it is no smaller), up to --seq-length {args.seq_length}"
        )
    return rms**2 / mean


def _found(own: argparse.Namespace, args: argparse.Namespace, planner):
    """What the search finds; of a recipe, the recipe alone."""
    from hymeg.planning import layout as layouts
    from hymeg.planning.search import Found
    from hymeg.planning.settings import settings_of
    from hymeg.training.preflight import layout_of

    is_search = own.config is None or own.search
    if args.global_batch_size is None and is_search:
        raise UserError("--global-batch-size is missing: give the samples of a step, e.g. --global-batch-size 256")
    layout, settings = layout_of(args), settings_of(args)
    if is_search and args.num_layers_per_virtual_pipeline_stage and "pipeline_model_parallel_size" in _free(args):
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {args.num_layers_per_virtual_pipeline_stage}: what that means "
            "depends on --pipeline-model-parallel-size; give that as well, or --num-virtual-stages-per-pipeline-rank"
        )
    if not is_search:
        layouts.check(planner.config, layout, settings)
        plans = [planner.plan(layout, settings)]
        return Found(plans, [], 1, sum(map(planner.fits, plans)))
    fixed = {name for name in vars(settings) if name in args.explicit}
    if {"main_grads_dtype", "grad_reduce_in_bf16"} & args.explicit.keys():
        fixed.add("grads_in_fp32")
    if "recompute_activations" in args.explicit:
        fixed.add("recompute_granularity")
    settings = dataclasses.replace(settings, **{name: True for name in ASSUMED if name not in args.explicit})
    return planner.search(layout, _free(args), settings, fixed)


def _free(args: argparse.Namespace) -> set[str]:
    free = {field for field, dests in CHOSEN.items() if not any(dest in args.explicit for dest in dests)}
    depth = {"virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"}
    if args.packed:
        free.discard("micro_batch_size")
    return free if depth <= free else free - depth


def _write_files(own: argparse.Namespace, args: argparse.Namespace, planner, chosen) -> None:
    from hymeg.planning import report
    from hymeg.training.yaml_file import setting_line

    say = (lambda line: None) if own.json else print
    if own.write is not None:
        decided = {"hf_model", "config"}.union(*CHOSEN.values())
        kept = {name: value for name, value in args.said.items() if name.replace("-", "_") not in decided}
        flags = report.flags_of(chosen.layout, chosen.settings)
        settings = flags | kept | flags  # in this order; the plan's values
        machine = planner.machine
        lines = [
            f"# {own.gpus} GPUs, {machine.hardware.name} with {machine.device.gpu_memory:g} GiB, {own.gpus_per_node} a "
            "node.",
            *report.comment(chosen, planner),
            *itertools.starmap(setting_line, settings.items()),
        ]
        _write(own.write, "--write", "\n".join(lines) + "\n")
        say(f"recipe: {own.write}")
    if own.sbatch is not None:
        _write(own.sbatch, "--sbatch", report.job(own.write, planner.machine, own.hf or args.hf_model))
        say(f"job: {own.sbatch} (run it with bash)")


def _write(path: str, flag: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(
            f"{flag} {path}: {error.strerror}; give a file in a folder that exists and can be written"
        ) from None


def _say_whether_it_fits(planner, chosen) -> None:
    from hymeg.planning.memory import GIB
    from hymeg.planning.report import why

    if not planner.fits(chosen):
        device = planner.machine.device
        margin = f", {planner.margin / GIB:g} GiB of margin" if planner.margin else ""
        raise UserError(
            f"--gpu-memory {device.gpu_memory:g}: the layout needs {chosen.peak / GIB:.1f} GiB and "
            f"{device.reserve / GIB:.1f} GiB of reserve{margin} ({why(chosen)}); recompute more, cut the model "
            "further, or run plan.py without --config for the layouts that fit"
        )


if __name__ == "__main__":
    main()
