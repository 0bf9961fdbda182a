"""Runs that were made, beside what the planner says of them: for `plan.py --measured`."""

import contextlib
import shlex
import statistics
from collections.abc import Sequence

from hymeg.errors import UserError, about
from hymeg.planning.measured import Calibration, Observation
from hymeg.planning.memory import GIB
from hymeg.planning.network import Machine
from hymeg.planning.search import Planner
from hymeg.planning.settings import settings_of
from hymeg.platform import for_gpus
from hymeg.reporting.reading import read_run
from hymeg.training.arguments import parse
from hymeg.training.preflight import layout_of

_SECONDS, _LOAD = "seconds per step", "load of the busiest expert-parallel rank over the mean"
_FIRST = 2  # steps that warm up


def observe(folder: str, hf: str | None, machine: Machine, attended: float | None) -> Observation:
    """A run by its record, in the layout and with the settings of its command line.

    Args:
        folder: the run's `--save` or `--tensorboard-dir`.
        hf: folder with config.json, in place of the command line's.
        machine: whose GPUs and links it ran on.
        attended: tokens of the row that a token lies in, where samples are packed.

    Raises:
        UserError: there is no record, too few steps in it, or a command line that is not understood.
    """
    with about("--measured "):
        run = read_run(folder)
    start = run.starts[-1]
    # Of its last life: those before may have had other layouts.
    seconds, loads = (
        [value for iteration, value in run.curves.get(name, []) if iteration > start["iteration"]]
        for name in (_SECONDS, _LOAD)
    )
    seconds = seconds[_FIRST:]
    if not seconds:
        raise UserError(
            f"--measured {folder}: fewer than {_FIRST + 1} steps are logged since it started last; let it go on, or "
            "give another"
        )
    words = shlex.split(start["command"])[1:] + ([] if hf is None else ["--hf-model", hf])
    where = contextlib.nullcontext() if start["device"] == "cpu" else for_gpus()
    with about(f"--measured {folder}, its command line: "), where:
        args, config = parse(words)
        args.world_size = start["world_size"]
        layout, settings = layout_of(args), settings_of(args)
    imbalance = statistics.median(loads) if loads and layout.expert_model_parallel_size > 1 else None
    planner = Planner(config, machine, imbalance or 1.0, attended=attended if args.packed else None)
    plan = planner.plan(layout, settings)
    excesses = [peak - stage.total for peak, stage in zip(run.peak_bytes, plan.memory, strict=False)]
    return Observation(run.name, statistics.median(seconds), plan.time, imbalance, max(excesses, default=None))


def told(observations: Sequence[Observation], calibration: Calibration) -> list[str]:
    """What came of it, in lines."""
    lines = []
    for of in observations:
        parts = [f"{of.seconds:.3g} s a step, {of.estimate.total:.3g} s estimated"]
        if of.imbalance is not None:
            parts.append(f"{of.imbalance:.2f} x the mean tokens on the busiest expert-parallel rank")
        if of.excess is not None:
            parts.append(f"{of.excess / GIB:+.1f} GiB against the estimate on the GPU where it is most")
        lines.append(f"Measured, {of.name}: {'; '.join(parts)}")
    lines.append(
        f"So times are the estimates', {calibration.compute:.3g} times for computing and "
        f"{calibration.communication:.3g} times for communication."
    )
    return lines
