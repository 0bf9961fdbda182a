"""A run's record, read: the figures of the steps that count, by name.

A run that was resumed from an earlier checkpoint made some steps twice; those of the later life count.
"""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from hymeg.errors import UserError
from hymeg.reporting.record import COUNTS, FOLDER, LINES

Series = list[tuple[int, float]]
"""(iteration, figure), in order."""

_FIGURES = {  # of a step, by what a page calls them
    "gradient norm": "grad_norm",
    "learning rate": "learning_rate",
    "tokens/s": "tokens_per_second",
    "seconds per step": "seconds",
    "TFLOP/s per GPU": "tflops_per_gpu",
    "MFU": "mfu",
    "positions that are no padding": "full",
    "load of the busiest expert-parallel rank over the mean": "expert_parallel_load",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a record holds."""

    name: str  # by which a page calls it
    folder: Path
    starts: list[dict[str, Any]]  # of its lives
    losses: dict[str, Series]  # by name, "lm loss" in training and "lm loss, validation"
    curves: dict[str, Series]  # by name
    saves: list[int]  # iterations
    translations: list[dict[str, Any]]  # of each evaluation its scores and alarms
    examples: dict[int, list[dict[str, Any]]]  # iteration -> rows
    load_iterations: list[int]  # of the expert counts
    counts: np.ndarray  # [iterations, layers, experts], tokens
    peak_bytes: list[int]  # of each pipeline stage's fullest GPU, in the last life; none where it was not measured
    unread: int  # lines that were cut off

    @property
    def resumes(self) -> list[int]:
        """Where a life went on from."""
        return [start["iteration"] for start in self.starts[1:]]

    @property
    def load(self) -> np.ndarray:
        """Tokens of each expert over the mean of its layer, `[iterations, layers, experts]`; NaN without experts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.counts / self.counts.mean(axis=2, keepdims=True)

    def numbers(self) -> dict[str, Any]:
        """All that a page shows, as JSON takes it."""
        by_name = {"losses": self.losses, "curves": self.curves}
        loads = {
            "iterations": self.load_iterations,
            "busiest over mean, by layer": _rounded(self.load.max(axis=2)) if len(self.counts) else [],
            "tokens of the whole run, by layer and expert": self.counts.sum(axis=0).tolist(),
        }
        parts = {"starts": self.starts, "resumes": self.resumes, "saves": self.saves, "expert load": loads}
        return {"name": self.name, "folder": str(self.folder)} | by_name | parts | {"translations": self.translations}


def read_run(folder: str | os.PathLike, name: str | None = None) -> Run:
    """The run whose `--save` or `--tensorboard-dir` was `folder`; or the folder of the record itself.

    Raises:
        UserError: there is no record, or nothing in it that a page could show.
    """
    folder = Path(folder)
    records = folder / FOLDER if (folder / FOLDER / LINES).is_file() else folder
    try:
        text = (records / LINES).read_text(errors="replace")
    except OSError as error:
        raise UserError(
            f"{folder}: no record of a run ({FOLDER}/{LINES}): {error.strerror}; give the --save (or "
            "--tensorboard-dir) of a training"
        ) from error
    lines, unread = _lines(text)
    starts = [line for line in lines if line["kind"] == "start"]
    if not starts:
        raise UserError(f"{records / LINES}: no run has begun in it; give the --save of a training")
    steps = _of(lines, "step")
    # A life before may have had other stages.
    peaks = [step.get("peak_bytes") for step in steps if step["iteration"] > starts[-1]["iteration"]]
    iterations, counts = _counts(records / COUNTS, starts[-1], steps)
    translations = _of(lines, "translations")
    return Run(
        name or folder.resolve().name,
        folder,
        starts,
        _losses(steps, _of(lines, "evaluation")),
        {title: series for title, key in _FIGURES.items() if (series := _series(steps, key))},
        [line["iteration"] for line in _of(lines, "save")],
        translations,
        {line["iteration"]: _rows(records / line["file"]) for line in translations},
        iterations,
        counts,
        [max(of) for of in zip(*filter(None, peaks), strict=True)],
        unread,
    )


def _lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """Those that count, without what a later life made anew; and how many were cut off."""
    kept, unread = [], 0
    for written in filter(None, text.split("\n")):  # not splitlines(), which also cuts at U+2028 inside a text
        try:
            line = json.loads(written)
            line |= {"iteration": int(line["iteration"]), "kind": line["kind"]}
        except (ValueError, TypeError, KeyError):
            unread += 1
            continue
        if line["kind"] == "start":
            kept = [other for other in kept if other["iteration"] <= line["iteration"]]
        kept.append(line)
    return kept, unread


def _of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """In the order of their iterations; of two alike the later one."""
    by_place = {(line["iteration"], line.get("set")): line for line in lines if line["kind"] == kind}
    return [by_place[place] for place in sorted(by_place, key=lambda place: (place[0], place[1] or ""))]


def _series(lines: list[dict[str, Any]], key: str) -> Series:
    return [(line["iteration"], line[key]) for line in lines if line.get(key) is not None]


def _losses(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Series]:
    losses: dict[str, Series] = {}
    for line in [*steps, *evaluations]:
        for name, value in line["losses"].items():
            if value is not None:
                title = f"{name}, {line['set']}" if "set" in line else name
                losses.setdefault(title, []).append((line["iteration"], value))
    return losses


def _counts(path: Path, start: dict[str, Any], steps: list[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Of each step that has them, whole in the file."""
    shape = tuple(start["expert_counts"])
    places = {step["iteration"]: step["expert_counts"] for step in steps if step.get("expert_counts") is not None}
    size = math.prod(shape) * 4
    data = np.memmap(path, np.uint8, "r") if path.is_file() and path.stat().st_size else np.zeros(0, np.uint8)
    found = {
        iteration: np.frombuffer(data[place : place + size].tobytes(), "<u4").reshape(shape)
        for iteration, place in places.items()
        if place + size <= len(data)
    }
    return list(found), np.stack(list(found.values())).astype(np.int64) if found else np.zeros((0, *shape), np.int64)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Those of a file of translations, up to where it was cut off; none where it was lost."""
    rows = []
    with contextlib.suppress(OSError, ValueError):
        for line in filter(None, path.read_text(errors="replace").split("\n")):
            rows.append(json.loads(line))
    return rows


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(value) else round(float(value), 4) for value in row] for row in values]
