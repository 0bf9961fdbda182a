"""A Hugging Face checkpoint as a sink: which tensor goes into which safetensors file."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hymeg.checkpoint.mapping import Entry, Range, hf_entries
from hymeg.checkpoint.row_tensors import RowTensor
from hymeg.checkpoint.sinks.transfer import FilesToWrite, Task, files_to_write
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.hf.safetensors_files import Shard, TensorSpec, index_files, into_shards, shard_header


class Place(NamedTuple):
    """Where the elements of a tensor are written."""

    spec: TensorSpec
    file: str
    position: int


def placed(shards: Iterable[Shard]) -> tuple[list[Place], dict[str, bytes]]:
    """Every tensor of these files, in the order of their bytes; the headers, by file."""
    places, headers = [], {}
    for shard in shards:
        headers[shard.file_name] = shard_header(shard)
        position = len(headers[shard.file_name])
        for spec in shard.tensors:
            places.append(Place(spec, shard.file_name, position))
            position += spec.nbytes
    return places, headers


def files_of_shards(
    shards: list[Shard],
    made_of: Mapping[str, tuple[RowTensor, Sequence[Range]]],
    workers: int,
    beside: Mapping[str, bytes] | None = None,
) -> FilesToWrite:
    """A folder of these files, and of those `beside`.

    Args:
        made_of: the rows that a tensor consists of, by its name; those of a file are moved in this order.
    """
    places, headers = placed(shards)
    order = {name: number for number, name in enumerate(made_of)}
    places.sort(key=lambda place: (place.file, order[place.spec.name]))
    tasks = [Task(*made_of[spec.name], spec.dtype, file, position) for spec, file, position in places]
    return files_to_write(tasks, workers, {**index_files(shards), **(beside or {})}, headers)


def hf_specs(entries: Iterable[Entry], dtypes: Mapping[str, str], dtype: str | None = None) -> list[TensorSpec]:
    """Hugging Face tensors to be written in `dtype`; None: in those of their distributed tensors, which `dtypes` has by
    key. The expert bias is always F32.
    """
    return [
        TensorSpec(entry.hf_name, "F32" if entry.is_fp32_buffer else dtype or dtypes[entry.dist_key], entry.hf_shape)
        for entry in entries
    ]


def files_of_hf(
    config: HyConfig,
    tensors: Mapping[str, RowTensor],
    layout: str,
    sharding: int | Mapping[str, str],
    dtype: str | None,
    workers: int,
) -> tuple[FilesToWrite, HyConfig]:
    """A folder that holds `tensors` under the names of `layout`, in `dtype` (None: their own), and its config.

    Args:
        sharding: the most bytes for a file, or the file of each tensor by its name.
    """
    entries = hf_entries(config, layout)
    specs = hf_specs(entries, {key: tensor.dtype_kept for key, tensor in tensors.items()}, dtype)
    made_of = {entry.hf_name: (tensors[entry.dist_key], entry.rows) for entry in entries}
    return files_of_shards(into_shards(specs, sharding), made_of, workers), with_dtype(config, specs)


def with_dtype(config: HyConfig, specs: list[TensorSpec]) -> HyConfig:
    """The config, its dtype that of most of the elements written. A config without one keeps silent."""
    elements: dict[str, int] = {}
    for spec in specs:
        elements[spec.dtype] = elements.get(spec.dtype, 0) + math.prod(spec.shape)
    dtype = WEIGHTS[max(elements, key=elements.__getitem__)].torch
    raw = config.without_quantization().raw
    return HyConfig.from_dict(raw | {key: dtype for key in ("dtype", "torch_dtype") if raw.get(key) is not None})
