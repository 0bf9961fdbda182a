"""Several processes at one job, with their progress shown: what conversion and comparison have in common. Nothing here
knows of checkpoints.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from hymeg.errors import UserError
from hymeg.progress import Progress

_SECONDS_BETWEEN_REDRAWS = 0.2
_MAX_WORKERS = 256

Work = Callable[[Any, Callable[[int], None]], Any]


def check_num_workers(workers: int) -> None:
    if not 1 <= workers <= _MAX_WORKERS:
        raise UserError(f"--workers {workers}: 1 to {_MAX_WORKERS} are possible")


class Outcome(NamedTuple):
    results: list  # what `work` returned, share by share
    peak_bytes: int  # of resident memory, of the workers and this process together; what they share counts once


told_to_end: list[int] = []
"""Signals that this process was ended by and that it does not ignore."""


def run(work: Work, shares: Sequence[Any], progress: Progress | None = None) -> Outcome:
    """Call `work(share, report)` for every share, each in a process of its own, forked from this one; `report(n)` tells
    that n more bytes are done.

    Shares go to the processes as they are, results come back pickled. The first failure ends the others. A worker whose
    parent is gone ends itself at its next report.

    Raises:
        UserError: a worker raised one, or was killed.
        RuntimeError: a worker raised something else; its traceback is the message.
    """
    context = multiprocessing.get_context("fork")
    done = context.RawArray("q", max(len(shares), 1))
    processes, results, peaks = [], [None] * len(shares), [0] * len(shares)
    waiting: dict[Connection, int] = {}
    gc.freeze()  # a collection in a worker would touch, and so copy, every page that it shares with this process
    try:
        for number, share in enumerate(shares):
            receive, send = context.Pipe(duplex=False)
            inherited = [*waiting, receive]
            arguments = (work, share, done, number, send, inherited, os.getpid())
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            send.close()
            processes.append(process)
            waiting[receive] = number
        while waiting:
            for connection in wait(list(waiting), timeout=_SECONDS_BETWEEN_REDRAWS):
                number = waiting.pop(connection)
                results[number], peaks[number] = _received(connection, processes[number])
            if told_to_end:  # the handler's SystemExit is lost where it meets a finalizer
                raise SystemExit(128 + told_to_end[-1])
            if progress:
                progress.show(sum(done))
        if progress:
            progress.show(sum(done), at_end=True)
        return Outcome(results, sum(peaks) + memory_of_process("status", "VmRSS"))
    finally:
        gc.unfreeze()
        if progress:
            progress.close()
        for process in processes:
            if waiting:
                process.kill()
            process.join()


def aside[T](function: Callable[[], T]) -> tuple[T, int]:
    """What `function()` returns, called in a process that then ends, and with it the memory that the call took; and the
    peak, as `Outcome` has it.

    Raises:
        UserError, RuntimeError: as `run` does.
    """

    def work(share: None, report: Callable[[int], None]) -> T:
        gc.disable()  # it would look through all that is made again and again, and the process ends soon
        return function()

    outcome = run(work, [None])
    return outcome.results[0], outcome.peak_bytes


def dealt[Part](parts: Sequence[Part]) -> Iterator[Part]:
    """`parts` for several processes that iterate over this, each part to the one that asks first. Make it before they
    are forked.
    """
    turn = multiprocessing.get_context("fork").Value("q", 0)

    def deal() -> Iterator[Part]:
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(parts):
                return
            yield parts[number]

    return deal()


def memory_of_process(file: str, *names: str) -> int:
    """Bytes, added up, of these lines of /proc/self/`file`; 0 where the system has no such file."""
    try:
        with open(f"/proc/self/{file}") as lines:
            fields = [line.split() for line in lines]
    except OSError:
        return 0
    return sum(int(words[1]) * 1024 for words in fields if words[0].rstrip(":") in names)


def _own_peak_bytes() -> int:
    """Of a forked worker: what it shares with no other process, and what it had at most beyond what it has now."""
    private = memory_of_process("smaps_rollup", "Private_Clean", "Private_Dirty")
    return private + memory_of_process("status", "VmHWM") - memory_of_process("status", "VmRSS")


def _worker(
    work: Work, share: Any, done: Any, number: int, send: Connection, inherited: list[Connection], parent: int
) -> None:
    for receive in inherited:
        receive.close()  # else sending to a parent that is gone would wait for ever

    def report(num_bytes: int) -> None:
        done[number] += num_bytes
        if os.getppid() != parent:
            os._exit(1)

    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_DFL)  # whatever the parent does about them
    with contextlib.suppress(BrokenPipeError):
        try:
            result = work(share, report)
            send.send((None, result, _own_peak_bytes()))
        except UserError as error:
            send.send((UserError(str(error)), None, 0))
        except KeyboardInterrupt:
            send.send((UserError("interrupted"), None, 0))
        except BaseException:
            send.send((RuntimeError(f"a worker failed:\n{traceback.format_exc()}"), None, 0))


def _received(connection: Connection, process: Any) -> tuple[Any, int]:
    try:
        error, result, peak = connection.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise UserError(
            f"a worker process {how} before its share was done; out of memory? give fewer --workers, or see the "
            "kernel's log"
        ) from None
    if error:
        raise error
    return result, peak
