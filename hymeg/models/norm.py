"""RMSNorm for the local layer spec."""

import torch


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension, `[..., hidden_size] -> [..., hidden_size]`, usable under sequence parallelism.

    The local spec's own norm refuses sequence parallelism (torch_norm.py:50). All it takes is the mark on the weight by
    which Megatron sums the gradient over the tensor-parallel group (finalize_model_grads.py:354).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
