"""A conversion checked and planned to the byte, before anything is written.

Plans are made in a process of their own (`workers.aside`). What grows with the number of tensors goes into a `Spool`; a
`Plan` is the rest.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.chunks import plan_dist
from hymeg.checkpoint.compare import Pair
from hymeg.checkpoint.dist_files import (
    COMMON_STATE_KEY,
    RELEASE,
    SOURCE_FILE,
    TRACKER,
    DistCheckpoint,
    open_dist_checkpoint,
)
from hymeg.checkpoint.dist_metadata import common_state, metadata_files
from hymeg.checkpoint.folders import carried_files, check_target
from hymeg.checkpoint.mapping import Entry, check_distributed_tensors, match_hf_tensors, plan
from hymeg.checkpoint.rows import RowTensor, row_ranges, rows_of_dist, rows_of_hf
from hymeg.checkpoint.spool import Part, Spool
from hymeg.checkpoint.stored_tensor import STORAGES
from hymeg.checkpoint.transfer import Task, shares, stored_length, turns
from hymeg.errors import UserError
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.hf.safetensors_files import (
    INDEX_FILE,
    SafetensorsFile,
    Shard,
    TensorEntry,
    TensorSpec,
    index_of,
    open_checkpoint,
    plan_shards,
    shard_header,
)

DTYPES = {"bf16": "BF16", "fp32": "F32", "keep": None}
_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DIST_NAMES = re.compile(rf"{RELEASE}|{re.escape(TRACKER)}|{re.escape(SOURCE_FILE)}|config\.json")
_HF_NAMES = re.compile(rf".*\.safetensors|{re.escape(INDEX_FILE)}|config\.json")
_SPARE_BYTES = 16 << 20  # for metadata and small files


class Plan(NamedTuple):
    """What to write. Parts are those of the spool that was planned into."""

    source: Path  # the folder that holds the tensors' files
    config: HyConfig  # to write
    carried: list[Path]
    shares: list[Part]  # of Task: what a worker moves at a time,
    sizes: dict[str, int]  # and the bytes of the files that it goes to
    headers: Part  # of (name, bytes): what these files begin with,
    after: Part  # and further files, to write last
    num_tensors: int
    num_bytes: int
    notes: list[str]  # for the user


class Pairs(NamedTuple):
    """What to compare: `Pair`s, in parts of a spool."""

    shares: list[Part]
    num_pairs: int
    num_bytes: int


class _HFSource(NamedTuple):
    config: HyConfig
    stored: dict[str, TensorEntry]
    entries: list[Entry]
    dropped: list[str]
    tensors: dict[str, RowTensor]


# ---- to a distributed checkpoint


def plan_to_dist(spool: Spool, hf: Path, dist: Path, workers: int, overwrite: bool) -> Plan:
    """From the Hugging Face checkpoint in `hf` to `dist`. Raises UserError as `convert.hf_to_dist` does."""
    source = _open_hf(hf)
    _check_apart(hf, dist)
    tasks, tensors = plan_dist(
        source.config, source.tensors, list(dict.fromkeys(str(entry.file) for entry in source.stored.values())), workers
    )
    sizes = {task.file: task.position + stored_length(task) for task in tasks}  # a file's last task ends it
    carried = carried_files(hf)
    check_target(dist, sum(sizes.values()) + _small_bytes(carried, len(tasks)), overwrite, _DIST_NAMES)
    state, state_file = common_state(source.config), f"__{len(sizes)}_0.distcp"
    return Plan(
        source=hf,
        config=source.config,
        carried=carried,
        shares=_spooled_tasks(spool, tasks, workers),
        sizes=sizes,
        headers=spool.add([]),
        after=spool.add(
            [(state_file, state), *metadata_files(tensors, {COMMON_STATE_KEY: (state_file, 0, len(state))}).items()]
        ),
        num_tensors=len(tensors),
        num_bytes=sum(task.nbytes for task in tasks),
        notes=[f"left out, the trunk's own are used instead: {', '.join(source.dropped)}"] if source.dropped else [],
    )


def pairs_with_dist(spool: Spool, made: Plan, folder: Path, workers: int) -> Pairs:
    """What `plan_to_dist` planned, and what was written to `folder`."""
    source = _open_hf(made.source)
    return _spooled_pairs(spool, source.entries, source.tensors, rows_of_dist(open_dist_checkpoint(folder)), workers)


def _open_hf(folder: Path) -> _HFSource:
    """A Hugging Face checkpoint, accounted for: config, every tensor, its shape and dtype."""
    config, stored = HyConfig.from_dir(folder), open_checkpoint(folder)
    for name, entry in stored.items():
        if entry.dtype not in STORAGES:
            raise UserError(
                f"{entry.file}: {name} is {entry.dtype}; allowed are {', '.join(STORAGES)}: dequantise the checkpoint "
                "first"
            )
    try:
        match = match_hf_tensors(config, {name: entry.shape for name, entry in stored.items()})
        return _HFSource(config, stored, match.entries, match.dropped, rows_of_hf(match.entries, stored))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


# ---- to Hugging Face


def plan_to_hf(
    spool: Spool,
    dist: Path,
    hf: Path,
    *,
    iteration: int | None,
    layout: str,
    max_shard_bytes: int,
    dtype: str,
    base_hf: Path | None,
    workers: int,
    overwrite: bool,
) -> Plan:
    """From the distributed checkpoint in `dist` to `hf`. Arguments and errors are those of `convert.dist_to_hf`."""
    checkpoint = open_dist_checkpoint(dist, iteration)
    companions, config = _companions(dist, checkpoint, base_hf)
    _check_apart(dist, hf)
    entries = plan(config, layout)
    tensors, notes = _complete(checkpoint, config, entries, base_hf)
    specs = {entry.hf_name: _spec(entry, tensors[entry.dist_key].dtype, DTYPES[dtype]) for entry in entries}
    shards = plan_shards(specs.values(), max_shard_bytes)
    tasks = list(_plan_hf(shards, {entry.hf_name: entry for entry in entries}, tensors))
    sizes = {task.file: task.position + task.nbytes for task in tasks}  # a file's last task ends it
    carried = carried_files(companions)
    check_target(hf, sum(sizes.values()) + _small_bytes(carried, len(tasks)), overwrite, _HF_NAMES)
    return Plan(
        source=checkpoint.folder,
        config=_with_dtype(config, specs.values()),
        carried=carried,
        shares=_spooled_tasks(spool, tasks, workers),
        sizes=sizes,
        headers=spool.add((shard.file_name, shard_header(shard)) for shard in shards),
        after=spool.add([(INDEX_FILE, index_of(shards))] if len(shards) > 1 else []),  # one file alone needs no index
        num_tensors=len(tasks),
        num_bytes=sum(task.nbytes for task in tasks),
        notes=notes,
    )


def pairs_with_hf(spool: Spool, made: Plan, folder: Path, *, layout: str, base_hf: Path | None, workers: int) -> Pairs:
    """What `plan_to_hf` planned, and what was written to `folder`."""
    entries = plan(made.config, layout)
    tensors, _ = _complete(open_dist_checkpoint(made.source), made.config, entries, base_hf)
    stored = {
        name: entry for path in folder.glob("*.safetensors") for name, entry in SafetensorsFile(path).tensors.items()
    }
    return _spooled_pairs(spool, entries, tensors, rows_of_hf(entries, stored), workers)


def _companions(dist: Path, checkpoint: DistCheckpoint, base_hf: Path | None) -> tuple[Path, HyConfig]:
    """The folder that config.json and tokenizer are taken from, and the config."""
    for folder in dict.fromkeys((dist, checkpoint.folder, checkpoint.folder.parent, *([base_hf] if base_hf else []))):
        if (folder / CONFIG_FILE).is_file():
            return folder, HyConfig.from_dir(folder)
    if base_hf is not None:
        raise UserError(
            f"--base-hf {base_hf}: no {CONFIG_FILE} in it; give the Hugging Face folder that training began with"
        )
    raise UserError(f"{dist}: no {CONFIG_FILE} in it; give --base-hf, the Hugging Face folder that training began with")


def _shape_fields(config: HyConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("raw", "dtype")}


def _complete(
    checkpoint: DistCheckpoint, config: HyConfig, entries: list[Entry], base_hf: Path | None
) -> tuple[dict[str, RowTensor], list[str]]:
    """The tensors of the checkpoint, and from `base_hf` those of MTP layers that it does not hold, which is noted; all
    accounted for.
    """
    notes = []
    tensors = rows_of_dist(checkpoint)
    missing = list(
        dict.fromkeys(
            entry.dist_key for entry in entries if entry.dist_key not in tensors and entry.dist_key.startswith("mtp.")
        )
    )
    if missing and not any(key.startswith("mtp.") for key in tensors):
        if base_hf is None:
            raise UserError(
                f"{checkpoint.folder}: training did not hold the model's MTP layers ({len(missing)} tensors, "
                "num_nextn_predict_layers = "
                f"{config.num_nextn_predict_layers}); give --base-hf, the Hugging Face folder to take them from"
            )
        base = _open_hf(base_hf)
        if differing := [
            name for name, value in _shape_fields(config).items() if _shape_fields(base.config)[name] != value
        ]:
            raise UserError(
                f"--base-hf {base_hf}: another model than the checkpoint's: {', '.join(differing)} differ in "
                "config.json; give its own"
            )
        tensors |= {key: base.tensors[key] for key in missing}
        notes.append(f"taken from {base_hf}: the MTP layers, {len(missing)} tensors, which training did not hold")
    try:
        check_distributed_tensors(config, {key: tensor.shape for key, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from None
    return tensors, notes


def _spec(entry: Entry, dtype: str, wanted: str | None) -> TensorSpec:
    return TensorSpec(entry.hf_name, "F32" if entry.is_fp32_buffer else wanted or dtype, entry.hf_shape)


def _plan_hf(shards: list[Shard], entries: Mapping[str, Entry], tensors: Mapping[str, RowTensor]) -> Iterator[Task]:
    for shard in shards:
        position = len(shard_header(shard))
        for spec in shard.tensors:
            entry = entries[spec.name]
            yield Task(
                spec.name,
                tensors[entry.dist_key],
                row_ranges(entry),
                spec.dtype,
                spec.nbytes,
                shard.file_name,
                position,
            )
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


# ---- both


def _check_apart(source: Path, target: Path) -> None:
    a, b = source.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UserError(f"{target}: is, holds or lies in {source}, which is read; give a folder elsewhere")


def _small_bytes(carried: list[Path], num_tasks: int) -> int:
    return sum(path.stat().st_size for path in carried) + num_tasks * 1024 + _SPARE_BYTES


def _spooled_tasks(spool: Spool, tasks: list[Task], workers: int) -> list[Part]:
    return [
        spool.add(task._replace(tensor=task.tensor.only(task.ranges)) for task in share)
        for share in turns(tasks, workers)
    ]


def _spooled_pairs(
    spool: Spool, entries: list[Entry], read: Mapping[str, RowTensor], written: Mapping[str, RowTensor], workers: int
) -> Pairs:
    pairs = []
    for entry in entries:
        ranges, a, b = row_ranges(entry), read[entry.dist_key], written[entry.dist_key]
        pairs.append(Pair(entry.hf_name, a.only(ranges), b.only(ranges), ranges, b.dtype))
    return Pairs([spool.add(share) for share in shares(pairs, workers)], len(pairs), sum(pair.nbytes for pair in pairs))
