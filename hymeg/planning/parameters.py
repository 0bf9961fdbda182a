"""The parameters that a rank holds. Shapes come from the table of the converter (`hymeg.checkpoint.mapping`); here
stands how a rank cuts them. Tests hold it equal to the real model, built on the meta device. What pads DDP's buffers,
some kilobytes a bucket, is left out.
"""

import functools
import math

from hymeg.checkpoint.adapter_table import Module, adapter_modules
from hymeg.checkpoint.mapping import distributed_shapes
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout
from hymeg.planning.settings import Settings
from hymeg.planning.stages import Chunk

WHOLE, TENSOR_CUT, EXPERT_CUT, NO_PARAMETER = "whole", "tp", "ep x etp", "buffer"
_ENDS = {  # of distributed keys, without ".weight", by the ways a rank's share is cut; the first that fits
    EXPERT_CUT: ("experts.experts.linear_fc1", "experts.experts.linear_fc2"),
    TENSOR_CUT: ("word_embeddings", "output_layer", "linear_qkv", "linear_proj", "eh_proj", "linear_fc1", "linear_fc2"),
    WHOLE: ("norm", "layer_norm_weight", "router"),  # input_layernorm, q_layernorm, ...
    NO_PARAMETER: "expert_bias",
}
_global_shapes = functools.lru_cache(maxsize=64)(distributed_shapes)


def padded_vocab_size(config: HyConfig, layout: Layout, settings: Settings) -> int:
    """Rows of embedding and head: the next multiple of --make-vocab-size-divisible-by x TP (vocab_utils.py)."""
    multiple = settings.make_vocab_size_divisible_by * layout.tp
    return -(-config.vocab_size // multiple) * multiple


def chunk_numel(
    config: HyConfig, layout: Layout, settings: Settings, chunk: Chunk, without_mtp: bool = False
) -> tuple[int, int]:
    """Elements of what a rank holds of `chunk`: dense parameters, experts."""
    cuts = padded_vocab_size(config, layout, settings), layout.tp, layout.ep * layout.etp
    return _chunk_numel(config, chunk, without_mtp, *cuts)


@functools.lru_cache(maxsize=4096)
def _chunk_numel(config: HyConfig, chunk: Chunk, without_mtp: bool, *cuts: int) -> tuple[int, int]:
    counts = {  # layers of a kind are alike: the first one stands for all
        f"decoder.layers.{config.mlp_layer_types.index(kind)}.": count for kind, count in _trunk(config, chunk).items()
    } | {
        # Under multi-token prediction over a pipeline the embedding exists twice (language_module.py:265-284).
        "embedding.": chunk.has_embedding or chunk.num_mtp_layers > 0,
        "mtp.layers.0.": 0 if without_mtp else chunk.num_mtp_layers,
        "decoder.final_layernorm": chunk.has_final_norm,
        "output_layer.": chunk.has_head,
    }
    held = [(count, _part_numel(config, prefix, *cuts)) for prefix, count in counts.items() if count]
    return sum(count * dense for count, (dense, _) in held), sum(count * expert for count, (_, expert) in held)


def _trunk(config: HyConfig, chunk: Chunk) -> dict[str, int]:
    """Layers of each kind that the model has."""
    return {kind: chunk.layers.count(kind == "sparse") for kind in set(config.mlp_layer_types)}


@functools.lru_cache(maxsize=4096)
def _part_numel(config: HyConfig, prefix: str, vocab_rows: int, tp: int, ep_etp: int) -> tuple[int, int]:
    """Of the tensors whose distributed keys begin so, on one rank: dense, experts."""
    ways, found = {WHOLE: 1, TENSOR_CUT: tp, EXPERT_CUT: ep_etp}, [0, 0]
    for key, shape in _global_shapes(config, vocab_rows).items():
        if key.startswith(prefix) and (cut := cut_of(key)) != NO_PARAMETER:
            found[cut == EXPERT_CUT] += math.prod(shape) // ways[cut]
    return found[0], found[1]


def cut_of(key: str) -> str:
    return next(cut for cut, ends in _ENDS.items() if key.removesuffix(".weight").endswith(ends))


def trained_numel(config: HyConfig, layout: Layout, settings: Settings, chunk: Chunk) -> tuple[int, int]:
    """Of what a rank holds of `chunk`, the elements that have gradients and an optimizer's state: dense, experts'. With
    adapters those are theirs alone: beside dense parameters, beside experts.
    """
    if settings.lora_rank is None:
        return chunk_numel(config, layout, settings, chunk, without_mtp=not settings.train_mtp)
    found = [0, 0]
    for kind, count in (_trunk(config, chunk) | {"mtp": chunk.num_mtp_layers}).items():
        for module in layer_adapters(config, settings.lora_targets, kind) if count else ():
            found[module.num_experts is not None] += count * _adapter_numel(module, settings.lora_rank, layout)
    return found[0], found[1]


@functools.lru_cache(maxsize=256)
def layer_adapters(config: HyConfig, targets: tuple[str, ...], kind: str) -> tuple[Module, ...]:
    """What has an adapter in one layer of a kind: "dense", "sparse" or "mtp"."""
    layer = config.num_hidden_layers if kind == "mtp" else config.mlp_layer_types.index(kind)
    modules = adapter_modules(config, targets) if targets else []
    return tuple(module for module in modules if module.path.startswith(f"model.layers.{layer}."))


def _adapter_numel(module: Module, rank: int, layout: Layout) -> int:
    """A is whole and B cut as the weight's rows where those are cut; where its columns are, the other way round
    (hymeg.models.lora)."""
    cut, stack = (layout.tp, 1) if module.num_experts is None else (layout.etp, module.num_experts // layout.ep)
    a, b = rank * module.num_in, module.num_out * rank
    return stack * (a // cut + b if module.path.endswith(("o_proj", "down_proj")) else a + b // cut)


def optimizer_ranks(layout: Layout) -> tuple[int, int]:
    """Ranks of an optimizer instance that share what is no expert (data x context parallel), and an expert."""
    instances = layout.pp * layout.num_distributed_optimizer_instances
    return layout.world_size // (layout.tp * instances), layout.world_size // (layout.ep * layout.etp * instances)
