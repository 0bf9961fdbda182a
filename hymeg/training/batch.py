"""One micro-batch on this rank, cut for context parallelism. Text is read once per tensor-parallel group; conversations
by every rank, because where each begins must be known on the CPU: asked for it, a GPU would have to finish first.
"""

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_batch_on_this_cp_rank

from hymeg.platform import device

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def is_reader() -> bool:
    """Whether this rank reads text for its tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def takes_data(args, pipeline_layout, vp_stage: int | None) -> bool:
    """Whether this rank's stage takes anything of a batch: tokens, labels, or where conversations begin and end."""
    if args.sft_rows:
        return True
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    has_mtp = mtp_on_this_rank(
        layout=pipeline_layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
    )
    return first or last or has_mtp


def get_batch(
    data_iterator: Iterator | None, args, pipeline_layout, vp_stage: int | None
) -> dict[str, torch.Tensor | PackedSeqParams | None]:
    """`tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32), each `[b, s / cp]`. For conversations also
    `padding_mask` (bool `[b, s / cp]`), and where they are packed, their positions restarting with each,
    `packed_seq_params`. Where samples are drawn from several data sets, and this rank has read them, `dataset_id`
    (int64 `[b]`). All None where the pipeline stage does not need them.

    Args:
        data_iterator: yields samples collated to `[b, s]`; None on ranks that are sent their text.
    """
    if not takes_data(args, pipeline_layout, vp_stage):
        return dict.fromkeys((*_KEYS, "padding_mask", "packed_seq_params", "dataset_id"))
    packed, is_weighted = None, False
    if args.sft_rows:
        data = next(data_iterator)
        lengths = data["lengths"].numpy()
        if torch.is_grad_enabled() and not vp_stage:
            _count(lengths[lengths > 0])
        if args.packed:
            packed = _packed_seq_params(data["position_ids"].numpy())
        mask = data["loss_mask"].numpy()
        is_weighted = bool(((mask != 0) & (mask != 1)).any())
        # What says whether a token is trained says whether it is padding too, and is cut once.
        mask[padding_of(lengths)] = -1
        batch = {key: device.move(data[key]) for key in _KEYS}
        dataset_id = device.move(data["dataset_id"]) if "dataset_id" in data else None
    else:
        batch, dataset_id = _text(data_iterator, args)
    if packed is not None:
        batch |= {"cu_seqlens": packed.cu_seqlens_q.unsqueeze(0), "cu_seqlens_padded": None}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    batch = {key: batch[key] for key in _KEYS}
    batch |= {"packed_seq_params": packed, "padding_mask": None, "dataset_id": dataset_id}
    if args.sft_rows:
        batch |= {"padding_mask": batch["loss_mask"] < 0, "loss_mask": batch["loss_mask"].clamp(min=0)}
    batch["loss_mask"].hymeg_is_weighted = is_weighted
    return batch


def _text(data_iterator: Iterator | None, args) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    micro_batch_size = args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size
    dataset_id = None
    if is_reader():
        data = next(data_iterator)
        dataset_id = device.move(data["dataset_id"]) if "dataset_id" in data else None
        together = torch.stack([device.move(data[key]).long() for key in _KEYS])
    else:
        shape = len(_KEYS), micro_batch_size, args.seq_length
        together = torch.empty(shape, dtype=torch.int64, device=device.current())
    if args.tensor_model_parallel_size > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(together, source, group=parallel_state.get_tensor_model_parallel_group())
    batch = dict(zip(_KEYS, together, strict=True))
    return batch | {"loss_mask": batch["loss_mask"].float()}, dataset_id


def padding_of(lengths: np.ndarray) -> np.ndarray:
    """Which positions belong to no conversation, bool `[b, s]`; `lengths` `[b, s]`: where one begins, its tokens."""
    samples, starts = lengths.nonzero()
    steps = np.zeros((len(lengths), lengths.shape[1] + 1), np.int8)
    steps[samples, starts] += 1
    steps[samples, starts + lengths[samples, starts]] -= 1
    return steps[:, :-1].cumsum(axis=1) == 0


def _count(lengths: np.ndarray) -> None:
    """Tell Megatron, whose log counts the tokens and FLOPs of conversations without their padding."""
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    update_seqlen_stats_from_cu_seqlens(device.move(torch.from_numpy(np.cumsum([0, *lengths]))))


def _packed_seq_params(position_ids: np.ndarray) -> PackedSeqParams:
    """Where the conversations of `position_ids` `[1, s]` begin and end. Padding belongs to the conversation before it:
    it follows, so nothing that is trained attends to it."""
    (positions,) = position_ids
    boundaries = np.append(np.flatnonzero(positions == 0), len(positions)).astype(np.int32)
    longest = int(np.diff(boundaries).max())
    cu_seqlens = device.move(torch.from_numpy(boundaries))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
