"""torchrun as it is, but for its end: the exit code says how the ranks ended, and one line says why, in place of its
report.

python -m hymeg.launch.elastic FD [torchrun's arguments]: the line goes to the file descriptor FD.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from typing import Any

from hymeg import errors
from hymeg.launch import REQUEUE
from hymeg.launch.node import kill_descendants

_SECONDS_FOR_OTHER_NODES = 5


def judge(exit_codes: Collection[int]) -> int:
    """The launcher's exit code for those of the ranks that failed. A user's error on one rank is everybody's."""
    if errors.EXIT_CODE in exit_codes:
        return errors.EXIT_CODE
    return REQUEUE if all(code == REQUEUE for code in exit_codes) else 1


def ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def explained(failures: dict[int, Any]) -> tuple[int, str]:
    """The launcher's exit code, and why: of torch's `ProcessFailure`s, by rank, the first to end so, and what that rank
    has said (errors.tell_torchrun)."""
    code = judge({failure.exitcode for failure in failures.values()})
    if code == REQUEUE:
        return code, "all ranks have saved and left"
    rank = min(failures, key=lambda rank: (judge({failures[rank].exitcode}) != code, failures[rank].timestamp))
    message = failures[rank].message
    said = message["extraInfo"]["py_callstack"] if isinstance(message, dict) else ""
    return code, f"rank {rank} {ending(failures[rank].exitcode)}{': ' if said else ''}{' '.join(said.split())}"


def end_with(parent: int) -> None:
    """Once the launcher is gone (it was killed itself: out of memory, say), nobody else would end the ranks."""
    while os.getppid() == parent:
        time.sleep(1)
    kill_descendants()
    os.kill(os.getpid(), signal.SIGKILL)


def main(report: int, words: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.run import main as torchrun

    os.environ["TORCHELASTIC_ERROR_FILE"] = os.devnull  # torchrun copies the first failure to its own, and asks for one
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    try:
        torchrun(words)
    except ChildFailedError as error:
        code, why = explained(error.failures)
        os.write(report, why.encode()[:1000])  # which nobody reads before the end: a pipe holds 64 KiB
        if code == REQUEUE:
            # The other agents look into the store, which lives on the first node as long as this error does, until
            # their ranks have gone too.
            time.sleep(_SECONDS_FOR_OTHER_NODES)
        return code
    except RendezvousConnectionError:
        os.write(report, b"the first node is gone, or its torchrun")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
