"""Products and norms."""

import torch
from torch import Tensor

from kernels.registry import kernel


def _dtype(number) -> torch.dtype:
    """The torch dtype of a `transformer_engine_torch.DType`."""
    names = {"kByte": "uint8", "kInt32": "int32", "kFloat32": "float32", "kFloat16": "float16", "kBFloat16": "bfloat16"}
    return getattr(torch, names[number.name])


# Products. cuBLAS counts columns first: with rows first, `B A^T` (TN), `B A` (NN) and `B^T A` (NT).


def _product(a: Tensor, a_is_transposed: bool, b: Tensor, b_is_transposed: bool) -> Tensor:
    a, b = a.reshape(-1, a.shape[-1]).float(), b.reshape(-1, b.shape[-1]).float()
    return (b.t() if b_is_transposed else b) @ (a.t() if a_is_transposed else a)


@kernel
def generic_gemm(
    a, transa, b, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, workspace_size,
    accumulate, use_split_accumulator, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
    alpha=1.0, beta=None,
):  # fmt: skip
    """`[out, gradient of the bias, input of the GELU, extra output]`."""
    assert quantizer is None and not gelu and comm_overlap is None and alpha == 1.0
    product = _product(a, transa, b, transb)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.reshape(-1, b.shape[-1]).float().sum(0).to(_dtype(bias_dtype))
    elif bias is not None:
        product = product + bias.float()
    if out is None:
        shape = product.shape if transb else (*b.shape[:-1], product.shape[-1])
        return [product.view(shape).to(_dtype(out_dtype) if out_dtype is not None else b.dtype), bias_grad, None, None]
    product = product.view(out.shape)
    out.copy_(product + (1.0 if beta is None else beta) * out.float() if accumulate else product)
    return [out, bias_grad, None, None]


@kernel
def te_general_grouped_gemm(
    a, transa, b, transb, out, out_dtype, m_splits, bias, bias_dtype, single_output, pre_gelu_out, grad, workspaces,
    workspace_size, accumulate, use_split_accumulator, math_sm_count,
):  # fmt: skip
    """One product for each pair of `a` and `b`, written into `out`: a tensor for each, or one whose rows `m_splits`
    deals out. A product of no rows leaves zeros, or what was there when it accumulates.
    """
    assert not any(one.numel() for one in pre_gelu_out)
    outs = out[0].split(m_splits) if single_output else out
    for one_a, one_b, one_out, one_bias in zip(a, b, outs, bias, strict=True):
        product = _product(one_a, transa, one_b, transb).view(one_out.shape)
        if grad and one_bias.numel():
            one_bias.copy_(one_b.float().sum(0))
        elif one_bias.numel():
            product = product + one_bias.float()
        one_out.copy_(one_out.float() + product if accumulate else product)
    return bias


# Norms.


@kernel
def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered_gamma):
    """`[normalised, None, 1 / root mean square [rows], fp32]`."""
    assert quantizer is None
    rows = x.float()
    scale = torch.rsqrt(rows.square().mean(-1) + eps)
    gamma = weight.float() + 1 if zero_centered_gamma else weight.float()
    normalised = (rows * scale.unsqueeze(-1) * gamma).to(_dtype(dtype))
    if out is not None:
        normalised = out.copy_(normalised)
    return [normalised, None, scale]


@kernel
def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    """`[gradient of x, gradient of gamma]`."""
    rows, grad, scale = x.float(), dz.float(), rsigma.unsqueeze(-1)
    weighted = grad * (gamma.float() + 1 if zero_centered_gamma else gamma.float())
    normalised = rows * scale
    dx = scale * (weighted - normalised * (weighted * normalised).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (grad * normalised).flatten(0, -2).sum(0).to(gamma.dtype)]
