"""HyConfig to Megatron's flags, by their argparse destinations."""

from typing import Any

from hymeg.hf.config import HyConfig


def architecture_flags(config: HyConfig) -> dict[str, Any]:
    """The flags that config.json fixes: a command line that says otherwise is wrong."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "qk_layernorm": True,
        "position_embedding_type": "rope",
        "rotary_base": config.rope_theta,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": True,
        "vocab_size": config.vocab_size,
        "num_experts": config.num_experts,
        # A list, so that every layer keeps keys of its own in the distributed checkpoint.
        "moe_layer_freq": [int(config.is_moe_layer(i)) for i in range(config.num_hidden_layers)],
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": config.moe_router_enable_expert_bias,
        "moe_router_topk_scaling_factor": config.router_scaling_factor,
        "moe_router_dtype": "fp32",
        "attention_softmax_in_fp32": config.enable_attention_fp32_softmax,
        "mtp_num_layers": config.num_nextn_predict_layers or None,
        "hy_lm_head_fp32": config.enable_lm_head_fp32,
    }


def default_flags(config: HyConfig) -> dict[str, Any]:
    """The flags that config.json suggests and a run may change: how these models are fine-tuned."""
    return {
        "max_position_embeddings": config.max_position_embeddings,
        "init_method_std": config.initializer_range,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        # The publisher fine-tunes with the expert bias frozen and without auxiliary losses.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
