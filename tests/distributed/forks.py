"""Worlds of processes that share one import of everything: python forks.py FOLDER, spoken to by worlds.py.

The process that was started imports, starts no thread, and forks the ranks of a new world for every case: none finds
what another left behind, least of all its process groups, whose threads gloo wakes a hundred times a second for good. A
request is a line of JSON, `{"size": N, "argv": [...], "check": null or NAME, "seconds": LIMIT}`; so is the answer,
`{"result": ...}` or `{"error": TEXT}`, where the text names the ranks that failed, with their tracebacks. Ranks print
into files of FOLDER.
"""

import ctypes
import faulthandler
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SECONDS_AFTER_A_FAILURE = 5  # for the other ranks: most only wait for the one that failed
LINES_OF_LOG = 60


class Rank:
    """A forked process, in a process group of its own, that runs its part of a case, answers and waits for its end."""

    def __init__(self, rank: int, request: dict, log: Path, listener: socket.socket):
        reading, writing = os.pipe()
        self.rank, self.log, self.pid = rank, log, os.fork()
        if self.pid == 0:
            os.setpgrp()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the one that forked it
            try:
                answer = {"result": _run(rank, request, log, listener)}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            sys.stdout.flush()
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
            signal.pause()
        os.close(writing)
        self.pipe = os.fdopen(reading)

    def printed(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if " .... " not in line]
        return "\n".join(lines[-LINES_OF_LOG:])

    def answer(self) -> dict:
        if said := self.pipe.read():
            return json.loads(said)
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return {"error": f"died: {'exit code' if found.si_code == os.CLD_EXITED else 'signal'} {found.si_status}"}

    def end(self) -> None:
        self.pipe.close()
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _run(rank: int, request: dict, log: Path, listener: socket.socket) -> dict | None:
    import torch.distributed as dist
    from worker import run_case

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(signal.SIGUSR1)
    address, port = listener.getsockname()
    size = str(request["size"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # As under torchrun: the store is there, and whoever asks for it is a client.
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if rank == 0:
        _run.store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    result = run_case(request["argv"], request["check"])
    return result if rank == 0 else None


def answered(request: dict, folder: Path) -> dict:
    """The result of a case in a world of its own; or what went wrong there."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads: what the others hold would never be given back in a forked process")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ranks = [Rank(rank, request, folder / f"rank-{rank}", listener) for rank in range(request["size"])]
    results, failures, deadline = {}, [], time.monotonic() + request["seconds"]
    with selectors.DefaultSelector() as waiting:
        for rank in ranks:
            waiting.register(rank.pipe, selectors.EVENT_READ, rank)
        while waiting.get_map() and (events := waiting.select(max(0, deadline - time.monotonic()))):
            for key, _ in events:
                rank, answer = key.data, key.data.answer()
                waiting.unregister(key.fileobj)
                results[rank.rank] = answer.get("result")
                if "error" in answer:
                    failures.append(f"rank {rank.rank} {answer['error']}\n{rank.printed()}")
                    deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        silent = [key.data for key in waiting.get_map().values()]
    for rank in silent:
        os.kill(rank.pid, signal.SIGUSR1)
    if silent:
        time.sleep(0.5)  # the time to write where they stand
    failures += [f"rank {rank.rank} has not answered:\n{rank.printed()}" for rank in silent]
    for rank in ranks:
        rank.end()
    return {"error": "\n\n".join(failures)} if failures else {"result": results[0]}


def main(folder: Path, prepare: Callable[[ModuleType], None] = lambda worker: None) -> None:
    """Answer the requests of stdin until it ends.

    Args:
        prepare: called with the module worker.py, before the first case.
    """
    gc.disable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    import replaced_names

    replaced_names.watch()
    from hymeg import platform

    platform.install()
    import worker

    worker.prepare()
    prepare(worker)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line), folder)), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
