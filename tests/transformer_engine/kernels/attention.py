"""Rotary embedding, fused attention and the softmax of the unfused one."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.registry import KERNELS, kernel

# Rotary embedding.


def _positions(tokens: int, cp_size: int, cp_rank: int, device) -> Tensor:
    """Of a sequence's tokens on a context-parallel rank: of its 2 x cp_size chunks it has number cp_rank from the front
    and from the back.
    """
    positions = torch.arange(tokens, device=device)
    if cp_size > 1:
        half = tokens // 2
        second = positions >= half
        positions = positions + torch.where(second, (2 * cp_size - 2 - cp_rank) * half, cp_rank * half)
    return positions


def _rotate(t, freqs, format_, cu_seqlens, cp_size, cp_rank, start_positions, interleaved, sign) -> Tensor:
    assert start_positions is None and not interleaved
    angles = freqs.float().view(freqs.shape[0], -1)
    if format_.name.endswith("THD"):
        bounds = (cu_seqlens // cp_size).tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        positions = torch.cat([_positions(length, cp_size, cp_rank, t.device) for length in lengths])
        angles = torch.nn.functional.pad(angles[positions], (0, 0, 0, t.shape[0] - len(positions)))[:, None]
    else:
        tokens = t.shape[0] if format_.name.endswith("SBHD") else t.shape[1]
        angles = angles[_positions(tokens, cp_size, cp_rank, t.device)]
        angles = angles[:, None, None] if format_.name.endswith("SBHD") else angles[None, :, None]
    width = angles.shape[-1]
    x = t[..., :width].float()
    if sign > 0:
        turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * angles.sin()
    else:  # the transpose: the sine belongs to the place that a value goes to
        x_sin = x * angles.sin()
        turned = torch.cat([x_sin[..., width // 2 :], -x_sin[..., : width // 2]], -1)
    return torch.cat([(x * angles.cos() + turned).to(t.dtype), t[..., width:]], -1)


@kernel
def fused_rope_forward(t, freqs, start_positions, format_, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotate(t, freqs, format_, cu_seqlens, cp_size, cp_rank, start_positions, interleaved, 1)


@kernel
def fused_rope_backward(grad, freqs, start_positions, format_, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotate(grad, freqs, format_, cu_seqlens, cp_size, cp_rank, start_positions, interleaved, -1)


# Fused attention.


def _ranges(format_: str, tensor: Tensor, cu_seqlens: Tensor, padded: Tensor | None, is_padding: bool):
    """The tokens of each sequence as an index into `tensor`: `(tokens, batch entry)` in the order of its format."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    if format_ == "THD":
        starts = (cu_seqlens if padded is None else padded).tolist()
        return [(slice(start, start + length),) for start, length in zip(starts, lengths, strict=False)]
    batch, tokens = tensor.shape[:2] if format_ == "BSHD" else (tensor.shape[1], tensor.shape[0])
    ends = lengths if is_padding else [tokens] * batch
    if format_ == "BSHD":
        return [(number, slice(end)) for number, end in enumerate(ends)]
    return [(slice(end), number) for number, end in enumerate(ends)]


def _format(layout, part: int) -> str:
    """Of the queries (0) or of keys and values (1): such as THD."""
    parts = layout.name.removeprefix("NVTE_").split("_")
    assert len(parts) == 3, f"{layout.name}: only separate queries, keys and values are stood in for"
    return parts[part]


def _scores(q: Tensor, k: Tensor, scale: float, mask, bottom_right: bool) -> Tensor:
    """Scaled scores `[h, s_q, s_kv]` in fp32 of `[s, h, d]`; query heads share keys in groups."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("shd,thd->hst", q.float(), k.float().repeat_interleave(groups, 1)) * scale
    if "CAUSAL" in mask.name:
        later = _later(scores, bottom_right or "BOTTOM_RIGHT" in mask.name)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _sequences(layout, q, k, cu_q, cu_kv, q_padded, kv_padded, mask) -> Iterator[tuple]:
    is_padding = "PADDING" in mask.name
    queries = _ranges(_format(layout, 0), q, cu_q, q_padded, is_padding)
    keys = _ranges(_format(layout, 1), k, cu_kv, kv_padded, is_padding)
    return zip(range(len(queries)), queries, keys, strict=True)


def _statistics(layout, q: Tensor) -> Tensor:
    """Log-sum-exp of every row of scores: `[t, h, 1]` for packed sequences, else `[b, h, s, 1]`, fp32."""
    format_ = _format(layout, 0)
    if format_ == "THD":
        return q.new_zeros((*q.shape[:2], 1), dtype=torch.float32)
    batch, tokens = q.shape[:2] if format_ == "BSHD" else (q.shape[1], q.shape[0])
    return q.new_zeros((batch, q.shape[2], tokens, 1), dtype=torch.float32)


def _rows(statistics: Tensor, layout, number: int, query: tuple) -> Tensor:
    """A sequence's part `[h, s]` of `_statistics`, as a view."""
    if _format(layout, 0) == "THD":
        return statistics[query[0], :, 0].t()
    tokens = next(index for index in query if isinstance(index, slice))
    return statistics[number, :, tokens, 0]


@kernel
def get_fused_attn_backend(params):
    return 1, ""


@kernel
def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, scale, dropout, set_zero, layout, o_format, scale_inv_format, bias_type,
    mask, softmax_type, window, bottom_right, cu_q, cu_kv, q, k, v, fake_dtype, q_padded, kv_padded, page_table_k,
    page_table_v, s_quantizer, o_quantizer, bias, softmax_offset, rng_gen, rng_elts, return_max_logit, cuda_graph,
):  # fmt: skip
    """`[output like q, statistics, state of the random numbers]`."""
    assert dropout == 0 and bias is None and softmax_offset is None and tuple(window) in ((-1, -1), (-1, 0))
    out, statistics = torch.zeros_like(q), _statistics(layout, q)
    for number, query, key in _sequences(layout, q, k, cu_q, cu_kv, q_padded, kv_padded, mask):
        scores = _scores(q[query], k[key], scale, mask, bottom_right)
        log_sum = scores.logsumexp(-1)
        groups = q.shape[-2] // k.shape[-2]
        values = v[key].float().repeat_interleave(groups, 1)
        out[query] = torch.einsum("hst,thd->shd", (scores - log_sum[..., None]).exp(), values).to(out.dtype)
        _rows(statistics, layout, number, query).copy_(log_sum)
    return [out, statistics, torch.zeros(2, dtype=torch.int64)]


@kernel
def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, scale, dropout, set_zero, layout, o_format, do_format, dqkv_layout, scale_inv_format,
    do_scale_inv_format, bias_type, mask, softmax_type, window, bottom_right, deterministic, cu_q, cu_kv, q, k, v, out,
    grad, fake_dtype, aux, q_padded, kv_padded, s_quantizer, dp_quantizer, dqkv_quantizer, cuda_graph,
):  # fmt: skip
    """`[dq, dk, dv, None, None]`: no gradient of a bias, nor of an offset of the softmax.

    The statistics and the output may be those of more keys than are given: then this is the part of the gradient that
    goes through the given ones, as context parallelism adds it up.
    """
    statistics = aux[0]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = q.shape[-2] // k.shape[-2]
    for number, query, key in _sequences(layout, q, k, cu_q, cu_kv, q_padded, kv_padded, mask):
        scores = _scores(q[query], k[key], scale, mask, bottom_right)
        weights = (scores - _rows(statistics, layout, number, query)[..., None]).exp()
        do, keys = grad[query].float(), k[key].float().repeat_interleave(groups, 1)
        through_values = torch.einsum("shd,thd->hst", do, v[key].float().repeat_interleave(groups, 1))
        own = (do * out[query].float()).sum(-1).t()[..., None]
        d_scores = weights * (through_values - own) * scale
        dq[query] = torch.einsum("hst,thd->shd", d_scores, keys).to(dq.dtype)
        for target, of_heads in (
            (dk, torch.einsum("hst,shd->thd", d_scores, q[query].float())),
            (dv, torch.einsum("hst,shd->thd", weights, do)),
        ):
            target[key] = of_heads.unflatten(1, (-1, groups)).sum(2).to(target.dtype)
    return [dq, dk, dv, None, None]


# Softmax of the unfused attention: rows of scores `[b, h, s_q, s_kv]`.


def _softmax(scores: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    scaled = scores.float() * scale
    if mask is not None:
        scaled = scaled.masked_fill(mask, -10000.0)
    return scaled.softmax(-1).to(scores.dtype)


def _softmax_backward(grad: Tensor, result: Tensor, scale: float) -> Tensor:
    weighted = grad.float() * result.float()
    return (scale * (weighted - result.float() * weighted.sum(-1, keepdim=True))).to(grad.dtype)


def _later(scores: Tensor, aligned_to_the_end: bool) -> Tensor:
    queries, keys = scores.shape[-2:]
    shift = keys - queries if aligned_to_the_end else 0
    return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1 + shift)


KERNELS |= {
    "scaled_softmax_forward": _softmax,
    "scaled_masked_softmax_forward": lambda scores, mask, scale: _softmax(scores, scale, mask.bool()),
    "scaled_upper_triang_masked_softmax_forward": lambda scores, scale: _softmax(scores, scale, _later(scores, False)),
    "scaled_aligned_causal_masked_softmax_forward": lambda scores, scale: _softmax(scores, scale, _later(scores, True)),
} | {
    f"scaled_{kind}softmax_backward": _softmax_backward
    for kind in ("", "masked_", "upper_triang_masked_", "aligned_causal_masked_")
}
