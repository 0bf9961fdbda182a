"""Which of a run's checkpoints are undamaged: looked at by all ranks together, each reading its share of the files."""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore

from hymeg.checksums import MANIFEST, Damaged, damaged_blocks, read_manifest
from hymeg.errors import UserError
from hymeg.training.once import job_store

Exchange = Callable[[str, str], list[str]]
"""Given a name that no other call has, and this rank's text: the texts of all ranks."""


def newest_undamaged(folder: str, iterations: Iterable[int], exchange: Exchange) -> tuple[int | None, list[str]]:
    """The newest of these iterations that no rank finds damaged; and what is wrong with newer ones. All ranks call it.

    One without checksums counts as undamaged, where it is complete.
    """
    wrong = []
    for iteration in sorted(iterations, reverse=True):
        found = exchange(f"iteration {iteration}", _damage(Path(folder, f"iter_{iteration:07d}")))
        damage = next(filter(None, found), None)
        if damage is None:
            return iteration, wrong
        wrong.append(damage)
    return None, wrong


def _damage(folder: Path) -> str:
    """What is wrong with this rank's share of the files; nothing where nothing is."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        manifest = read_manifest(folder / MANIFEST)
        for name, expected in sorted(manifest.files.items())[rank::world] if manifest else ():
            if not (folder / name).is_file():
                return f"{folder / name}: missing"
            if damaged_blocks(folder / name, expected):
                return f"{folder / name}: damaged"
    except (Damaged, UserError) as error:
        return str(error)
    return ""


def exchange_by_store(name: str, text: str) -> list[str]:
    """Before the process groups are there."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return [text]
    store = PrefixStore(f"hymeg/{name}", job_store())
    store.set(str(rank), text)
    store.wait([str(other) for other in range(world)], timedelta(days=1))
    return [store.get(str(other)).decode() for other in range(world)]


def exchange_by_group(name: str, text: str) -> list[str]:
    """Once they are."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [text]
    texts: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(texts, text)
    return texts
