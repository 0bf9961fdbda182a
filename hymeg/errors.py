"""The one exception for what a person got wrong. Tracebacks are for bugs."""

import contextlib
import os
import sys
import time

EXIT_CODE = 2
_SECONDS_FOR_RANK_0 = 15


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was wrong (flag, file, key, line), what was found,
    what is allowed, what to do.
    """


@contextlib.contextmanager
def exit_on_user_error():
    """Turn a `UserError` into one line and exit code 2. Every command line runs inside this.

    Under a launcher rank 0 speaks for all. The others wait for it: the launcher ends every rank as soon as one has
    failed, and must not end rank 0 before it has spoken. A rank that is still alive then was alone with its error and
    says it itself.
    """
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(_SECONDS_FOR_RANK_0)
        where = f"rank {rank}: " if rank > 0 else ""
        print(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        # No clean-up: a process group would wait for ranks that are gone, and no file is half-written (they appear
        # whole or not at all).
        sys.stdout.flush()
        os._exit(EXIT_CODE)
