"""The local spec's experts: Megatron's SequentialMLP, whose parameters and stored names they keep, with the products of
all experts in one call, as Transformer Engine's grouped layers have them. Expert by expert most of a small model's step
on a CPU is what Megatron does around each product.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP

from hymeg.platform.kernels import grouped_linear


class Experts(SequentialMLP):
    """`forward(tokens, tokens_per_expert, probs)` takes `[t, hidden]` ordered by expert, how many each has, and the
    router's weight of each `[t]`; returns `[t, hidden]` and no bias. Their layers communicate nothing under expert
    tensor parallelism: the token dispatcher does.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.linear_fc1, self.linear_fc2 = (
            GroupedLinear([getattr(expert, name) for expert in self.local_experts])
            for name in ("linear_fc1", "linear_fc2")
        )

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        counts = tokens_per_expert.tolist()
        gate_and_up, _ = self.linear_fc1(tokens, counts)
        return self.linear_fc2(self._activated(gate_and_up, probs.unsqueeze(-1)), counts)

    def _activated(self, gate_and_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(gate_and_up, None, weights, self.config.activation_func_fp8_input_store)
        gate, up = gate_and_up.chunk(2, -1)
        return (F.silu(gate) * up * weights).to(gate_and_up.dtype)


class GroupedLinear(torch.nn.Module):
    """One layer of every expert, whose weights it does not own: `[t, in]`, ordered by expert, and how many tokens each
    has, to `[t, out]` and no bias, as Transformer Engine's.
    """

    def __init__(self, linears: Sequence[torch.nn.Module]):
        super().__init__()
        self.linears = tuple(linears)  # no children of this module

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Its layers': where weights are gathered meanwhile, Megatron waits for those of the module that is called
        (distributed_data_parallel.py:448).
        """
        return (linear.weight for linear in self.linears)

    def forward(self, tokens: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, None]:
        return grouped_linear(tokens, [linear.weight for linear in self.linears], counts), None
