#!/usr/bin/env python
"""All that conversion is held to, in one table: time against cp and transformers, memory, planning for Hy3, a large
checkpoint in little memory.

Checkpoints are made in a folder inside FOLDER, on the disk to be timed, and removed at the end. Times are of random
weights; memory is measured with files of holes, which read as zeros and take no room. Each conversion runs in a process
of its own, where, for a time without fsync, fsync does nothing.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hymeg.checkpoint.dist_files import RELEASE, TRACKER
from hymeg.checkpoint.mapping import hf_entries
from hymeg.checkpoint.sinks.dist_folder import files_of_dist
from hymeg.checkpoint.sources import open_hf
from hymeg.checksums import MANIFEST, sum_of_file, write_manifest
from hymeg.errors import UserError, exit_on_user_error
from hymeg.files import read_json
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import (
    INDEX_FILE,
    TensorSpec,
    index_files,
    into_shards,
    open_checkpoint,
    shard_header,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "tools" / "convert_checkpoint.py"
CONVERT = """
import json, os, sys
from hymeg.checkpoint.convert import {function} as convert
if not {sync}:
    os.fsync = os.fdatasync = lambda descriptor: None
print(json.dumps(convert(sys.argv[1], sys.argv[2], workers={workers}, **{more})._asdict()))
"""
TRANSFORMERS = """
import sys, time
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
start = time.monotonic()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2], max_shard_size="1GB")
print(time.monotonic() - start)
"""
SHARD_BYTES = 10**9
# 0.2 GB a layer: 64 experts of 3 x 1024 x 512 in bf16.
SHAPE = {
    "model_type": "hy_v3",
    "architectures": ["HYV3ForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "router_scaling_factor": 2.826,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "rope_theta": 11158840.0,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
# Hy3's, as published: 80 layers of 192 experts and one for multi-token prediction.
HY3 = SHAPE | {
    "vocab_size": 120832,
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "head_dim": 128,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts": 192,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 80,
    "num_nextn_predict_layers": 1,
}
NUM_HY3_TENSORS = 47_138


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    bar: str
    holds: bool


class Bench:
    """The measurements. Each gives rows and leaves nothing but what the next needs in `folder`."""

    def __init__(self, folder: Path, workers: int, repeats: int):
        self.folder, self.workers, self.repeats = folder, workers, repeats

    def speed(self, num_gb: float) -> list[Row]:
        """Both directions against `cp -r` of the source and against transformers, all from memory to the same place, in
        turns that begin with another of them each round: what one leaves behind, a busy disk or memory that is quickly
        had again, does not always meet the same other one."""
        source, dist, target = (self.folder / name for name in ("hf", "dist", "target"))
        self._make_random(source, num_gb)
        self._convert("hf-to-dist", source, dist, sync=True)
        copies = {
            "cp": lambda sync: (_timed_copy(source, target, sync), 0),
            "hf-to-dist": lambda sync: self._timed_conversion("hf-to-dist", source, target, sync),
            "dist-to-hf": lambda sync: self._timed_conversion("dist-to-hf", dist, target, sync),
        }
        transformers = {"transformers": lambda sync: (_timed_transformers(source, target), 0)}
        rows = []
        for sync, ways in ((False, copies | transformers), (True, copies)):  # transformers does not wait for the disk
            seconds, peak = self._in_turns(ways, sync)
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            how = "with fsync" if sync else "without fsync"
            rows.append(Row(f"cp, {how}", _spread(seconds["cp"]), "", True))
            for name in ("hf-to-dist", "dist-to-hf"):
                ratio = medians[name] / medians["cp"]
                bar = 1.2 if sync else 1.5
                found = f"{_spread(seconds[name])}: {ratio:.2f} x cp"
                rows.append(Row(f"{name}, source verified, {how}", found, f"<= {bar} x cp", ratio <= bar))
            rows.append(Row(f"memory of all processes, {how}", f"{peak / 1e6:,.0f} MB", "<= 600 MB", peak <= 600e6))
            if "transformers" in ways:
                ratio = medians["transformers"] / max(medians["hf-to-dist"], medians["dist-to-hf"])
                found = f"{_spread(seconds['transformers'])}: {ratio:.1f} x the slower of ours"
                rows.append(Row(f"transformers load and save, {how}", found, ">= 10 x", ratio >= 10))
        self._clear()
        return rows

    def fp8(self, num_gb: float) -> list[Row]:
        """hf-to-dist of FP8 in both forms, against `cp -r` of what it writes, in turns, with fsync."""
        plain, dist, target = (self.folder / name for name in ("hf", "dist", "target"))
        self._make_random(plain, num_gb)
        self._convert("hf-to-dist", plain, dist, sync=True)
        folders = {name: self.folder / name.replace(" ", "-") for name in ("one scale", "scales by block")}
        for name, folder in folders.items():
            _make_fp8(plain, folder, name == "scales by block")
        ways = {"cp": lambda sync: (_timed_copy(dist, target, sync), 0)}
        for name, folder in folders.items():
            ways[name] = lambda sync, folder=folder: self._timed_conversion("hf-to-dist", folder, target, sync)
        seconds, peak = self._in_turns(ways, True)
        rows = [Row("cp of what FP8 becomes", _spread(seconds["cp"]), "", True)]
        for name in folders:
            ratio = statistics.median(seconds[name]) / statistics.median(seconds["cp"])
            found = f"{_spread(seconds[name])}: {ratio:.2f} x cp"
            rows.append(Row(f"hf-to-dist of FP8, {name}", found, "<= 1.5 x cp", ratio <= 1.5))
        rows.append(Row("memory of all processes, FP8", f"{peak / 1e6:,.0f} MB", "<= 600 MB", peak <= 600e6))
        self._clear()
        return rows

    def _in_turns(
        self, ways: dict[str, Callable[[bool], tuple[float, int]]], sync: bool
    ) -> tuple[dict[str, list[float]], int]:
        """Seconds of each way, round by round, and the peak bytes of all. One more round comes first, which had other
        things before it.
        """
        names, peak = list(ways), 0
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self.repeats + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                taken, peak_bytes = ways[name](sync)
                peak = max(peak, peak_bytes)
                if number:
                    seconds[name].append(taken)
        return seconds, peak

    def memory(self, small_gb: float, large_gb: float) -> list[Row]:
        rows = []
        peaks: dict[str, list[int]] = {"hf-to-dist": [], "dist-to-hf": []}
        planning = 0
        for num_gb in (small_gb, large_gb):
            self._make_holes(self.folder / "hf", _config(num_gb))
            for name, given, target in (("hf-to-dist", "hf", "dist"), ("dist-to-hf", "dist", "back")):
                summary = self._convert(name, self.folder / given, self.folder / target, sync=False)
                peaks[name].append(summary["peak_bytes"])
                planning = max(planning, summary["planning_bytes"])
            self._clear()
        for name, (small, large) in peaks.items():
            found = f"{small / 1e6:,.1f} MB at {small_gb:g} GB, {large / 1e6:,.1f} MB at {large_gb:g} GB: "
            found += f"{large / small - 1:+.1%} (to plan: {planning / 1e6:,.0f} MB)"
            rows.append(
                Row(
                    f"memory, {name}", found, "<= 600 MB, within 10 %", large <= 600e6 and abs(large / small - 1) <= 0.1
                )
            )
        return rows

    def planning(self) -> list[Row]:
        """The command's own start, checks and plan for Hy3, up to its refusal of a target that is not empty: the last
        check before it writes.
        """
        hf, dist, used = self.folder / "hf", self.folder / "dist", self.folder / "used"
        # In a process of its own: a command's peak memory counts what the process that starts it has held.
        maker = multiprocessing.get_context("fork").Process(target=self._make_hy3, args=(hf, dist))
        maker.start()
        maker.join()
        used.mkdir()
        (used / "file").touch()
        num_tensors = len(read_json(hf / INDEX_FILE)["weight_map"])
        rows = [
            Row(
                "tensors of the imitation of Hy3",
                f"{num_tensors:,}",
                f"{NUM_HY3_TENSORS:,}",
                num_tensors == NUM_HY3_TENSORS,
            )
        ]
        for name, words in (
            ("hf-to-dist", ("--hf", hf, "--dist", used)),
            ("dist-to-hf", ("--dist", dist, "--hf", used)),
        ):
            seconds, peaks = zip(*(_refused(name, *words) for _ in range(self.repeats)), strict=True)
            found = f"{_spread(list(seconds))}, {max(peaks) / 1e6:,.0f} MB"
            rows.append(
                Row(
                    f"start and plan, {name}",
                    found,
                    "<= 5 s, <= 400 MB",
                    statistics.median(seconds) <= 5 and max(peaks) <= 400e6,
                )
            )
        self._clear()
        return rows

    def limit(self, num_gb: float, limit_gb: float) -> list[Row]:
        """As under `ulimit -v`: no process may have more address space, of which what it really holds is a part."""
        self._make_holes(self.folder / "hf", _config(num_gb))
        rows = []
        for name, given, target in (("hf-to-dist", "hf", "dist"), ("dist-to-hf", "dist", "back")):
            try:
                summary = self._convert(
                    name, self.folder / given, self.folder / target, sync=True, limit=round(limit_gb * 1e9)
                )
                found, holds = (
                    f"{summary['seconds']:.0f} s, {summary['peak_bytes'] / 1e6:,.0f} MB in all processes",
                    summary["peak_bytes"] <= limit_gb * 1e9,
                )
            except subprocess.CalledProcessError as error:
                found, holds = f"failed with exit code {error.returncode}", False
            rows.append(Row(f"{num_gb:g} GB, {name}, ulimit -v {limit_gb:g} GB", found, "completes", holds))
            shutil.rmtree(self.folder / given)
        self._clear()
        return rows

    def _timed_conversion(self, name: str, given: Path, target: Path, sync: bool) -> tuple[float, int]:
        _clean(given, target)
        summary = self._convert(name, given, target, sync)
        return summary["seconds"], summary["peak_bytes"]

    def _convert(self, name: str, given: Path, target: Path, sync: bool, limit: int | None = None) -> dict:
        more = {"max_shard_bytes": SHARD_BYTES} if name == "dist-to-hf" else {}  # the same files as the source's
        code = CONVERT.format(function=name.replace("-", "_"), workers=self.workers, sync=sync, more=more)
        # One thread a library: each would reserve address space for its own stack and heap.
        prepare = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) if limit else None
        command = [sys.executable, "-c", code, given, target]
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return json.loads(done.stdout)

    def _make_random(self, folder: Path, num_gb: float) -> None:
        """With checksums, as hymeg writes folders: what is read of it is verified."""
        from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint

        write_tiny_checkpoint(folder, _config(num_gb), max_shard_bytes=SHARD_BYTES)
        write_manifest(folder / MANIFEST, {path.name: sum_of_file(path) for path in folder.iterdir()})

    def _make_holes(self, folder: Path, config: HyConfig) -> None:
        """A checkpoint of zeros that takes no room."""
        folder.mkdir()
        config.save(folder)
        specs = [
            TensorSpec(entry.hf_name, "F32" if entry.is_fp32_buffer else "BF16", entry.hf_shape)
            for entry in hf_entries(config, "hub")
        ]
        shards = into_shards(specs)
        for shard in shards:
            header = shard_header(shard)
            (folder / shard.file_name).write_bytes(header)
            os.truncate(folder / shard.file_name, len(header) + sum(tensor.nbytes for tensor in shard.tensors))
        for name, data in index_files(shards).items():
            (folder / name).write_bytes(data)

    def _make_hy3(self, hf: Path, dist: Path) -> None:
        self._make_holes(hf, HyConfig.from_dict(HY3))
        self._make_holes_dist(hf, dist)

    def _make_holes_dist(self, hf: Path, dist: Path) -> None:
        """The distributed checkpoint that `hf` would become, its files holes."""
        source = open_hf(hf)
        files = files_of_dist(source.config, source.tensors, None, self.workers)
        folder = dist / RELEASE
        folder.mkdir(parents=True)
        for name, size in files.sizes.items():
            (folder / name).touch()
            os.truncate(folder / name, size)
        for name, data in (files.beside | files.last).items():
            (folder / name).write_bytes(data)
        source.config.save(dist)
        (dist / TRACKER).write_text(RELEASE)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path)


def _config(num_gb: float) -> HyConfig:
    """Of about so many GB in bf16: 0.14 of them for the vocabulary, 0.2 for each layer."""
    return HyConfig.from_dict(SHAPE | {"num_hidden_layers": max(2, round((num_gb - 0.14) / 0.21))})


def _make_fp8(plain: Path, folder: Path, by_block: bool) -> None:
    """The tensors of `plain`, their upper bytes for codes, with scales of one form."""
    folder.mkdir()
    stored, specs = open_checkpoint(plain), []
    for name, entry in stored.items():
        is_fp8 = name.endswith("_proj.weight")
        specs.append(TensorSpec(name, "F8_E4M3" if is_fp8 else entry.dtype, entry.shape))
        if is_fp8 and by_block:
            specs.append(TensorSpec(f"{name}_scale_inv", "F32", tuple(-(-length // 128) for length in entry.shape)))
        elif is_fp8:
            specs.append(TensorSpec(f"{name}_scale", "F32", (1,)))

    def read(spec: TensorSpec) -> list[np.ndarray]:
        if spec.name not in stored:
            return [np.full(spec.shape, 0.01, np.float32)]
        entry = stored[spec.name]
        data = np.fromfile(entry.file, np.uint8, entry.nbytes, offset=entry.offset)
        return [np.minimum(data[1::2] & 0x7F, 0x7E) if spec.dtype == "F8_E4M3" else data]

    write_checkpoint(folder, specs, read, SHARD_BYTES)
    config = HyConfig.from_dir(plain).to_dict()
    quantization = {"quant_method": "fp8"} | ({"weight_block_size": [128, 128]} if by_block else {})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def _clean(source: Path, target: Path) -> None:
    """Nothing at `target`, `source` in memory, which transformers needs so much of that part of it had to go, and an
    idle disk.
    """
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(
        ["cat", *(path for path in source.rglob("*") if path.is_file())], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["sync"], check=True)


def _timed_copy(source: Path, target: Path, sync: bool) -> float:
    _clean(source, target)
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
        subprocess.run(["sync", "-f", target], check=True)
    return time.monotonic() - start


def _timed_transformers(source: Path, target: Path) -> float:
    _clean(source, target)
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, source, target],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout.split()[-1])


def _refused(direction: str, *words: str | Path) -> tuple[float, int]:
    """Seconds and peak bytes of a command that ends with "not empty"."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, CLI, direction, *words], stderr=subprocess.PIPE, text=True)
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 2 or "not empty" not in message:
        raise UserError(f"{direction} should have refused the target and nothing else: {message}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="where checkpoints are made, and removed: a folder on the disk to be timed",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("speed", "fp8", "memory", "planning", "limit"),
        help="some of the measurements (default: all)",
    )
    parser.add_argument(
        "--gb", type=float, default=4.0, metavar="N", help="of the checkpoint that is timed (default: 4)"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        nargs=2,
        default=(1.0, 8.0),
        metavar="N",
        help="of those whose memory is compared (default: 1 8)",
    )
    parser.add_argument(
        "--limit-gb",
        type=float,
        nargs=2,
        default=(20.0, 2.0),
        metavar="N",
        help="of checkpoint and of memory (default: 20 2)",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of what is timed (default: 3)")
    args = parser.parse_args()

    with exit_on_user_error():
        needed, free = (
            3.1e9 * max(args.gb, *args.memory_gb, args.limit_gb[0] * 2 / 3),
            shutil.disk_usage(args.folder).free,
        )
        if free < needed:
            raise UserError(
                f"{args.folder}: {needed / 1e9:.0f} GB are needed and {free / 1e9:.0f} GB are free; give a folder on "
                "another disk"
            )
        folder = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=args.folder))
        try:
            bench = Bench(folder, args.workers, args.repeats)
            parts = {
                "planning": bench.planning,
                "speed": lambda: bench.speed(args.gb),
                "fp8": lambda: bench.fp8(args.gb),
                "memory": lambda: bench.memory(*args.memory_gb),
                "limit": lambda: bench.limit(*args.limit_gb),
            }
            print(
                f"{args.workers} workers; times: medians of {args.repeats}, the spread in brackets\n\n| what | found | "
                "bar | |\n|---|---|---|---|"
            )
            for name, measure in parts.items():
                if args.only is None or name in args.only:
                    for row in measure():
                        print(f"| {row.what} | {row.found} | {row.bar} | {'' if row.holds else 'MISSED'} |", flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
