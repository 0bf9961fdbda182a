"""The weights of a model in training: given to whoever asks under their Hugging Face names, and taken from a folder, in
any layout, without a conversion on disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from hymeg.checkpoint.mapping import Entry, check_distributed_tensors, hf_entries, num_rows, row_ranges
from hymeg.checkpoint.peft_table import served_tensors
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader
from hymeg.checkpoint.sources import open_any
from hymeg.checkpoint.sources.live_model import TORCH_DTYPES, LiveModel, adapted_modules, extent_of, held_shards
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig


def export_weights(
    model_chunks: Sequence[torch.nn.Module],
    config: HyConfig,
    *,
    layout: str = "hub",
    dtype: str | None = None,
    to_rank: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model under their Hugging Face names, one whole tensor after the other, on the device. Of one
    with adapters, those beside which they are: `export_adapter_weights` gives the adapters.

    Every rank of the world calls this and takes all that it gives: each tensor is a collective. Beside the model a
    rank's memory holds BATCH_BYTES and the tensor that was asked for last.

    Args:
        model_chunks: this rank's, wrapped or not.
        layout: "hub", expert by expert, or "fused", transformers' names in memory.
        dtype: "BF16" or "F32"; None: as trained. The expert bias is always fp32.
        to_rank: who is given the tensors; the others give theirs and get none. None: everyone.

    Raises:
        UserError: the model is not that of `config`.
    """
    for entry, tensor in LiveModel(model_chunks, config).tensors(hf_entries(config, layout), to_rank):
        yield entry.hf_name, tensor.to(TORCH_DTYPES[dtype]) if dtype and not entry.is_fp32_buffer else tensor


def export_adapter_weights(
    model_chunks: Sequence[torch.nn.Module], config: HyConfig, *, to_rank: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapters of a model in training, under the names that vLLM and SGLang read: to the byte what
    `adapters.adapter_to_peft` writes in the layout "served" of a checkpoint saved at the same moment. Expert by expert;
    the adapters of MTP layers, which no reader has, are left out there and here.

    Args:
        model_chunks, to_rank: as for `export_weights`, with its collectives and its memory.

    Raises:
        UserError: the model has no adapters outside its MTP layers, or is not that of `config`.
    """
    live = LiveModel(model_chunks, config, adapters=True)
    modules = [module for module in adapted_modules(config, live.shapes) if not module.is_mtp]
    if not modules:
        raise UserError("all adapters of the model are in its MTP layers, which no reader of served adapters has")
    rank = live.shapes[modules[0].lora_a][-2]
    entries = []
    for tensor in served_tensors(modules, rank):
        [key], first = tensor.keys, (tensor.expert or 0) * tensor.shape[0]
        rows = ((first, first + tensor.shape[0]),)
        entries.append(Entry(tensor.name, key, False, tensor.shape, live.shapes[key], rows))
    for entry, tensor in live.tensors(entries, to_rank):
        yield entry.hf_name, tensor


def load_weights(model_chunks: Sequence[torch.nn.Module], config: HyConfig, folder: str | Path) -> None:
    """Fill this rank's part of a model, in place and in its own dtype, from the Hugging Face or distributed checkpoint
    in `folder`, of which it reads what it needs. Padding rows of the vocabulary become zero.

    No collective. An optimizer that keeps weights of its own must be told (`optimizer.reload_model_params()`).

    Raises:
        UserError: the folder holds no checkpoint, a broken one or another model's.
    """
    source = open_any(folder)
    load_tensors(model_chunks, config, source.tensors, source.folder)


@torch.no_grad()
def load_tensors(
    model_chunks: Sequence[torch.nn.Module], config: HyConfig, tensors: Mapping[str, RowTensor], folder: Path
) -> None:
    """As `load_weights`, from distributed tensors by key, which are those of the checkpoint in `folder`, or made of
    them.
    """
    shards = held_shards(model_chunks)
    held = {shard.key: tuple(shard.global_shape) for shard in shards}
    check_distributed_tensors(config, held, required=())
    try:
        check_distributed_tensors(config, {key: tensor.shape for key, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    with TensorReader() as reader:
        for shard in shards:
            _fill(shard, tensors[shard.key], reader)


def _fill(shard: ShardedTensor, tensor: RowTensor, reader: TensorReader) -> None:
    into, row = shard.data.view(-1, shard.data.shape[-1]), 0
    columns = slice(shard.global_offset[-1], shard.global_offset[-1] + into.shape[1])
    for start, stop in row_ranges(tuple(shard.global_shape), tuple(shard.global_offset), extent_of(shard)):
        there = min(stop, num_rows(tensor.shape))  # beyond: padding
        for block in reader.blocks(tensor, [(start, there)] if start < there else []):
            rows = torch.frombuffer(block, dtype=TORCH_DTYPES[tensor.dtype]).view(-1, tensor.num_columns)
            into[row : row + len(rows)].copy_(rows[:, columns])
            row += len(rows)
        num_padding = stop - max(start, there)
        into[row : row + num_padding].zero_()
        row += num_padding
