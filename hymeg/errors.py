"""The one exception for what a person got wrong. Tracebacks are for bugs."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

EXIT_CODE = 2
_SECONDS_FOR_RANK_0 = 15.0
_SECONDS_FOR_EARLIER_RANKS = 0.5  # torchrun looks at its ranks every tenth of a second


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was wrong (flag, file, key, line), what was found,
    what is allowed, what to do.
    """


class about:
    """Puts `what` before the message of a `UserError` that is raised inside, and `after` behind it."""

    def __init__(self, what: str, after: str = ""):
        self.what, self.after = what, after

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self.what}{error}{self.after}") from error


def located(where: object) -> about:
    """Puts `where`, and a colon, before that message."""
    return about(f"{where}: ")


@contextlib.contextmanager
def exit_on_user_error():
    """Turn a `UserError` into one line and exit code 2. Every command line runs inside this.

    Under a launcher rank 0 speaks for all. The others wait for it: the launcher ends every rank as soon as one has
    failed, and must not end rank 0 before it has spoken. A rank that is still alive then was alone with its error and
    says it itself. torchrun is told, too: its report comes last on the screen.
    """
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher may have made it deaf, and ends it by this
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            time.sleep(_SECONDS_FOR_RANK_0 + _SECONDS_FOR_EARLIER_RANKS * local_rank)
        said = " ".join(str(error).split())
        line = f"error: {f'rank {rank}: ' if rank > 0 else ''}{said}"
        if said not in _told_before():
            print(line, file=sys.stderr, flush=True)
        tell_torchrun(said, line)
        # No clean-up: a process group would wait for ranks that are gone, and no file is half-written (they appear
        # whole or not at all).
        sys.stdout.flush()
        os._exit(EXIT_CODE)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        where = [f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}", *getattr(error, "__notes__", ())]
        tell_torchrun(said, f"{', '.join(where)}: {said}")
        raise


def tell_torchrun(message: str, line: str) -> None:
    """Have torchrun, where there is one, show `line` as this rank's failure, at the end of its report.

    The file is the one that torch.distributed.elastic.multiprocessing.errors reads; of `py_callstack` it shows all.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        beside = Path(f"{path}.beside")  # torchrun breaks on half a file
        beside.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        beside.replace(path)


def _told_before() -> set[str]:
    """By ranks of this node, also before torchrun's last restart: it keeps RUN/attempt_N/LOCAL_RANK/error.json."""
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or os.devnull)
    if path.name != "error.json":
        return set()
    return {
        json.loads(told.read_text())["message"]["message"] for told in path.parents[2].glob("attempt_*/*/error.json")
    }
