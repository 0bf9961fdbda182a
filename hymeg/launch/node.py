"""One node of a job: python -m hymeg.launch.node [--folder DIR --name NODE] -- TORCHRUN'S ARGUMENTS pretrain_hy.py
FLAGS

SIGUSR1 and SIGTERM mean "save and leave". Slurm sends a signal to every process of a step, torchrun and every helper of
a rank included, most of which would die of it in the middle of a save. So this process alone listens: all below it is
deaf to both from birth, and the ranks, nobody else, get Megatron's exit signal from here, again and again until they
have gone (they may not be listening yet).

Nothing outlives this process: it adopts orphans, and kills what is left when torchrun has ended, when its own parent
has gone (Slurm's step daemon), or when another node of the job has failed, which NCCL would find out after minutes
only. Killed itself, torchrun's process does it (elastic.py).
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from hymeg import errors
from hymeg.launch import REQUEUE, STEP_FILE

EXIT_SIGNAL = signal.SIGUSR2
_LEAVE = (signal.SIGTERM, signal.SIGUSR1)
_SECONDS_BETWEEN_LOOKS = 1.0
_PR_SET_CHILD_SUBREAPER = 36


class Node:
    """Runs torchrun and says how it ended: the exit code, and in `DIR/NODE.result` "UNIX TIME, CODE, WHY"."""

    def __init__(self, folder: Path | None, name: str, words: list[str]):
        self.folder, self.name, self.words = folder, name, words
        self.parent = os.getppid()
        self.leaving = False

    def run(self) -> int:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in _LEAVE:
            signal.signal(number, self._leave)
        report, report_end = os.pipe()
        self.torchrun = self._start(report_end)
        os.close(report_end)
        try:
            stopped = self._watch()
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            kill_descendants()
        ended = self.torchrun.returncode
        code = ended if not stopped and ended in (0, errors.EXIT_CODE, REQUEUE) else 1
        why = stopped or os.read(report, 1000).decode(errors="replace")
        self._say(code, why or ("all ranks are done" if code == 0 else f"torchrun exited with {ended}"))
        return code

    def _leave(self, number: int, _) -> None:
        if not self.leaving:
            told = f"{signal.Signals(number).name}: the ranks are told to save and leave"
            print(f"hymeg: {self.name}: {told}", flush=True)
        self.leaving = True

    def _start(self, report: int) -> subprocess.Popen:
        handled = ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]  # torchrun's own list without SIGTERM
        words = [*handled, *self.words, "--exit-signal-handler", "--exit-signal", EXIT_SIGNAL.name]
        command = [sys.executable, "-m", "hymeg.launch.elastic", str(report), *words]
        step = {} if self.folder is None else {STEP_FILE: str(self.folder / "step")}
        return subprocess.Popen(command, env=os.environ | step, pass_fds=(report,), preexec_fn=_be_deaf)

    def _watch(self) -> str | None:
        """Returns when torchrun has ended: None; or why it must be ended."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.torchrun.wait(_SECONDS_BETWEEN_LOOKS)
                return None
            if self.folder is not None and os.getppid() != self.parent:
                return "Slurm's step daemon on this node is gone"
            if (failed := self._failed_peer()) is not None:
                return f"stopped, for {failed} has failed"
            if self.leaving:
                for rank in psutil.Process(self.torchrun.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has just left
                        rank.send_signal(EXIT_SIGNAL)

    def _failed_peer(self) -> str | None:
        for path in self.folder.glob("*.result") if self.folder is not None else ():
            if int(path.read_text().split()[1]) not in (0, REQUEUE):
                return path.stem
        return None

    def _say(self, code: int, why: str) -> None:
        print(f"hymeg: {self.name}: {why}", flush=True)
        if self.folder is not None:
            beside = self.folder / f".{self.name}.beside"  # nobody looks for this name
            beside.write_text(f"{time.time():.3f} {code} {why}\n")
            beside.rename(self.folder / f"{self.name}.result")


def _be_deaf() -> None:
    for number in (*_LEAVE, EXIT_SIGNAL):
        signal.signal(number, signal.SIG_IGN)


def kill_descendants() -> None:
    """Orphans among them are children of this process by now."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hymeg.launch.node", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of this start, shared by the nodes: for results, and the step")
    parser.add_argument("--name", default="this node", help="of this node")
    parser.add_argument("words", nargs="+", metavar="WORD", help="torchrun's arguments, the program and its flags")
    args = parser.parse_args()
    sys.exit(Node(args.folder, args.name, args.words).run())


if __name__ == "__main__":
    main()
