"""Where Megatron's training has no hook, and what its wheel or its optimizers lack on every platform. Importing this
module replaces names; line numbers are megatron-core 0.19.2's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.datasets import utils
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args, get_timers, training

from hymeg.platform.patches import patched, replaced, replaces

_OF_VALIDATION = ("eval_iters", "full_validation", "multiple_validation_sets", "validation_set_names")


@replaces(utils, "compile_helpers", "initialize.py:178")
def _import_helpers(compile_helpers) -> None:
    """It runs `make`, and the wheel ships the compiled helper but no Makefile, so that rank 0 would exit with 1."""
    import megatron.core.datasets.helpers_cpp  # noqa: F401


@replaces(training, "dummy_train_step", "training.py:3800")
def _skipped_step(dummy_train_step, data_iterator) -> None:
    """What `--iterations-to-skip` leaves out is read by every rank that would read it in a step: Megatron reads on the
    first of each tensor-parallel group alone, after which the ranks would train on different conversations, and fails
    on a list of iterators, of virtual stages.
    """
    while get_rerun_state_machine().should_run_forward_backward(data_iterator):
        for iterator in data_iterator if isinstance(data_iterator, list) else [data_iterator]:
            for _ in range(0 if iterator is None else get_num_microbatches()):
                next(iterator)


@replaces(training, "get_megatron_optimizer", "training.py:2132")
def _without_empty_optimizers(get_megatron_optimizer, *args, **kwargs):
    """Where only experts are trained, Megatron makes an optimizer of nothing for all else, and fails on it in each save
    and load (optimizer.py, ChainedOptimizer._synchronize_steps).
    """
    made = get_megatron_optimizer(*args, **kwargs)
    chained = getattr(made, "chained_optimizers", [])
    if real := [one for one in chained if not getattr(one, "is_stub_optimizer", False)]:
        made.chained_optimizers = real
    return made


@replaces(training, "evaluate_and_print_results", "training.py:1494")
def _test_data_apart(evaluate_and_print, title, *args, **kwargs):
    """Test data are one set, of `args.test_iters` iterations. Megatron takes what it was told of validation for it: as
    many iterations, whatever there is to test on; and fails where that has several sets.
    """
    if not title.endswith("test set"):  # where it learns of all ranks' iterations
        return evaluate_and_print(title, *args, **kwargs)
    of_run = get_args()
    kept = {name: getattr(of_run, name) for name in _OF_VALIDATION}
    vars(of_run).update(dict.fromkeys(_OF_VALIDATION) | {"eval_iters": of_run.test_iters})
    try:
        evaluate_and_print(title, *args, **kwargs)
    finally:
        vars(of_run).update(kept)


def flops_formula(flops: Callable[[int, float | None, float | None], float]) -> contextlib.AbstractContextManager:
    """Count a step's FLOPs by `flops(batch_size, squared_lengths, num_tokens)` instead of Megatron's formula, which
    does not know these models.
    """

    def ours(args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None):
        return flops(batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)

    return patched(training, "num_floating_point_operations", ours, "training.py:2827, 3963: throughput, total FLOPs")


def log_line(line) -> contextlib.AbstractContextManager:
    """Let `line` (a hymeg.training.metrics.LogLine) see every call of training_log and extend what it prints."""

    def logged(training_log, *args, **kwargs):
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

        def noted(elapsed, *timer_args, **timer_kwargs):
            seconds = elapsed(*timer_args, **timer_kwargs)
            advanced, skipped = (total_loss_dict[f"{what} iterations"] for what in ("advanced", "skipped"))
            line.seconds = seconds / (advanced + skipped)
            line.losses = {
                name: float(total) / max(1, advanced)
                for name, total in total_loss_dict.items()
                if not name.endswith(" iterations")
            }
            return seconds

        def extended(print_rank_last, message):
            print_rank_last(line.extended(message))

        with (
            replaced(get_timers()("interval-time"), "elapsed", noted, "training.py:2824: the time per iteration"),
            replaced(training, "print_rank_last", extended, "training.py:2909"),
        ):
            return training_log(*args, **kwargs)

    return replaced(training, "training_log", logged, "training.py:3985")


def after_steps(act: Callable[[int, list, Any], None]) -> contextlib.AbstractContextManager:
    """Call `act(iteration, model_chunks, optimizer)` on every rank after every step, once Megatron has saved what it
    saves then.
    """

    def decided(decide, model_chunks, optimizer, opt_param_scheduler, iteration, *args, **kwargs):
        exits = decide(model_chunks, optimizer, opt_param_scheduler, iteration, *args, **kwargs)
        act(iteration, model_chunks, optimizer)
        return exits

    return replaced(training, "checkpoint_and_decide_exit", decided, "training.py:4081: the end of a step")


def after_evaluations(
    act: Callable[[int, str, list[dict[str, float]], list], None],
) -> contextlib.AbstractContextManager:
    """Call `act(iteration, title, losses, model_chunks)` on every rank after every evaluation. `title` is Megatron's,
    "iteration 10" in training and "iteration 10 on test set" after it; `losses` are those of each data set, by name,
    empty but on ranks of the last pipeline stage.
    """

    def evaluated(evaluate_and_print, title, forward_step, data, model_chunks, iteration, *args, **kwargs):
        losses = []

        def noted(evaluate, *evaluate_args, **evaluate_kwargs):
            result = evaluate(*evaluate_args, **evaluate_kwargs)
            losses.append({name: float(value) for name, value in (result[0] or {}).items()})
            return result

        with replaced(training, "evaluate", noted, "training.py:4402: the losses"):
            evaluate_and_print(title, forward_step, data, model_chunks, iteration, *args, **kwargs)
        act(iteration, title, losses, model_chunks)

    return replaced(training, "evaluate_and_print_results", evaluated, "training.py:1483, 1494, 4040")


def after_saves(act: Callable[[int, float], None]) -> contextlib.AbstractContextManager:
    """Call `act(iteration, seconds)` on every rank after every checkpoint. Of one that is written in the background the
    seconds are those for which training waited.
    """

    def saved(save, iteration, *args, **kwargs):
        started = time.monotonic()
        save(iteration, *args, **kwargs)
        act(iteration, time.monotonic() - started)

    return replaced(training, "save_checkpoint_and_time", saved, "training.py:1442, 3251 to 3326, 3772, 3872")


def gather_weights(model_chunks: list, optimizer) -> None:
    """Where they are gathered as the next step asks for them (`--overlap-param-gather`), now: as for a checkpoint."""
    if training.should_disable_forward_pre_hook(get_args()):
        training.force_param_sync(model_chunks, optimizer=optimizer)


@contextlib.contextmanager
def not_in_interval_time() -> Iterator[None]:
    """What is done meanwhile is not part of the time of an iteration in the log, as a checkpoint is not."""
    timer = get_timers()("interval-time")
    timer.stop()
    yield
    timer.start(barrier=True)
