"""A model in training as a source of rows, and as where they go: the weights that its ranks hold, without a file.

Which rows and columns of which distributed tensor a rank holds, Megatron's `sharded_state_dict` says, as it does for a
checkpoint; where a Hugging Face tensor lies in them, `hymeg.checkpoint.mapping`. A few megabytes of rows at a time go
from the ranks that hold them to all others, by broadcasts over the world.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.utils import unwrap_model

from hymeg.checkpoint.mapping import (
    Entry,
    Range,
    Shape,
    check_distributed_tensors,
    hf_entries,
    num_rows,
    row_ranges,
)
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader
from hymeg.checkpoint.sources import open_any
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS

BATCH_BYTES = 16 << 20  # on their way at once
_ALIGNMENT = 16

_TORCH = {name: getattr(torch, names.torch) for name, names in WEIGHTS.items()}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


class Block(NamedTuple):
    """Consecutive rows, whole, of a Hugging Face tensor: from its `row` on, as a matrix."""

    entry: Entry
    row: int
    rows: torch.Tensor


def export_weights(
    model_chunks: Sequence[torch.nn.Module],
    config: HyConfig,
    *,
    layout: str = "hub",
    dtype: str | None = None,
    to_rank: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model under their Hugging Face names, one whole tensor after the other, on the device.

    Every rank of the world calls this and takes all that it gives: each tensor is a collective. Beside the model a
    rank's memory holds two of BATCH_BYTES and the tensor that was asked for last.

    Args:
        model_chunks: this rank's, wrapped or not.
        layout: "hub", expert by expert, or "fused", transformers' names in memory.
        dtype: "BF16" or "F32"; None: as trained. The expert bias is always fp32.
        to_rank: who is given the tensors; the others give theirs and get none. None: everyone.

    Raises:
        UserError: the model is not that of `config`.
    """
    blocks = LiveModel(model_chunks, config).blocks(hf_entries(config, layout), to_rank)
    for entry, of_entry in itertools.groupby(blocks, key=lambda block: block.entry):
        first = next(of_entry)
        tensor = first.rows
        if len(tensor) < num_rows(entry.hf_shape):
            tensor = tensor.new_empty(num_rows(entry.hf_shape), entry.hf_shape[-1])
            for block in itertools.chain([first], of_entry):
                tensor[block.row : block.row + len(block.rows)] = block.rows
        tensor = tensor.view(entry.hf_shape)
        yield entry.hf_name, tensor.to(_TORCH[dtype]) if dtype and not entry.is_fp32_buffer else tensor


@torch.no_grad()
def load_weights(model_chunks: Sequence[torch.nn.Module], config: HyConfig, folder: str | Path) -> None:
    """Fill this rank's part of a model, in place and in its own dtype, from the Hugging Face or distributed checkpoint
    in `folder`, of which it reads what it needs. Padding rows of the vocabulary become zero.

    No collective. An optimizer that keeps weights of its own must be told (`optimizer.reload_model_params()`).

    Raises:
        UserError: the folder holds no checkpoint, a broken one or another model's.
    """
    shards, source = _shards(model_chunks), open_any(folder)
    held = {shard.key: tuple(shard.global_shape) for shard in shards}
    check_distributed_tensors(config, held, required=())
    try:
        check_distributed_tensors(config, {key: tensor.shape for key, tensor in source.tensors.items()})
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from None
    with TensorReader() as reader:
        for shard in shards:
            _fill(shard, source.tensors[shard.key], reader)


class LiveModel:
    """What the ranks of a model hold. All ranks construct it together.

    Attributes:
        dtypes: of the distributed tensors, by key: "BF16".

    Raises:
        UserError: the model is not that of `config`.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], config: HyConfig):
        for chunk in model_chunks:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                # The last step's weights are gathered when the next step asks for them.
                chunk.start_param_sync(force_sync=True)
        self._shards = [shard for shard in _shards(model_chunks) if is_main_replica(shard.replica_id)]
        self._device = next(model_chunks[0].parameters()).device
        self._rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        held = [
            (s.key, tuple(s.global_shape), tuple(s.global_offset), _extent(s), _NAMES[s.dtype]) for s in self._shards
        ]
        of_ranks = [held]
        if world > 1:
            dist.all_gather_object(of_ranks := [None] * world, held)
        self.dtypes: dict[str, str] = {}
        self._parts: dict[str, list[_Part]] = {}
        shapes: dict[str, Shape] = {}
        for rank, of_rank in enumerate(of_ranks):
            for number, (key, shape, offset, extent, dtype) in enumerate(of_rank):
                shapes[key], self.dtypes[key] = shape, dtype
                self._parts.setdefault(key, []).extend(_parts(shape, offset, extent, rank, number))
        check_distributed_tensors(config, shapes)
        for key, parts in self._parts.items():
            parts.sort(key=lambda part: part.stop)
            held_elements = sum((part.stop - part.start) * part.num_columns for part in parts)
            assert held_elements == math.prod(shapes[key]), f"{key}: {held_elements} elements of {shapes[key]} are held"

    @torch.no_grad()
    def blocks(self, entries: Iterable[Entry], to_rank: int | None = None) -> Iterator[Block]:
        """The rows of Hugging Face tensors, in order, in their own dtypes; a block is at most BATCH_BYTES, or a row.
        Collective; `to_rank` as for `export_weights`.
        """
        is_taker = to_rank in (None, self._rank)
        for batch in self._batches(entries):
            blocks = [
                Block(entry, row, torch.empty(stop - start, entry.hf_shape[-1], dtype=dtype, device=self._device))
                for entry, row, (start, stop), dtype in batch
                if is_taker
            ]
            for rank, moves in sorted(self._moves(batch).items()):
                for move, rows in self._broadcast(rank, moves):
                    if is_taker:
                        into = blocks[move.block].rows[move.row : move.row + move.num_rows]
                        into[:, move.column : move.column + move.num_columns] = rows
            yield from blocks

    def _batches(self, entries: Iterable[Entry]) -> Iterator[list[tuple[Entry, int, Range, torch.dtype]]]:
        """(tensor, its row, rows of the distributed tensor, dtype), BATCH_BYTES together."""
        batch, num_bytes = [], 0
        for entry in entries:
            row, dtype = 0, _TORCH[self.dtypes[entry.dist_key]]
            row_bytes = entry.hf_shape[-1] * dtype.itemsize
            for start, stop in entry.rows:
                for low in range(start, stop, step := max(BATCH_BYTES // row_bytes, 1)):
                    high = min(low + step, stop)
                    if batch and num_bytes + (high - low) * row_bytes > BATCH_BYTES:
                        yield batch
                        batch, num_bytes = [], 0
                    batch.append((entry, row, (low, high), dtype))
                    row, num_bytes = row + high - low, num_bytes + (high - low) * row_bytes
        yield batch

    def _moves(self, batch: list[tuple[Entry, int, Range, torch.dtype]]) -> "dict[int, list[_Move]]":
        """What each rank gives to a batch."""
        moves: dict[int, list[_Move]] = {}
        for block, (entry, _, (start, stop), dtype) in enumerate(batch):
            parts = self._parts[entry.dist_key]
            for part in itertools.islice(parts, bisect_left(parts, start + 1, key=lambda part: part.stop), None):
                if part.start >= stop:
                    break
                low, high = max(start, part.start), min(stop, part.stop)
                if low < high:
                    place = part.number, part.row + low - part.start, block, low - start
                    moves.setdefault(part.rank, []).append(
                        _Move(*place, high - low, part.column, part.num_columns, dtype)
                    )
        return moves

    def _broadcast(self, rank: int, moves: "list[_Move]") -> "Iterator[tuple[_Move, torch.Tensor]]":
        """What `rank` gives, on every rank."""
        sizes = [move.num_rows * move.num_columns * move.dtype.itemsize for move in moves]
        ends = list(itertools.accumulate(size + -size % _ALIGNMENT for size in sizes))
        packed = torch.empty(ends[-1], dtype=torch.uint8, device=self._device)
        rows = [
            packed[end - size - -size % _ALIGNMENT :][:size].view(move.dtype).view(move.num_rows, move.num_columns)
            for move, size, end in zip(moves, sizes, ends, strict=True)
        ]
        if rank == self._rank:
            for move, of_move in zip(moves, rows, strict=True):
                of_move.copy_(_matrix(self._shards[move.number])[move.from_row : move.from_row + move.num_rows])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(packed, src=rank)
        return zip(moves, rows, strict=True)


class _Part(NamedTuple):
    """Rows [start, stop) of a distributed tensor, some of their columns, as rank `rank` holds them: from `row` on of
    its shard `number`.
    """

    start: int
    stop: int
    column: int
    num_columns: int
    rank: int
    number: int
    row: int


class _Move(NamedTuple):
    """Rows of a rank's shard `number`, and to which rows and columns of which block of a batch they go."""

    number: int
    from_row: int
    block: int
    row: int
    num_rows: int
    column: int
    num_columns: int
    dtype: torch.dtype


def _shards(model_chunks: Sequence[torch.nn.Module]) -> list[ShardedTensor]:
    """Every part that this rank holds of the distributed tensors, a SwiGLU's fc1 as its two halves: views of the
    parameters.
    """
    shards = []
    for chunk in unwrap_model(list(model_chunks)):
        state_dict = chunk.sharded_state_dict(metadata={})
        apply_factories(state_dict)
        shards += [value for value in nested_values(state_dict) if isinstance(value, ShardedTensor)]
    return shards


def _extent(shard: ShardedTensor) -> Shape:
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def _matrix(shard: ShardedTensor) -> torch.Tensor:
    """The shard's elements [rows, columns]."""
    data = dequantize_fp8_tensor(shard.data) if is_float8tensor(shard.data) else shard.data.detach()
    return data.reshape(-1, data.shape[-1])


def _parts(shape: Shape, offset: Shape, extent: Shape, rank: int, number: int) -> Iterator[_Part]:
    row = 0
    for start, stop in row_ranges(shape, offset, extent):
        yield _Part(start, stop, offset[-1], extent[-1], rank, number, row)
        row += stop - start


def _fill(shard: ShardedTensor, tensor: RowTensor, reader: TensorReader) -> None:
    into, row = shard.data.view(-1, shard.data.shape[-1]), 0
    columns = slice(shard.global_offset[-1], shard.global_offset[-1] + into.shape[1])
    for start, stop in row_ranges(tuple(shard.global_shape), tuple(shard.global_offset), _extent(shard)):
        there = min(stop, num_rows(tensor.shape))  # beyond: padding
        for block in reader.blocks(tensor, [(start, there)] if start < there else []):
            rows = torch.frombuffer(block, dtype=_TORCH[tensor.dtype]).view(-1, tensor.num_columns)
            into[row : row + len(rows)].copy_(rows[:, columns])
            row += len(rows)
        num_padding = stop - max(start, there)
        into[row : row + num_padding].zero_()
        row += num_padding
