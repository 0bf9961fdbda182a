"""A rank's part: which step it works on, for the launcher to see, and its exit code when it was told to leave."""

import functools
import os
import signal
from collections.abc import Callable

from hymeg.errors import tell_torchrun
from hymeg.launch import ENDINGS, REQUEUE, STEP_FILE


def noting_steps(forward_step: Callable, args) -> Callable:
    """`forward_step`, which on rank 0 also writes the number of the step, from 1, to the launcher's file, if any."""
    path = os.environ.get(STEP_FILE)
    if path is None or int(os.environ["RANK"]) != 0:
        return forward_step
    noted = None

    @functools.wraps(forward_step)
    def noting(*arguments, **keywords):
        nonlocal noted
        if noted != args.curr_iteration:
            noted = args.curr_iteration
            _write(path, f"{noted + 1}\n")
        return forward_step(*arguments, **keywords)

    return noting


def _write(path: str, text: str) -> None:
    """Never an empty file in between: a killed rank's last word is read. Steps only grow, so that a longer text
    replaces a shorter one.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(file, text.encode())
    os.close(file)


def admit_rerun_state() -> None:
    """A checkpoint saved to compute a result again (exit code 16) holds classes that Megatron's own list of safe ones
    lacks (core/safe_globals.py): with PyTorch loading nothing else, no start could go on from it.
    """
    import torch
    from megatron.core import rerun_state_machine as rerun

    torch.serialization.add_safe_globals([rerun.Call, rerun.Caller, rerun.QuickStats])


def exit_code_of(train: Callable[[], None], args) -> str | int | None:
    """Train, to the end or until told to leave, and return what to exit with: `REQUEUE` on every rank or on none.

    Raises:
        Exception: what `train` raised, with the iteration in its notes.
    """
    code = 0
    try:
        train()
    except SystemExit as early:  # Megatron's way out before the last step
        code = REQUEUE if not early.code and _must_go_on(args) else early.code
    except Exception as error:
        at = getattr(args, "curr_iteration", None)
        error.add_note("before the first iteration" if at is None else f"in iteration {at + 1}")
        raise
    if code in ENDINGS:
        tell_torchrun(ENDINGS[code], ENDINGS[code])
    if args.exit_signal_handler:
        # The signal is sent again until the process has gone, and Python resets its handlers before it goes.
        signal.signal(args.exit_signal, signal.SIG_IGN)
    return code


def _must_go_on(args) -> bool:
    """Whether a launcher is to start the same command again: a signal or `--exit-duration-in-mins` ended this life, not
    `--exit-interval`. Collective: all ranks leave at the same step, and a rank may not have had its signal yet.
    """
    from megatron.training import get_signal_handler

    if not args.exit_signal_handler:
        return False
    if any(get_signal_handler().signals_received()):
        return True
    at_interval = args.exit_interval and (args.curr_iteration + 1) % args.exit_interval == 0
    at_phase = args.curr_iteration + 1 in (args.phase_transition_iterations or ())
    return bool(args.exit_duration_in_mins) and not at_interval and not at_phase
