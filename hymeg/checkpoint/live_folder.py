"""A Hugging Face folder written by a model in training: every rank gives its weights, rank 0's disk takes them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hymeg.checkpoint.companions import carried_files, carry
from hymeg.checkpoint.mapping import hf_entries
from hymeg.checkpoint.sinks.hf_folder import Place, hf_specs, placed, with_dtype
from hymeg.checkpoint.sinks.new_folder import new_folder
from hymeg.checkpoint.sinks.transfer import FilesToWrite, write_in_order
from hymeg.checkpoint.sources.live_model import Block, LiveModel
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ITEM_SIZES
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, index_files, into_shards

_SPARE_BYTES = 16 << 20  # for small files


def save_hf_folder(
    model_chunks: Sequence[torch.nn.Module],
    config: HyConfig,
    target: str | Path,
    *,
    companions: Path | None = None,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the weights of a model as the Hugging Face folder `target`, whole or not at all: to the byte what
    `dist_to_hf` writes of a checkpoint saved at the same moment.

    Every rank of the world calls this; rank 0 writes, a few megabytes at a time, and needs no memory for more.

    Args:
        model_chunks: this rank's, wrapped or not.
        companions: a folder whose tokenizer, templates, code and licence go along.
        layout, max_shard_bytes, overwrite, say: as for `dist_to_hf`.
        record: where it comes from, for the folder's conversion.json.

    Raises:
        UserError: on every rank: `target` cannot be written, or holds what no conversion wrote; or the model is not
            that of `config`.
    """
    live = LiveModel(model_chunks, config)
    entries = {entry.hf_name: entry for entry in hf_entries(config, layout)}
    specs = hf_specs(entries.values(), live.dtypes)
    shards = into_shards(specs, max_shard_bytes)
    places, headers = placed(shards)
    num_bytes = sum(spec.nbytes for spec in specs)
    sizes = {place.file: place.position + place.spec.nbytes for place in places}  # of a file's last tensor
    files = FilesToWrite(sizes, [], index_files(shards), headers, len(places), num_bytes)
    blocks = live.blocks((entries[place.spec.name] for place in places), to_rank=0)
    failure = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            size = sum(sizes.values()) + _SPARE_BYTES
            with new_folder(Path(target), size, overwrite, record or {}, say) as partial:
                write_in_order(partial, files, _pieces(places, blocks))
                carry(carried_files(companions) if companions else {}, partial)
                with_dtype(config, specs).save(partial)
        except UserError as error:
            failure = str(error)
    for _ in blocks:
        pass  # every rank comes to every collective, whatever became of rank 0's disk
    if dist.is_initialized():
        told = [failure]
        dist.broadcast_object_list(told, src=0)
        failure = told[0]
    if failure is not None:
        raise UserError(failure)


def _pieces(places: Iterable[Place], blocks: Iterator[Block]) -> Iterator[tuple[str, int, memoryview]]:
    remaining = iter(places)
    place = None
    for block in blocks:
        if block.row == 0:
            place = next(remaining)
        row_bytes = block.entry.hf_shape[-1] * ITEM_SIZES[place.spec.dtype]
        data = memoryview(block.rows.cpu().view(torch.uint8).numpy()).cast("B")
        yield place.file, place.position + block.row * row_bytes, data
