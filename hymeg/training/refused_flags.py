"""Megatron's flags that hymeg refuses wherever it runs: those that would make another model of it, and those that would
be ignored.

By argparse destination; a flag that repeats Megatron's default is let through. What only the CPU cannot serve stands in
hymeg.platform.flags.
"""

_OTHER_MODEL = """
    activation_func_clamp_value apply_query_key_layer_scaling apply_residual_connection_post_layernorm attention_output_gate decoder_num_layers
    encoder_num_layers experimental_attention_variant glu_linear_offset heterogeneous_layers_config_encoded_json heterogeneous_layers_config_path
    hybrid_layer_pattern hybrid_override_pattern is_hybrid_model layernorm_zero_centered_gamma linear_attention_freq moe_apply_probs_on_input
    moe_latent_size moe_mlp_glu_interleave_size moe_router_group_topk moe_router_num_groups moe_router_pre_softmax moe_shared_expert_gate
    moe_shared_expert_glu_interleave_size moe_use_upcycling mrope_section mtp_hybrid_override_pattern mtp_use_repeated_layer multi_latent_attention
    no_rope_freq openai_gelu qk_clip qk_l2_norm quick_geglu rope_type rotary_interleaved rotary_seq_len_interpolation_factor softmax_type spec
    squared_relu use_mup use_rope_scaling window_attn_skip_freq window_size
"""
OTHER_MODEL = frozenset(_OTHER_MODEL.split())
"""What these change is fixed by the architecture, without a field of its own in config.json."""

_OLD = "Megatron has replaced it: use {}"
_OWN_LOSS = "these models are trained on their data's own tokens; leave it out"
_CHECKPOINT_ARGS = (
    "config.json is where the architecture comes from, and the command line where the layout does; leave it out"
)
_CAUSAL = "attention is causal over the whole sample, so it would change nothing; leave it out"
_INDEXED = "hymeg reads Megatron's indexed datasets (tools/preprocess_data.py); leave it out"
_SHARDS = "hymeg's layouts know tensor parallelism and the distributed optimizer only; leave it out"
_VOCABULARY = "the vocabulary is config.json's, padded so that the tensor-parallel ranks share it evenly; leave it out"

UNSUPPORTED: dict[str, str] = {
    "adlr_autoresume": "it is for NVIDIA's own clusters; --exit-duration-in-mins and --exit-signal-handler end a run with a checkpoint",
    "auto_detect_ckpt_format": "checkpoints are in Megatron's torch_dist format; leave it out",
    "batch_size": _OLD.format("--micro-batch-size and --global-batch-size"),
    "checkpoint_activations": _OLD.format("--recompute-granularity"),
    "ckpt_convert_format": "checkpoints are in Megatron's torch_dist format; convert them with tools/convert_checkpoint.py",
    "ckpt_format": "checkpoints are in Megatron's torch_dist format; leave it out",
    "encoder_seq_length": "use --seq-length",
    "decoder_seq_length": "use --seq-length",
    "dataloader_inter_document_masking": _CAUSAL,
    "disable_msc_deprecated": "it has no effect any more; leave it out",
    "fim_data": _INDEXED,
    "init_method_xavier_uniform": "Megatron 0.19 cannot build a model with it; random weights are normal with --init-method-std",
    "hybrid_context_parallel": "context parallelism cuts every sample alike; leave it out",
    "logits_load_dir": _OWN_LOSS,
    "logits_save_dir": _OWN_LOSS,
    "model_parallel_size": _OLD.format("--tensor-model-parallel-size"),
    "pad_vocab_size": _VOCABULARY,
    "padded_vocab_size": _VOCABULARY,
    "per_dataset_sequences_path": _INDEXED,
    "perform_rl_step": "reinforcement learning is not part of hymeg; leave it out",
    "rampup_batch_size": "Megatron 0.19 ignores it: use --step-batch-size-schedule",
    "reset_attention_mask": _CAUSAL,
    "reset_position_ids": "rotary positions are counted over the whole sample, so it would change nothing; leave it out",
    "tensor_parallel_num_weight_shards": _SHARDS,
    "expert_tensor_parallel_num_weight_shards": _SHARDS,
    "use_checkpoint_args": _CHECKPOINT_ARGS,
    "use_mp_args_from_checkpoint_args": _CHECKPOINT_ARGS,
    "vocab_extra_ids": _VOCABULARY,
    "warmup": _OLD.format("--lr-warmup-iters or --lr-warmup-fraction"),
    "yaml_cfg": "give a recipe with --config FILE.yaml, whose keys are the flags themselves",
}
"""Destination -> why, and what to do instead."""

UNSUPPORTED_VALUES: dict[tuple[str, str], str] = {
    ("attention_backend", "local"): "it needs a --spec of Megatron's; use auto",
    ("dataloader_type", "external"): "hymeg gives Megatron datasets, not data loaders; use single or cyclic",
}
