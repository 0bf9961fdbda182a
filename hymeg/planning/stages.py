"""Which layers lie on which pipeline stage, how many micro-batches a stage holds at once, and ways to cut a model into
stages. Arithmetic on a legal `Layout`; no Megatron, no torch."""

import functools
import itertools
import operator
from typing import Any, NamedTuple

from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout, unrolled


class Chunk(NamedTuple):
    """One virtual stage of one pipeline rank: what Megatron builds as one model."""

    layers: tuple[bool, ...]  # of the trunk, in their order: whether each is a mixture of experts
    num_mtp_layers: int
    has_embedding: bool  # the first stage
    has_head: bool  # the last stage
    has_final_norm: bool
    """On the last stage; with multi-token prediction, behind the trunk's last layer (transformer_block.py:387)."""


@functools.lru_cache(maxsize=4096)
def stages(config: HyConfig, layout: Layout) -> tuple[tuple[Chunk, ...], ...]:
    """`[pipeline rank][virtual stage]`, of a layout that `layout.check` accepts.

    Virtual stages go round the ranks: stage i of the model is virtual stage i // pp of rank i % pp
    (transformer_block.py, get_transformer_layer_offset).
    """
    mtp = config.num_nextn_predict_layers
    if layout.pipeline_model_parallel_layout is not None:
        counts = [(text.count("t"), text.count("m")) for text in unrolled(layout.pipeline_model_parallel_layout)]
    else:
        *trunk, last = _even_counts(config, layout)
        counts = [*((count, 0) for count in trunk), (last, mtp)]
    is_moe = tuple(map(config.is_moe_layer, range(config.num_hidden_layers)))
    chunks, first = [], 0
    for index, (count, num_mtp) in enumerate(counts):
        last, is_last = first + count, index == len(counts) - 1
        norm = first < config.num_hidden_layers == last if mtp else is_last
        chunks.append(Chunk(is_moe[first:last], num_mtp, index == 0, is_last, norm))
        first = last
    return tuple(tuple(chunks[rank :: layout.pp]) for rank in range(layout.pp))


def _even_counts(config: HyConfig, layout: Layout) -> list[int]:
    """Layers of every stage of the model, in order, without a layout string (transformer_block.py:70)."""
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    embedding, loss = layout.account_for_embedding_in_pipeline_split, layout.account_for_loss_in_pipeline_split
    middle = layout.pp - (first is not None) - (last is not None)
    rest = config.num_hidden_layers + embedding + loss - (first or 0) - (last or 0)
    per_rank = [rest // middle if middle else 0] * layout.pp
    per_rank[0] = per_rank[0] if first is None else first
    per_rank[-1] = per_rank[-1] if last is None else last
    counts = [size // layout.num_virtual_stages for size in per_rank] * layout.num_virtual_stages
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


@functools.cache
def micro_batches_held(
    rank: int, pp: int, vpp: int, num_microbatches: int, group: int | None = None, overlap: bool = False
) -> tuple[tuple[int, ...], ...]:
    """How many micro-batches' activations of each of its virtual stages a pipeline rank holds at once, wherever that is
    not exceeded in all of them.

    The schedules are Megatron's (schedules.py:915, get_pp_rank_microbatches): 1F1B, where rank r of p runs p - r - 1
    forward passes before its first backward pass and so holds min(p - r, m) micro-batches; and interleaved 1F1B, where
    it runs 2 (p - r - 1) + (v - 1) g of its v m forward passes first, g micro-batches of a virtual stage at a time. The
    latter is played through here, but for groups in the middle: it repeats itself after g v passes.

    Args:
        group: --microbatch-group-size-per-virtual-pipeline-stage; p where it is not given.
        overlap: --overlap-moe-expert-parallel-comm, under which a forward pass runs beside the backward pass of the one
            before it: one more comes first.
    """
    if vpp == 1:
        return ((min(pp - rank + overlap, num_microbatches),),)
    group = group or pp
    num_microbatches = min(num_microbatches, 5 * group + num_microbatches % group)
    total = num_microbatches * vpp
    order = [
        stage
        for first in range(0, num_microbatches, group)
        for stage in range(vpp)
        for _ in range(min(group, num_microbatches - first))
    ]
    warmup = min(2 * (pp - rank - 1) + (vpp - 1) * group + overlap, total)
    held, found = [0] * vpp, set()
    for step, stage in enumerate(order):
        held[stage] += 1
        if step >= warmup or step == total - 1:
            found.add(tuple(held))
        if step >= warmup:
            held[vpp - 1 - order[step - warmup]] -= 1
    most = []
    for one in sorted(found, key=sum, reverse=True):
        if not any(all(map(operator.ge, other, one)) for other in most):
            most.append(one)
    return tuple(sorted(most))


# ---- ways to cut a model, where embedding, head and multi-token prediction weigh something too


def pipeline_splits(config: HyConfig, pp: int) -> list[dict[str, Any]]:
    """Fields of `Layout`, for up to six virtual stages a rank: equal stages where layers divide, and a layout string
    that leaves the last stage fewer layers for its head."""
    if pp == 1:
        return [{}]
    found = []
    for vpp in range(1, min(6, config.num_hidden_layers // pp) + 1):
        if config.num_hidden_layers % (pp * vpp) == 0:
            found.append({"virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None})
        found.append({"pipeline_model_parallel_layout": balanced(config, pp * vpp)})
    return found


def balanced(config: HyConfig, num_stages: int) -> str:
    """A layout string: the last stage has as many layers fewer as its tail weighs; of the others, the later ones have
    one more where they do not divide, since the earlier ones hold more micro-batches."""
    layers, tail = config.num_hidden_layers, _tail_weight(config)
    last = max(0, round((layers + tail) / num_stages - tail))
    each, more = divmod(layers - last, num_stages - 1)
    counts = [each] * (num_stages - 1 - more) + [each + 1] * more
    return layout_string([*counts, last], config.num_nextn_predict_layers)


def _tail_weight(config: HyConfig) -> float:
    """What the last stage has more than others, head and multi-token prediction, in MoE layers' worth of products."""
    hidden, mtp = config.hidden_size, config.num_nextn_predict_layers
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    expert_width = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    heads = hidden * (config.vocab_size * (1 + mtp) + 2 * hidden * mtp)
    return heads / (attention + 3 * hidden * expert_width) + mtp


def layout_string(counts: list[int], num_mtp_layers: int) -> str:
    """Megatron's notation of stages with so many layers: `Et*5|(t*5|)*13t*6|t*4mL`."""
    first, *middle, last = ("t" * count if count < 2 else f"t*{count}" for count in counts)
    text = f"E{first}|"
    for layers, run in itertools.groupby(middle):
        times = len(list(run))
        text += f"{layers}|" if times == 1 else f"({layers}|)*{times}"
    return f"{text}{last}{'m' * num_mtp_layers}L"
