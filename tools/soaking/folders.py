"""Conversions, exports and index builds that are killed, and bits that flip in what they wrote."""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hymeg import platform
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.verification import verify_folder
from hymeg.data.corpus import preprocess
from hymeg.data.index_building import build_missing

platform.install()  # and once, not in each child:
import megatron.core.datasets.indexed_dataset  # noqa: E402, F401

KILLS_TO_A_WHOLE_RUN = 10
_forks = multiprocessing.get_context("fork")
Job = Callable[[Path, Path], None]  # of the folder in which all lies, and of the one to make


def convert(out: Path, target: Path) -> None:
    hf_to_dist(out / "model", target, overwrite=True)


def export(out: Path, target: Path) -> None:
    dist_to_hf(out / "whole", target, max_shard_bytes=300_000, overwrite=True)


def index_rows(out: Path, target: Path) -> None:
    build_missing({str(out / "rows.jsonl"): target}, (str(out / "model"),), io.StringIO(), num_workers=1)


def index_text(out: Path, target: Path) -> None:
    texts = sorted(Path(__file__).resolve().parents[2].glob("examples/data/udhr/*.jsonl"))
    preprocess(texts, target / "corpus", out / "model", num_workers=1, overwrite=True)


JOBS: dict[str, Job] = {
    "conversion": convert,
    "export": export,
    "index of rows": index_rows,
    "index of text": index_text,
}


@dataclass
class Found:
    in_work: int = 0  # killed before they were done
    broken: int = 0  # folders that look whole and are not, or are gone
    not_anew: int = 0  # runs after a kill that did not give what an undisturbed one gives
    left_over: int = 0  # files and folders that such a run left beside


def in_child(job: Callable, *args) -> None:
    """This process is forked from again and again: it stays without threads."""
    child = _child(job, *args)
    child.join()
    if child.exitcode != 0:
        raise SystemExit(f"soak: {job.__name__} failed with {child.exitcode}")


def kill_jobs(name: str, job: Job, out: Path, count: int, chance: random.Random) -> Found:
    """`count` times, at any moment; half of them over what is there already, half of them the main process alone."""
    found, place, undisturbed = Found(), out / "jobs" / name, out / "done" / name
    started = time.monotonic()
    in_child(job, out, undisturbed)
    seconds, wanted = time.monotonic() - started, _contents(undisturbed)
    for number in tqdm(range(count), desc=f"killed: {name}", mininterval=5):
        is_over = number % 2 == 1
        target = place / "target"
        if not is_over:
            shutil.rmtree(target, ignore_errors=True)
        elif not target.exists():
            shutil.copytree(undisturbed, target)
        child = _child(job, out, target)
        time.sleep(chance.uniform(0, seconds))
        found.in_work += child.is_alive()
        with contextlib.suppress(ProcessLookupError):
            (os.kill if chance.random() < 0.5 else os.killpg)(child.pid, signal.SIGKILL)
        child.join()
        has_old = any(place.glob("target.old-*"))
        is_whole = _contents(target) == wanted
        if name == "index of text":  # without its index it is no data set
            found.broken += (target / "corpus_text_document.idx").exists() and not is_whole
        else:
            found.broken += not is_whole and (target.exists() or (is_over and not has_old))
        if number % KILLS_TO_A_WHOLE_RUN == 0 or number == count - 1:
            with contextlib.suppress(SystemExit):
                in_child(job, out, target)
            found.not_anew += _contents(target) != wanted
            found.left_over += sum(path != target and "old-" not in path.name for path in place.iterdir())
            shutil.rmtree(place)
    return found


def flip_bits(kind: str, folder: Path, place: Path, count: int, chance: random.Random) -> list[Path]:
    """One at a time, in a file of any kind and at any place in it; the files in which one was not found."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    files = [path for path in sorted(place.rglob("*")) if _counts(path) and path.stat().st_size]
    missed = []
    for _ in tqdm(range(count), desc=f"flipped: {kind}", mininterval=5):
        path = chance.choice(files)
        intact = path.read_bytes()
        data, bit = bytearray(intact), chance.randrange(8 * len(intact))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if path not in [finding.path for finding in verify_folder(place, workers=1).damaged]:
            missed.append(path)
        path.write_bytes(intact)
    return missed


def _child(job: Callable, *args):
    child = _forks.Process(target=_alone, args=(job, *args))
    child.start()
    return child


def _alone(job: Callable, *args) -> None:
    with contextlib.suppress(PermissionError):
        os.setsid()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    job(*args)


def _contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if _counts(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _counts(path: Path) -> bool:
    """Not the times with which a source was seen, nor what a killed run left hidden."""
    return path.is_file() and path.parent.name != "seen" and not path.name.endswith(".tmp")
