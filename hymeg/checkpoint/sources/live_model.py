"""A model in training as a source of rows: the weights that its ranks hold, without a file.

Which rows and columns of which distributed tensor a rank holds, Megatron's `sharded_state_dict` says, as it does for a
checkpoint; where a Hugging Face tensor lies in them, `hymeg.checkpoint.mapping`. A few megabytes of rows at a time go
from the ranks that hold them to all others, by broadcasts over the world.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.utils import unwrap_model

from hymeg.checkpoint.adapter_table import Module, all_modules
from hymeg.checkpoint.mapping import Entry, Shape, check_distributed_tensors, row_ranges, with_first_rows
from hymeg.checkpoint.sources.adapter_folder import full_names
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS

BATCH_BYTES = 16 << 20  # on their way at once
_ALIGNMENT = 16

TORCH_DTYPES = {name: getattr(torch, names.torch) for name, names in WEIGHTS.items()}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Block(NamedTuple):
    """Consecutive rows, whole, of a Hugging Face tensor: from its `row` on, as a matrix."""

    entry: Entry
    row: int
    rows: torch.Tensor


class LiveModel:
    """What the ranks of a model hold: its weights, or its adapters. All ranks construct it together.

    Attributes:
        dtypes: of the distributed tensors, by key: "BF16".
        shapes: of them.

    Raises:
        UserError: the model is not that of `config`, or has no adapters.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], config: HyConfig, adapters: bool = False):
        for chunk in model_chunks:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                # The last step's weights are gathered when the next step asks for them.
                chunk.start_param_sync(force_sync=True)
        held = held_shards(model_chunks, adapters)
        self._shards = [shard for shard in held if is_main_replica(shard.replica_id)]
        self._device = next(model_chunks[0].parameters()).device
        self._given, self._taken = _Buffer(self._device), _Buffer(self._device)
        self._rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        held = [
            (s.key, tuple(s.global_shape), tuple(s.global_offset), extent_of(s), _NAMES[s.dtype]) for s in self._shards
        ]
        of_ranks = [held]
        if world > 1:
            dist.all_gather_object(of_ranks := [None] * world, held)
        self.dtypes: dict[str, str] = {}
        self._parts: dict[str, list[_Part]] = {}
        self.shapes: dict[str, Shape] = {}
        for rank, of_rank in enumerate(of_ranks):
            for number, (key, shape, offset, extent, dtype) in enumerate(of_rank):
                self.shapes[key], self.dtypes[key] = shape, dtype
                for start, stop, row in with_first_rows(row_ranges(shape, offset, extent)):
                    part = _Part(start, stop, offset[-1], extent[-1], rank, number, row)
                    self._parts.setdefault(key, []).append(part)
        (_check_adapters if adapters else check_distributed_tensors)(config, self.shapes)
        for key, parts in self._parts.items():
            parts.sort(key=lambda part: part.stop)
            held_elements = sum((part.stop - part.start) * part.num_columns for part in parts)
            assert held_elements == math.prod(self.shapes[key]), (
                f"{key}: {held_elements} elements of {self.shapes[key]} are held"
            )

    @torch.no_grad()
    def tensors(self, entries: Iterable[Entry], to_rank: int | None = None) -> Iterator[tuple[Entry, torch.Tensor]]:
        """Hugging Face tensors, whole and in order, in their own dtypes. Collective; `to_rank` as for
        `export_weights`.
        """
        is_taker = to_rank in (None, self._rank)
        rows = torch.empty(0)
        for batch in self._batches(entries):
            targets, complete = [], []
            for span in batch if is_taker else ():
                if span.row == 0:
                    rows = torch.empty(span.entry.hf_shape, dtype=span.dtype, device=self._device)
                    rows = rows.view(-1, span.num_columns)
                targets.append(rows[span.row : span.row + span.num_rows])
                if span.row + span.num_rows == len(rows):
                    complete.append((span.entry, rows.view(span.entry.hf_shape)))
            self._gather(batch, targets)
            del targets
            while complete:
                yield complete.pop(0)

    @torch.no_grad()
    def blocks(self, entries: Iterable[Entry], to_rank: int | None = None) -> Iterator[Block]:
        """Their rows in order, at most BATCH_BYTES, or one row, at a time; each is gone when the next is asked for.
        Collective.
        """
        is_taker = to_rank in (None, self._rank)
        for batch in self._batches(entries):
            shapes = [(span.num_rows, span.num_columns, span.dtype) for span in batch]
            targets = self._taken.matrices(shapes) if is_taker else []
            self._gather(batch, targets)
            for span, rows in zip(batch, targets, strict=is_taker):
                yield Block(span.entry, span.row, rows)

    def _batches(self, entries: Iterable[Entry]) -> "Iterator[list[_Span]]":
        """BATCH_BYTES together."""
        batch, num_bytes = [], 0
        for entry in entries:
            dtype = TORCH_DTYPES[self.dtypes[entry.dist_key]]
            row_bytes = entry.hf_shape[-1] * dtype.itemsize
            for start, stop, row in with_first_rows(entry.rows):
                for low in range(start, stop, step := max(BATCH_BYTES // row_bytes, 1)):
                    span = _Span(entry, row + low - start, low, min(low + step, stop), dtype)
                    if batch and num_bytes + span.num_rows * row_bytes > BATCH_BYTES:
                        yield batch
                        batch, num_bytes = [], 0
                    batch.append(span)
                    num_bytes += span.num_rows * row_bytes
        yield batch

    def _gather(self, batch: "list[_Span]", targets: Sequence[torch.Tensor]) -> None:
        """Have every rank give what it holds of `batch`, and fill `targets`, where there are any."""
        moves: dict[int, list[_Move]] = {}
        for number, span in enumerate(batch):
            for move in self._moves(span, number):
                moves.setdefault(move.part.rank, []).append(move)
        for rank in sorted(moves):
            shapes = [(move.num_rows, move.part.num_columns, batch[move.span].dtype) for move in moves[rank]]
            given = self._given.matrices(shapes)
            if rank == self._rank:
                for move, rows in zip(moves[rank], given, strict=True):
                    rows.copy_(_matrix(self._shards[move.part.number])[move.from_row : move.from_row + move.num_rows])
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(self._given.used, src=rank)
            for move, rows in zip(moves[rank], given, strict=True) if targets else ():
                into = targets[move.span][move.row : move.row + move.num_rows]
                into[:, move.part.column : move.part.column + move.part.num_columns] = rows

    def _moves(self, span: "_Span", number: int) -> "Iterator[_Move]":
        parts = self._parts[span.entry.dist_key]
        for part in itertools.islice(parts, bisect_right(parts, span.start, key=lambda part: part.stop), None):
            if part.start >= span.stop:
                break
            low, high = max(span.start, part.start), min(span.stop, part.stop)
            yield _Move(part, part.row + low - part.start, number, low - span.start, high - low)


class _Span(NamedTuple):
    """Rows [start, stop) of a distributed tensor: those of a Hugging Face tensor from its `row` on."""

    entry: Entry
    row: int
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def num_columns(self) -> int:
        return self.entry.hf_shape[-1]


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
    """Rows of a part, and to which rows of which span of a batch they go."""

    part: _Part
    from_row: int  # of the shard
    span: int
    row: int
    num_rows: int


class _Buffer:
    """Memory that is used again and again: asked for anew, it would be scattered over the heap."""

    def __init__(self, device: torch.device):
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self.used = self._bytes

    def matrices(self, shapes: Sequence[tuple[int, int, torch.dtype]]) -> list[torch.Tensor]:
        """Matrices of (rows, columns, dtype), one after the other, each aligned."""
        sizes = [height * width * dtype.itemsize for height, width, dtype in shapes]
        starts = list(itertools.accumulate((size + -size % _ALIGNMENT for size in sizes), initial=0))
        num_bytes = starts.pop()
        if len(self._bytes) < num_bytes:
            self._bytes = self._bytes.new_empty(num_bytes)
        self.used = self._bytes[:num_bytes]
        return [
            self.used[start : start + size].view(dtype).view(height, width)
            for (height, width, dtype), size, start in zip(shapes, sizes, starts, strict=True)
        ]


def adapted_modules(config: HyConfig, shapes: Mapping[str, Shape]) -> list[Module]:
    """Those whose adapters these distributed tensors are, in the order of the table."""
    return [module for module in all_modules(config) if module.lora_a in shapes]


def _check_adapters(config: HyConfig, shapes: Mapping[str, Shape]) -> None:
    if not shapes:
        raise UserError("the model has no adapters; train it with --lora-rank, or export its weights")
    if full := full_names(shapes):
        raise UserError(
            f"{full[0]} is trained in full beside the adapters, which vLLM and SGLang cannot load with an adapter; "
            "save and merge it"
        )
    modules = adapted_modules(config, shapes)
    rank = shapes[modules[0].lora_a][-2] if modules else 0
    if {key: shape for module in modules for key, shape in module.shapes(rank).items()} != dict(shapes):
        raise UserError("the model's adapters are not those of a model of this config; give the config of its folder")


def held_shards(model_chunks: Sequence[torch.nn.Module], adapters: bool = False) -> list[ShardedTensor]:
    """Every part that this rank holds of the distributed tensors, a SwiGLU's fc1 as its two halves: views of the
    parameters. Those of the weights, or those of the adapters beside them.
    """
    shards = []
    for chunk in unwrap_model(list(model_chunks)):
        if adapters and chunk.adapters is None:
            continue
        state_dict = (chunk.sharded_state_dict if adapters else chunk.weights_sharded_state_dict)(metadata={})
        apply_factories(state_dict)
        shards += [value for value in nested_values(state_dict) if isinstance(value, ShardedTensor)]
    return shards


def extent_of(shard: ShardedTensor) -> Shape:
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def _matrix(shard: ShardedTensor) -> torch.Tensor:
    """The shard's elements [rows, columns]."""
    data = dequantize_fp8_tensor(shard.data) if is_float8tensor(shard.data) else shard.data.detach()
    return data.reshape(-1, data.shape[-1])
