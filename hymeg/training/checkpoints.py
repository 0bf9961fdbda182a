"""The checkpoints in a run's folder: which are whole, which is the newest undamaged, which older ones are removed."""

import contextlib
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from hymeg.checkpoint.dist_files import FORMAT_FILE, RELEASE, TRACKER, complete_iterations, named_iteration
from hymeg.checksums import MANIFEST, damaged_blocks, read_manifest
from hymeg.errors import UserError
from hymeg.training.once import rank, told_by_all, world_size


def is_distributed_checkpoint(folder: str) -> bool:
    return Path(folder, TRACKER).is_file()


def complete_steps(folder: str) -> list[int]:
    """The iterations that were saved to the end, in order."""
    return [step_of(Path(name)) for name in complete_iterations(Path(folder)) if name != RELEASE]


def step_of(folder: Path) -> int:
    """Of `.../iter_0000100`."""
    return int(folder.name.removeprefix("iter_"))


def tracked_step(folder: str) -> int | None:
    """The iteration that the tracker names, where it names one."""
    try:
        return named_iteration(Path(folder))
    except UserError:
        return None


def newest_undamaged(folder: str, steps: Iterable[int]) -> tuple[int | None, list[str]]:
    """The newest of these iterations that no rank finds damaged, each reading its share of the files; and what is wrong
    with newer ones. One without checksums, but complete, counts as undamaged. All ranks call it.
    """
    wrong = []
    for step in sorted(steps, reverse=True):
        found = told_by_all(f"iteration {step}", _damage(Path(folder, f"iter_{step:07d}")))
        damage = next(filter(None, found), None)
        if damage is None:
            return step, wrong
        wrong.append(damage)
    return None, wrong


def _damage(folder: Path) -> str:
    """What is wrong with this rank's share of the files; nothing where nothing is."""
    try:
        manifest = read_manifest(folder / MANIFEST) or {}
        for name, expected in sorted(manifest.items())[rank() :: world_size()]:
            if not (folder / name).is_file():
                return f"{folder / name}: missing"
            if damaged_blocks(folder / name, expected):
                return f"{folder / name}: damaged"
    except UserError as error:
        return str(error)
    return ""


def surplus(complete: list[int], keep_last: int, keep_every: int | None, needed: set[int]) -> list[int]:
    """The iterations to remove: all but the newest `keep_last`, the multiples of `keep_every` and those `needed`."""
    kept = {*sorted(complete)[-keep_last:], *needed}
    return [step for step in sorted(complete) if step not in kept and not (keep_every and step % keep_every == 0)]


def remove_older(save: str, new: int, keep_last: int, keep_every: int | None, loaded: int | None) -> None:
    """In the background, of the iterations in `save` up to the `new` one, which the tracker does not name yet: later
    ones are of a life that this one went back behind. Never the one that the tracker names, nor the one loaded.
    """
    complete = [step for step in complete_steps(save) if step <= new]
    needed = {step for step in (tracked_step(save), loaded) if step is not None}
    folders = [Path(save, f"iter_{step:07d}") for step in surplus(complete, keep_last, keep_every, needed)]
    threading.Thread(target=lambda: [_remove(folder) for folder in folders]).start()


def _remove(folder: Path) -> None:
    """What makes it a checkpoint goes first."""
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            (folder / FORMAT_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
