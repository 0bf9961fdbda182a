"""The fused router, and the permutation.

The permutation's kernels are Triton's; `TRITON` has the functions that call them. A row map `[tokens, 2 x experts + 1]`
says of each token in its last column by how many experts it is taken; of these the first columns say the rows that it
goes to, and the columns from `experts` on which experts they are.
"""

import torch
from torch import Tensor

from kernels.registry import kernel


@kernel
def fused_topk_with_score_function_fwd(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias, map_format,
    topk_indices,
):  # fmt: skip
    """`[probabilities, which experts, sigmoid scores]`, all `[tokens, experts]`."""
    assert score_function == "sigmoid" and not num_groups and topk_indices is None and map_format == 0
    scores = logits.float().sigmoid()
    chosen = (scores if expert_bias is None else scores + expert_bias.float()).topk(topk, -1).indices
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    return _normalised(scores, routing_map, topk, scaling_factor).to(logits.dtype), routing_map, scores


def _normalised(scores: Tensor, routing_map: Tensor, topk: int, scaling_factor: float | None) -> Tensor:
    taken = scores * routing_map
    if topk > 1:
        taken = taken / (taken.sum(-1, keepdim=True) + 1e-20)
    return taken * (scaling_factor or 1.0)


@kernel
def fused_topk_with_score_function_bwd(
    routing_map, scores, grad_probs, grad_logits, topk, use_pre_softmax, scaling_factor, score_function,
    use_dense_indices, map_format,
):  # fmt: skip
    """In place of `grad_logits`."""
    grad = grad_probs.float() * routing_map * (scaling_factor or 1.0)
    if topk > 1:
        total = (scores * routing_map).sum(-1, keepdim=True) + 1e-20
        grad = (grad - (grad * scores / total).sum(-1, keepdim=True)) / total * routing_map
    grad_logits.copy_(grad * scores * (1 - scores))


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Rows are ordered by expert, then by token."""
    taken = routing_map.bool()
    rows = (taken.t().flatten().cumsum(0) - 1).view(num_experts, num_tokens).t()
    order = taken.int().argsort(dim=1, descending=True, stable=True)
    return torch.cat([rows.gather(1, order), order, taken.sum(1, keepdim=True)], 1).int()


def _pairs(row_id_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and row of every pair of a token and an expert that takes it."""
    experts = row_id_map.shape[1] // 2
    taken = torch.arange(experts) < row_id_map[:, -1:]
    tokens, places = taken.nonzero(as_tuple=True)
    return tokens, row_id_map[tokens, experts + places].long(), row_id_map[tokens, places].long()


def permute_with_mask_map(
    inp, row_id_map, probs, scale, pad_offsets, num_tokens, num_experts, num_out_tokens, hidden_size, scale_hidden_dim
):
    """`(rows, scales, probabilities of the rows)`."""
    assert scale is None and pad_offsets is None, "only FP8 has scales and pads"
    tokens, experts, rows = _pairs(row_id_map)
    permuted = inp.new_zeros(num_out_tokens, hidden_size).index_copy(0, rows, inp[tokens])
    if probs is None:
        return permuted, None, None
    return permuted, None, probs.new_zeros(num_out_tokens).index_copy(0, rows, probs[tokens, experts])


def unpermute_with_mask_map(
    inp, row_id_map, merging_probs, permuted_probs, pad_offsets, num_tokens, num_experts, hidden_size
):
    """`(the sum of each token's rows, the probabilities back in [tokens, experts])`."""
    assert pad_offsets is None
    tokens, experts, rows = _pairs(row_id_map)
    values = inp[rows].float()
    if merging_probs is not None:
        values = values * merging_probs[tokens, experts].float()[:, None]
    summed = values.new_zeros(num_tokens, hidden_size).index_add(0, tokens, values).to(inp.dtype)
    if permuted_probs is None:
        return summed, None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[tokens, experts] = permuted_probs[rows]
    return summed, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    grad, row_id_map, fwd_input, merging_probs, pad_offsets, num_tokens, num_experts, num_out_tokens, hidden_size
):
    """`(gradient of the rows, of the merging probabilities)`."""
    assert pad_offsets is None
    tokens, experts, rows = _pairs(row_id_map)
    of_rows = (grad[tokens].float() * merging_probs[tokens, experts].float()[:, None]).to(grad.dtype)
    of_probs = torch.zeros_like(merging_probs)
    of_probs[tokens, experts] = (grad[tokens].float() * fwd_input[rows].float()).sum(1).to(merging_probs.dtype)
    return grad.new_zeros(num_out_tokens, hidden_size).index_copy(0, rows, of_rows), of_probs


def make_chunk_sort_map(split_sizes, sorted_indices, num_tokens, num_splits):
    """Where each row goes when the chunks are put in the order of `sorted_indices`."""
    sizes = split_sizes.tolist()
    chunks = torch.arange(num_tokens).split(sizes)
    order = torch.cat([chunks[index] for index in sorted_indices.tolist()])
    return torch.empty(num_tokens, dtype=torch.int32).index_copy(0, order, torch.arange(num_tokens, dtype=torch.int32))


def sort_chunks_by_map(inp, row_id_map, probs, num_tokens, hidden_size, is_forward):
    order = row_id_map.long()

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor).index_copy(0, order, tensor) if is_forward else tensor[order]

    return move(inp), None if probs is None else move(probs)


TRITON = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    unpermute_with_mask_map_bwd_with_merging_probs,
    make_chunk_sort_map,
    sort_chunks_by_map,
)
"""In `transformer_engine.pytorch.triton.permutation`."""
