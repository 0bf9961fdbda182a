"""Many tensors at a time. `chunk_size` and `noop_flag` are the GPU's affair."""

import torch

from kernels.registry import kernel


@kernel
def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


@kernel
def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)


@kernel
def multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, scale):
    """`multi_tensor_scale` by a tensor of one element."""
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale.float().reshape(()))


@kernel
def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    """Lists of gradients, parameters, first and second moments, and perhaps of fp32 copies that the parameters are
    rounded from. Mode 0 adds the decay to the gradient, 1 to the update.
    """
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, first, second, *copy in zip(*tensor_lists, strict=True):
        value = (copy[0] if copy else parameter).float()
        gradient = grad.float() + (weight_decay * value if mode == 0 else 0)
        first.copy_(beta1 * first.float() + (1 - beta1) * gradient)
        second.copy_(beta2 * second.float() + (1 - beta2) * gradient.square())
        update = (first.float() / corrections[0]) / ((second.float() / corrections[1]).sqrt() + epsilon)
        value = value - lr * (update + (weight_decay * value if mode == 1 else 0))
        parameter.copy_(value)
        if copy:
            copy[0].copy_(value)


def split_fp32(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 that an fp32 number is rounded to, and the 16 bits that it lacks of it: rounded up where those, as
    int16, are negative.
    """
    bits = value.contiguous().view(torch.int32)
    rest = (bits & 0xFFFF).to(torch.int16)
    upper = (bits >> 16) + (rest < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), rest


def join_fp32(rounded: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """`split_fp32`, undone."""
    upper = rounded.contiguous().view(torch.int16).int() - (rest < 0).int()
    return ((upper << 16) | (rest.int() & 0xFFFF)).view(torch.float32)


@kernel
def multi_tensor_adam_param_remainder(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    """`multi_tensor_adam` of bf16 parameters whose fp32 copies lack what the parameters hold (`split_fp32`)."""
    grads, parameters, firsts, seconds, rests = tensor_lists
    values = [join_fp32(parameter, rest) for parameter, rest in zip(parameters, rests, strict=True)]
    multi_tensor_adam(
        chunk_size, noop_flag, [grads, values, firsts, seconds],
        lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay,
    )  # fmt: skip
    for parameter, rest, value in zip(parameters, rests, values, strict=True):
        for target, part in zip((parameter, rest), split_fp32(value), strict=True):
            target.copy_(part)
