"""The experts of the local layer spec: Megatron's, one after another, without those that no token came to."""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP


class Experts(SequentialMLP):
    """In training every expert computes, and has a gradient. Without gradients, one that has no token is left out: a
    pass of generation brings tokens to few.
    """

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Arguments and result as Megatron's."""
        counts = tokens_per_expert.tolist()
        if torch.is_grad_enabled() or self.num_local_experts == 1 or not any(counts):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        ends = itertools.accumulate(counts)
        outputs = [
            _computed(expert, permuted_local_hidden_states[end - count : end], permuted_probs[end - count : end])
            for expert, count, end in zip(self.local_experts, counts, ends, strict=True)
            if count
        ]
        return torch.cat(outputs), None


def _computed(expert: MLP, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """What `expert(tokens, probs)` gives: of plain layers without what they do for gradients, which takes four times as
    long as the products of few tokens.
    """
    layers = expert.linear_fc1, expert.linear_fc2
    if (*map(type, layers),) != (ColumnParallelLinear, RowParallelLinear) or any(x._forward_hooks for x in layers):
        return expert(tokens, probs)[0]
    return F.linear(weighted_swiglu(F.linear(tokens, layers[0].weight), probs.unsqueeze(-1)), layers[1].weight)
