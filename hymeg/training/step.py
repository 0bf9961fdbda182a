"""The forward step and the loss that Megatron's loop calls; and the loss of each data set of a blend."""

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split

from hymeg.errors import UserError
from hymeg.platform import device
from hymeg.training.batch import get_batch
from hymeg.training.row_data import row_blends

straggler_times = StragglerDetector()  # one a process, which Megatron sets up and reads under --log-straggler
_SPIKE = 10  # Megatron's own threshold of gradients (param_and_grad_buffer.py, check_grads)


def forward_step(
    data_iterator: Iterator | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
    set_losses: "SetLosses | None" = None,
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
    layout, vp_stage = config.pipeline_model_parallel_layout, get_attr_wrapped_model(model, "vp_stage")
    with straggler_times(bdata=True):
        batch = get_batch(data_iterator, args, layout, vp_stage)
    timers("batch-generator").stop()
    inputs = {key: batch[key] for key in ("labels", "loss_mask", "packed_seq_params", "padding_mask")}
    note = None
    if set_losses is not None and batch["dataset_id"] is not None and torch.is_grad_enabled():
        note = functools.partial(set_losses.add, batch["dataset_id"])
    run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
    with straggler_times:
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
    args, machine = get_args(), get_rerun_state_machine()
    validate = functools.partial(machine.validate_result, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            said = f"found {what} in local forward loss calculation"
            validate(result=loss, rejection_func=reject, message=said, fatal=True)
    if args.check_for_spiky_loss:
        mean, said = loss.detach() / num_tokens.clamp(min=1), f"loss above {_SPIKE} times the largest of its first 100"
        is_spike = functools.partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        validate(result=mean, rejection_func=is_spike, message=said, fatal=False)
    report = torch.stack([loss.detach(), num_tokens.float()])
    return loss, num_tokens.to(torch.int), {"lm loss": report}


def check_finite(iteration: int, losses: Mapping[str, torch.Tensor], grad_norm: float | None) -> None:
    """After a step that changed the weights: Megatron's own checks leave out the first step of every start. Raises
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


def training_sets(args: argparse.Namespace) -> list[str]:
    """The names of the data sets that training draws from, in the order of their numbers."""
    if args.sft_rows:
        paths = row_blends(args)[0].paths
    else:
        blend, per_split = get_blend_and_blend_per_split(args)
        paths = ((blend or (per_split or [None])[0]) or ([],))[0]
    return [f"{number}-{Path(path).stem if args.sft_rows else Path(path).name}" for number, path in enumerate(paths)]


class SetLosses:
    """Sums on the device, which is only waited for when they are read. `names`: of the data sets."""

    def __init__(self, names: list[str]):
        self.names = names
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64)

    def add(self, numbers: torch.Tensor, losses: torch.Tensor, loss_mask: torch.Tensor) -> None:
        """Samples of a micro-batch, or this rank's part of them.

        Args:
            numbers: `[b]`, of each sample's data set.
            losses: `[b, s]`, nats, times their weights.
            loss_mask: `[b, s]`, the weights.
        """
        parts = [losses.detach().sum(dim=1, dtype=torch.float64), loss_mask.count_nonzero(dim=1).double()]
        self._sums = self._sums.to(losses.device).index_add_(0, numbers.long(), torch.stack(parts, dim=1))

    def means(self, forget: bool) -> dict[str, float]:
        """Of each data set that anything was trained of since `forget` was last given: the loss of a trained token.
        Collective: every rank calls it; ranks that hold the same losses count alike.
        """
        sums = self._sums.to(device.current(), copy=True)
        torch.distributed.all_reduce(sums)
        if forget:
            self._sums.zero_()
        return {name: loss / count for name, (loss, count) in zip(self.names, sums.tolist(), strict=True) if count}
