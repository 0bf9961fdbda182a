"""Adam on the CPU in the shape of Transformer Engine's FusedAdam.

Megatron's distributed optimizer knows two layouts of optimizer state: FusedAdam's (the step lies in the parameter
group, a parameter has `exp_avg` and `exp_avg_sq` alone) and torch's, with which it cannot resume
(distrib_optimizer.py:839, 1025, 1223). The arithmetic is torch's own fused kernel.
"""

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`: L2 added to the gradient) or AdamW (decoupled decay) over fp32 parameters.

    Args as Transformer Engine's class of this name; those that only matter on a GPU are accepted and must be at their
    defaults.

    Raises:
        ValueError: an option was asked for that only the GPU's kernel has (state in lower precision, master weights,
            capturable).
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, **gpu_only):
        bias_correction = gpu_only.pop("bias_correction", True)
        asked_for = {k: v for k, v in gpu_only.items() if v not in (None, False, torch.float32)}
        if asked_for or not bias_correction:
            raise ValueError(f"FusedAdam on CPU does not offer {asked_for or 'bias_correction=False'}")
        defaults = dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            (adamw if self.adam_w_mode else adam)(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                max_exp_avg_sqs=[],
                # torch's kernel counts the step up by itself.
                state_steps=[torch.tensor(float(group["step"] - 1)) for _ in params],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
