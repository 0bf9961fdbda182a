#!/usr/bin/env python
"""Which layouts of a model fit on a cluster, how fast each would be, and what to submit: without a GPU, in seconds.

    python tools/plan.py --hf DIR --gpus 64 --seq-length 4096 --global-batch-size 1024 [any flag of pretrain_hy.py: it
    is kept] python tools/plan.py --hf DIR --config recipe.yaml --gpus 64

With a recipe that recipe is judged as it stands; with --search it fixes what it says, and the rest is chosen.
"""

import argparse
import dataclasses
import itertools
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
ASSUMED = (
    "bf16",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
)  # on where a search is free to choose


def own_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = _error
    parser.add_argument("--hf", metavar="DIR", help="folder with the model's config.json")
    parser.add_argument("--config", metavar="FILE.yaml", help="a recipe, judged as it stands")
    parser.add_argument("--search", action="store_true", help="with --config: choose what the recipe does not set")
    parser.add_argument("--gpus", type=int, metavar="N", required=True, help="GPUs of the job")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="of them in one node, joined by NVLink (default: 8)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU, as in its name (default: 80)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="its speed: A100, H100, H200, ... (default: by its memory)")
    parser.add_argument(
        "--network-gbps", type=float, default=400, metavar="X", help="Gbit/s between nodes for each GPU (default: 400)"
    )
    imbalance = "tokens of the busiest expert-parallel rank over the mean (default: 1.2)"
    parser.add_argument("--imbalance", type=float, default=1.2, metavar="X", help=imbalance)
    parser.add_argument("--experts-across-nodes", action="store_true", help="let expert parallelism leave the node")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts to list (default: 5)")
    explain = "the K-th layout stage by stage, checked against Megatron's objects on the meta device"
    parser.add_argument("--explain", type=int, nargs="?", const=1, metavar="K", help=explain)
    parser.add_argument(
        "--picture", metavar="FILE.png", help="with --explain: its memory as a picture (default: plan.png)"
    )
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
        ("network_gbps", 1e-9),
        ("imbalance", 1),
        ("top", 1),
    ):
        value = getattr(own, name)
        if not least <= value < 1e6:
            raise UserError(
                f"--{name.replace('_', '-')} {value:g}: {'a positive number' if least < 1 else f'{least} or more'} is "
                "needed"
            )
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
    if own.picture is not None and own.explain is None:
        raise UserError(f"--picture {own.picture} goes with --explain; add it")
    if own.search and own.config is None:
        raise UserError("--search goes with --config: without a recipe it is what plan.py does; leave it out")


def plan(own: argparse.Namespace, rest: list[str]) -> None:
    from hymeg.planning import layout as layouts
    from hymeg.planning import report
    from hymeg.planning.memory import Device
    from hymeg.planning.network import hardware_of
    from hymeg.planning.search import Found, Machine, Planner
    from hymeg.planning.settings import settings_of
    from hymeg.platform.flags import for_gpus
    from hymeg.training.arguments import naming_lines, parse
    from hymeg.training.preflight import layout_of

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(own.gpus)}
    source = [*(["--hf-model", own.hf] if own.hf else []), *(["--config", own.config] if own.config else [])]
    try:
        with for_gpus():
            args, config = parse([*source, *rest])
    except UserError as error:
        raise UserError(str(error).replace("--hf-model", "--hf") if own.hf else str(error)) from error
    if args.fp16:
        raise UserError("--fp16 is not planned for: leave it out for bf16, or give --no-bf16 for fp32")
    hardware = hardware_of(own.gpu, own.gpu_memory)
    machine = Machine(own.gpus, own.gpus_per_node, Device(own.gpu_memory), hardware, own.network_gbps / 8)
    planner = Planner(config, machine, own.imbalance, own.experts_across_nodes)
    with naming_lines(args.explicit):
        _check_batch(args, own)
        layout, settings = layout_of(args), settings_of(args)
        if own.config is not None and not own.search:
            layouts.check(config, layout)
            plans = [planner.plan(layout, settings)]
            found = Found(plans, [], 1, sum(map(planner.fits, plans)))
        else:
            free, fixed = _free(args), {name for name in vars(settings) if name in args.explicit}
            if "main_grads_dtype" in args.explicit or "grad_reduce_in_bf16" in args.explicit:
                fixed.add("grads_in_fp32")
            if "recompute_activations" in args.explicit:
                fixed.add("recompute_granularity")
            settings = dataclasses.replace(
                settings, **dict.fromkeys([name for name in ASSUMED if name not in args.explicit], True)
            )
            found = planner.search(layout, free, settings, fixed)
            found = found._replace(
                fitting=[
                    planner.plan(one.layout, one.settings) for one in found.fitting[: max(own.top, own.explain or 1)]
                ]
            )
    print("\n".join(report.listed(found, machine, own.top)))
    _details(own, args, planner, found)
    _say_whether_it_fits(planner, found.fitting[0])


def _check_batch(args: argparse.Namespace, own: argparse.Namespace) -> None:
    if args.global_batch_size is None and (own.config is None or own.search):
        raise UserError("--global-batch-size is missing: give the samples of a step, e.g. --global-batch-size 256")


def _free(args: argparse.Namespace) -> set[str]:
    free = {field for field, dests in CHOSEN.items() if not any(dest in args.explicit for dest in dests)}
    depth = {"virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"}
    if args.packed:
        free.discard("micro_batch_size")
    return free if depth <= free else free - depth


def _details(own: argparse.Namespace, args: argparse.Namespace, planner, found) -> None:
    from hymeg.planning import report
    from hymeg.planning.picture import draw
    from hymeg.training.yaml_file import setting_line

    number = own.explain or 1
    if not 1 <= number <= len(found.fitting):
        raise UserError(f"--explain {number}: there are {len(found.fitting)} layouts; use 1 to {len(found.fitting)}")
    chosen, machine = found.fitting[number - 1], planner.machine
    if own.explain is not None:
        print("\n" + "\n".join(report.explained(chosen, machine)))
        print(f"\n{_checked(args, planner.config, chosen)}")
        picture = own.picture or "plan.png"
        draw(chosen, machine, picture)
        print(f"memory by part and stage: {picture}")
    if own.write is not None:
        decided = {"hf_model", "config"}.union(*CHOSEN.values())
        kept = {name: value for name, value in args.said.items() if name.replace("-", "_") not in decided}
        flags = report.flags_of(chosen.layout, chosen.settings)
        settings = flags | kept | flags  # in this order; the plan's values
        _write(
            own.write,
            "--write",
            "\n".join([*report.comment(chosen, machine), *itertools.starmap(setting_line, settings.items())]) + "\n",
        )
        print(f"recipe: {own.write}")
    if own.sbatch is not None:
        _write(own.sbatch, "--sbatch", report.job(own.write, machine, own.hf or args.hf_model))
        print(f"job: {own.sbatch} (run it with bash)")


def _checked(args: argparse.Namespace, config, chosen) -> str:
    """Build the fullest stage, and the first and the last, and hold the arithmetic against them."""
    from hymeg.planning.construction import differences

    fullest = max(range(len(chosen.memory)), key=lambda rank: chosen.memory[rank].total)
    ranks = sorted({0, fullest, len(chosen.memory) - 1})
    if wrong := differences(args, config, chosen.layout, chosen.settings, ranks):
        raise RuntimeError(f"the planner's arithmetic is not what Megatron builds: {wrong}")
    return f"built on the meta device: stage {', '.join(map(str, ranks))} of Megatron's own objects, weights, gradients and optimizer shards equal"


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
        raise UserError(
            f"--gpu-memory {device.gpu_memory:g}: the layout needs {chosen.peak / GIB:.1f} GiB and "
            f"{device.reserve / GIB:.1f} GiB of reserve "
            f"({why(chosen)}); recompute more, cut the model further, or run plan.py without --config for the layouts "
            "that fit"
        )


if __name__ == "__main__":
    main()
