"""Model FLOPs of a Hy model, and what a GPU could do at best: the two halves of MFU.

Counted are the matrix multiplications that the model's definition asks for, two FLOPs a multiply-add. Left out, as in
published MFU figures: norms, softmax, RoPE, activations, routing's top-k, the optimizer, and whatever a run computes
twice (activation recomputation).
"""

from hymeg.hf.config import HyConfig

# Dense (not sparse) bf16 tensor-core TFLOP/s by a part of the device's name as CUDA gives it, from NVIDIA's data
# sheets. The longest match counts.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "L20": 119.5,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.0,  # SXM: its name says "H100 80GB HBM3"
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Peak bf16 TFLOP/s of the GPU that calls itself so, e.g. "NVIDIA H100 80GB HBM3"; None where it is not known."""
    matches = [part for part in PEAK_TFLOPS if part.lower() in device_name.lower()]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None


def forward_flops_by_part(config: HyConfig, num_tokens: int, squared_length_sum: int) -> dict[str, float]:
    """FLOPs of one forward pass by part of the model. With H hidden, L layers (the MTP layers included), and all per
    token but the scores:

        attention_projections   2 L (H q + 2 H kv + q H)
                                    q = query heads x head_dim, kv = key-value heads x head_dim
        attention_scores        2 L 2 q sum(len^2) / 2
                                    QK^T and the product with V, each q per pair of positions
        dense_mlp               2 x 3 H intermediate_size for each dense layer: gate, up, down
        routed_experts          2 x 3 H moe_intermediate_size top_k for each MoE layer
        shared_experts          2 x 3 H shared_expert_intermediate_size for each MoE layer
        router                  2 H num_experts for each MoE layer
        lm_head                 2 H vocab_size, once and once more for each MTP layer
        mtp_projection          2 x 2H H for each MTP layer: eh_proj

    The halving takes len^2 / 2 for the len (len + 1) / 2 pairs under a causal mask: the convention of Megatron-LM
    (`num_floating_point_operations`) and of the MFU figures published with it. (PaLM's appendix B, arXiv:2204.02311,
    counts every pair.)

    Args:
        num_tokens: tokens in the batch.
        squared_length_sum: sum of len^2 over the sequences that attend within themselves: the documents, where a batch
            is packed.
    """
    hidden = config.hidden_size
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    num_mtp = config.num_nextn_predict_layers
    num_layers = config.num_hidden_layers + num_mtp
    num_moe = sum(config.is_moe_layer(layer) for layer in range(num_layers))

    def linear(inputs: int, outputs: int) -> int:
        return 2 * num_tokens * inputs * outputs

    def swiglu(width: int) -> int:
        return 3 * linear(hidden, width)

    return {
        "attention_projections": num_layers * (2 * linear(hidden, query_width) + 2 * linear(hidden, kv_width)),
        "attention_scores": num_layers * 2 * (2 * squared_length_sum * query_width) / 2,
        "dense_mlp": (num_layers - num_moe) * swiglu(config.intermediate_size),
        "routed_experts": num_moe * config.num_experts_per_tok * swiglu(config.moe_intermediate_size),
        "shared_experts": num_moe * swiglu(config.shared_expert_intermediate_size),
        "router": num_moe * linear(hidden, config.num_experts),
        "lm_head": (1 + num_mtp) * linear(hidden, config.vocab_size),
        "mtp_projection": num_mtp * linear(2 * hidden, hidden),
    }


def training_flops(config: HyConfig, batch_size: int, seq_length: int) -> float:
    """FLOPs of one training step on `batch_size` (the global one) unpacked sequences; see `packed_training_flops`."""
    return packed_training_flops(config, batch_size * seq_length, batch_size * seq_length**2)


def packed_training_flops(config: HyConfig, num_tokens: int, squared_length_sum: int, is_frozen: bool = False) -> float:
    """FLOPs of one training step on packed documents: the forward pass, and twice as much for the backward pass.

    Args:
        num_tokens: tokens in the global batch; leave the padding out, or count it as documents of its own.
        squared_length_sum: sum of len^2 over the documents in it.
        is_frozen: the weights have no gradients, as beside adapters: their products are then two, forward and for the
            input's gradient, not three. The adapters' own, some thousandths, are left out.
    """
    parts = forward_flops_by_part(config, num_tokens, squared_length_sum)
    scores = parts.pop("attention_scores")
    return 3 * scores + (2 if is_frozen else 3) * sum(parts.values())
