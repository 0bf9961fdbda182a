"""A Hugging Face checkpoint as a sink: which tensor goes into which safetensors file."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hymeg.checkpoint.mapping import Entry, hf_entries
from hymeg.checkpoint.row_tensors import RowTensor
from hymeg.checkpoint.sinks.transfer import FilesToWrite, Task, files_to_write
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.hf.safetensors_files import Shard, TensorSpec, index_files, into_shards, shard_header


class Place(NamedTuple):
    """Where a tensor is written: its elements, in `dtype`, at `position` of `file`."""

    entry: Entry
    dtype: str
    file: str
    position: int


class Plan(NamedTuple):
    """A folder planned to the byte, its tensors in the order in which they lie in its files."""

    places: list[Place]
    shards: list[Shard]
    headers: dict[str, bytes]  # file -> its first bytes
    config: HyConfig  # that tells the dtype


def planned(
    config: HyConfig,
    dtypes: Mapping[str, str],
    layout: str,
    sharding: int | Mapping[str, str],
    dtype: str | None = None,
) -> Plan:
    """A folder under the names of `layout`, in `dtype`.

    Args:
        dtypes: of the distributed tensors, by key.
        sharding: the most bytes for a file, or the file of each tensor by its name.
        dtype: None: their own. The expert bias is always F32.
    """
    entries = {entry.hf_name: entry for entry in hf_entries(config, layout)}
    specs = [
        TensorSpec(name, "F32" if entry.is_fp32_buffer else dtype or dtypes[entry.dist_key], entry.hf_shape)
        for name, entry in entries.items()
    ]
    shards = into_shards(specs, sharding)
    headers = {shard.file_name: shard_header(shard) for shard in shards}
    places = [
        Place(entries[spec.name], spec.dtype, shard.file_name, position)
        for shard in shards
        for spec, position in positions(shard, headers[shard.file_name])
    ]
    return Plan(places, shards, headers, with_dtype(config, specs))


def positions(shard: Shard, header: bytes) -> Iterator[tuple[TensorSpec, int]]:
    """The tensors of a file, in their order, and where each begins."""
    position = len(header)
    for spec in shard.tensors:
        yield spec, position
        position += spec.nbytes


def files_of_hf(
    config: HyConfig,
    tensors: Mapping[str, RowTensor],
    layout: str,
    sharding: int | Mapping[str, str],
    dtype: str | None,
    workers: int,
) -> tuple[FilesToWrite, HyConfig]:
    """A folder that holds `tensors`, and its config; the arguments as for `planned`."""
    dtypes = {key: tensor.dtype_kept for key, tensor in tensors.items()}
    plan = planned(config, dtypes, layout, sharding, dtype)
    tasks = [
        Task(tensors[entry.dist_key], entry.rows, dtype, file, position) for entry, dtype, file, position in plan.places
    ]
    return files_to_write(tasks, workers, index_files(plan.shards), plan.headers), plan.config


def with_dtype(config: HyConfig, specs: list[TensorSpec]) -> HyConfig:
    """The config, its dtype that of most of the elements written. A config without one keeps silent."""
    elements: dict[str, int] = {}
    for spec in specs:
        elements[spec.dtype] = elements.get(spec.dtype, 0) + math.prod(spec.shape)
    dtype = WEIGHTS[max(elements, key=elements.__getitem__)].torch
    return HyConfig.from_dict(
        {
            key: dtype if key in ("dtype", "torch_dtype") and value is not None else value
            for key, value in config.without_quantization().raw.items()
        }
    )
