"""Megatron's own names that must change: one function a patch. Line numbers are megatron-core 0.19.2's."""

import contextlib
import functools
import logging
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hymeg.platform.patches import patch, patched


def use_shipped_dataset_helpers() -> None:
    """On every platform: initialize.py:178 runs `make`, and the wheel ships the compiled helper but no Makefile, so
    that rank 0 would exit with 1.
    """
    from megatron.core.datasets import utils

    def import_helper():
        import megatron.core.datasets.helpers_cpp  # noqa: F401

    patch(utils, "compile_helpers", import_helper, "initialize.py:178")


def mend_mtp_rolls() -> None:
    """On every platform. Multi-token prediction rolls tokens, labels, masks by one with `roll_tensor`:

    - in a packed sample Megatron asks the device where each conversation ends and waits for it, four times for each;
    - padding stays padding: a position that the trunk's experts are not counted for, those of the layer aren't either;
    - under context parallelism process_mtp_loss divides by the tokens of its own rank, so that the loss depends on the
      context-parallel size. `roll_tensor` tells it that count: told the share of the whole sequence's, it divides by
      the right one. Its log would then be a mean of the ranks' quotients; each is weighed by its tokens.
    """
    from megatron.core.transformer import multi_token_prediction

    roll_tensor = multi_token_prediction.roll_tensor
    save_metrics = multi_token_prediction.MTPLossLoggingHelper.save_metrics_to_tracker
    weight = 1.0  # of this rank's tokens: over the group's mean

    def roll(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None):
        nonlocal weight
        if tensor is None or tensor.dtype == torch.bool:
            return tensor, None
        if packed_seq_params is None:
            rolled, count = roll_tensor(tensor, shifts, dims, cp_group)
        else:
            rolled = roll_packed(tensor, packed_seq_params.cu_seqlens_q.long(), cp_group)
            count = rolled.sum()
        # Of what is rolled only the loss mask is a floating-point tensor.
        if cp_group is None or cp_group.size() == 1 or not tensor.is_floating_point():
            return rolled, count
        # Tokens before the first roll, here and in the whole group: a mask that was rolled before carries them.
        original, original_in_group = getattr(tensor, "hymeg_num_tokens", (tensor.sum(), None))
        counts = torch.stack([count, original])
        torch.distributed.all_reduce(counts, group=cp_group)
        original_in_group = counts[1] if original_in_group is None else original_in_group
        rolled.hymeg_num_tokens = (original, original_in_group)
        share = original / original_in_group.clamp(min=1)
        weight = share * cp_group.size()
        return rolled, counts[0] * share

    def save(loss, *args, **kwargs):
        save_metrics(loss * weight, *args, **kwargs)

    where = "multi_token_prediction.py, process_mtp_loss"
    patch(multi_token_prediction, "roll_tensor", roll, f"{where}: num_tokens")
    patch(
        multi_token_prediction.MTPLossLoggingHelper,
        "save_metrics_to_tracker",
        staticmethod(save),
        f"{where}: mtp_loss_for_log",
    )


def weigh_mtp_losses() -> None:
    """On every platform: process_mtp_loss divides by the sum of the loss mask, which then counts as tokens. Where the
    mask holds other weights than 0 and 1, it is given one that does not, and losses that are weighed already.
    """
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction

    process_mtp_loss = gpt_model.process_mtp_loss
    roll_tensor = multi_token_prediction.roll_tensor

    def weighing(*args, loss_mask, compute_language_model_loss, cp_group, packed_seq_params, **kwargs):
        weights = loss_mask

        def weighed(labels, logits):
            nonlocal weights
            # As bits: of a floating-point tensor `mend_mtp_rolls` would count the tokens anew.
            bits, _ = roll_tensor(weights.view(torch.int32), -1, -1, cp_group, packed_seq_params)
            weights = bits.view(torch.float32)
            return compute_language_model_loss(labels, logits) * weights

        is_weighted = getattr(loss_mask, "hymeg_is_weighted", False)
        return process_mtp_loss(
            *args,
            loss_mask=(loss_mask > 0).float() if is_weighted else loss_mask,
            compute_language_model_loss=weighed if is_weighted else compute_language_model_loss,
            cp_group=cp_group,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    patch(gpt_model, "process_mtp_loss", weighing, "multi_token_prediction.py:838, 884: loss_mask.sum()")


def roll_packed(tensor: torch.Tensor, cu_seqlens: torch.Tensor, cp_group) -> torch.Tensor:
    """`tensor [..., t]` one to the left within each of the sequences that begin at `cu_seqlens [n + 1]` (int64), 0 at
    their ends. Under context parallelism t are a rank's: of every sequence, cut into 2 x cp_size chunks, chunk cp_rank
    and its mirror.
    """
    rolled = torch.roll(tensor, -1, -1)
    if cp_group is None or cp_group.size() == 1:
        rolled[..., cu_seqlens[1:] - 1] = 0
        return rolled
    size, rank = cp_group.size(), cp_group.rank()
    starts, chunks = cu_seqlens[:-1] // size, cu_seqlens.diff() // (2 * size)
    firsts = torch.stack([tensor[..., starts], tensor[..., starts + chunks]])  # of the chunk, of its mirror
    ranks = [torch.empty_like(firsts) for _ in range(size)]
    torch.distributed.all_gather(ranks, firsts, group=cp_group)
    rolled[..., starts + chunks - 1] = firsts[1] if rank == size - 1 else ranks[rank + 1][0]
    rolled[..., starts + 2 * chunks - 1] = 0 if rank == 0 else ranks[rank - 1][1]
    return rolled


def count_mtp_hits_without_logits() -> None:
    """On every platform: process_mtp_loss counts the tokens that multi-token prediction got right by the argmax of its
    logits. Where the head has made none, what stands for them tells in `hits` where the label is the likeliest token
    (hymeg.models.head.PendingLogits)."""
    from megatron.core.transformer import multi_token_prediction

    count_by_argmax = multi_token_prediction._compute_mtp_acceptance_counts

    def count(mtp_logits, mtp_labels, loss_mask, *args, **kwargs):
        if isinstance(mtp_logits, torch.Tensor):
            return count_by_argmax(mtp_logits, mtp_labels, loss_mask, *args, **kwargs)
        trained = loss_mask.t().bool()
        return (mtp_logits.hits & trained).sum().float(), trained.sum().float()

    patch(
        multi_token_prediction,
        "_compute_mtp_acceptance_counts",
        count,
        "multi_token_prediction.py, process_mtp_loss: correct, total",
    )


def leave_out_empty_optimizers() -> None:
    """On every platform: where only experts are trained, Megatron makes an optimizer of nothing for all else, and fails
    on it in each save and load (optimizer.py, ChainedOptimizer._synchronize_steps).
    """
    from megatron.training import training

    get_optimizer = training.get_megatron_optimizer

    def get(*args, **kwargs):
        made = get_optimizer(*args, **kwargs)
        chained = getattr(made, "chained_optimizers", [])
        if real := [one for one in chained if not getattr(one, "is_stub_optimizer", False)]:
            made.chained_optimizers = real
        return made

    patch(training, "get_megatron_optimizer", get, "training.py:2132")


def quieten() -> None:
    """Before Megatron is imported: on a CPU it warns a dozen times of what is as it should be."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "Only transformer-engine",
        "'pin_memory' argument is set",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # The device's generator is the CPU's, so that both change together.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def install() -> None:
    """The patches that only the CPU needs."""
    _allow_no_cuda()
    _skip_kernel_warmup()
    _use_fused_adam()
    _provide_packed_context_parallel_indices()
    _use_the_gradient_of_silu()
    _leave_sorted_chunks_alone()


def _allow_no_cuda() -> None:
    from megatron.training import initialize, training

    new = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    patch(training, "initialize_megatron", new, "initialize.py:66 asserts torch.cuda.is_available()")


def _skip_kernel_warmup() -> None:
    from megatron.training import initialize

    patch(
        initialize,
        "_warmup_jit_function",
        lambda tp_size=None: None,
        "initialize.py:497 runs full-size layers to warm up GPU kernels",
    )


def _use_fused_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from hymeg.platform.adam import FusedAdam

    patch(optimizer, "Adam", FusedAdam, "optimizer/__init__.py:560")
    patch(optimizer, "USING_PYTORCH_OPTIMIZER", False, "optimizer/__init__.py:556")
    patch(
        distrib_optimizer,
        "HAVE_APEX_OR_TE",
        True,
        "distrib_optimizer.py:837, 1025: torch's layout of the step cannot resume",
    )
    patch(
        distrib_optimizer,
        "USING_APEX_OPTIMIZER",
        True,
        "distrib_optimizer.py:851, 874: the step lies in the parameter group",
    )


def _provide_packed_context_parallel_indices() -> None:
    from megatron.core import utils

    def thd_get_partitioned_indices(
        cu_seqlens: torch.Tensor, num_tokens: int, cp_size: int, cp_rank: int
    ) -> torch.Tensor:
        """The tokens of rank `cp_rank`, [num_tokens / cp_size]: of every sequence, cut into 2 x cp_size chunks, chunk
        cp_rank and its mirror.
        """
        parts = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            chunk = (end - start) // (2 * cp_size)
            parts.append(torch.arange(start + cp_rank * chunk, start + (cp_rank + 1) * chunk))
            parts.append(torch.arange(end - (cp_rank + 1) * chunk, end - cp_rank * chunk))
        return torch.cat(parts)

    if utils.tex is None:
        stand_in = types.SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)
        patch(utils, "tex", stand_in, "core/utils.py:2441 slices packed sequences with Transformer Engine's kernel")


def _use_the_gradient_of_silu() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    def swiglu_back(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return of_input(g, y, F.silu(y.chunk(2, -1)[0]))

    def weighted_swiglu_back(g: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> tuple:
        gate, up = y.chunk(2, -1)
        activated = F.silu(gate)
        of_weights = (activated * up * g.to(weights.dtype)).sum(-1, keepdim=True)
        return of_input(g * weights, y, activated).to(y.dtype), of_weights

    def of_input(g: torch.Tensor, y: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, -1)
        found = torch.empty(y.shape, dtype=g.dtype)
        of_gate, of_up = found.chunk(2, -1)
        torch.ops.aten.silu_backward(g * up, gate.to(g.dtype), grad_input=of_gate)
        torch.mul(g, activated, out=of_up)
        return found

    reason = "fused_bias_swiglu.py:54, 74: written to be compiled, they pass over their tensors a dozen times"
    patch(fused_bias_swiglu, "swiglu_back", swiglu_back, reason)
    patch(fused_bias_swiglu, "weighted_swiglu_back", weighted_swiglu_back, reason)


def _leave_sorted_chunks_alone() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    sort_chunks_by_idxs = token_dispatcher.sort_chunks_by_idxs

    def sort(tokens, split_sizes, order, probs=None, fused=False):
        if order.tolist() == list(range(len(order))):
            return tokens, probs
        return sort_chunks_by_idxs(tokens, split_sizes, order, probs, fused)

    reason = "token_dispatcher.py:775, 810: where a rank has all experts, tokens are copied to where they are"
    patch(token_dispatcher, "sort_chunks_by_idxs", sort, reason)


@contextlib.contextmanager
def flops_formula(flops: Callable[[int, float | None, float | None], float]) -> Iterator[None]:
    """Count a step's FLOPs by `flops(batch_size, squared_lengths, num_tokens)` instead of Megatron's formula, which
    does not know these models.
    """
    from megatron.training import training

    def ours(args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None):
        return flops(batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)

    with patched(training, "num_floating_point_operations", ours, "training.py:2827, 3963: throughput and total FLOPs"):
        yield


@contextlib.contextmanager
def log_line(line) -> Iterator[None]:
    """Let `line` (a hymeg.training.metrics.LogLine) see every call of training_log and extend what it prints: Megatron
    has no hook there.
    """
    from megatron.training import get_args, get_timers, training

    training_log, print_rank_last = training.training_log, training.print_rank_last

    def logged(*args, **kwargs):
        total_loss_dict, iteration = args[1], args[3]
        line.learning_rate, line.grad_norm = args[2], args[7]
        if not args[6]:  # the step was not skipped
            line.check(iteration, args[0])
        if iteration % get_args().log_interval == 0:
            # Said to be the first, an iteration is logged and its sums kept (training.py:2594): the next line would be
            # the mean of both.
            kwargs["is_first_iteration"] = False
        packed = kwargs.get("total_real_tokens_in_batch"), kwargs.get("seqlen_squared_sum_in_batch")
        line.before(iteration, kwargs.get("is_first_iteration", False), *packed)
        timer = get_timers()("interval-time")
        elapsed = timer.elapsed

        def noted(*timer_args, **timer_kwargs):
            seconds = elapsed(*timer_args, **timer_kwargs)
            advanced, skipped = (total_loss_dict[f"{what} iterations"] for what in ("advanced", "skipped"))
            line.seconds = seconds / (advanced + skipped)
            line.losses = {
                name: float(total) / max(1, advanced)
                for name, total in total_loss_dict.items()
                if not name.endswith(" iterations")
            }
            return seconds

        with (
            patched(timer, "elapsed", noted, "training.py:2824: what the line calls elapsed time per iteration"),
            patched(
                training, "print_rank_last", lambda message: print_rank_last(line.extended(message)), "training.py:2909"
            ),
        ):
            return training_log(*args, **kwargs)

    with patched(training, "training_log", logged, "training.py:3985"):
        yield


@contextlib.contextmanager
def after_steps(act: Callable[[int, list, Any], None]) -> Iterator[None]:
    """Call `act(iteration, model_chunks, optimizer)` on every rank after every step, once Megatron has saved what it
    saves then: it has no hook there.
    """
    from megatron.training import training

    decide = training.checkpoint_and_decide_exit

    def decided(model_chunks, optimizer, opt_param_scheduler, iteration, *args, **kwargs):
        exits = decide(model_chunks, optimizer, opt_param_scheduler, iteration, *args, **kwargs)
        act(iteration, model_chunks, optimizer)
        return exits

    with patched(training, "checkpoint_and_decide_exit", decided, "training.py:4081: the end of a step"):
        yield


@contextlib.contextmanager
def after_evaluations(act: Callable[[int, str, list[dict[str, float]], list], None]) -> Iterator[None]:
    """Call `act(iteration, title, losses, model_chunks)` on every rank after every evaluation: Megatron has no hook
    there. `title` is Megatron's, "iteration 10" in training and "iteration 10 on test set" after it; `losses` are those
    of each data set, by name, empty but on ranks of the last pipeline stage.
    """
    from megatron.training import training

    evaluate, evaluate_and_print = training.evaluate, training.evaluate_and_print_results

    def evaluated(title, forward_step, data, model_chunks, iteration, *args, **kwargs):
        losses = []

        def noted(*evaluate_args, **evaluate_kwargs):
            result = evaluate(*evaluate_args, **evaluate_kwargs)
            losses.append({name: float(value) for name, value in (result[0] or {}).items()})
            return result

        with patched(training, "evaluate", noted, "training.py:4402: the losses"):
            evaluate_and_print(title, forward_step, data, model_chunks, iteration, *args, **kwargs)
        act(iteration, title, losses, model_chunks)

    with patched(training, "evaluate_and_print_results", evaluated, "training.py:1483, 1494, 4040"):
        yield


@contextlib.contextmanager
def after_saves(act: Callable[[int, float], None]) -> Iterator[None]:
    """Call `act(iteration, seconds)` on every rank after every checkpoint: Megatron has no hook there. Of one that is
    written in the background the seconds are those for which training waited.
    """
    from megatron.training import training

    save = training.save_checkpoint_and_time

    def saved(iteration, *args, **kwargs):
        started = time.monotonic()
        save(iteration, *args, **kwargs)
        act(iteration, time.monotonic() - started)

    with patched(training, "save_checkpoint_and_time", saved, "training.py:1442, 3251 to 3326, 3772, 3872"):
        yield


def gather_weights(model_chunks: list, optimizer) -> None:
    """Where they are gathered as the next step asks for them (`--overlap-param-gather`), now: as for a checkpoint."""
    from megatron.training import get_args, training

    if training.should_disable_forward_pre_hook(get_args()):
        training.force_param_sync(model_chunks, optimizer=optimizer)


@contextlib.contextmanager
def not_in_interval_time() -> Iterator[None]:
    """What is done meanwhile is not part of the time of an iteration in the log, as a checkpoint is not."""
    from megatron.training import get_timers

    timer = get_timers()("interval-time")
    timer.stop()
    yield
    timer.start(barrier=True)
