#!/usr/bin/env python
"""Time conversions against `cp -r` of the same bytes, without and with waiting for the disk; medians. Each runs in a process of its own."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hymeg.errors import exit_on_user_error

CONVERT = """
import json, sys
from hymeg.checkpoint.convert import {function} as convert
summary = convert(sys.argv[1], sys.argv[2], workers={workers}, sync={sync})
print(json.dumps(summary._asdict()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hf", metavar="HF_DIR", help="Hugging Face folder, such as tools/make_tiny_checkpoint.py writes; on the disk to be timed")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default: 3)")
    args = parser.parse_args()

    with exit_on_user_error():
        source = Path(args.hf)
        dist, hf, copy = (source.with_name(f"{source.name}-benchmark-{name}") for name in ("dist", "hf", "cp"))
        num_bytes = sum(path.stat().st_size for path in source.iterdir())
        print(f"{source}: {num_bytes / 1e9:.2f} GB, {args.workers} workers, medians of {args.repeats}")
        for sync in (False, True):
            seconds: dict[str, list[float]] = {"cp -r": [], "hf-to-dist": [], "dist-to-hf": []}
            peaks = dict.fromkeys(seconds, 0)
            for _ in range(args.repeats):  # in turns, so that a disk that slows down slows down all
                seconds["cp -r"].append(timed(lambda: copied(source, copy, sync), copy))  # noqa: B023
                for name, function, given, target in (("hf-to-dist", "hf_to_dist", source, dist), ("dist-to-hf", "dist_to_hf", dist, hf)):
                    shutil.rmtree(target, ignore_errors=True)
                    subprocess.run(["sync"], check=True)
                    code = CONVERT.format(function=function, workers=args.workers, sync=sync)
                    done = subprocess.run([sys.executable, "-c", code, given, target], check=True, stdout=subprocess.PIPE, text=True)
                    summary = json.loads(done.stdout)
                    seconds[name].append(summary["seconds"])
                    peaks[name] = max(peaks[name], summary["peak_bytes"])
            base = statistics.median(seconds["cp -r"])
            for name, found in seconds.items():
                median = statistics.median(found)
                memory = f", {peaks[name] / 1e6:,.0f} MB of memory in all processes" if peaks[name] else ""
                spread = f"{min(found):.2f} to {max(found):.2f}"
                print(f"{'with' if sync else 'without'} fsync: {name}: {median:.2f} s ({spread}), {median / base:.2f} x cp{memory}", flush=True)
        for folder in (dist, hf, copy):
            shutil.rmtree(folder, ignore_errors=True)


def copied(source: Path, target: Path, sync: bool) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
        subprocess.run(["sync", "-f", target], check=True)


def timed(work, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    start = time.monotonic()
    work()
    return time.monotonic() - start


if __name__ == "__main__":
    main()
