"""The flags that the CPU needs and those that it cannot serve, by argparse destination."""

from typing import Any

REQUIRED: dict[str, Any] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_grouped_gemm": False,
}
"""What every run on CPU is given; a flag that says otherwise is refused."""

_NEEDS_TE = "it needs Transformer Engine on a GPU"
_NEEDS_CUDA = "it needs CUDA"

REFUSED: dict[str, tuple[Any, str]] = {
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
    "nccl_ub": (False, "it is NCCL's"),
    "use_sharp": (False, "it is NCCL's"),
}
"""Destination -> (the only value the CPU allows, why)."""

REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("moe_token_dispatcher_type", "flex"): "DeepEP and HybridEP need CUDA; use alltoall or allgather",
    ("attention_backend", "flash"): "it needs CUDA; leave --attention-backend out",
    ("attention_backend", "fused"): "it needs CUDA; leave --attention-backend out",
    ("cross_entropy_fusion_impl", "te"): "it needs Transformer Engine; use native",
}
