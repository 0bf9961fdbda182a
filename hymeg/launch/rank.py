"""A rank's part: which step it works on, for the launcher to see, and its exit code when it was told to leave."""

import functools
import os
import signal
from collections.abc import Callable

from hymeg.launch import REQUEUE, STEP_FILE


def noting_steps(forward_step: Callable, args) -> Callable:
    """`forward_step`, which on rank 0 also writes the number of the step, from 1, to the file that the launcher has
    named, if one has.
    """
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


def exit_code_of(train: Callable[[], None], args) -> str | int | None:
    """Train, to the end or until told to leave, and return what to exit with: `REQUEUE` on every rank or on none."""
    code = 0
    try:
        train()
    except SystemExit as early:  # Megatron's way out before the last step
        code = REQUEUE if not early.code and _told_to_leave(args) else early.code
    if args.exit_signal_handler:
        # The signal is sent again until the process has gone, and Python resets its handlers before it goes.
        signal.signal(args.exit_signal, signal.SIG_IGN)
    return code


def _told_to_leave(args) -> bool:
    """Collective: all ranks leave at the same step. Megatron does so at `--exit-interval` too, and a rank may not have
    had its signal yet.
    """
    from megatron.training import get_signal_handler

    return args.exit_signal_handler and any(get_signal_handler().signals_received())
