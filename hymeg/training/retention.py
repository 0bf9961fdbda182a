"""Older checkpoints, removed as new ones are complete; and a file that says how a run is."""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

from hymeg.checkpoint.dist_files import FORMAT_FILE, TRACKER
from hymeg.errors import UserError
from hymeg.files import write_whole

HEARTBEAT = "heartbeat.json"


def surplus(complete: list[int], keep_last: int, keep_every: int | None, needed: set[int]) -> list[int]:
    """The iterations to remove: all but the newest `keep_last`, the multiples of `keep_every` and those `needed`."""
    kept = {*sorted(complete)[-keep_last:], *needed}
    return [step for step in sorted(complete) if step not in kept and not (keep_every and step % keep_every == 0)]


def remove_older(save: str, keep_last: int, keep_every: int | None, loaded: int | None) -> None:
    """In the background, of the iterations in `save`. The one that the tracker names is never removed, nor the one that
    was loaded.
    """
    from hymeg.training.weights import complete_iterations

    needed = {step for step in (_named(save), loaded) if step is not None}
    folders = [
        Path(save, f"iter_{step:07d}") for step in surplus(complete_iterations(save), keep_last, keep_every, needed)
    ]
    threading.Thread(target=lambda: [_remove(folder) for folder in folders]).start()


def _remove(folder: Path) -> None:
    """What makes it a checkpoint goes first."""
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            (folder / FORMAT_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _named(save: str) -> int | None:
    try:
        return int(Path(save, TRACKER).read_text())
    except (OSError, ValueError):
        return None


def beat(save: str, iteration: int, seconds: float, line: str) -> None:
    """Leave in `save` how the run is: what Megatron's log line says of this iteration, which took so long."""
    loss = re.search(r"lm loss: (\S+)", line)
    found = {
        "iteration": iteration,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "loss": float(loss[1]) if loss else None,
        "seconds_per_iteration": seconds,
        "last_checkpoint": _named(save),
        "pid": os.getpid(),
    }
    with contextlib.suppress(UserError):  # a full disk is told of when a checkpoint does not fit
        write_whole(Path(save, HEARTBEAT), json.dumps(found).encode())
