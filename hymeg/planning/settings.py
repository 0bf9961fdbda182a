"""What decides about memory and speed beside the layout: precision, optimizer, recomputation, overlap. Values of
Megatron's flags; no Megatron here."""

import argparse
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields are Megatron's flags of the same names, dtypes by the names that the flags take, such as "fp32"."""

    transformer_impl: str = "transformer_engine"
    bf16: bool = True
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    grads_in_fp32: bool = True
    """Accumulated and reduced: unless --grad-reduce-in-bf16, or --main-grads-dtype bf16 (arguments.py:1186)."""
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()
    train_mtp: bool = True
    """False where --mtp-loss-scaling-factor is 0: hymeg then freezes the multi-token-prediction layers."""
    overlap_moe_expert_parallel_comm: bool = False
    moe_shared_expert_overlap: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    make_vocab_size_divisible_by: int = 128
    cross_entropy_loss_fusion: bool = False
    hy_recompute_logits: bool = False
    dist_ckpt_optim_fully_reshardable: bool = True
    distrib_optim_fully_reshardable_mem_efficient: bool = True
    lora_rank: int | None = None
    """Of the adapters that are trained beside frozen weights; None: the weights are trained."""
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.bf16 else 4

    @property
    def gradient(self) -> int:
        """Bytes of a gradient in its buffer."""
        return 4 if self.grads_in_fp32 or not self.bf16 else 2

    @property
    def recompute_name(self) -> str:
        """In a word or two, for tables."""
        names = {
            "selective": "+".join(self.recompute_modules),
            "full": f"full {self.recompute_method} {self.recompute_num_layers}",
        }
        parts = [names.get(self.recompute_granularity), "logits" if self.hy_recompute_logits else None]
        return "+".join(filter(None, parts)) or "none"

    @property
    def optimizer_name(self) -> str:
        if self.optimizer_cpu_offload:
            return f"Adam, {self.optimizer_offload_fraction:.0%} on the CPU"
        kind = "distributed Adam" if self.use_distributed_optimizer else "Adam"
        if not self.use_precision_aware_optimizer:
            return kind
        moments = f"{self.exp_avg_dtype}/{self.exp_avg_sq_dtype}"
        return f"{kind}, precision-aware" + ("" if moments == "fp32/fp32" else f", moments {moments}")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings in `args`, parsed by hymeg.training.arguments and not yet validated by Megatron."""
    names = {field.name for field in dataclasses.fields(Settings)} & vars(args).keys()
    values = {name: getattr(args, name) for name in names}
    values["bf16"] = bool(args.bf16)
    values["grads_in_fp32"] = not (args.bf16 and (args.grad_reduce_in_bf16 or args.main_grads_dtype == "bf16"))
    if args.recompute_activations:  # another name for it (arguments.py:589)
        values["recompute_granularity"] = "selective"
    # Megatron's own default where selective recomputation is asked for (transformer_config.py:1763).
    selective = values["recompute_granularity"] == "selective"
    values["recompute_modules"] = tuple(args.recompute_modules or ("core_attn",)) if selective else ()
    values["train_mtp"] = args.mtp_loss_scaling_factor != 0
    values["lora_targets"] = tuple(values.get("lora_targets") or ()) if values.get("lora_rank") else ()
    return Settings(**values)


_UNMODELLED_SWITCHES = """
    async_save batch_invariant_mode cpu_offloading_num_layers ddp_reduce_scatter_with_fp32_accumulation
    defer_embedding_wgrad_compute delay_wgrad_compute deterministic_mode distribute_saved_activations enable_cuda_graph
    external_cuda_graph fine_grained_activation_offloading fp32_residual_connection fp4 fp8 fp8_param_gather
    freeze fsdp_double_buffer fused_residual_rmsnorm hidden_dropout hierarchical_context_parallel_sizes
    moe_enable_deepep moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_paged_stash moe_permute_fusion moe_router_fusion
    moe_router_padding_for_quantization moe_shared_expert_overlap mtp_detach_heads nccl_ub
    overlap_dispatch_backward_with_experts_wgrad overlap_param_gather_with_optimizer_step
    reuse_grad_buf_for_mxfp8_param_ag step_batch_size_schedule tp_comm_overlap train_also train_only
    use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert use_megatron_fsdp use_sharp use_te_activation_func
    use_torch_fsdp2 use_tp_pp_dp_mapping use_transformer_engine_op_fuser
"""
UNMODELLED: dict[str, tuple[Any, ...]] = {name: (False, None, 0, 0.0) for name in _UNMODELLED_SWITCHES.split()} | {
    "apply_rope_fusion": (True,),
    "attention_backend": ("auto", "flash", "fused"),
    "bias_swiglu_fusion": (True,),
    "cp_comm_type": (["p2p"], "p2p", None),
    "cuda_graph_impl": ("none",),
    "gradient_accumulation_fusion": (True,),
    "moe_token_dispatcher_type": ("alltoall",),
    "optimizer": ("adam",),
}
"""Flags that change memory or time and that nothing here knows: destination -> the values that are planned for."""


def unmodelled(args: argparse.Namespace) -> list[str]:
    """Destinations of what `args` ask for and the plan leaves out."""
    asked = {name: getattr(args, name) for name in UNMODELLED}
    return [name for name, value in asked.items() if getattr(value, "name", value) not in UNMODELLED[name]]
