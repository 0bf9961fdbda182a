"""Self-attention of both layer specs: Megatron's in training, and with a cache of keys and values in generation."""

import torch
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention


class SelfAttention(MegatronSelfAttention):
    """Given an `inference_context`, tokens `[t, 1, h]` of any sequences attend to what the context keeps of each, in
    place of Megatron's own caches: those want all prompts of one length, or CUDA.
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments and result as Megatron's."""
        cache = kwargs.get("inference_context")
        if cache is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        return self.linear_proj(cache.attend(self, query, key, value))
