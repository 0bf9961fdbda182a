"""Multi-token prediction's losses in Megatron, mended on every platform: what process_mtp_loss rolls, weighs and
counts. Importing this module replaces the names; line numbers are megatron-core 0.19.2's.
"""

import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction

from hymeg.platform.patches import replaces

_WHERE = "multi_token_prediction.py, process_mtp_loss"
_weight = 1.0  # of this rank's tokens in the log: over the group's mean


@replaces(multi_token_prediction, "roll_tensor", f"{_WHERE}: num_tokens")
def _roll(roll_tensor, tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None):
    """By one, tokens, labels and masks:

    - in a packed sample Megatron asks the device where each conversation ends and waits for it, four times for each;
    - padding stays padding: a position that the trunk's experts are not counted for, those of the layer aren't either;
    - under context parallelism process_mtp_loss divides by the tokens of its own rank, so that the loss depends on the
      context-parallel size. `roll_tensor` tells it that count: told the share of the whole sequence's, it divides by
      the right one. Its log would then be a mean of the ranks' quotients; each is weighed by its tokens.
    """
    global _weight
    if tensor is None or tensor.dtype == torch.bool:
        return tensor, None
    if packed_seq_params is None:
        rolled, count = roll_tensor(tensor, shifts, dims, cp_group)
    else:
        rolled = roll_packed(tensor, packed_seq_params.cu_seqlens_q.long(), cp_group)
        count = rolled.sum()
    # Of what is rolled only the loss mask is a floating-point tensor.
    if cp_group is None or cp_group.size() == 1 or not tensor.is_floating_point():
        return rolled, count
    # Tokens before the first roll, here and in the whole group: a mask that was rolled before carries them.
    original, original_in_group = getattr(tensor, "hymeg_num_tokens", (tensor.sum(), None))
    counts = torch.stack([count, original])
    torch.distributed.all_reduce(counts, group=cp_group)
    original_in_group = counts[1] if original_in_group is None else original_in_group
    rolled.hymeg_num_tokens = (original, original_in_group)
    share = original / original_in_group.clamp(min=1)
    _weight = share * cp_group.size()
    return rolled, counts[0] * share


@replaces(
    multi_token_prediction.MTPLossLoggingHelper, "save_metrics_to_tracker", f"{_WHERE}: mtp_loss_for_log is a rank's"
)
def _save_weighed(save_metrics, loss, *args, **kwargs):
    save_metrics(loss * _weight, *args, **kwargs)


def roll_packed(tensor: torch.Tensor, cu_seqlens: torch.Tensor, cp_group) -> torch.Tensor:
    """`tensor [..., t]` one to the left within each of the sequences that begin at `cu_seqlens [n + 1]` (int64), 0 at
    their ends. Under context parallelism t are a rank's: of every sequence, cut into 2 x cp_size chunks, chunk cp_rank
    and its mirror.
    """
    rolled = torch.roll(tensor, -1, -1)
    if cp_group is None or cp_group.size() == 1:
        rolled[..., cu_seqlens[1:] - 1] = 0
        return rolled
    size, rank = cp_group.size(), cp_group.rank()
    starts, chunks = cu_seqlens[:-1] // size, cu_seqlens.diff() // (2 * size)
    firsts = torch.stack([tensor[..., starts], tensor[..., starts + chunks]])  # of the chunk, of its mirror
    ranks = [torch.empty_like(firsts) for _ in range(size)]
    torch.distributed.all_gather(ranks, firsts, group=cp_group)
    rolled[..., starts + chunks - 1] = firsts[1] if rank == size - 1 else ranks[rank + 1][0]
    rolled[..., starts + 2 * chunks - 1] = 0 if rank == 0 else ranks[rank - 1][1]
    return rolled


@replaces(gpt_model, "process_mtp_loss", "multi_token_prediction.py:838, 884: loss_mask.sum()")
def _process_weighted(process_mtp_loss, *args, loss_mask, compute_language_model_loss, **kwargs):
    """It divides by the sum of the loss mask, which then counts as tokens. Where the mask holds other weights than 0
    and 1, it is given one that does not, and losses that are weighed already.
    """
    weights, loss = loss_mask, compute_language_model_loss

    def weighed(labels, logits):
        nonlocal weights
        # As bits: of a floating-point tensor `_roll` would count the tokens anew.
        bits, _ = multi_token_prediction.roll_tensor(
            weights.view(torch.int32), cp_group=kwargs["cp_group"], packed_seq_params=kwargs["packed_seq_params"]
        )
        weights = bits.view(torch.float32)
        return loss(labels, logits) * weights

    if getattr(loss_mask, "hymeg_is_weighted", False):
        loss_mask, compute_language_model_loss = (loss_mask > 0).float(), weighed
    return process_mtp_loss(
        *args, loss_mask=loss_mask, compute_language_model_loss=compute_language_model_loss, **kwargs
    )


@replaces(multi_token_prediction, "_compute_mtp_acceptance_counts", f"{_WHERE}: correct, total")
def _count_hits(count_by_argmax, mtp_logits, mtp_labels, loss_mask, *args, **kwargs):
    """The tokens that multi-token prediction got right, which Megatron counts by the argmax of its logits. Where the
    head has made none, what stands for them tells in `hits` where the label is the likeliest token
    (hymeg.models.head.PendingLogits).
    """
    if isinstance(mtp_logits, torch.Tensor):
        return count_by_argmax(mtp_logits, mtp_labels, loss_mask, *args, **kwargs)
    trained = loss_mask.t().bool()
    return (mtp_logits.hits & trained).sum().float(), trained.sum().float()
