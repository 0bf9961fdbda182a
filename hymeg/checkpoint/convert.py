"""Hugging Face checkpoints to distributed ones and back: streaming, in several processes, without a model, a GPU or a
process group.

Everything is checked and planned to the byte before anything is written (`conversion_plan`); then rows are moved
(`transfer`), into a folder that appears whole or not at all (`folders`). Names and places come from `mapping`.
"""

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hymeg.checkpoint.compare import compare_rows
from hymeg.checkpoint.conversion_plan import (
    DTYPES,
    Pairs,
    Plan,
    pairs_with_dist,
    pairs_with_hf,
    plan_to_dist,
    plan_to_hf,
)
from hymeg.checkpoint.dist_files import RELEASE, TRACKER
from hymeg.checkpoint.folders import built_beside, carry
from hymeg.checkpoint.spool import Spool
from hymeg.checkpoint.transfer import write
from hymeg.checkpoint.workers import Progress, aside
from hymeg.errors import UserError
from hymeg.hf.files import overwrite_start, write_whole
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES

__all__ = ["DTYPES", "Summary", "dist_to_hf", "hf_to_dist"]

Say = Callable[[str], None]


class Summary(NamedTuple):
    """What a conversion did."""

    num_tensors: int
    num_bytes: int
    seconds: float
    peak_bytes: int  # resident memory of all processes at a time, added up

    def __str__(self) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-6) / 1e9
        memory = f"{self.peak_bytes / 1e6:,.0f} MB of memory"
        return (
            f"{self.num_tensors:,} tensors, {self.num_bytes:,} bytes, {self.seconds:.1f} s, {rate:.2f} GB/s, {memory}"
        )


def hf_to_dist(
    hf: str | Path,
    dist: str | Path,
    *,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Convert the Hugging Face checkpoint in folder `hf` to a distributed one in `dist`, with all that training needs
    beside the weights.

    dtypes are kept, but for the expert bias, which becomes fp32.

    Args:
        workers: number of processes.
        overwrite: replace what an earlier conversion wrote to `dist`.
        verify: read everything back and compare it, before `dist` appears.
        say: is given lines for the user.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of its config.json; `dist` cannot be written.
            Nothing is left behind.
    """
    started, hf, dist, spool = time.monotonic(), Path(hf), Path(dist), Spool()
    plan, peak = aside(lambda: plan_to_dist(spool, hf, dist, workers, overwrite))
    for note in plan.notes:
        say(note)
    with built_beside(dist, say) as partial:
        folder = partial / RELEASE
        folder.mkdir()
        peak = max(peak, _move(plan, spool, folder, workers, "to distributed"))
        if verify:
            peak = max(peak, _verify(spool, lambda: pairs_with_dist(spool, plan, folder, workers)))
        carry(plan.carried, partial)
        plan.config.save(partial)
        write_whole(partial / TRACKER, RELEASE.encode())
    return Summary(plan.num_tensors, plan.num_bytes, time.monotonic() - started, peak)


def dist_to_hf(
    dist: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Convert the distributed checkpoint in folder `dist` to a Hugging Face one in `hf`. Optimizer state beside the
    weights is passed over.

    Args:
        iteration: which one; None: the one that the tracker names.
        layout: "hub", the published names, or "fused", transformers' names in memory.
        max_shard_bytes: for each safetensors file.
        dtype: "bf16", "fp32" or "keep". The expert bias is always fp32.
        base_hf: the Hugging Face folder that training began with. From it come MTP layers that training did not hold,
            and, where `dist` has no config.json, that and the tokenizer.
        workers, overwrite, verify, say: as for `hf_to_dist`.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of the config.json; `hf` cannot be written. Nothing
            is left behind.
    """
    started, dist, hf, spool = time.monotonic(), Path(dist), Path(hf), Spool()
    base = Path(base_hf) if base_hf is not None else None
    choices = {"iteration": iteration, "max_shard_bytes": max_shard_bytes, "dtype": dtype, "overwrite": overwrite}
    shared = {"layout": layout, "base_hf": base, "workers": workers}
    plan, peak = aside(lambda: plan_to_hf(spool, dist, hf, **choices, **shared))
    for note in plan.notes:
        say(note)
    with built_beside(hf, say) as partial:
        peak = max(peak, _move(plan, spool, partial, workers, "to Hugging Face"))
        if verify:
            peak = max(peak, _verify(spool, lambda: pairs_with_hf(spool, plan, partial, **shared)))
        carry(plan.carried, partial)
        plan.config.save(partial)
    return Summary(plan.num_tensors, plan.num_bytes, time.monotonic() - started, peak)


def _move(plan: Plan, spool: Spool, folder: Path, workers: int, what: str) -> int:
    """Write all that is planned; the peak resident memory of all processes, in bytes."""
    shares = [functools.partial(spool.read, part) for part in plan.shares]
    peak = write(folder, plan.sizes, shares, workers, Progress(what, plan.num_bytes))
    for name, data in spool.read(plan.headers):  # after the tensors: a file that was not finished is none
        overwrite_start(folder / name, data)
    for name, data in spool.read(plan.after):
        write_whole(folder / name, data)
    return peak


def _verify(spool: Spool, make_pairs: Callable[[], Pairs]) -> int:
    """Read back and compare; the peak resident memory of all processes, in bytes."""
    pairs, planning = aside(make_pairs)
    results, comparing = compare_rows(
        [spool.read(part) for part in pairs.shares], Progress("verifying", pairs.num_bytes)
    )
    differences = list(itertools.chain(*results))
    if differences:
        first = differences[0]
        raise UserError(
            f"{len(differences)} of {pairs.num_pairs} tensors were not written as they were read, the first "
            f"{first.name} ({first.what}); "
            f"disk or memory is faulty, or the source was changed: convert again"
        )
    return max(planning, comparing)
