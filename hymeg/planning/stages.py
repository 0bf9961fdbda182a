"""Which layers lie on which pipeline stage, and how many micro-batches a stage holds at once. Arithmetic on a legal
`Layout`; no Megatron, no torch."""

import functools
import re
from typing import NamedTuple

from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout


class Chunk(NamedTuple):
    """One virtual stage of one pipeline rank: what Megatron builds as one model."""

    layers: tuple[int, ...]  # of the trunk, counted from 0
    num_mtp_layers: int
    has_embedding: bool  # the first stage
    has_head: bool  # the last stage
    has_final_norm: bool
    """Megatron puts it on the last stage; with multi-token prediction, behind the trunk's last layer
    (transformer_block.py:387).
    """


class ByValue:
    """A HyConfig that functools can key a cache by: two of equal numbers are one."""

    def __init__(self, config: HyConfig):
        self.config = config
        self._key = tuple(
            value
            for name, value in vars(config).items()
            if name not in ("raw", "bos_token_id", "eos_token_id", "pad_token_id")
        )

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByValue) and self._key == other._key


def stages(config: HyConfig, layout: Layout) -> list[list[Chunk]]:
    """`[pipeline rank][virtual stage]`, of a layout that `layout.check` accepts.

    Virtual stages go round the ranks: stage i of the model is virtual stage i // pp of rank i % pp
    (transformer_block.py, get_transformer_layer_offset).
    """
    return _stages(ByValue(config), _DepthOnly(*(getattr(layout, name) for name in _DepthOnly._fields)))


class _DepthOnly(NamedTuple):
    """What of a layout decides where layers lie."""

    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    decoder_first_pipeline_num_layers: int | None
    decoder_last_pipeline_num_layers: int | None
    account_for_embedding_in_pipeline_split: bool
    account_for_loss_in_pipeline_split: bool
    pipeline_model_parallel_layout: str | None


@functools.lru_cache(maxsize=4096)
def _stages(of: ByValue, layout: _DepthOnly) -> list[list[Chunk]]:
    config = of.config
    pp, mtp = layout.pipeline_model_parallel_size, config.num_nextn_predict_layers
    if layout.pipeline_model_parallel_layout is not None:
        texts = _unrolled(layout.pipeline_model_parallel_layout)
        counts = [(text.count("t"), text.count("m")) for text in texts]
    else:
        trunk = _even_counts(config, layout)
        counts = [(count, mtp if index == len(trunk) - 1 else 0) for index, count in enumerate(trunk)]
    chunks, first = [], 0
    for index, (count, num_mtp) in enumerate(counts):
        is_last = index == len(counts) - 1
        layers = tuple(range(first, first + count))
        norm = config.num_hidden_layers - 1 in layers if mtp else is_last
        chunks.append(Chunk(layers, num_mtp, index == 0, is_last, norm))
        first += count
    return [chunks[rank::pp] for rank in range(pp)]


def num_stages(layout_string: str) -> int:
    """Virtual stages of all ranks."""
    return len(_unrolled(layout_string))


def _unrolled(text: str) -> list[str]:
    """`E(t|)*3L` as ["Et", "t", "t", "L"]."""
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def _even_counts(config: HyConfig, layout: _DepthOnly) -> list[int]:
    """Layers of every stage of the model, in its order, where no layout string says so (transformer_block.py:70,
    get_num_layers_to_build).
    """
    pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    embedding, loss = layout.account_for_embedding_in_pipeline_split, layout.account_for_loss_in_pipeline_split
    if first is None and last is None:
        per_rank = [(config.num_hidden_layers + embedding + loss) // pp] * pp
    else:
        middle = pp - (first is not None) - (last is not None)
        rest = config.num_hidden_layers - (first or 0) - (last or 0)
        per_rank = [rest // middle if middle else 0] * pp
        per_rank[0] = per_rank[0] if first is None else first
        per_rank[-1] = per_rank[-1] if last is None else last
    counts = [per_rank[index % pp] // vpp for index in range(pp * vpp)]
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


@functools.cache
def micro_batches_held(rank: int, pp: int, vpp: int, num_microbatches: int) -> tuple[tuple[int, ...], ...]:
    """How many micro-batches' activations of each of its virtual stages a pipeline rank holds at once, wherever that is
    not exceeded in all of them.

    The schedules are Megatron's (schedules.py:915, get_pp_rank_microbatches): 1F1B, where rank r of p runs p - r - 1
    forward passes before its first backward pass and so holds min(p - r, m) micro-batches; and interleaved 1F1B, where
    it runs 2 (p - r - 1) + (v - 1) p of its v m forward passes first, p micro-batches of a virtual stage at a time. The
    latter is played through here; it repeats itself after p v passes.
    """
    if vpp == 1:
        return ((min(pp - rank, num_microbatches),),)
    total, round_length = num_microbatches * vpp, pp * vpp
    warmup = min(2 * (pp - rank - 1) + (vpp - 1) * pp, total)
    held, found = [0] * vpp, set()
    for step in range(min(total, warmup + 2 * round_length)):
        held[step % round_length // pp] += 1
        if step >= warmup or step == total - 1:
            found.add(tuple(held))
        if step >= warmup:
            held[vpp - 1 - (step - warmup) % round_length // pp] -= 1
    return tuple(sorted(one for one in found if not any(_exceeds(other, one) for other in found)))


def _exceeds(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))
