"""Seconds of a training's save with checksums and without, side by side: Megatron's writer, and ours beside it.

Two processes, one with hymeg's writer and one with Megatron's own, save the same state to FOLDER in turns, each into a
new folder, flushed to disk; a first save of each is not counted. Processor seconds are the process's, its threads'
included: they tell what the disk's moods hide.

    python tools/benchmarks/saving.py FOLDER [--gb 2] [--rounds 8]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TENSOR_BYTES = 64 << 20
WAYS = {"without": "Megatron's writer", "with": "the same with checksums"}


def save_on_request(folder: Path, way: str, num_tensors: int) -> None:
    """A save into a new folder for each line of stdin; answers with its seconds of the clock and of the processor."""
    from hymeg import platform

    platform.install()
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from hymeg.platform import saving

    if way == "without":
        saving.SummingWriter = saving.filesystem_async.FileSystemWriterAsync
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{way}.store", rank=0, world_size=1)
    draw = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.rand(TENSOR_BYTES // 4096, 1024, generator=draw) for i in range(num_tensors)}
    for _ in sys.stdin:
        target = folder / way
        target.mkdir()
        state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
        wall, cpu = time.perf_counter(), time.process_time()
        dist_checkpointing.save(state, str(target))
        print(f"took {time.perf_counter() - wall} {time.process_time() - cpu}", flush=True)
        assert (target / saving.MANIFEST).exists() == (way == "with"), way
        shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="on the disk to be timed")
    parser.add_argument("--gb", type=float, default=2.0, metavar="N", help="of state (default: 2)")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="saves of each (default: 8)")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    num_tensors = max(1, round(args.gb * 1e9 / TENSOR_BYTES))
    if args.child:
        save_on_request(args.folder, args.child, num_tensors)
        return
    folder = Path(tempfile.mkdtemp(prefix="saving-benchmark-", dir=args.folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        children = {
            way: subprocess.Popen(
                [sys.executable, __file__, folder, "--gb", str(args.gb), "--child", way],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for way in WAYS
        }
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(args.rounds + 1):
            for way in sorted(WAYS, reverse=bool(number % 2)):
                children[way].stdin.write("save\n")
                children[way].stdin.flush()
                while not (line := children[way].stdout.readline()).startswith("took "):
                    if not line:
                        raise SystemExit(f"the process that saves {way} checksums ended: run it with --child {way}")
                if number:
                    found[way].append(tuple(map(float, line.split()[1:])))
        for child in children.values():
            child.stdin.close()
            child.wait()
    finally:
        shutil.rmtree(folder)
    print(f"{num_tensors * TENSOR_BYTES / 1e9:.2f} GB, one process, {args.rounds} saves of each in turns, medians\n")
    print("| what | s | least to most | against it | s of processor |\n|---|---|---|---|---|")
    plain = statistics.median(wall for wall, _ in found["without"])
    for way, name in WAYS.items():
        walls, cpus = zip(*found[way], strict=True)
        wall = statistics.median(walls)
        ratio = "" if way == "without" else f"{wall / plain:.3f}x"
        spread = f"{min(walls):.2f} to {max(walls):.2f}"
        print(f"| {name} | {wall:.2f} | {spread} | {ratio} | {statistics.median(cpus):.2f} |")


if __name__ == "__main__":
    main()
