"""A Hugging Face folder written by a model in training: every rank gives its weights, rank 0's disk takes them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hymeg.checkpoint.companions import carried_files, carry
from hymeg.checkpoint.sinks.hf_folder import Place, Plan, planned
from hymeg.checkpoint.sinks.new_folder import new_folder
from hymeg.checkpoint.sinks.transfer import FilesToWrite, write_in_order
from hymeg.checkpoint.sources.live_model import Block, LiveModel
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ITEM_SIZES
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, index_files

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
    plan = planned(config, live.dtypes, layout, max_shard_bytes)
    blocks = live.blocks((place.entry for place in plan.places), to_rank=0)
    failure = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _write(Path(target), plan, blocks, companions, overwrite, record or {}, say)
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


def _write(
    target: Path,
    plan: Plan,
    blocks: Iterator[Block],
    companions: Path | None,
    overwrite: bool,
    record: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    num_bytes = {shard.file_name: sum(spec.nbytes for spec in shard.tensors) for shard in plan.shards}
    sizes = {name: len(header) + num_bytes[name] for name, header in plan.headers.items()}
    beside, last = index_files(plan.shards), dict(plan.headers)
    files = FilesToWrite(sizes, [], beside, last, len(plan.places), sum(num_bytes.values()))
    with new_folder(target, sum(sizes.values()) + _SPARE_BYTES, overwrite, record, say) as partial:
        write_in_order(partial, files, _pieces(plan.places, blocks))
        carry(carried_files(companions) if companions else {}, partial)
        plan.config.save(partial)


def _pieces(places: Iterable[Place], blocks: Iterator[Block]) -> Iterator[tuple[str, int, memoryview]]:
    remaining = iter(places)
    place = None
    for block in blocks:
        if block.row == 0:
            place = next(remaining)
        row_bytes = block.entry.hf_shape[-1] * ITEM_SIZES[place.dtype]
        data = memoryview(block.rows.cpu().view(torch.uint8).numpy()).cast("B")
        yield place.file, place.position + block.row * row_bytes, data
