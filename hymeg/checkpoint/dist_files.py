"""The files of a distributed (Megatron torch_dist, PyTorch DCP) checkpoint: their names, and which folder is meant.

A checkpoint folder holds one folder for each iteration, `iter_0000100` or `release` for one that no training made, and
the tracker `latest_checkpointed_iteration.txt`, which names one of them ("100" or "release"). An iteration's folder
holds: `*.distcp`, stored tensors and objects one after the other; `.metadata`, a pickle that says for each key its
dtype, global shape and chunks (offset and shape in the global tensor), and for each chunk its file, position and
length; `metadata.json`, which names the format and, written last, makes the folder a checkpoint. What is no tensor
(flags, version) is one object, key `common_state/shard_0_1`: torch.save of a list of one dictionary. Sources:
torch/distributed/checkpoint/{metadata,filesystem}.py; megatron/core/dist_checkpointing/{core,serialization}.py.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from hymeg.checkpoint.mapping import Shape
from hymeg.errors import UserError
from hymeg.files import shown

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
METADATA, FORMAT_FILE = ".metadata", "metadata.json"
SOURCE_FILE = "source.json"  # beside the tracker: what training converted the checkpoint from, by itself
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.", "mtp.")
NEMO_WEIGHTS = "weights"  # in a checkpoint of NeMo 2: the folder that is an iteration's elsewhere
ADAPTER_KEYS = "adapter."
COMMON_STATE_KEY = "common_state/shard_0_1"


_ITERATION = re.compile(r"iter_(\d{7,18})")


class StoredChunk(NamedTuple):
    """A block of a tensor and where it is stored: `length` bytes from `position` on."""

    file: str
    position: int
    length: int
    offset: Shape
    shape: Shape


class StoredTensor(NamedTuple):
    """A tensor in its chunks, which together fill it exactly once."""

    dtype: str
    shape: Shape
    chunks: list[StoredChunk]


def iteration_folder(
    directory: str | os.PathLike, iteration: int | None = None, option: str = "--iteration"
) -> tuple[Path, int | None]:
    """The folder of one iteration (None in the result: a release) in a checkpoint folder: the tracker's, or
    `iteration`, which the user gives by the flag `option`.

    `directory` may also be an iteration's folder itself.

    Raises:
        UserError: there is no such folder, no tracker, or the iteration was not saved to the end.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; give the folder of a distributed checkpoint (with {TRACKER})")
    if not (directory / FORMAT_FILE).is_file() and (directory / NEMO_WEIGHTS / FORMAT_FILE).is_file():
        directory = directory / NEMO_WEIGHTS
    if (directory / FORMAT_FILE).is_file() and iteration is None:
        named = re.fullmatch(r"iter_(\d+)", directory.resolve().name)
        return directory, int(named[1]) if named else None
    said = f"{TRACKER} names it" if iteration is None else f"{option} {iteration}"
    if iteration is None:
        if not (directory / TRACKER).is_file():
            hint = "; an unfinished conversion? run it again" if directory.name.endswith(".partial") else ""
            raise UserError(
                f"{directory}: not a distributed checkpoint: no {TRACKER} "
                f"({_available(directory)}){hint or f'; give {option} N or the right folder'}"
            )
        iteration = named_iteration(directory, option)
    name = RELEASE if iteration is None else f"iter_{iteration:07d}"
    if name not in complete_iterations(directory):
        raise UserError(
            f"{directory}: {said}, but {name} is missing or was not saved to the end ({_available(directory)}); give "
            f"{option} N of a complete one"
        )
    return directory / name, iteration


def complete_iterations(directory: Path) -> list[str]:
    """The folders of a checkpoint's iterations that were saved to the end, in order."""
    numbers = sorted((int(found[1]), name) for name in os.listdir(directory) if (found := _ITERATION.fullmatch(name)))
    names = [name for _, name in numbers] + [RELEASE]
    return [name for name in names if (directory / name / FORMAT_FILE).is_file()]


def named_iteration(directory: Path, option: str = "--iteration") -> int | None:
    """The iteration that the tracker in `directory` names; None for a release. Raises UserError where it names none."""
    content = tracker_content(directory)
    if content != RELEASE and not re.fullmatch(r"\d{1,18}", content):
        raise UserError(
            f"{directory / TRACKER} names {shown(content)}; an iteration or {RELEASE!r} is needed "
            f"({_available(directory)}): write it there, or give {option}"
        )
    return None if content == RELEASE else int(content)


def tracker_content(directory: Path) -> str:
    """What the tracker says, whatever it is. Raises UserError where it cannot be read."""
    try:
        with open(directory / TRACKER, encoding="utf-8") as file:
            return file.read(100).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{directory / TRACKER}: cannot be read ({error}); write the iteration to load into it, or {RELEASE!r}"
        ) from None


def _available(directory: Path) -> str:
    complete = [name.removeprefix("iter_").lstrip("0") or "0" for name in complete_iterations(directory)[-5:]]
    return f"complete in it: {', '.join(complete)}" if complete else "there is no complete one in it"
