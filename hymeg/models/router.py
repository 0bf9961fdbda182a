"""The router: Megatron's, with the expert bias the way these models are fine-tuned, and counts for the log."""

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Sigmoid top-k router with an expert bias that only selects.

    The bias stays fp32 whatever the training dtype, and frozen while `--moe-router-bias-update-rate` is 0, the
    publisher's practice in fine-tuning. `expert_load` (int64 `[experts]`, not saved) counts the tokens each expert was
    given since the last log line. Padding moves neither.
    """

    def __init__(self, config, pg_collection=None, is_mtp_layer: bool = False):
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.frozen_expert_bias = config.moe_router_bias_update_rate == 0 or (
            is_mtp_layer and config.mtp_loss_scaling_factor == 0
        )
        self.register_buffer(
            "expert_load",
            torch.zeros(config.num_moe_experts, dtype=torch.int64, device=self.weight.device),
            persistent=False,
        )

    def _maintain_float32_expert_bias(self):
        super()._maintain_float32_expert_bias()
        # In bf16 counts above 256 are inexact, and an update of the bias could take the wrong sign.
        if self.local_tokens_per_expert is not None and self.local_tokens_per_expert.dtype != torch.float32:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """In training; Megatron's own makes losses of an evaluation and generated texts random, too (router.py:706)."""
        return super().apply_input_jitter(input) if self.training else input

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Count `routing_map` (bool `[tokens, experts]`) without the padding (bool `[tokens]`), once for the bias and
        the log. Megatron's own takes no mask of that shape (router.py:738).
        """
        # Without gradients it is evaluation, or the first pass of a recomputed layer.
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            counts = (routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]).sum(dim=0)
            self.expert_load += counts
            if self.enable_expert_bias:
                self.local_tokens_per_expert += counts
