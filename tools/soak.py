#!/usr/bin/env python3
"""Break things for an hour and see that nothing is lost: SIGKILLs of a training on four processes, of conversions,
exports and index builds, and single bits that flip in whatever they wrote.

    tools/soak.py                 what docs/reliability.md promises: 2,000 steps, 10 + 200 kills, 1,000 flips
    tools/soak.py --scale 0.04    the same, small: some minutes

One table at the end; exit code 1 where a line of it misses its bar.
"""

import argparse
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from soaking.folders import JOBS, flip_bits, in_child, kill_jobs
from soaking.training import STEPS_PER_KILL, Training

ROOT = Path(__file__).resolve().parents[1]
MODEL_LANGUAGES = ("en", "de", "fr", "es", "zh")
NUM_PROCESSES = 4
MAX_GROWTH = 0.02  # of a rank's memory, from the middle third of its steps to the last


class Line(NamedTuple):
    """Of the table at the end."""

    what: str
    done: str
    found: str
    is_good: bool


def prepare(out: Path) -> None:
    """`model`, `text.bin`, `text.idx`, `rows.jsonl`."""
    import json

    from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
    from hymeg.data.corpus import preprocess

    write_tiny_checkpoint(out / "model", dtype="fp32", max_shard_bytes=300_000)
    texts = [ROOT / "examples" / "data" / "udhr" / f"{language}.jsonl" for language in MODEL_LANGUAGES]
    preprocess(texts, out / "text", out / "model")
    lines = [json.loads(line)["text"] for path in texts for line in path.read_text().splitlines()]
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in lines]
    (out / "rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns * 4))


def soak_training(out: Path, num_steps: int, save_interval: int, num_kills: int, chance: random.Random) -> list[Line]:
    training = Training(out, NUM_PROCESSES, num_steps, save_interval)
    whole = training.uninterrupted(out / "whole")
    grown = whole.growth()
    memory = f"memory x {grown.memory:.3f}, open files {grown.files:+d}"
    yes = grown.memory <= 1 + MAX_GROWTH and grown.files <= 0
    lines = [Line("a training's ranks, middle third to last", f"{num_steps} steps", memory, yes)]
    found = training.killed(out / "killed", whole, num_kills, chance)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items()))
    wrong = {
        "lost": found.lost,
        "damaged": found.damaged,
        "other losses": found.other_losses,
        "starts that failed": found.failed,
        "orphans": found.orphans,
        "weights that differ": found.other_weights,
    }
    lines.append(Line("a training's SIGKILLs", f"{num_kills}: {kinds}", _counted(wrong), not any(wrong.values())))
    return lines


def soak_jobs(out: Path, num_kills: int, chance: random.Random) -> list[Line]:
    lines = []
    for name, job in JOBS.items():
        count = max(1, num_kills // len(JOBS))
        found = kill_jobs(name, job, out, count, chance)
        wrong = {"half written": found.broken, "not made anew": found.not_anew, "left over": found.left_over}
        done = f"{count}: {found.in_work} at work"
        lines.append(Line(f"SIGKILLs: {name}", done, _counted(wrong), not any(wrong.values())))
    return lines


def soak_flips(out: Path, num_flips: int, chance: random.Random) -> list[Line]:
    iteration = max((out / "killed").glob("iter_*"))
    kinds = {"training's checkpoint": iteration} | {name: out / "done" / name for name in JOBS}
    lines = []
    for kind, folder in kinds.items():
        count = max(1, num_flips // len(kinds))
        missed = flip_bits(kind, folder, out / "flipped", count, chance)
        lines.append(Line(f"single bits flipped: {kind}", str(count), _counted({"not found": len(missed)}), not missed))
    return lines


def _counted(wrong: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in wrong.items())


def table(lines: list[Line], seconds: float) -> str:
    header = "| what | done | found | |\n|---|---|---|---|\n"
    rows = [f"| {line.what} | {line.done} | {line.found} | {'good' if line.is_good else 'BAD'} |\n" for line in lines]
    return header + "".join(rows) + f"in {seconds:,.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="so much of all (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and places (default: 0)")
    where = ROOT / "out" / "soak"
    parser.add_argument("--out", type=Path, default=where, metavar="DIR", help="is emptied (default: out/soak)")
    args = parser.parse_args()
    if not 0 < args.scale <= 100:
        parser.error(f"--scale {args.scale}: above 0, up to 100")
    out = args.out.resolve()
    if out != where and out.exists():
        parser.error(f"--out {out}: is there already; give another, so that nothing of yours is lost")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    num_kills = max(4, round(2000 * args.scale / STEPS_PER_KILL))  # one of each kind
    num_steps = max(round(2000 * args.scale), 20 * num_kills)
    started, chance = time.monotonic(), random.Random(args.seed)
    in_child(prepare, out)
    parts: list[Callable[[], list[Line]]] = [
        lambda: soak_training(out, num_steps, min(50, num_steps // 4), num_kills, chance),
        lambda: soak_jobs(out, round(200 * args.scale), chance),
        lambda: soak_flips(out, round(1000 * args.scale), chance),
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        lines = [line for part in parts for line in part()]
    finally:
        for process in psutil.Process().children(recursive=True):
            process.kill()
    print(f"\n{table(lines, time.monotonic() - started)}")
    sys.exit(0 if all(line.is_good for line in lines) else 1)


if __name__ == "__main__":
    main()
