"""Layer specs: Transformer Engine's on CUDA, local modules elsewhere, the same stored keys from both.

Megatron's own specs are taken and five things changed: the router on every platform; self-attention, which can also
attend to generation's cache; norm and core attention in the local spec, whose own refuse sequence parallelism, context
parallelism and packing; its experts, which would be multiplied one by one; and its key for the norm before a MoE layer,
which it stores under a name of its own, so that checkpoints cross between CPU and GPU.
"""

import dataclasses
import functools

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from hymeg.models.attention import CoreAttention, SelfAttention
from hymeg.models.experts import Experts
from hymeg.models.router import Router


class RMSNorm(torch.nn.RMSNorm):
    """Over the last dimension. The local spec's own norm refuses sequence parallelism (torch_norm.py:50). All it takes
    is the mark on the weight by which Megatron sums the gradient over the tensor-parallel group
    (finalize_model_grads.py:354).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def uses_transformer_engine(config: TransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def decoder_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm."""
    use_te = uses_transformer_engine(config)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    block.layer_specs = [_adapted(layer, use_te) for layer in block.layer_specs]
    if not use_te:
        block.layer_norm = RMSNorm
    return block


def mtp_spec(config: TransformerConfig, vp_stage: int | None = None) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token-prediction layers of this pipeline stage, each a MoE layer like the trunk's; None where there are
    none.
    """
    if not config.mtp_num_layers:
        return None
    use_te = uses_transformer_engine(config)
    trunk = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    inner = _adapted(next(layer for layer in reversed(trunk) if _is_moe(layer)), use_te)
    block = get_gpt_mtp_block_spec(config, inner, use_transformer_engine=use_te, vp_stage=vp_stage)
    if block is not None and not use_te:
        for layer in block.layer_specs:
            layer.submodules = dataclasses.replace(layer.submodules, enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm)
    return block


def _is_moe(layer: ModuleSpec) -> bool:
    mlp = layer.submodules.mlp
    return isinstance(mlp, functools.partial) and mlp.func is MoELayer


def _adapted(layer: ModuleSpec, use_te: bool) -> ModuleSpec:
    """A changed copy: Megatron hands out one spec object for many layers."""
    changes = {}
    keys_map = dict(layer.submodules.sharded_state_dict_keys_map)
    if _is_moe(layer):
        submodules = dataclasses.replace(layer.submodules.mlp.keywords["submodules"], router=Router)
        if not use_te:
            submodules.experts = functools.partial(Experts, **submodules.experts.keywords)
        changes["mlp"] = functools.partial(MoELayer, submodules=submodules)
        keys_map.pop("pre_mlp_layernorm.", None)
    attention = layer.submodules.self_attention.submodules
    if not use_te:
        attention = dataclasses.replace(
            attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm, core_attention=CoreAttention
        )
        changes["input_layernorm"] = changes["pre_mlp_layernorm"] = RMSNorm
    changes["self_attention"] = dataclasses.replace(
        layer.submodules.self_attention, module=SelfAttention, submodules=attention
    )
    submodules = dataclasses.replace(layer.submodules, sharded_state_dict_keys_map=keys_map, **changes)
    return dataclasses.replace(layer, submodules=submodules)
