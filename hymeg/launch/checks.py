"""What a node can say of itself before a start: packages, GPUs, memory, folders. A check of the node gives a line for
each thing that is wrong.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

import hymeg
from hymeg.errors import UserError

_DISTRIBUTIONS = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "transformer-engine")
_GPU_GIB_IN_USE = 2.0  # more than a driver and a display need
_HOST_GIB_PER_PROCESS = {"gpu": 8.0, "cpu": 0.5}
_HOST_GIB_IN_RECIPE = re.compile(r"^#.*?\b([\d,]+) GiB of host memory a node", re.MULTILINE)
_BEGIN_ANEW = {"finetune": "no_finetune", "no_load_optim": "load_optim"}
"""Switches by which every start begins something anew, and what undoes them."""
_PROCESSES_IN_RECIPE = 8  # on a node, for which tools/plan.py writes that


class Run(NamedTuple):
    """What recipe and flags say that matters before a start."""

    save: str | None = None
    load: str | None = None
    ckpt_step: str | None = None
    host_gib: float | None = None
    """Of host memory that each process needs by the recipe's comment: a save or a load holds 12 bytes for every
    parameter of the model shard.
    """
    begins_anew: tuple[str, ...] = ()
    """Of _BEGIN_ANEW what is given."""


def read_run(recipe: str, words: list[str]) -> Run:
    """The last one wins, as it does for the training itself, which will say what is wrong with the rest."""
    try:
        text = Path(recipe).read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{recipe} cannot be read as YAML ({' '.join(str(error).split())}); give a recipe: flags as keys of a flat "
            "file"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{recipe} is no recipe: a flat YAML file is needed, whose keys are flags of pretrain_hy.py")
    found = {str(key).replace("-", "_"): value for key, value in settings.items()}
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            name = option[2:].replace("-", "_")
            found.pop(name, None)  # the last one is the last in it
            found[name] = value if equals else next(iter(words[index + 1 :]), None)
    flags = {name: str(found[name]) for name in ("save", "load", "ckpt_step") if found.get(name) is not None}
    planned = _HOST_GIB_IN_RECIPE.search(text)
    gib = float(planned[1].replace(",", "")) / _PROCESSES_IN_RECIPE if planned else None
    said = [name for name, value in found.items() if value is not False]
    given = [on for on, off in _BEGIN_ANEW.items() if [None, *(n for n in said if n in (on, off))][-1] == on]
    return Run(**flags, host_gib=gib, begins_anew=tuple(given))


def host_gib(run: Run, processes: int) -> float:
    """Of host memory that a node needs: HYMEG_HOST_GIB, what the recipe was planned with, or a little."""
    said = os.environ.get("HYMEG_HOST_GIB")
    if said is None:
        return processes * (run.host_gib or _HOST_GIB_PER_PROCESS["cpu" if _on_cpu() else "gpu"])
    if re.fullmatch(r"\d+(\.\d+)?", said) is None:
        raise UserError(f"HYMEG_HOST_GIB {said!r}: the GiB of host memory that a node needs, a number such as 400")
    return float(said)


def _on_cpu() -> bool:
    return os.environ.get("HYMEG_PLATFORM") == "cpu"


def check_run(run: Run) -> None:
    """A job that is started again must find its own checkpoints."""
    if run.save is None:
        raise UserError(
            "no --save: a job that is requeued would begin anew; give --save DIR --load DIR, and "
            "--pretrained-checkpoint where to begin"
        )
    if run.load is None or os.path.realpath(run.load) != os.path.realpath(run.save):
        found = "no --load" if run.load is None else f"--load {run.load}"
        raise UserError(
            f"--save {run.save} with {found}: a requeued job could not go on from its own checkpoints; give --load "
            f"{run.save}, and where to begin as --pretrained-checkpoint"
        )
    if run.ckpt_step is not None:
        raise UserError(
            f"--ckpt-step {run.ckpt_step}: a requeued job would go back to that step each time; leave it out, and "
            f"write {run.ckpt_step} into {run.load}/latest_checkpointed_iteration.txt"
        )
    for name in run.begins_anew:
        what = "at iteration 0" if name == "finetune" else "with a new optimizer"
        raise UserError(
            f"--{name.replace('_', '-')}: a requeued job would begin {what} each time; leave it out, and give where to "
            f"begin as --pretrained-checkpoint, of which weights alone are taken, with {run.save} empty"
        )


def check_num_gpus(recipe: str, num_nodes: int, processes: int, any_number: bool) -> str | None:
    """A recipe's name says how many GPUs it was planned for (`..._16xh100_80gb_...`). More are fine; what is returned
    then is to be said.
    """
    planned = re.search(r"(?:^|_)(\d+)x[a-z]", Path(recipe).name)
    world = num_nodes * processes
    if planned is None or world == int(planned[1]):
        return None
    said = f"{recipe} is for {planned[1]} GPUs, and this job has {num_nodes} nodes x {processes} = {world}"
    if world < int(planned[1]) and not any_number:
        nodes = -(-int(planned[1]) // processes)
        raise UserError(
            f"{said}: it would not fit in memory as planned; submit it with --nodes {nodes}, or set HYMEG_ANY_GPUS=1 "
            "if you know better"
        )
    return f"{said}: the global batch stays the recipe's, data parallelism takes the rest"


def versions(package: Path = Path(hymeg.__file__).parent) -> dict[str, str]:
    """Of everything that must be the same on all nodes: packages, Python, and hymeg's own files by their digest."""
    found = {"Python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    digest = hashlib.sha256()
    for path in sorted(package.glob("**/*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return found | {"hymeg's files": digest.hexdigest()[:12]}


def node_problems(processes: int, needed_gib: float, folders: Iterable[Path]) -> Iterator[str]:
    """What is wrong with this node for so many processes, which need so many GiB of host memory together."""
    if not _on_cpu():
        yield from gpu_problems(_nvidia_smi(), processes)
        yield from _torch_problems(processes)
    available = psutil.virtual_memory().available / 2**30
    if available < needed_gib:
        yield (
            f"of host memory {available:.0f} GiB are free, {needed_gib:.0f} are needed for {processes} processes; end "
            "what holds it, leave the node out, or set HYMEG_HOST_GIB if they need less"
        )
    for folder in folders:
        yield from _folder_problems(folder)


def _nvidia_smi() -> str | None:
    """A line for each GPU: index, MiB in use, MiB in all; None without the program."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return ""


def gpu_problems(table: str | None, processes: int) -> Iterator[str]:
    """What nvidia-smi's table says: too few GPUs, and GPUs that hold something already."""
    if table is None:
        return
    rows = [line.split(", ") for line in table.splitlines() if re.fullmatch(r"\d+, \d+, \d+", line.strip())]
    if len(rows) < processes:
        yield (
            f"nvidia-smi shows {len(rows)} working GPUs, {processes} are needed; leave the node out, or submit with "
            f"--gpus-per-node {len(rows)}"
        )
    for index, used, total in rows[:processes]:
        if int(used) / 1024 > _GPU_GIB_IN_USE:
            yield (
                f"GPU {index} is not idle: {int(used) / 1024:.0f} of {int(total) / 1024:.0f} GiB are in use; end what "
                "runs there (see nvidia-smi)"
            )


def _torch_problems(processes: int) -> Iterator[str]:
    import torch

    from hymeg.platform import device

    try:
        # The driver counts GPUs also where CUDA does not start on them.
        count = device.count() if device.current().type != "cpu" else 0
    except RuntimeError as error:
        yield f"CUDA does not start: {str(error).splitlines()[0]}; check the driver (nvidia-smi), or leave the node out"
        return
    if count < processes:
        yield (
            f"torch {torch.__version__} sees {count} GPUs, {processes} are needed; check driver, container and "
            "CUDA_VISIBLE_DEVICES (HYMEG_PLATFORM=cpu trains on the CPU)"
        )


def _folder_problems(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".hymeg-{platform.node()}-{os.getpid()}"
        own.write_text("writable")
        own.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield (
            f"{folder} is not writable from this node ({error.strerror}); give a folder on a file system that all "
            "nodes share"
        )
        return
    if free == 0:
        yield f"{folder}: no space left on its disk; free some, or give another folder"
