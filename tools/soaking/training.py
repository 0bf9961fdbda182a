"""A training on several processes, killed and started again by the same command, held against one that is not."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from tqdm import tqdm

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.dist_files import FORMAT_FILE, TRACKER
from hymeg.checkpoint.verification import verify_folder

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_KILL = 200
SECONDS_A_LIFE = 3600.0
SECONDS_FOR_ORPHANS = 120.0
KINDS = ("one rank", "all ranks", "everything", "the launcher")  # whose ranks train on until another run takes over
_STEP = re.compile(r" iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|")


class Growth(NamedTuple):
    memory: float  # the largest ratio among the ranks, of resident memory
    files: int  # the largest difference among the ranks, of open files


@dataclass
class Whole:
    """A training that nobody interrupted."""

    save: Path
    losses: dict[int, str] = field(default_factory=dict)  # as printed
    held: list[list[tuple[int, int]]] = field(default_factory=list)  # a step: of each rank, bytes and open files

    def growth(self) -> Growth:
        """From the middle third of the steps to the last: in the first there is much to be allocated."""
        third = max(1, len(self.held) // 3)
        middle, last = self.held[-2 * third : -third], self.held[-third:]
        memory, files = [], []
        for rank in range(len(self.held[0])):
            before, after = ([of_step[rank] for of_step in part] for part in (middle, last))
            memory.append(median(size for size, _ in after) / median(size for size, _ in before))
            files.append(round(median(count for _, count in after) - median(count for _, count in before)))
        return Growth(max(memory), max(files))


@dataclass
class Found:
    """What the kills did."""

    kinds: Counter = field(default_factory=Counter)
    lost: int = 0  # starts from an older checkpoint than there was
    damaged: int = 0  # folders that are marked as checkpoints and are none
    other_losses: int = 0
    failed: int = 0  # starts that ended before they were killed, or did not come to their end
    orphans: int = 0  # ranks that outlived their launcher's successor
    other_weights: int = 0  # at the end


class Life:
    """From a start to its end."""

    def __init__(self, words: list[str], log: Path):
        self.log, self.losses, self._read = log, {}, 0
        environment = os.environ | {"HYMEG_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as said:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        self.deadline = time.monotonic() + SECONDS_A_LIFE

    def steps(self) -> Iterator[int]:
        """Those that it has logged since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines)
        for step, loss in _STEP.findall(lines.decode(errors="replace")):
            self.losses[int(step)] = loss
            yield int(step)

    def ranks(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children()
        return []

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Until that is so, which it returns, or the end."""
        while not until() and time.monotonic() < self.deadline:
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return time.monotonic() < self.deadline

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


class Training:
    """Its command line, and the folder in which all lies."""

    def __init__(self, out: Path, num_processes: int, num_steps: int, save_interval: int):
        self.out, self.num_steps, self.num_lives = out, num_steps, 0
        model, text = out / "model", out / "text_text_document"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
        words = f"""pretrain_hy.py --hf-model {model} --pretrained-checkpoint {model} --data-path {text} --split 100,0,0
            --seq-length 32 --micro-batch-size 1 --global-batch-size 4 --train-iters {num_steps} --eval-iters 0
            --lr 1e-3 --lr-decay-style constant --num-workers 0 --log-interval 1 --save-interval {save_interval}
            --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer"""
        self.words = [*map(str, launcher), *words.split()]

    def start(self, save: Path) -> Life:
        self.num_lives += 1
        words = [*self.words, "--load", str(save), "--save", str(save), "--data-cache-path", str(self.out / "cache")]
        return Life(words, self.out / f"{save.name}-{self.num_lives}.log")

    def uninterrupted(self, save: Path) -> Whole:
        whole, life = Whole(save), self.start(save)

        def look() -> bool:
            for _ in life.steps():
                bar.update()
                with contextlib.suppress(psutil.Error):
                    whole.held.append([(rank.memory_info().rss, rank.num_fds()) for rank in life.ranks()])
            return False

        with tqdm(total=self.num_steps, desc="training, uninterrupted", mininterval=5) as bar:
            life.wait(look)
            look()
        whole.losses = life.losses
        if life.process.returncode != 0 or len(whole.losses) != self.num_steps:
            raise SystemExit(f"soak: the uninterrupted training failed: {life.log}")
        num_ranks = max(map(len, whole.held))
        whole.held = [of_step for of_step in whole.held if len(of_step) == num_ranks]
        return whole

    def killed(self, save: Path, whole: Whole, num_kills: int, chance: random.Random) -> Found:
        found, orphans, window = Found(), [], self.num_steps // num_kills
        with tqdm(total=self.num_steps, desc="training, killed", mininterval=5) as bar:
            for number in range(num_kills + 1):
                known, life = _tracker(save), self.start(save)

                def seen(target: int, life: Life = life) -> bool:
                    list(life.steps())
                    newest = max(life.losses, default=0)
                    bar.update(max(0, newest - bar.n))
                    return newest >= target

                if number < num_kills:
                    kind = KINDS[number % len(KINDS)]
                    at = number * window + chance.randint(1, max(1, window - 2))
                    # Orphans may have come to the end of all steps meanwhile.
                    found.failed += not life.wait(lambda at=at, seen=seen: seen(at)) and bool(life.process.poll())
                    if chance.random() < 0.5:
                        life.wait(lambda: _is_saving(save))
                        found.kinds["while saving"] += 1
                        time.sleep(chance.uniform(0, 0.1))
                    else:
                        time.sleep(chance.uniform(0, 1))
                    found.kinds[kind] += 1
                    orphans += self._kill(life, kind, chance)
                else:
                    life.wait(lambda seen=seen: seen(self.num_steps + 1))
                    life.kill([] if life.process.poll() is not None else life.ranks())
                    found.failed += life.process.wait() != 0
                seen(0)
                found.lost += bool(life.losses) and min(life.losses) - 1 < known
                found.other_losses += sum(loss != whole.losses[step] for step, loss in life.losses.items())
                found.damaged += sum(
                    bool(verify_folder(marked.parent, workers=1).damaged)
                    for marked in save.glob(f"iter_*/{FORMAT_FILE}")
                )
        found.orphans = _outlived(orphans)
        found.other_weights = len(compare_checkpoints(whole.save, save))
        return found

    def _kill(self, life: Life, kind: str, chance: random.Random) -> list[psutil.Process]:
        """The ranks that nobody has ended."""
        ranks = life.ranks()
        if kind in ("the launcher", "everything") and life.process.poll() is None:
            life.process.kill()
        if kind != "the launcher":
            life.kill(ranks if kind != "one rank" else ranks and [chance.choice(ranks)])
        life.process.wait()
        return ranks if kind == "the launcher" else []


def _tracker(save: Path) -> int:
    try:
        return int((save / TRACKER).read_text())
    except (OSError, ValueError):
        return 0


def _is_saving(save: Path) -> bool:
    return any(not (folder / FORMAT_FILE).exists() for folder in save.glob("iter_*"))


def _outlived(orphans: list[psutil.Process]) -> int:
    """How many still live; they are ended."""
    _, living = psutil.wait_procs(orphans, timeout=SECONDS_FOR_ORPHANS)
    for process in living:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(living)
