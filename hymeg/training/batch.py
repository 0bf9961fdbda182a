"""One micro-batch on this rank: read once per tensor-parallel group, cut for context parallelism."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank

from hymeg.platform import device

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def get_batch(data_iterator: Iterator | None, args, pipeline_layout, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """`tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32), each `[b, s / cp]`; None where the pipeline stage does not need them.

    Args:
        data_iterator: yields samples collated to `[b, s]`; None on ranks that receive theirs from tensor-parallel rank 0.
    """
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    has_mtp = mtp_on_this_rank(layout=pipeline_layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last or has_mtp):
        return dict.fromkeys(_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        data = next(data_iterator)
        batch = {key: device.move(data[key]) for key in _KEYS} | {"attention_mask": None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = get_batch_on_this_cp_rank({key: batch[key] for key in _KEYS}, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return {key: batch[key] for key in _KEYS}
