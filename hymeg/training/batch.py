"""One micro-batch on this rank: read once per tensor-parallel group, cut for context parallelism."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_batch_on_this_cp_rank

from hymeg.platform import device

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_KEYS_OF_ROWS = (*_KEYS, "lengths")


def is_reader() -> bool:
    """Whether this rank reads for its tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def takes_data(args, pipeline_layout, vp_stage: int | None) -> bool:
    """Whether this rank's stage of the pipeline takes anything of a batch: tokens or labels, or where conversations
    begin and how long they are.
    """
    if args.sft_rows:
        return True
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    return (
        first
        or last
        or mtp_on_this_rank(
            layout=pipeline_layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
        )
    )


def get_batch(
    data_iterator: Iterator | None, args, pipeline_layout, vp_stage: int | None
) -> dict[str, torch.Tensor | PackedSeqParams | None]:
    """`tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32), each `[b, s / cp]`, and `packed_seq_params`
    for packed conversations, whose positions restart with each. All None where the pipeline stage does not need them.

    Args:
        data_iterator: yields samples collated to `[b, s]`; None on ranks that receive theirs from tensor-parallel rank
            0.
    """
    if not takes_data(args, pipeline_layout, vp_stage):
        return dict.fromkeys((*_KEYS, "packed_seq_params"))
    micro_batch_size = args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size
    keys = _KEYS_OF_ROWS if args.sft_rows else _KEYS
    if is_reader():
        data = next(data_iterator)
        together = torch.stack([device.move(data[key]).long() for key in keys])
    else:
        together = torch.empty(len(keys), micro_batch_size, args.seq_length, dtype=torch.int64, device=device.current())
    if args.tensor_model_parallel_size > 1:
        source, group = (
            parallel_state.get_tensor_model_parallel_src_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        torch.distributed.broadcast(together, source, group=group)
    batch = dict(zip(keys, together, strict=True))
    lengths = batch.pop("lengths", None)
    if lengths is not None and torch.is_grad_enabled() and not vp_stage:
        _count(lengths)
    batch["loss_mask"] = batch["loss_mask"].float()
    packed = _packed_seq_params(batch["position_ids"]) if args.packed else None
    if packed is not None:
        batch |= {"cu_seqlens": packed.cu_seqlens_q.unsqueeze(0), "cu_seqlens_padded": None}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return {key: batch[key] for key in _KEYS} | {"packed_seq_params": packed}


def _count(lengths: torch.Tensor) -> None:
    """Tell Megatron, whose log counts the tokens and FLOPs of conversations without their padding."""
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    update_seqlen_stats_from_cu_seqlens(torch.nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)))


def _packed_seq_params(position_ids: torch.Tensor) -> PackedSeqParams:
    """Where the conversations of `position_ids` `[1, s]` begin and end. Padding belongs to the conversation before it:
    it follows, so nothing that is trained attends to it."""
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([position_ids.size(1)])]).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
