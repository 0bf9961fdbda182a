"""A Hugging Face checkpoint as a sink: which tensor goes into which safetensors file."""

import math
from collections.abc import Mapping

from hymeg.checkpoint.mapping import hf_entries
from hymeg.checkpoint.row_tensors import RowTensor
from hymeg.checkpoint.sinks.transfer import FilesToWrite, Task, files_to_write
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.hf.safetensors_files import TensorSpec, index_files, into_shards, shard_header


def files_of_hf(
    config: HyConfig,
    tensors: Mapping[str, RowTensor],
    layout: str,
    max_shard_bytes: int,
    dtype: str | None,
    workers: int,
) -> tuple[FilesToWrite, HyConfig]:
    """A folder that holds `tensors` under the names of `layout`, in `dtype` (None: their own; the expert bias is always
    F32), and the config that tells that dtype.
    """
    entries = {entry.hf_name: entry for entry in hf_entries(config, layout)}
    specs = [
        TensorSpec(name, "F32" if entry.is_fp32_buffer else dtype or tensors[entry.dist_key].dtype, entry.hf_shape)
        for name, entry in entries.items()
    ]
    shards = into_shards(specs, max_shard_bytes)
    headers, tasks = {shard.file_name: shard_header(shard) for shard in shards}, []
    for shard in shards:
        position = len(headers[shard.file_name])
        for spec in shard.tensors:
            entry = entries[spec.name]
            tasks.append(Task(tensors[entry.dist_key], entry.rows, spec.dtype, shard.file_name, position))
            position += spec.nbytes
    return files_to_write(tasks, workers, index_files(shards), headers), _with_dtype(config, specs)


def _with_dtype(config: HyConfig, specs: list[TensorSpec]) -> HyConfig:
    """The config, its dtype that of most of the elements written. A config without one keeps silent."""
    elements: dict[str, int] = {}
    for spec in specs:
        elements[spec.dtype] = elements.get(spec.dtype, 0) + math.prod(spec.shape)
    dtype = WEIGHTS[max(elements, key=elements.__getitem__)].torch
    return HyConfig.from_dict(
        {
            key: dtype if key in ("dtype", "torch_dtype") and value is not None else value
            for key, value in config.raw.items()
        }
    )
