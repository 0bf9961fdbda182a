"""The record of a run: plain files in the folder `records` of its `--save` (or `--tensorboard-dir`), written as
training logs.

`run.jsonl` has an object a line, each with "kind" and "iteration":

    start         a life of the run begins: command, layout, model, data, versions
    step          the log line's figures: losses, learning_rate, grad_norm, seconds, tokens_per_second, tflops_per_gpu,
                  mfu, expert_load by layer, expert_parallel_load; peak_bytes of each pipeline stage's fullest GPU;
                  "expert_counts" is the place of the counts, in bytes
    evaluation    losses of a data set
    save          a checkpoint, and the seconds for which training waited
    translations  scores and alarms of held-out rows, and the file beside that has them

`expert_counts.u32` holds for each step `[layers, experts]` counts of tokens since the step before, uint32,
little-endian; layers and experts stand in the start. A line that was cut off by a crash is followed by a line feed.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "records"
LINES, COUNTS, TRANSLATIONS = "run.jsonl", "expert_counts.u32", "translations"


class RunRecord:
    """Writes a run's record. What cannot be written is said once and does not end the training.

    Args:
        folder: of the record; None: nothing is written.
        facts: of the start.
        say: told what went wrong.
    """

    def __init__(self, folder: Path | None, facts: dict[str, Any], say: Callable[[str], None]):
        self.folder, self.facts, self.say = folder, facts, say
        self.has_begun = False

    def begin(self, iteration: int) -> None:
        """The run goes on from `iteration`; called again, nothing happens."""
        if not self.has_begun:
            self.has_begun = True
            self.add("start", iteration, time=time.time(), **self.facts)

    def add(self, kind: str, iteration: int, **figures: Any) -> None:
        """A line."""
        self.begin(iteration)
        line = json.dumps({"kind": kind, "iteration": iteration} | _finite(figures), ensure_ascii=False)
        self._append(LINES, f"{line}\n".encode())

    def add_step(self, iteration: int, counts: np.ndarray | None, **figures: Any) -> None:
        """A line of kind step; `counts` `[layers, experts]` of its experts."""
        self.begin(iteration - 1)
        place = None if counts is None else self._append(COUNTS, counts.astype("<u4").tobytes())
        self.add("step", iteration, **figures, expert_counts=place)

    def add_translations(self, iteration: int, rows: list[dict[str, Any]], **figures: Any) -> None:
        """A line of kind translations, and a file of `rows` beside."""
        name = f"{TRANSLATIONS}/iter_{iteration:07d}.jsonl"
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        self._append(name, text.encode(), anew=True)
        self.add("translations", iteration, file=name, **figures)

    def _append(self, name: str, data: bytes, anew: bool = False) -> int | None:
        """Where in the file the data lie."""
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb" if anew else "ab+") as file:
                place = file.seek(0, os.SEEK_END)
                if name == LINES and place:
                    file.seek(-1, os.SEEK_END)
                    data = data if file.read() == b"\n" else b"\n" + data
                file.write(data)
        except OSError as error:
            self.say(f"{path}: cannot be written: {error.strerror or error}; the run's record ends here")
            self.folder = None
            return None
        return place


def _finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
