"""What is left of Megatron's layers without gradients and other ranks' parts to wait for: with a token at a time, most
of a pass on a CPU is what layers do around their products.

The sums are Megatron's, in its order. A layer that is not as assumed here goes Megatron's way.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

Tensor, Linear = torch.Tensor, ColumnParallelLinear | RowParallelLinear


@contextlib.contextmanager
def shortened(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While open, layers of the local spec in evaluation mode compute by the shortest way; their hooks are called."""
    short = [pair for chunk in chunks for pair in _short(chunk)]
    try:
        for module, forward in short:
            module.forward = forward
        yield
    finally:
        for module, _ in short:
            del module.forward


def _short(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Callable]]:
    way = _WAYS.get(type(module))
    if forward := way and way(module):
        yield module, forward
    if not isinstance(module, SequentialMLP):
        for child in module.children():
            yield from _short(child)


def _linear(layer: Linear) -> Callable | None:
    if layer.bias is not None or (layer.tp_group.size() > 1 and not layer.explicit_expert_comm):
        return None
    weight = layer.weight
    return lambda tokens: (F.linear(tokens, weight), None)


def _layer(layer: TransformerLayer) -> Callable | None:
    attention, attention_norm = layer.self_attention, layer.input_layernorm
    mlp, mlp_norm = layer.mlp, layer.pre_mlp_layernorm

    def forward(hidden_states: Tensor, *, inference_context=None, inference_params=None, **unused):
        cache = inference_context or inference_params  # the latter from the multi-token-prediction layers
        hidden_states = hidden_states + attention(attention_norm(hidden_states), inference_context=cache)[0]
        return hidden_states + mlp(mlp_norm(hidden_states))[0], None

    return None if layer.config.fp32_residual_connection else forward


def _mlp(mlp: MLP) -> Callable:
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    return lambda tokens: fc2(swiglu(fc1(tokens)[0]))


def _shared_experts(mlp: SharedExpertMLP) -> Callable:
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    return lambda tokens: fc2(swiglu(fc1(tokens)[0]))[0]


def _moe(layer: MoELayer) -> Callable | None:
    """Tokens to their experts and back, in the experts' order."""
    router, experts, shared = layer.router, layer.experts, layer.shared_experts

    def forward(hidden_states: Tensor, **unused) -> tuple[Tensor, None]:
        probs, routing_map = router(hidden_states)
        tokens = hidden_states.flatten(0, 1)
        expert, token = routing_map.t().nonzero(as_tuple=True)
        outputs, _ = experts(tokens[token], routing_map.sum(dim=0), probs[token, expert])
        output = torch.zeros_like(tokens).index_add_(0, token, outputs).view_as(hidden_states)
        return output if shared is None else output + shared(hidden_states), None

    is_alone = layer.token_dispatcher.tp_size * layer.token_dispatcher.ep_size == 1
    return forward if is_alone and not layer.shared_expert_overlap else None


_WAYS = {
    ColumnParallelLinear: _linear,
    RowParallelLinear: _linear,
    TransformerLayer: _layer,
    MLP: _mlp,
    SharedExpertMLP: _shared_experts,
    MoELayer: _moe,
}
