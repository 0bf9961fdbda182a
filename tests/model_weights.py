"""Weights into and out of Megatron models that tests build: whichever part of one a process holds."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from hymeg.checkpoint.adapter import HyStateDictAdapter
from hymeg.checkpoint.mapping import check_distributed_tensors, distributed_shapes
from hymeg.hf.config import HyConfig


@torch.no_grad()
def load_into(
    config: HyConfig, model_chunks: Sequence[torch.nn.Module], hf_state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Fill this process's part of a model from the whole model's Hugging Face tensors, in place and in its own dtype.
    Padding rows become zero.
    """
    shards = sharded_tensors(config, model_chunks)
    padded = next((of_key[0].global_shape[0] for key, of_key in shards.items() if _is_vocabulary(key)), None)
    tensors = HyStateDictAdapter(config).from_hf(hf_state_dict, padded_vocab_size=padded)
    for shard in itertools.chain.from_iterable(shards.values()):
        shard.data.copy_(tensors[shard.key][shard.global_slice()])


@torch.no_grad()
def gather_from(
    config: HyConfig, model_chunks: Sequence[torch.nn.Module], layout: str = "hub"
) -> dict[str, torch.Tensor]:
    """The Hugging Face state dict of a model all of whose parts are in this process."""
    shards = sharded_tensors(config, model_chunks)
    tensors = {key: _whole(shards[key]) for key in distributed_shapes(config)}
    return HyStateDictAdapter(config).to_hf(tensors, layout=layout)


def sharded_tensors(config: HyConfig, model_chunks: Sequence[torch.nn.Module]) -> dict[str, list[ShardedTensor]]:
    """Every part that the chunks hold, by key, once they are found to be parts of the config's model."""
    shards: dict[str, list[ShardedTensor]] = {}
    for chunk in unwrap_model(list(model_chunks)):
        for shard in _sharded(chunk.sharded_state_dict(metadata={})):
            shards.setdefault(shard.key, []).append(shard)
    held = {_layer(key) for key in shards}
    required = [key for key in distributed_shapes(config) if _layer(key) in held]
    shapes = {key: tuple(of_key[0].global_shape) for key, of_key in shards.items()}
    check_distributed_tensors(config, shapes, required)
    return shards


def _is_vocabulary(key: str) -> bool:
    return key in ("embedding.word_embeddings.weight", "output_layer.weight")


def _layer(key: str) -> str:
    """What a pipeline stage holds whole or not at all; a tensor outside the layers is its own."""
    return ".".join(key.split(".")[:3])


def _sharded(state_dict) -> Iterator[ShardedTensor]:
    """A SwiGLU's fc1 comes as its two halves: views of the parameter."""
    apply_factories(state_dict)
    remaining = [state_dict]
    while remaining:
        value = remaining.pop()
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict | list):
            remaining.extend(value.values() if isinstance(value, dict) else value)


def _whole(shards: list[ShardedTensor]) -> torch.Tensor:
    distinct = {shard.global_offset: shard for shard in shards}.values()  # at the same offset lie replicas
    assert sum(shard.data.numel() for shard in distinct) == math.prod(shards[0].global_shape), shards[0].key
    tensor = shards[0].data.new_empty(shards[0].global_shape)
    for shard in distinct:
        tensor[shard.global_slice()] = shard.data
    return tensor
