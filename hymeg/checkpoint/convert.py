"""Hugging Face checkpoints to distributed ones and back: streaming, in several processes, without a model, a GPU or a process group.

Everything is checked and planned to the byte before anything is written; then rows are moved (`transfer`), into a folder that appears whole or not at
all (`folders`). Names and places come from `mapping`.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.chunks import plan_dist
from hymeg.checkpoint.compare import Pair, compare_rows
from hymeg.checkpoint.dist_files import (
    COMMON_STATE_KEY,
    RELEASE,
    SOURCE_FILE,
    TRACKER,
    DistCheckpoint,
    open_dist_checkpoint,
)
from hymeg.checkpoint.dist_metadata import common_state, write_metadata
from hymeg.checkpoint.folders import built_beside, carried_files, carry, check_target
from hymeg.checkpoint.mapping import Entry, check_distributed_tensors, match_hf_tensors, plan
from hymeg.checkpoint.rows import RowTensor, row_ranges, rows_of_dist, rows_of_hf
from hymeg.checkpoint.stored_tensor import STORAGES
from hymeg.checkpoint.transfer import Task, stored_length, write
from hymeg.checkpoint.workers import Progress
from hymeg.errors import UserError
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.hf.files import write_whole
from hymeg.hf.safetensors_files import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    SafetensorsFile,
    Shard,
    TensorEntry,
    TensorSpec,
    open_checkpoint,
    plan_shards,
    shard_header,
    write_index,
)

DTYPES = {"bf16": "BF16", "fp32": "F32", "keep": None}
_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DIST_NAMES = re.compile(rf"{RELEASE}|{re.escape(TRACKER)}|{re.escape(SOURCE_FILE)}|config\.json")
_HF_NAMES = re.compile(rf".*\.safetensors|{re.escape(INDEX_FILE)}|config\.json")
_SPARE_BYTES = 16 << 20  # for metadata and small files

Say = Callable[[str], None]


class Summary(NamedTuple):
    """What a conversion did."""

    num_tensors: int
    num_bytes: int
    seconds: float
    peak_bytes: int  # resident memory of all processes, added up

    def __str__(self) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-6) / 1e9
        memory = f"{self.peak_bytes / 1e6:,.0f} MB of memory"
        return f"{self.num_tensors:,} tensors, {self.num_bytes:,} bytes, {self.seconds:.1f} s, {rate:.2f} GB/s, {memory}"


class _HFSource(NamedTuple):
    config: HyConfig
    stored: dict[str, TensorEntry]
    entries: list[Entry]
    dropped: list[str]
    tensors: dict[str, RowTensor]


def hf_to_dist(
    hf: str | Path,
    dist: str | Path,
    *,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    sync: bool = True,
    say: Say = lambda line: None,
) -> Summary:
    """Convert the Hugging Face checkpoint in folder `hf` to a distributed one in `dist`, with all that training needs beside the weights.

    dtypes are kept, but for the expert bias, which becomes fp32.

    Args:
        workers: number of processes.
        overwrite: replace what an earlier conversion wrote to `dist`.
        verify: read everything back and compare it, before `dist` appears.
        sync: wait for the disk; only a measurement goes without.
        say: is given lines for the user.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of its config.json; `dist` cannot be written. Nothing is left behind.
    """
    started, hf, dist = time.monotonic(), Path(hf), Path(dist)
    source = _open_hf(hf)
    _check_apart(hf, dist)
    tasks, tensors = plan_dist(source.config, source.tensors, list(dict.fromkeys(entry.file for entry in source.stored.values())), workers)
    num_bytes = sum(task.nbytes for task in tasks)
    carried = carried_files(hf)
    check_target(dist, sum(map(stored_length, tasks)) + _small_bytes(carried, len(tasks)), overwrite, _DIST_NAMES)
    if source.dropped:
        say(f"left out, the trunk's own are used instead: {', '.join(source.dropped)}")
    with built_beside(dist, say) as partial:
        folder = partial / RELEASE
        folder.mkdir()
        peak = write(folder, tasks, workers, Progress("to distributed", num_bytes), sync)
        state, state_file = common_state(source.config), f"__{workers}_0.distcp"
        write_whole(folder / state_file, state)
        write_metadata(folder, tensors, {COMMON_STATE_KEY: (state_file, 0, len(state))})
        if verify:
            _verify(source.entries, source.tensors, rows_of_dist(open_dist_checkpoint(folder)), workers)
        carry(carried, partial)
        source.config.save(partial)
        write_whole(partial / TRACKER, RELEASE.encode())
    return Summary(len(tensors), num_bytes, time.monotonic() - started, peak)


def dist_to_hf(
    dist: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    sync: bool = True,
    say: Say = lambda line: None,
) -> Summary:
    """Convert the distributed checkpoint in folder `dist` to a Hugging Face one in `hf`. Optimizer state beside the weights is passed over.

    Args:
        iteration: which one; None: the one that the tracker names.
        layout: "hub", the published names, or "fused", transformers' names in memory.
        max_shard_bytes: for each safetensors file.
        dtype: "bf16", "fp32" or "keep". The expert bias is always fp32.
        base_hf: the Hugging Face folder that training began with. From it come MTP layers that training did not hold, and, where `dist` has no
            config.json, that and the tokenizer.
        workers, overwrite, verify, sync, say: as for `hf_to_dist`.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of the config.json; `hf` cannot be written. Nothing is left behind.
    """
    started, dist, hf = time.monotonic(), Path(dist), Path(hf)
    checkpoint = open_dist_checkpoint(dist, iteration)
    base = Path(base_hf) if base_hf is not None else None
    companions, config = _companions(dist, checkpoint, base)
    _check_apart(dist, hf)
    entries = plan(config, layout)
    tensors = _complete(checkpoint, config, entries, base, say)
    wanted = DTYPES[dtype]
    specs = {entry.hf_name: _spec(entry, tensors[entry.dist_key].dtype, wanted) for entry in entries}
    shards = plan_shards(specs.values(), max_shard_bytes)
    tasks = list(_plan_hf(shards, {entry.hf_name: entry for entry in entries}, tensors))
    num_bytes = sum(task.nbytes for task in tasks)
    carried = carried_files(companions)
    check_target(hf, num_bytes + sum(len(shard_header(shard)) for shard in shards) + _small_bytes(carried, len(tasks)), overwrite, _HF_NAMES)
    with built_beside(hf, say) as partial:
        for shard in shards:
            (partial / shard.file_name).write_bytes(shard_header(shard))
        peak = write(partial, tasks, workers, Progress("to Hugging Face", num_bytes), sync)
        if verify:
            stored = {name: entry for shard in shards for name, entry in SafetensorsFile(partial / shard.file_name).tensors.items()}
            _verify(entries, tensors, rows_of_hf(entries, stored), workers)
        carry(carried, partial)
        write_index(partial, shards)
        _with_dtype(config, specs.values()).save(partial)
    return Summary(len(tasks), num_bytes, time.monotonic() - started, peak)


def _open_hf(folder: Path) -> _HFSource:
    """A Hugging Face checkpoint, accounted for: config, every tensor, its shape and dtype."""
    config, stored = HyConfig.from_dir(folder), open_checkpoint(folder)
    for name, entry in stored.items():
        if entry.dtype not in STORAGES:
            raise UserError(f"{entry.file}: {name} is {entry.dtype}; allowed are {', '.join(STORAGES)}: dequantise the checkpoint first")
    try:
        match = match_hf_tensors(config, {name: entry.shape for name, entry in stored.items()})
        return _HFSource(config, stored, match.entries, match.dropped, rows_of_hf(match.entries, stored))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _check_apart(source: Path, target: Path) -> None:
    a, b = source.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UserError(f"{target}: is, holds or lies in {source}, which is read; give a folder elsewhere")


def _small_bytes(carried: list[Path], num_tasks: int) -> int:
    return sum(path.stat().st_size for path in carried) + num_tasks * 1024 + _SPARE_BYTES


def _verify(entries: list[Entry], read: Mapping[str, RowTensor], written: Mapping[str, RowTensor], workers: int) -> None:
    keys = [entry.dist_key for entry in entries]
    pairs = [Pair(entry.hf_name, read[key], written[key], row_ranges(entry), written[key].dtype) for entry, key in zip(entries, keys, strict=True)]
    differences = compare_rows(pairs, workers, "verifying")
    if differences:
        first = differences[0]
        raise UserError(
            f"{len(differences)} of {len(pairs)} tensors were not written as they were read, the first {first.name} ({first.what}); "
            f"disk or memory is faulty, or the source was changed: convert again"
        )


# ---- to Hugging Face


def _companions(dist: Path, checkpoint: DistCheckpoint, base_hf: Path | None) -> tuple[Path, HyConfig]:
    """The folder that config.json and tokenizer are taken from, and the config."""
    for folder in dict.fromkeys((dist, checkpoint.folder, checkpoint.folder.parent, *([base_hf] if base_hf else []))):
        if (folder / CONFIG_FILE).is_file():
            return folder, HyConfig.from_dir(folder)
    if base_hf is not None:
        raise UserError(f"--base-hf {base_hf}: no {CONFIG_FILE} in it; give the Hugging Face folder that training began with")
    raise UserError(f"{dist}: no {CONFIG_FILE} in it; give --base-hf, the Hugging Face folder that training began with")


def _shape_fields(config: HyConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("raw", "dtype")}


def _complete(checkpoint: DistCheckpoint, config: HyConfig, entries: list[Entry], base_hf: Path | None, say: Say) -> dict[str, RowTensor]:
    """The tensors of the checkpoint, and from `base_hf` those of MTP layers that it does not hold; all accounted for."""
    tensors = rows_of_dist(checkpoint)
    missing = list(dict.fromkeys(entry.dist_key for entry in entries if entry.dist_key not in tensors and entry.dist_key.startswith("mtp.")))
    if missing and not any(key.startswith("mtp.") for key in tensors):
        if base_hf is None:
            raise UserError(
                f"{checkpoint.folder}: training did not hold the model's MTP layers ({len(missing)} tensors, num_nextn_predict_layers = "
                f"{config.num_nextn_predict_layers}); give --base-hf, the Hugging Face folder to take them from"
            )
        base = _open_hf(base_hf)
        if differing := [name for name, value in _shape_fields(config).items() if _shape_fields(base.config)[name] != value]:
            raise UserError(f"--base-hf {base_hf}: another model than the checkpoint's: {', '.join(differing)} differ in config.json; give its own")
        tensors |= {key: base.tensors[key] for key in missing}
        say(f"taken from {base_hf}: the MTP layers, {len(missing)} tensors, which training did not hold")
    try:
        check_distributed_tensors(config, {key: tensor.shape for key, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from None
    return tensors


def _spec(entry: Entry, dtype: str, wanted: str | None) -> TensorSpec:
    return TensorSpec(entry.hf_name, "F32" if entry.is_fp32_buffer else wanted or dtype, entry.hf_shape)


def _plan_hf(shards: list[Shard], entries: Mapping[str, Entry], tensors: Mapping[str, RowTensor]) -> Iterator[Task]:
    for shard in shards:
        position = len(shard_header(shard))
        for spec in shard.tensors:
            entry = entries[spec.name]
            yield Task(spec.name, tensors[entry.dist_key], row_ranges(entry), spec.dtype, spec.nbytes, shard.file_name, position)
            position += spec.nbytes


def _with_dtype(config: HyConfig, specs: Any) -> HyConfig:
    """The config, its dtype that of most of the elements written. A config without one keeps silent."""
    elements: dict[str, int] = {}
    for spec in specs:
        elements[spec.dtype] = elements.get(spec.dtype, 0) + math.prod(spec.shape)
    dtype = _CONFIG_DTYPES[max(elements, key=elements.__getitem__)]
    raw = config.to_dict()
    for key in ("dtype", "torch_dtype"):
        if raw.get(key) is not None:
            raw[key] = dtype
    return HyConfig.from_dict(raw)
