"""The flags that the CPU needs and those that it cannot serve, by argparse destination."""

import contextlib
from collections.abc import Iterator
from typing import Any

from hymeg import platform

Only = dict[str, tuple[Any, str]]
Values = dict[tuple[str, str], str]

_NEEDS_TE = "it needs Transformer Engine on a GPU"
_NEEDS_CUDA = "it needs CUDA"
_NO_NCCL = "it is NCCL's, and the CPU's backend is gloo"

REQUIRED: Only = {
    "transformer_impl": ("local", "Transformer Engine needs a GPU, and the CPU takes local"),
    "distributed_backend": ("gloo", "the CPU's backend is gloo"),
    "apply_rope_fusion": (False, _NEEDS_TE),
    "no_persist_layer_norm": (True, _NEEDS_CUDA),
    "masked_softmax_fusion": (False, _NEEDS_CUDA),
    "gradient_accumulation_fusion": (False, _NEEDS_CUDA),
    "moe_grouped_gemm": (False, "its kernels are Transformer Engine's, which needs a GPU"),
}
"""Destination -> (what every run on CPU is given, why); a flag that says otherwise is refused."""

REFUSED: Only = {
    "fp8": (None, _NEEDS_TE),
    "fp4": (None, _NEEDS_TE),
    "fp16": (False, "the CPU trains in bf16 or fp32"),
    "moe_enable_deepep": (False, _NEEDS_CUDA),
    "moe_permute_fusion": (False, _NEEDS_TE),
    "moe_router_fusion": (False, _NEEDS_TE),
    "cuda_graph_impl": ("none", _NEEDS_CUDA),
    "enable_cuda_graph": (False, _NEEDS_CUDA),
    "external_cuda_graph": (False, _NEEDS_CUDA),
    "tp_comm_overlap": (False, _NEEDS_TE),
    "use_te_activation_func": (False, _NEEDS_TE),
    "te_rng_tracker": (False, _NEEDS_TE),
    "delay_wgrad_compute": (False, _NEEDS_TE),
    "overlap_moe_expert_parallel_comm": (False, _NEEDS_CUDA),
    "moe_shared_expert_overlap": (False, _NEEDS_CUDA),
    "fine_grained_activation_offloading": (False, _NEEDS_TE),
    "use_precision_aware_optimizer": (False, _NEEDS_TE),
    "optimizer_cpu_offload": (False, "the optimizer is on the CPU already"),
    "use_torch_fsdp2": (False, _NEEDS_CUDA),
    "use_megatron_fsdp": (False, _NEEDS_CUDA),
    "nccl_ub": (False, _NO_NCCL),
    "use_sharp": (False, _NO_NCCL),
    "nccl_communicator_config_path": (None, _NO_NCCL),
    "fp8_param_gather": (False, _NEEDS_TE),
    "fp4_param_gather": (False, _NEEDS_TE),
    "moe_router_padding_for_quantization": (False, _NEEDS_TE),
    "moe_router_padding_for_fp8": (False, _NEEDS_TE),
    "cuda_graph_modules": ([], _NEEDS_CUDA),
    "cuda_graph_scope_deprecated": (None, _NEEDS_CUDA),
    "optimizer_cuda_graph": (False, _NEEDS_CUDA),
    "use_transformer_engine_op_fuser": (False, _NEEDS_TE),
    "use_grouped_gemm_for_shared_expert": (False, _NEEDS_TE),
    "use_grouped_gemm_for_dense_mlp": (False, _NEEDS_TE),
    "moe_single_grouped_weight": (False, _NEEDS_TE),
    "fused_residual_rmsnorm": (False, _NEEDS_TE),
    "overlap_dispatch_backward_with_experts_wgrad": (False, _NEEDS_TE),
    "moe_paged_stash": (False, _NEEDS_CUDA),
    "use_flash_attn": (False, _NEEDS_CUDA),
    "log_max_attention_logit": (False, _NEEDS_TE),
    "symmetric_ar_type": (None, _NEEDS_CUDA),
    "batch_invariant_mode": (False, _NEEDS_CUDA),
    "dist_ckpt_optim_fully_reshardable": (True, "what its other format has saved cannot be resumed there"),
    "fp32_residual_connection": (False, "the CPU's layers compute in one dtype"),
    "log_energy": (False, "it reads a GPU's power"),
    "log_straggler": (False, "it times GPU kernels"),
    "gpu_sniff_test_interval": (None, _NEEDS_CUDA),
    "record_memory_history": (False, "it is CUDA's memory that it records"),
    "nvtx_ranges": (False, _NEEDS_CUDA),
}
"""Destination -> (the only value the CPU allows, why)."""

REFUSED_VALUES: Values = {
    ("moe_token_dispatcher_type", "flex"): "DeepEP and HybridEP need CUDA; use alltoall or allgather",
    ("attention_backend", "flash"): "it needs CUDA; leave --attention-backend out",
    ("attention_backend", "fused"): "it needs CUDA; leave --attention-backend out",
    ("recompute_modules", "layernorm"): "it needs Transformer Engine; leave it out of the list",
    ("recompute_modules", "moe_act"): "it needs Transformer Engine; leave it out of the list",
    ("cross_entropy_fusion_impl", "te"): "it needs Transformer Engine; use native",
}


_elsewhere = False


@contextlib.contextmanager
def for_gpus() -> Iterator[None]:
    """While the context is open, flags are judged as on a machine with CUDA: they are a plan's or a recipe's, to run
    elsewhere.
    """
    global _elsewhere
    _elsewhere = True
    try:
        yield
    finally:
        _elsewhere = False


def here() -> tuple[Only, Only, Values]:
    """`REQUIRED`, `REFUSED` and `REFUSED_VALUES` where this process runs: all empty with CUDA."""
    return (REQUIRED, REFUSED, REFUSED_VALUES) if platform.is_cpu() and not _elsewhere else ({}, {}, {})
