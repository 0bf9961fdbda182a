"""What decides about memory and speed beside the layout: precision, optimizer, recomputation, overlap. Values of
Megatron's flags; no Megatron here."""

import argparse
import dataclasses

SELECTIVE_MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields are Megatron's flags of the same names, dtypes by the names that the flags take ("fp32", "bf16", "fp16",
    "fp8").
    """

    transformer_impl: str = "transformer_engine"
    bf16: bool = True
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    ddp_bucket_size: int | None = None
    ddp_num_buckets: int | None = None
    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    grads_in_fp32: bool = True
    """Gradients are accumulated and reduced in fp32: unless --grad-reduce-in-bf16, or --main-grads-dtype bf16
    (arguments.py:1186).
    """
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    main_params_dtype: str = "fp32"
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()
    train_mtp: bool = True
    """False where --mtp-loss-scaling-factor is 0: hymeg then freezes the multi-token-prediction layers."""
    overlap_moe_expert_parallel_comm: bool = False
    make_vocab_size_divisible_by: int = 128
    cross_entropy_loss_fusion: bool = False
    hy_recompute_logits: bool = False

    @property
    def recompute_name(self) -> str:
        """In a word or two, for tables."""
        if self.recompute_granularity == "full":
            return f"full {self.recompute_method} {self.recompute_num_layers}"
        return "+".join(self.recompute_modules) if self.recompute_granularity == "selective" else "none"

    @property
    def optimizer_name(self) -> str:
        if self.optimizer_cpu_offload:
            return f"Adam, {self.optimizer_offload_fraction:.0%} on the CPU"
        kind = "distributed Adam" if self.use_distributed_optimizer else "Adam"
        if self.use_precision_aware_optimizer:
            return f"{kind}, precision-aware, moments {self.exp_avg_dtype}/{self.exp_avg_sq_dtype}"
        return kind


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
    return Settings(**values)
