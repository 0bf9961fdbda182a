"""The forward step and the loss that Megatron's loop calls."""

import functools
from collections.abc import Callable, Iterator

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers

from hymeg.training.batch import get_batch


def forward_step(
    data_iterator: Iterator | None, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[torch.Tensor, Callable]:
    """One micro-batch through this stage of the model.

    Returns:
        The stage's output (losses `[b, s]` on the last one) and the function that turns them into the loss. With
        `return_schedule_plan`, the plan of the expert-parallel overlap instead of the output.
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    config = get_attr_wrapped_model(model, "config")
    batch = get_batch(
        data_iterator, args, config.pipeline_model_parallel_layout, get_attr_wrapped_model(model, "vp_stage")
    )
    timers("batch-generator").stop()
    inputs = {key: batch[key] for key in ("labels", "loss_mask", "packed_seq_params", "padding_mask")}
    if return_schedule_plan:
        plan = get_attr_wrapped_model(model, "build_schedule_plan")
        return plan(batch["tokens"], batch["position_ids"], None, **inputs), functools.partial(
            loss_function, batch["loss_mask"]
        )
    return model(batch["tokens"], batch["position_ids"], None, **inputs), functools.partial(
        loss_function, batch["loss_mask"]
    )


def loss_function(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked losses, and over how many tokens: Megatron divides by the tokens of the whole step
    (`--calculate-per-token-loss`).

    Args:
        loss_mask: `[b, s]`, 1 for tokens that are trained.
        losses: `[b, s]`, nats.

    Returns:
        The sum, the number of tokens (int32), and `[sum, tokens]` for the log.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum()
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.stack([loss.detach(), num_tokens.detach()])
    return loss, num_tokens.detach().to(torch.int), {"lm loss": report}
