#!/usr/bin/env python
"""Merging an adapter of every projection: time against `cp` of the base, and a large base in little memory.

Checkpoints are made in a folder inside FOLDER, on the disk to be timed, and removed at the end; the large base is files
of holes, which read as zeros and take no room. Each merge runs in a process of its own.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from convert import SHARD_BYTES, Bench, _clean, _config, _spread, _timed_copy

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import PROJECTIONS, adapter_modules
from hymeg.checkpoint.peft_table import CONFIG_FILE, WEIGHTS_FILE, peft_config, served_tensors
from hymeg.errors import exit_on_user_error
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import TensorSpec, write_checkpoint

MERGE = """
import json, sys
from hymeg.checkpoint.adapters import merge
summary = merge(*sys.argv[1:4], workers={workers}, max_shard_bytes={shard})
print(json.dumps(summary._asdict()))
"""


def write_adapter(folder: Path, config: HyConfig, rank: int) -> None:
    """A served peft folder of random bf16 numbers for every projection."""
    folder.mkdir()
    settings = AdapterSettings(rank, 2.0 * rank, "lora", 0.0, PROJECTIONS)
    modules = adapter_modules(config, PROJECTIONS)
    specs = [TensorSpec(tensor.name, "BF16", tensor.shape) for tensor in served_tensors(modules, rank)]
    noise = np.random.default_rng(0).standard_normal(2**22).astype("<f4").view("<u4") >> 16
    numbers = memoryview(noise.astype("<u2")).cast("B")
    write_checkpoint(folder, specs, lambda spec: [numbers[: spec.nbytes]], max_shard_bytes=2**62)
    (folder / "model.safetensors").rename(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(peft_config(settings, modules, "served", False, [])))


def merged(base: Path, adapter: Path, target: Path, workers: int, limit: int | None = None) -> dict:
    """A merge's summary. `limit`: bytes of address space for each process."""
    shutil.rmtree(target, ignore_errors=True)
    prepare = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) if limit else None
    done = subprocess.run(
        [sys.executable, "-c", MERGE.format(workers=workers, shard=SHARD_BYTES), base, adapter, target],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where checkpoints are made, and removed")
    parser.add_argument("--gb", type=float, default=4.0, metavar="N", help="of the base that is timed (default: 4)")
    parser.add_argument("--large-gb", type=float, default=20.0, metavar="N", help="of the large base (default: 20)")
    parser.add_argument("--limit-gb", type=float, default=2.0, metavar="N", help="of address space (default: 2)")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="of the adapters (default: 16)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of what is timed (default: 3)")
    args = parser.parse_args()

    with exit_on_user_error():
        folder = Path(tempfile.mkdtemp(prefix="merge-benchmark-", dir=args.folder))
        base, adapter, target = (folder / name for name in ("hf", "adapter", "target"))
        bench = Bench(folder, args.workers, args.repeats)
        try:
            print("| what | found | bar |\n|---|---|---|")
            bench._make_random(base, args.gb)
            write_adapter(adapter, _config(args.gb), args.rank)

            def timed_merge(sync: bool) -> tuple[float, int]:
                _clean(base, target)
                found = merged(base, adapter, target, args.workers)
                return found["seconds"], found["peak_bytes"]

            ways = {"cp": lambda sync: (_timed_copy(base, target, sync), 0), "merge": timed_merge}
            seconds, peak = bench._in_turns(ways, sync=True)
            ratio = statistics.median(seconds["merge"]) / statistics.median(seconds["cp"])
            print(f"| cp of {args.gb:g} GB | {_spread(seconds['cp'])} | |")
            took = f"{_spread(seconds['merge'])}: {ratio:.2f} x cp"
            print(f"| merge, rank {args.rank}, every projection | {took} | <= 2 x |")
            print(f"| memory of all its processes | {peak / 1e6:,.0f} MB | |", flush=True)
            bench._clear()
            config = _config(args.large_gb)
            bench._make_holes(base, config)
            write_adapter(adapter, config, args.rank)
            try:
                found = merged(base, adapter, target, args.workers, round(args.limit_gb * 1e9))
                said = f"{found['seconds']:.0f} s, {found['peak_bytes'] / 1e6:,.0f} MB in all processes"
            except subprocess.CalledProcessError as error:
                said = f"failed with exit code {error.returncode}"
            print(f"| {args.large_gb:g} GB under ulimit -v {args.limit_gb:g} GB | {said} | completes |")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
