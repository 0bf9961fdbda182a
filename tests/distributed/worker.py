"""Runs many trainings in one gloo world: python -m torch.distributed.run --nproc-per-node N worker.py CASES.json
RESULTS.json.

A case is `{"name": ..., "argv": [...], "check": None}`; its result the losses and gradient norms of every step as the
trainer computed them, unrounded, with the sequences of conversations that it drew; the loss of every evaluation; and
the bytes that each rank held all the time. With a check, the function of that name in checks.py is called instead, and
its result is the case's.
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what all rooms of the tests use

from hymeg import platform

platform.install()

import checks  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.training import training  # noqa: E402
from static_bytes import static_bytes  # noqa: E402

from hymeg.data.conversations import ConversationDataset  # noqa: E402
from hymeg.platform.patches import patched  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.preflight import preflight  # noqa: E402
from hymeg.training.run import train  # noqa: E402


def run(argv: list[str]) -> dict:
    """Train as the command line says; on every rank the figures of the last pipeline stage."""
    args, config = parse(argv)
    notes = []
    preflight(args, config, notes.append)
    steps, evaluations, held, drawn = [], [], [], []
    train_step, set_up, evaluate, sequence = (
        training.train_step,
        training.setup_model_and_optimizer,
        training.evaluate,
        ConversationDataset.sequence,
    )

    def noted(dataset, sample):
        if dataset.index_split == Split.train:
            drawn.append(sequence(dataset, sample))
        return sequence(dataset, sample)

    def recorded(*step_args, **step_kwargs):
        drawn.clear()
        result = train_step(*step_args, **step_kwargs)
        loss = {key: value.item() for key, value in result[0].items()}
        steps.append({"loss": loss.get("lm loss"), "grad_norm": float(result[5]), "drawn": list(drawn)})
        return result

    def evaluated(*evaluate_args, **evaluate_kwargs):
        result = evaluate(*evaluate_args, **evaluate_kwargs)
        evaluations.extend(value.item() for key, value in result[0].items() if key == "lm loss")
        return result

    def watched(*set_up_args, **set_up_kwargs):
        made = set_up(*set_up_args, **set_up_kwargs)
        held.extend(made[:2])
        return made

    with (
        patched(training, "train_step", recorded, "tests read losses unrounded"),
        patched(training, "evaluate", evaluated, "tests read losses unrounded"),
        patched(ConversationDataset, "sequence", noted, "tests read what is drawn"),
        patched(training, "setup_model_and_optimizer", watched, "tests weigh what it made"),
    ):
        train(args, config)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (steps, evaluations, _speaks_for_its_data(), static_bytes(*held)))
    steps, evaluations, *_ = gathered[-1]
    for number, step in enumerate(steps):
        step["drawn"] = [
            one for steps_of_rank, _, speaks, _ in gathered if speaks for one in steps_of_rank[number]["drawn"]
        ]
    return {"steps": steps, "evaluations": evaluations, "notes": notes, "static": [static for *_, static in gathered]}


def _speaks_for_its_data() -> bool:
    """One rank of those that draw the same samples."""
    context_parallel = parallel_state.get_context_parallel_rank()
    return (
        parallel_state.is_pipeline_first_stage()
        and context_parallel == parallel_state.get_tensor_model_parallel_rank() == 0
    )


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
