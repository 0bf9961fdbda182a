"""Every flag of Megatron's that hymeg does not take as Megatron does: when it is refused, why, and what to do instead.

By argparse destination. What no row refuses is passed through, or set from config.json (hymeg.models.flags); a test
walks all flags and shows that each of these is read.
"""

import fnmatch
from typing import Any, NamedTuple

ALWAYS = "is not supported"
ON_CPU = "cannot work on CPU"
WITH_SFT = "has no place with --sft"
WITH_LORA = "has no place with --lora-rank"
WITH_FROZEN = "has no place with --freeze or --train-only"
WITHOUT = "has no effect without"

_DEFAULT = object()


class Row(NamedTuple):
    """Some flags, refused for one reason."""

    dests: str  # destinations, with * as in a shell
    why: str
    when: str = ALWAYS
    instead: str = ""  # what to do; leaving the flag out, where nothing is said
    only: Any = _DEFAULT  # the value that is let through: the flag's default, where nothing is said
    values: tuple[Any, ...] = ()  # where given, only these are refused
    needs: str = ""  # one of these must be set: "dest", "dest=value,value", "dest>1", by spaces

    def names(self, dest: str) -> bool:
        return any(
            dest == pattern if pattern.isidentifier() else fnmatch.fnmatchcase(dest, pattern)
            for pattern in self.dests.split()
        )

    def refused(self, value: Any, default: Any) -> str | None:
        """What of `value` is refused; None where nothing is.

        Args:
            value: text, or a list of texts, for a flag that takes a name; what argparse made of it otherwise.
            default: the flag's.
        """
        if self.values:
            given = value if isinstance(value, list) else [value]
            return next((name for name in self.values if name in given), None)
        allowed = default if self.only is _DEFAULT else self.only
        # A switch that is undone is False, where nothing was said of it Megatron's default may be None.
        return None if value == allowed or (value is False and allowed is None) else value


_OLD = "Megatron has replaced it"
_GONE = "Megatron does not read it any more"
_FORMAT = "checkpoints are in Megatron's torch_dist format"
_NEEDS_TE = "it needs Transformer Engine on a GPU"
_NEEDS_CUDA = "it needs CUDA"

_REFUSED = {
    ALWAYS: {
        "it makes another model than Hy-MT2 or Hy3, whose checkpoints could not be used": """
            activation_func_clamp_value add_position_embedding apply_query_key_layer_scaling
            apply_residual_connection_post_layernorm attention_output_gate cache_mla_latents decoder_num_layers
            dsa_* encoder_num_layers experimental_attention_variant glu_linear_offset heterogeneous_*
            hybrid_layer_pattern hybrid_override_pattern is_hybrid_model kv_lora_rank layernorm_zero_centered_gamma
            linear_* mamba_* mla_down_proj_fusion moe_apply_probs_on_input moe_latent_size
            moe_mlp_glu_interleave_size moe_router_group_topk moe_router_num_groups moe_router_pre_softmax
            moe_shared_expert_gate moe_shared_expert_glu_interleave_size moe_single_grouped_bias
            moe_upcycling_granularity moe_use_upcycling mrope_section mscale* mtp_hybrid_override_pattern
            mtp_use_repeated_layer multi_latent_attention mup_* no_rope_freq openai_gelu q_lora_rank qk_clip*
            qk_head_dim qk_l2_norm qk_pos_emb_head_dim quick_geglu relative_attention_* rope_scaling_factor
            rope_type rotary_interleaved rotary_scaling_factor rotary_seq_len_interpolation_factor softmax_type spec
            squared_relu use_fused_weighted_squared_relu use_mamba_mem_eff_path use_mup use_rope_scaling v_head_dim
            window_attn_skip_freq window_size yarn_*""",
        "it is for other kinds of models: BERT, retrieval, vision": """
            bert_* biencoder_* block_data_path classes_fraction data_per_class_fraction dino_* embedding_path
            evidence_data_path head_lr_mult ict_* img_? indexer_* iter_per_epoch mask_factor mask_prob mask_type
            num_channels num_classes onnx_safe output_bert_embeddings patch_dim query_in_block_prob retriever_*
            sample_rate short_seq_prob swin_backbone_type titles_data_path use_one_sent_docs vision_*""",
        "reinforcement learning is not part of hymeg": "rl_* grpo_* langrl_* perform_rl_step refit_method",
        "these models are trained on their data's own tokens": "logits_load_* logits_save_*",
        "hymeg trains, and it is for inference": """
            inference_* decode_only_cuda_graphs enable_chunked_prefill flash_decode max_tokens_to_oom
            mlp_chunks_for_prefill moe_enable_routing_replay moe_pad_experts_for_cuda_graph_inference
            nccl_all_reduce_for_prefill num_speculative_tokens offset_sampling_seed_by_dp_rank
            use_legacy_static_engine""",
        "tokenizer and chat template are those in --hf-model": """
            chat_template merge_file metadata_path null_tokenizer_* sft_tokenizer_prompt_format special_tokens
            tiktoken_* tokenizer_hf_* tokenizer_sentencepiece_* trust_remote_code
            use_tokenizer_model_from_checkpoint_args vocab_file""",
        "the vocabulary is config.json's, padded so that the tensor-parallel ranks share it evenly": """
            pad_vocab_size padded_vocab_size vocab_extra_ids""",
        _GONE: """
            ckpt_fully_parallel_save_deprecated deprecated_use_mcore_models disable_msc_deprecated
            dist_ckpt_format_deprecated dist_ckpt_save_pre_mcore_014 exit_signal_handler_for_dataloader
            use_dist_ckpt_deprecated""",
        "Megatron reads it in a way of building models that hymeg does not take": """
            create_all_gather_group use_layer_wise_param_layout""",
        "Megatron would leave the model on the CPU": "use_cpu_initialization",
        "Megatron fills such a model under FSDP only: it would train whatever the memory held": """
            init_model_with_meta_device""",
        "hymeg's head computes its gradient where its loss is": "defer_embedding_wgrad_compute wgrad_deferral_limit",
        "hymeg's head computes in 16 bits or fp32": "fp8_output_proj",
        "hymeg's head computes its loss in fp32": "fp16_lm_cross_entropy",
        "attention is causal, and its masks of seq_length^2 bytes would go unread": """
            create_attention_mask_in_dataloader""",
        "attention is causal over the whole sample, so it would change nothing": """
            dataloader_inter_document_masking reset_attention_mask""",
        "rotary positions are counted over the whole sample, so it would change nothing": "reset_position_ids",
        "hymeg reads Megatron's indexed datasets (tools/preprocess_data.py)": "fim_* per_dataset_sequences_path",
        "context parallelism cuts every sample alike": "hybrid_context_parallel max_seqlen_per_dp_cp_rank",
        "hymeg's layouts know tensor parallelism and the distributed optimizer only": """
            *tensor_parallel_num_weight_shards""",
        "config.json is where the architecture comes from, and the command line where the layout does": """
            use_checkpoint_args use_mp_args_from_checkpoint_args""",
        "--pipeline-model-parallel-layout says where those layers lie": "mtp_standalone",
        _FORMAT: "auto_detect_ckpt_format ckpt_format",
        "Megatron 0.19 cannot copy process groups, which are in what it would write": "config_logger_dir",
        "tensor parallelism comes with sequence parallelism here, which reduce-scatters what it would all-reduce": """
            symmetric_ar_type""",
        "it needs software of NVIDIA's own": "lazy_mpu_init use_ring_exchange_p2p use_kitchen* kitchen_*",
        "it is for Megatron's own developers": "run_workload_inspector_server test_mode",
        "it is for --fp8-recipe delayed, which is not supported": "fp8_margin fp8_interval fp8_amax_*",
    },
    ON_CPU: {
        _NEEDS_TE: """
            cpu_offloading_num_layers delay_wgrad_compute fine_grained_activation_offloading flash_attention_version
            fp4 fp4_param_gather fp8 fp8_param_gather fused_residual_rmsnorm log_max_attention_logit
            moe_permute_fusion moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization
            moe_single_grouped_weight overlap_dispatch_backward_with_experts_wgrad te_precision_config_file
            te_rng_tracker tp_comm_overlap use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
            use_precision_aware_optimizer use_te_activation_func use_transformer_engine_op_fuser""",
        _NEEDS_CUDA: """
            batch_invariant_mode cuda_graph_impl cuda_graph_modules cuda_graph_scope_deprecated enable_cuda_graph
            empty_unused_memory_level external_cuda_graph gpu_sniff_test_interval moe_enable_deepep moe_paged_stash
            moe_shared_expert_overlap nvtx_ranges optimizer_cuda_graph overlap_moe_expert_parallel_comm""",
        "it is NCCL's, and the CPU's backend is gloo": """
            flight_recorder_dump_path high_priority_stream_groups nccl_communicator_config_path nccl_ub
            pipeline_model_parallel_comm_backend sharp_enabled_group use_sharp""",
        "the CPU's attention gathers keys and values": "cp_comm_type",
        "the CPU trains in bf16 or fp32": "fp16",
        "the optimizer is on the CPU already": "optimizer_cpu_offload",
        "the CPU's layers compute in one dtype": "fp32_residual_connection",
        "it reads a GPU's power": "log_energy",
        "it times GPU kernels": "log_straggler",
        "it is CUDA's memory that it records": "record_memory_history",
        "its worker asks for the number of a GPU, and training would wait for ever": "async_save",
        "the local experts do not count for it": "save_tokens_per_expert_interval",
        "Megatron looks for Transformer Engine's layers among the model's": """
            save_activations_interval save_dgrads_interval""",
    },
    WITH_SFT: {
        "exactly the assistant's tokens are trained": "eod_mask_loss",
        "without --eval-iters all validation data is used": "full_validation",
        "several --valid-data-path have a loss each": "multiple_validation_sets",
        "it is about Megatron's indexed text": """
            allow_ambiguous_pad_tokens dataloader_defer_npy_index_mmap dataloader_fast_cache_load
            mid_level_dataset_surplus mmap_bin_files num_dataset_builder_threads object_storage_cache_path
            phase_transition_iterations validation_set_names""",
        "conversations differ in how many tokens they train, and means of means would weigh them unequally": """
            calculate_per_token_loss""",
    },
    WITH_LORA: {
        "it makes one of several layers, which adapters cannot stand beside": """
            use_transformer_engine_op_fuser moe_single_grouped_weight""",
        "the frozen weights have no gradients": "delay_wgrad_compute",
        "the frozen weights are kept in 16 bits": "fp8_param_gather fp4_param_gather",
    },
    WITH_FROZEN: {
        "frozen weights have no gradients": "delay_wgrad_compute",
        "frozen weights would be rounded, and saved so": "fp8_param_gather fp4_param_gather",
    },
}
"""Case -> why -> flags."""

# What has advice of its own, or is refused for some values only.
_ROWS = (
    Row("batch_size", _OLD, instead="use --micro-batch-size and --global-batch-size"),
    Row("checkpoint_activations", _OLD, instead="use --recompute-granularity"),
    Row("model_parallel_size", _OLD, instead="use --tensor-model-parallel-size"),
    Row("warmup", _OLD, instead="use --lr-warmup-iters or --lr-warmup-fraction"),
    Row("use_flash_attn", _GONE, instead="use --attention-backend flash"),
    Row("moe_deepep_num_sms moe_hybridep_num_sms", _GONE, instead="use --moe-flex-dispatcher-num-sms"),
    Row("bias_gelu_fusion", "these models' activation is SwiGLU", instead="use --no-bias-swiglu-fusion"),
    Row("encoder_seq_length decoder_seq_length", "there is one length of samples", instead="use --seq-length"),
    Row("rampup_batch_size", "Megatron 0.19 ignores it", instead="use --step-batch-size-schedule"),
    Row(
        "yaml_cfg", "hymeg has recipes", instead="give one with --config FILE.yaml, whose keys are the flags themselves"
    ),
    Row(
        "freeze_all_layers",
        "Megatron applies it in a way of building models that hymeg does not take",
        instead="name what is not to be trained with --freeze, what is with --train-only",
    ),
    Row("init_method_xavier_uniform", "Megatron 0.19 cannot build a model with it", instead="use --init-method-std"),
    Row("ckpt_convert_*", _FORMAT, instead="convert with tools/convert_checkpoint.py"),
    Row("enable_one_logger one_logger_* app_tag_*", "it is NVIDIA's own", only=False, instead="use --tensorboard-dir"),
    Row(
        "adlr_autoresume*",
        "it is for NVIDIA's own clusters",
        instead="--exit-duration-in-mins and --exit-signal-handler end a run with a checkpoint",
    ),
    Row(
        "exit_signal_handler_for_training",
        "it leaves in the midst of a step, without a checkpoint",
        instead="use --exit-signal-handler, which ends a run with one",
    ),
    Row("inprocess_*", "hymeg has no restart inside a process", instead="let its launcher restart (docs/slurm.md)"),
    Row(
        """use_megatron_fsdp use_torch_fsdp2 data_parallel_sharding_strategy enable_full_sharding_in_hsdp
        fsdp_* gradient_reduce_div_fusion keep_fp8_transpose_cache megatron_fsdp_*
        outer_dp_sharding_strategy strict_fsdp_dtensor_load suggested_communication_unit_size torch_fsdp2_*""",
        "hymeg's tools cannot read FSDP's checkpoints",
        instead="shard with --use-distributed-optimizer, and tensor, expert or pipeline parallelism",
    ),
    Row(
        "fp8_recipe",
        "its state cannot be loaded again: Transformer Engine refuses to unpickle it, so that no run could be resumed",
        values=("delayed",),
        instead="use blockwise, or tensorwise before Hopper",
    ),
    Row("lora_rank", "adapters have a rank of at least 1", values=(0,), instead="give one"),
    Row("attention_backend", "it needs a --spec of Megatron's", values=("local",), instead="use auto"),
    Row(
        "dataloader_type",
        "hymeg gives Megatron datasets, not data loaders",
        values=("external",),
        instead="use single or cyclic",
    ),
    Row(
        "moe_router_load_balancing_type",
        "it chooses experts without the checkpoint's expert bias, and so makes another model than Hy-MT2 or Hy3",
        values=("sinkhorn", "quantile_balancing"),
        instead="balance by --moe-router-bias-update-rate, or by a loss such as seq_aux_loss",
    ),
    Row("moe_router_quantile_balancing_ema", "it is for quantile_balancing, which is not supported"),
    Row(
        "moe_router_load_balancing_type",
        "",
        WITHOUT,
        values=("aux_loss", "seq_aux_loss", "global_aux_loss"),
        needs="moe_aux_loss_coeff",
    ),
    Row(
        "dist_ckpt_strictness",
        "Megatron 0.19 takes what it returns for the checkpoint, and fails",
        values=("return_unexpected", "return_all"),
        instead="use log_all",
    ),
    Row("transformer_impl", "Transformer Engine needs a GPU, and the CPU takes local", ON_CPU, only="local"),
    Row("distributed_backend", "the CPU's backend is gloo", ON_CPU, only="gloo"),
    Row("apply_rope_fusion", _NEEDS_TE, ON_CPU, only=False),
    Row("no_persist_layer_norm", _NEEDS_CUDA, ON_CPU, only=True),
    Row("masked_softmax_fusion gradient_accumulation_fusion", _NEEDS_CUDA, ON_CPU, only=False),
    Row("moe_grouped_gemm", "its kernels are Transformer Engine's, which needs a GPU", ON_CPU, only=False),
    Row(
        "dist_ckpt_optim_fully_reshardable",
        "what its other format has saved cannot be resumed there",
        ON_CPU,
        only=True,
    ),
    Row(
        "moe_token_dispatcher_type",
        "DeepEP and HybridEP need CUDA",
        ON_CPU,
        values=("flex",),
        instead="use alltoall or allgather",
    ),
    Row("attention_backend", _NEEDS_CUDA, ON_CPU, values=("flash", "fused")),
    Row("recompute_modules", _NEEDS_TE, ON_CPU, values=("layernorm", "moe_act"), instead="leave it out of the list"),
    Row("cross_entropy_fusion_impl", _NEEDS_TE, ON_CPU, values=("te",), instead="use native"),
    Row(
        "mock_data data_args_path per_split_data_args_path",
        "conversations come from files of rows",
        WITH_SFT,
        instead="give them with --data-path",
    ),
    Row("dataloader_type", "the order is hymeg's own, seeded by epoch", WITH_SFT, values=("cyclic",)),
    Row(
        "freeze train_only",
        "adapters are trained alone, beside frozen weights",
        WITH_LORA,
        instead="name what has adapters with --lora-targets, what is trained in full with --train-also",
    ),
    Row("save_hf", "it writes the model's own weights", WITH_LORA, instead="merge the adapters into them afterwards"),
)

_NO_EFFECT_WITHOUT = {
    "lora_rank": "lora_alpha lora_targets lora_dropout lora_scaling train_also",
    "sft": "train_epochs sft_packing sft_truncation sft_bad_rows",
    "save": """async_save keep_last log_progress no_save_optim no_save_rng save_activations_interval
    save_dgrads_interval save_params_interval save_retain_interval save_tokens_per_expert_interval
    save_wgrads_interval""",
    "load": "fall_back_to_older_checkpoint ckpt_step",
    "load pretrained_checkpoint": """finetune load_main_params_from_ckpt no_load_optim no_load_rng
    override_ckpt_iteration""",
    "save_hf": "save_hf_interval",
    "valid_translations": "valid_generate",
    "recompute_granularity=full": "recompute_method recompute_num_layers",
    "recompute_granularity=selective recompute_activations": "recompute_modules",
    "tp_comm_overlap": "tp_comm_bootstrap_backend tp_comm_bulk_* tp_comm_overlap_* tp_comm_split_*",
    "overlap_moe_expert_parallel_comm": """ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
    overlap_dispatch_backward_with_experts_wgrad""",
    "pipeline_model_parallel_size>1": "account_for_*_in_pipeline_split",
    "num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage pipeline_model_parallel_layout": """
    microbatch_group_size_per_vp_stage""",
    "context_parallel_size>1": "cp_comm_type hierarchical_context_parallel_sizes",
    "fp8": "fp8_param_gather fp8_recipe fp8_wgrad",
    "fp8_recipe=custom": "fp8_quantizer_factory",
    "fp8_recipe=mxfp8": "reuse_grad_buf_for_mxfp8_param_ag",
    "fp4": "fp4_param_gather fp4_quantizer_factory fp4_recipe",
    "fp8 fp4": "first_last_layers_bf16 moe_router_padding_for_*",
    "first_last_layers_bf16": "num_layers_at_end_in_bf16 num_layers_at_start_in_bf16",
    "fp16": "hysteresis initial_loss_scale loss_scale_window min_loss_scale",
    "cross_entropy_loss_fusion": "cross_entropy_fusion_impl",
    "mtp_num_layers": "mtp_detach_heads mtp_loss_scaling_factor",
    "moe_router_enable_expert_bias": "moe_router_bias_update_rate",
    "moe_router_load_balancing_type=aux_loss,seq_aux_loss,global_aux_loss": "moe_aux_loss_coeff",
    "moe_expert_capacity_factor": "moe_pad_expert_input_to_capacity moe_token_drop_policy",
    "moe_token_dispatcher_type=flex": """moe_flex_dispatcher_* moe_hybridep_* moe_ncclep_*
    moe_permute_fusion_into_hybridep""",
    "moe_paged_stash": "moe_paged_stash_*",
    "fine_grained_activation_offloading": """activation_offload_fraction delay_offload_until_cuda_graph
    delta_offload_bytes_across_pp_ranks fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size
    offload_modules""",
    "cpu_offloading_num_layers": "cpu_offloading_retain_pinned_cpu_buffers",
    "cuda_graph_impl=local,transformer_engine,full_iteration enable_cuda_graph external_cuda_graph": """
    cuda_graph_modules cuda_graph_scope_deprecated cuda_graph_warmup_steps""",
    "optimizer=sgd": "sgd_momentum",
    "optimizer=lion muon_scalar_optimizer=lion": "lion_*",
    "optimizer=muon,dist_muon,adaptive_muon": "muon_*",
    "optimizer_cpu_offload": """optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_*
    use_torch_optimizer_for_cpu_offload""",
    "lr_decay_style=WSD": "lr_wsd_*",
    "manual_gc": "manual_gc_eval manual_gc_interval",
    "exit_signal_handler": "exit_signal",
    "non_persistent_ckpt_type": "non_persistent_save_interval",
    "non_persistent_ckpt_type=global": "non_persistent_global_ckpt_dir",
    "non_persistent_ckpt_type=local": "non_persistent_local_* replication",
    "replication": "replication_*",
    "async_save": "async_ckpt_* async_strategy use_persistent_ckpt_worker",
    "ckpt_fully_parallel_load": "ckpt_fully_parallel_load_*",
    "ckpt_fully_parallel_save": "ckpt_fully_parallel_save_process_group",
    "dist_ckpt_optim_fully_reshardable": "distrib_optim_fully_reshardable_mem_efficient",
    "use_sharp": "sharp_enabled_group",
    "nccl_ub": "disable_symmetric_registration",
    "flight_recorder_dump_path": "flight_recorder_[!d]* flight_recorder_dump_on_timeout",
    "profile record_memory_history": "profile_ranks",
    "profile": "nvtx_ranges profile_step_* pytorch_profiler_* record_shapes use_pytorch_profiler",
    "record_memory_history": "memory_snapshot_path",
    "wandb_project": "wandb_*",
    "tensorboard_dir": "log_*_to_tensorboard tensorboard_log_interval tensorboard_queue_size",
    "moe_routing_trace_path": "moe_routing_trace_*",
    "log_straggler": "straggler_* disable_straggler_on_startup",
    "fault_injector_ranks fault_injector_num_ranks": "fault_injector_*",
    "error_injection_rate": "error_injection_type",
    "enable_ft_package": "calc_ft_timeouts ft_num_warmup_iters",
    "dataloader_type=cyclic": "data_sharding",
    "multiple_validation_sets": "validation_set_names",
}

TABLE = (
    *(Row(dests, why, when) for when, reasons in _REFUSED.items() for why, dests in reasons.items()),
    *_ROWS,
    *(Row(dests, "", WITHOUT, needs=needs) for needs, dests in _NO_EFFECT_WITHOUT.items()),
)


def cpu_values() -> dict[str, Any]:
    """Destination -> the only value that the CPU allows, where that is not Megatron's default."""
    rows = [row for row in _ROWS if row.when == ON_CPU and row.only is not _DEFAULT]
    return {dest: row.only for row in rows for dest in row.dests.split()}
