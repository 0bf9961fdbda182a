"""The forward step and the loss that Megatron's loop calls."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers

from hymeg.errors import UserError
from hymeg.training.batch import get_batch
from hymeg.training.set_losses import SetLosses

_SPIKE = 10  # Megatron's own threshold of gradients (param_and_grad_buffer.py, check_grads)


def forward_step(
    data_iterator: Iterator | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
    set_losses: SetLosses | None = None,
) -> tuple[torch.Tensor, Callable]:
    """One micro-batch through this stage of the model.

    Args:
        set_losses: given the losses of training, where there are several data sets.

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
    note = None
    if set_losses is not None and batch["dataset_id"] is not None and torch.is_grad_enabled():
        note = functools.partial(set_losses.add, batch["dataset_id"])
    run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
    output = run(batch["tokens"], batch["position_ids"], None, **inputs)
    return output, functools.partial(loss_function, batch["loss_mask"], note=note)


def loss_function(
    loss_mask: torch.Tensor, losses: torch.Tensor, note: Callable[[torch.Tensor, torch.Tensor], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the weighed losses, and of how many tokens: Megatron divides by the tokens of the whole step
    (`--calculate-per-token-loss`), and not by their weights, which would be without effect where all are alike.

    Args:
        loss_mask: `[b, s]`, the weights of tokens that are trained, 0 for others.
        losses: `[b, s]`, nats.
        note: given the weighed losses and the mask, both `[b, s]`.

    Returns:
        The sum, the number of tokens (int32), and `[sum, tokens]` for the log.
    """
    weighed = losses.float() * loss_mask
    loss, num_tokens = weighed.reshape(-1).sum(), loss_mask.count_nonzero()
    if note is not None:
        note(weighed, loss_mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if get_args().check_for_spiky_loss:
        machine = get_rerun_state_machine()
        machine.validate_result(
            result=loss.detach() / num_tokens.clamp(min=1),
            rejection_func=functools.partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss"),
            message=f"loss above {_SPIKE} times the largest of its first 100",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.stack([loss.detach(), num_tokens.float()])
    return loss, num_tokens.to(torch.int), {"lm loss": report}


def check_finite(iteration: int, losses: Mapping[str, torch.Tensor], grad_norm: float | None) -> None:
    """After a step that changed the weights: Megatron's own checks leave out the first step of every start.

    Raises:
        UserError: a loss or the gradients' norm is none.
    """
    figures = {"the gradients' norm": grad_norm} | {name: float(loss.sum()) for name, loss in losses.items()}
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"iteration {iteration}: {name} is {float(value)}, and so are the weights now, of which nothing was "
                "saved; look at the weights and data that this start began with, or lower --lr; a new start goes on "
                "from the last checkpoint (--no-check-for-nan-in-loss-and-grad trains on)"
            )
