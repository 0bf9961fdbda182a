"""Which layers lie on which pipeline stage, and how many micro-batches a stage holds at once. Arithmetic on a legal
`Layout`; no Megatron, no torch."""

import functools
import operator
from typing import NamedTuple

from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout, unrolled


class Chunk(NamedTuple):
    """One virtual stage of one pipeline rank: what Megatron builds as one model."""

    layers: tuple[bool, ...]  # of the trunk, in their order: whether each is a mixture of experts
    num_mtp_layers: int
    has_embedding: bool  # the first stage
    has_head: bool  # the last stage
    has_final_norm: bool
    """Megatron puts it on the last stage; with multi-token prediction, behind the trunk's last layer
    (transformer_block.py:387).
    """


@functools.lru_cache(maxsize=4096)
def stages(config: HyConfig, layout: Layout) -> tuple[tuple[Chunk, ...], ...]:
    """`[pipeline rank][virtual stage]`, of a layout that `layout.check` accepts.

    Virtual stages go round the ranks: stage i of the model is virtual stage i // pp of rank i % pp
    (transformer_block.py, get_transformer_layer_offset).
    """
    pp, mtp = layout.pipeline_model_parallel_size, config.num_nextn_predict_layers
    if layout.pipeline_model_parallel_layout is not None:
        counts = [(text.count("t"), text.count("m")) for text in unrolled(layout.pipeline_model_parallel_layout)]
    else:
        trunk = _even_counts(config, layout)
        counts = [(count, mtp if index == len(trunk) - 1 else 0) for index, count in enumerate(trunk)]
    is_moe = tuple(map(config.is_moe_layer, range(config.num_hidden_layers)))
    chunks, first = [], 0
    for index, (count, num_mtp) in enumerate(counts):
        last, is_last = first + count, index == len(counts) - 1
        norm = first < config.num_hidden_layers == last if mtp else is_last
        chunks.append(Chunk(is_moe[first:last], num_mtp, index == 0, is_last, norm))
        first = last
    return tuple(tuple(chunks[rank::pp]) for rank in range(pp))


def _even_counts(config: HyConfig, layout: Layout) -> list[int]:
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


def num_virtual_stages(layout: Layout) -> int:
    """Of a rank."""
    if layout.pipeline_model_parallel_layout is not None:
        return len(unrolled(layout.pipeline_model_parallel_layout)) // layout.pipeline_model_parallel_size
    return layout.virtual_pipeline_model_parallel_size or 1


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
