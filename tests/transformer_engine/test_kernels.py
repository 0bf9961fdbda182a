"""The stand-ins for Transformer Engine's kernels compute what autograd and torch's own functions do."""

import enum
import math

import pytest
import torch
from kernels import KERNELS, moe, optimizer

DType = enum.Enum("DType", ["kFloat32", "kBFloat16"])
Layout = enum.Enum("Layout", ["NVTE_SBHD_SBHD_SBHD", "NVTE_BSHD_BSHD_BSHD", "NVTE_THD_THD_THD"])
Mask = enum.Enum("Mask", ["NVTE_NO_MASK", "NVTE_CAUSAL_MASK", "NVTE_PADDING_CAUSAL_MASK", "NVTE_PADDING_MASK"])
Format = enum.Enum("Format", ["NVTE_SBHD", "NVTE_THD"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def gemm(a, b, layout, out=None, bias=None, grad=False, accumulate=False):
    return KERNELS["generic_gemm"](
        a, layout[0] == "T", b, layout[1] == "T", out, None, DType.kFloat32, bias, DType.kFloat32, False, None, grad,
        None, 0, accumulate, False,
    )  # fmt: skip


def test_products_are_a_linear_layers_forward_and_backward():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,)))
    y = torch.nn.functional.linear(x, weight, bias)
    grad = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), grad)
    close(gemm(weight, x, "TN", bias=bias)[0], y)
    close(gemm(weight, grad, "NN", grad=True)[0], dx)
    found, bias_grad, *_ = gemm(x, grad, "NT", bias=bias, grad=True)
    close(found, dw)
    close(bias_grad, db)
    main_grad = torch.ones_like(weight)
    gemm(x, grad, "NT", out=main_grad, grad=True, accumulate=True)
    close(main_grad, dw + 1)


@pytest.mark.parametrize("single_output", [True, False])
def test_grouped_products_are_one_for_each_expert_and_zero_for_none(single_output):
    splits = [3, 0, 2]
    x, weights = torch.randn(5, 4), [torch.randn(6, 4) for _ in splits]
    expected = [part @ weight.t() for part, weight in zip(x.split(splits), weights, strict=True)]
    empty = [torch.empty(0)] * 3
    rest = (DType.kFloat32, splits, empty, DType.kFloat32, single_output, empty, False, None, 0, False, False, 0)
    out = [torch.full((5, 6), 9.0)] if single_output else [torch.full((rows, 6), 9.0) for rows in splits]
    KERNELS["te_general_grouped_gemm"](weights, True, list(x.split(splits)), False, out, *rest)
    close(torch.cat(out), torch.cat(expected))
    grads = [torch.full((6, 4), 9.0) for _ in splits]
    rest = (DType.kFloat32, splits, empty, DType.kFloat32, False, empty, True, None, 0, False, False, 0)
    KERNELS["te_general_grouped_gemm"](list(x.split(splits)), False, expected, True, grads, *rest)
    close(grads[1], torch.zeros(6, 4))
    close(grads[2], expected[2].t() @ x[3:])


def test_norm_is_torchs():
    x, weight = torch.randn(7, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    found, _, scale = KERNELS["rmsnorm_fwd"](x, weight, 1e-5, None, None, DType.kFloat32, 0, False)
    close(found, y)
    for one, other in zip(KERNELS["rmsnorm_bwd"](grad, x, scale, weight, 0, False), (dx, dw), strict=True):
        close(one, other)


def rotated(t, freqs, positions):
    """The formula written out: pairs (i, i + d/2) turn by their angle."""
    angle = freqs[positions, 0, 0, : freqs.shape[-1] // 2][:, None]
    first, second = t[..., : angle.shape[-1]], t[..., angle.shape[-1] : 2 * angle.shape[-1]]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat([*turned, t[..., 2 * angle.shape[-1] :]], -1)


@pytest.mark.parametrize("cp_rank", [None, 0, 1])
def test_rotary_embedding_turns_each_sequence_by_its_own_positions(cp_rank):
    freqs = torch.randn(16, 1, 1, 4).repeat(1, 1, 1, 2)
    cu_seqlens, cp_size = torch.tensor([0, 8, 12], dtype=torch.int32), 1 if cp_rank is None else 2
    chunks = {None: [*range(8), *range(4)], 0: [0, 1, 6, 7, 0, 3], 1: [2, 3, 4, 5, 1, 2]}[cp_rank]
    t = torch.randn(len(chunks), 3, 10, requires_grad=True)
    expected = rotated(t, freqs, chunks)
    grad = torch.randn_like(expected)
    arguments = (freqs, None, Format.NVTE_THD, False, cu_seqlens, cp_size, cp_rank or 0)
    close(KERNELS["fused_rope_forward"](t, *arguments), expected)
    close(KERNELS["fused_rope_backward"](grad, *arguments), torch.autograd.grad(expected, t, grad)[0])
    if cp_rank is None:
        one = (freqs, None, Format.NVTE_SBHD, False, None, 1, 0)
        close(KERNELS["fused_rope_forward"](t[:8, None], *one)[:, 0], expected[:8])


def attended(q, k, v, scale, causal):
    """`[s, h, d]` by torch's own attention."""
    q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


def fused_attention(layout, mask, q, k, v, cu_seqlens, padded, scale):
    arguments = (layout, None, None, None, mask, None, (-1, -1), False, cu_seqlens, cu_seqlens)
    forward = KERNELS["fused_attn_fwd"](
        8, 8, True, scale, 0.0, True, *arguments, q, k, v, None, padded, padded, *[None] * 8, False, False
    )

    def backward(grad):
        before = (8, 8, scale, 0.0, True, layout, *[None] * 6, mask, None, (-1, -1), False, False)
        after = (q, k, v, forward[0], grad, None, forward[1:], padded, padded, None, None, None, False)
        return KERNELS["fused_attn_bwd"](*before, cu_seqlens, cu_seqlens, *after)

    return forward, backward


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_is_torchs(layout, causal):
    scale, lengths = 0.3, [5, 3]
    padded = torch.tensor([0, 6, 10], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
    shape = {"THD": (10,), "SBH": (6, 2), "BSH": (2, 6)}[layout.name[5:8]]
    q = torch.randn(*shape, 4, 8, requires_grad=True)
    k, v = (torch.randn(*shape, 2, 8, requires_grad=True) for _ in range(2))
    mask = Mask.NVTE_PADDING_CAUSAL_MASK if causal else Mask.NVTE_PADDING_MASK

    def of(tensor, number):
        if len(shape) == 1:
            return tensor[padded[number] : padded[number] + lengths[number]]
        return (tensor[:, number] if layout.name[5] == "S" else tensor[number])[: lengths[number]]

    expected = [attended(of(q, n), of(k, n), of(v, n), scale, causal) for n in range(2)]
    forward, backward = fused_attention(layout, mask, q.detach(), k.detach(), v.detach(), cu_seqlens, padded, scale)
    grad = torch.randn_like(forward[0])
    found = backward(grad)
    wanted = torch.autograd.grad(expected, (q, k, v), [of(grad, n) for n in range(2)])
    for number in range(2):
        close(of(forward[0], number), expected[number])
    for one, other in zip(found, wanted, strict=False):
        close(one, other)


def test_attention_statistics_are_log_sums():
    q, k, v = (torch.randn(4, 1, 2, 8) for _ in range(3))
    (_, statistics, _), _ = fused_attention(
        Layout.NVTE_SBHD_SBHD_SBHD, Mask.NVTE_NO_MASK, q, k, v, torch.tensor([0, 4]), None, 0.5
    )
    scores = torch.einsum("shd,thd->hst", q[:, 0], k[:, 0]) * 0.5
    close(statistics[0, ..., 0], scores.exp().sum(-1).log())


@pytest.mark.parametrize("kind", ["", "masked_", "upper_triang_masked_", "aligned_causal_masked_"])
def test_softmax_of_unfused_attention(kind):
    scores, scale = torch.randn(2, 3, 4, 4, requires_grad=True), 0.7
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    hidden = torch.zeros(4, 4, dtype=torch.bool) if kind == "" else later
    expected = (scores * scale).masked_fill(hidden, -1e4).softmax(-1)
    arguments = (scores, hidden, scale) if kind == "masked_" else (scores, scale)
    found = KERNELS[f"scaled_{kind}softmax_forward"](*arguments)
    close(found, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, scores, grad)[0]
    close(KERNELS[f"scaled_{kind}softmax_backward"](grad, found, scale), wanted)


def test_halves_of_packed_sequences():
    """Two sequences of 4 and 2 tokens: their first halves are 0, 1, 4, their second ones 2, 3, 5."""
    cu_seqlens, t = torch.tensor([0, 4, 6], dtype=torch.int32), torch.randn(6, 2, 3)
    for half, places in enumerate(([0, 1, 4], [2, 3, 5])):
        close(KERNELS["thd_read_half_tensor"](t, cu_seqlens, half), t[places])
        close(KERNELS["thd_read_half_tensor"](torch.stack([t, -t]), cu_seqlens, half)[1], -t[places])
    lse, of_step = torch.randn(2, 6), torch.randn(2, 3)
    close(KERNELS["thd_read_second_half_lse"](lse, cu_seqlens, True, 3), lse[:, [2, 3, 5]])
    both = lse.clone()
    KERNELS["thd_second_half_lse_correction"](both, of_step, cu_seqlens, True)
    close(both[:, [2, 3, 5]].exp(), lse[:, [2, 3, 5]].exp() + of_step.exp())
    close(both[:, [0, 1, 4]], lse[:, [0, 1, 4]])
    found = [KERNELS["thd_get_partitioned_indices"](torch.tensor([0, 8, 12]), 12, 2, rank).tolist() for rank in (0, 1)]
    assert found == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


@pytest.mark.parametrize("only_second_half", [True, False])
def test_attention_over_two_sets_of_keys_is_put_together(only_second_half):
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    places = [2, 3, 5] if only_second_half else list(range(6))
    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))

    def attention(queries, keys):
        scores = torch.einsum("shd,thd->hst", q[queries], k[keys])
        return torch.einsum("hst,thd->shd", scores.softmax(-1), v[keys]), scores.logsumexp(-1)

    out, old = attention(list(range(6)), [0, 1, 2])
    step, lse_of_step = attention(places, [3, 4, 5])
    expected, _ = attention(places, list(range(6)))
    before, lse = out.clone(), old.clone()
    lse[:, places] = torch.logaddexp(lse[:, places], lse_of_step)
    KERNELS["thd_out_correction"](out, step, old, lse, lse_of_step, cu_seqlens, only_second_half, True)
    close(out[places], expected)
    if only_second_half:
        close(out[[0, 1, 4]], before[[0, 1, 4]])


@pytest.mark.parametrize(
    ("first", "second"), [("none", "add"), ("none", "copy"), ("copy", "add"), ("add", "none"), ("zero", "copy")]
)
def test_gradients_of_halves_are_put_together(first, second):
    cu_seqlens, grad = torch.tensor([0, 4, 6], dtype=torch.int32), torch.randn(6, 2, 3)
    step = torch.randn(3 if "none" in (first, second) else 6, 2, 3)
    expected = grad.clone()
    for places, what in (([0, 1, 4], first), ([2, 3, 5], second)):
        new = step if len(step) == 3 else step[places]
        expected[places] = {"none": grad[places], "zero": 0 * new, "copy": new, "add": grad[places] + new}[what]
    KERNELS["thd_grad_correction"](grad, step, cu_seqlens, first, second)
    close(grad, expected)


def routed():
    """A bias that selects other experts than the scores would."""
    logits = torch.randn(6, 5, requires_grad=True)
    bias = torch.tensor([0.0, 0.6, -0.6, 0.3, 0.0])
    chosen = (logits.sigmoid() + bias).topk(2, -1).indices
    taken = logits.sigmoid().gather(1, chosen)
    probs = torch.zeros(6, 5).scatter(1, chosen, 2.5 * taken / taken.sum(-1, keepdim=True))
    return logits, bias, probs


def test_fused_router():
    logits, bias, expected = routed()
    arguments = (2, False, None, None, 2.5, "sigmoid", bias, 0, None)
    probs, routing_map, scores = KERNELS["fused_topk_with_score_function_fwd"](logits.detach(), *arguments)
    close(probs, expected)
    assert torch.equal(routing_map, expected != 0)
    grad, found = torch.randn(6, 5), torch.empty(6, 5)
    KERNELS["fused_topk_with_score_function_bwd"](routing_map, scores, grad, found, 2, False, 2.5, "sigmoid", False, 0)
    close(found, torch.autograd.grad(expected, logits, grad)[0])


def test_permutation_orders_by_expert_and_comes_back():
    *_, probs = routed()
    probs, x = probs.detach(), torch.randn(6, 3)
    row_map = moe.make_row_id_map(probs != 0, 6, 5)
    assert row_map[:, -1].tolist() == [2] * 6
    pairs = [(expert, token) for expert in range(5) for token in range(6) if probs[token, expert] != 0]
    rows, _, of_rows = moe.permute_with_mask_map(x, row_map, probs, None, None, 6, 5, 12, 3, None)
    close(rows, torch.stack([x[token] for _, token in pairs]))
    close(of_rows, torch.stack([probs[token, expert] for expert, token in pairs]))
    summed, again = moe.unpermute_with_mask_map(rows, row_map, probs, of_rows, None, 6, 5, 3)
    close(summed, x * probs.sum(1, keepdim=True))
    close(again, probs)
    grad, rows, weights = torch.randn(6, 3), rows.requires_grad_(), probs.clone().requires_grad_()
    tokens, experts = [token for _, token in pairs], [expert for expert, _ in pairs]
    merged = torch.zeros(6, 3).index_add(0, torch.tensor(tokens), rows * weights[tokens, experts][:, None])
    wanted = torch.autograd.grad(merged, (rows, weights), grad)
    found = moe.unpermute_with_mask_map_bwd_with_merging_probs(grad, row_map, rows, weights, None, 6, 5, 12, 3)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_chunks_are_sorted_and_come_back():
    x, probs = torch.randn(6, 2), torch.randn(6)
    order = moe.make_chunk_sort_map(torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1]), 6, 3)
    sorted_, of_rows = moe.sort_chunks_by_map(x, order, probs, 6, 2, True)
    close(sorted_, x[[3, 4, 5, 0, 1, 2]])
    close(of_rows, probs[[3, 4, 5, 0, 1, 2]])
    close(moe.sort_chunks_by_map(sorted_, order, of_rows, 6, 2, False)[0], x)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("remainder", [False, True])
def test_adam_is_torchs(mode, remainder):
    optimizer_class = torch.optim.AdamW if mode else torch.optim.Adam
    parameter = torch.nn.Parameter(torch.randn(50))
    reference = optimizer_class([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    value, first, second = parameter.detach().clone(), torch.zeros(50), torch.zeros(50)
    rounded, rest = optimizer.split_fp32(value)
    for step in (1, 2, 3):
        parameter.grad = torch.randn(50)
        reference.step()
        lists = [[parameter.grad], [rounded if remainder else value], [first], [second]]
        name = "multi_tensor_adam_param_remainder" if remainder else "multi_tensor_adam"
        lists += [[rest]] if remainder else []
        KERNELS[name](0, None, lists, 1e-2, 0.9, 0.95, 1e-8, step, mode, 1, 0.1)
    close(optimizer.join_fp32(rounded, rest) if remainder else value, parameter.detach())
    if remainder:
        assert (rounded.float() - parameter).abs().max() <= parameter.abs().max() * 2**-8


def test_fp32_is_bf16_and_a_rest():
    value = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1.0, -math.pi])])
    rounded, rest = optimizer.split_fp32(value)
    assert torch.equal(optimizer.join_fp32(rounded, rest).view(torch.int32), value.view(torch.int32))
    assert (rounded.float() - value).abs().max() <= (value.to(torch.bfloat16).float() - value).abs().max() * 1.01


def test_norms_and_scaling_of_many_tensors():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    total, each = KERNELS["multi_tensor_l2norm"](0, None, [tensors], True)
    close(total[0], torch.cat([one.flatten() for one in tensors]).norm())
    close(each, torch.stack([one.norm() for one in tensors]))
    for name, factor in (("multi_tensor_scale", 0.5), ("multi_tensor_scale_tensor", torch.tensor([0.5]))):
        scaled = [torch.empty_like(one) for one in tensors]
        KERNELS[name](0, None, [tensors, scaled], factor)
        close(scaled[1], tensors[1] / 2)
