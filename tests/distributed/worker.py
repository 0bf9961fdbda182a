"""Runs many trainings in one gloo world: python -m torch.distributed.run --nproc-per-node N worker.py CASES.json RESULTS.json.

A case is `{"name": ..., "argv": [...], "check": None}`; its result the losses and gradient norms of every step as the trainer computed them,
unrounded. With a check, the function of that name in checks.py is called instead, and its result is the case's.
"""

import gc
import json
import os
import sys

from hymeg import platform

platform.install()

import checks  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.training import training  # noqa: E402

from hymeg.platform.patches import patched  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.preflight import preflight  # noqa: E402
from hymeg.training.run import train  # noqa: E402


def run(argv: list[str]) -> dict:
    """Train as the command line says; on every rank the figures of the last pipeline stage."""
    args, config = parse(argv)
    notes = []
    preflight(args, config, notes.append)
    steps = []
    train_step = training.train_step

    def recorded(*step_args, **step_kwargs):
        result = train_step(*step_args, **step_kwargs)
        loss = {key: value.item() for key, value in result[0].items()}
        steps.append({"loss": loss.get("lm loss"), "grad_norm": float(result[5])})
        return result

    with patched(training, "train_step", recorded, "tests read losses unrounded"):
        train(args, config)
    last = dist.get_world_size() - 1
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, steps)
    return {"steps": gathered[last], "notes": notes}


def clean_up() -> None:
    """Forget the case: Megatron's globals, and every process group but the world's."""
    training.destroy_global_state()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def main(cases_path: str, results_path: str) -> None:
    with open(cases_path) as file:
        cases = json.load(file)
    dist.init_process_group("gloo")
    results = {}
    for case in cases:
        if dist.get_rank() == 0:
            print(f"=== {case['name']}", flush=True)
        results[case["name"]] = getattr(checks, case["check"])(case["argv"]) if case["check"] else run(case["argv"])
        clean_up()
        if dist.get_rank() == 0:
            with open(results_path, "w") as file:
                json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert not parallel_state.model_parallel_is_initialized()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    main(*sys.argv[1:])
