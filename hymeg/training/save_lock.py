"""One run writes to a `--save` folder: a lock in it says which; whoever finds another's leaves, or says it takes over.

LOCK holds host, process, parent process, job and start time of the run that writes. Rank 0 holds an flock on it, and
touches it every few seconds: file systems without flock, or with one that only a node's own processes see, are told
that the run lives by the time of the file. A run whose launcher was killed is an orphan: the next one takes the folder
over, and the orphan ends at its next save, since the lock does not name it any more.
"""

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from hymeg.errors import UserError
from hymeg.files import shown, write_whole
from hymeg.progress import Say
from hymeg.training.once import rank

LOCK = "run.lock"
_SECONDS_BETWEEN_TOUCHES = 5.0
_SECONDS_TO_SEE_ONE = 20.0  # over a network file system
_PARENT, _BORN = 1, 19  # in what `_stat` gives
_held: list[int] = []  # descriptors, which must stay open


def lock(save: str, say: Say) -> None:
    """Take `save`, which exists, for this run, on rank 0. Raises UserError: another run writes to it."""
    path = Path(save, LOCK)
    found = _read(path)
    if not _is_ours(found):
        if _is_alive(path, found):
            raise UserError(
                f"--save {save}: another run writes to it, {_described(found)}; wait, end it, or give another folder"
            )
        say(f"--save {save}: taken over from a run that is gone, {_described(found)}")
    record = {"run": run_name(), **_process(), "parent": os.getppid(), "job": os.environ.get("SLURM_JOB_ID")}
    record |= {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_whole(path, json.dumps(record).encode())
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    _held.append(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--save {save}: another run has taken it in this moment; give another folder") from None
    except OSError:
        pass  # no flock here: the time of the file tells
    threading.Thread(target=_touch, args=(path,), daemon=True).start()


def unlock(save: str) -> None:
    """At a run's end. For rank 0."""
    path = Path(save, LOCK)
    if _is_ours(_read(path)):
        path.unlink(missing_ok=True)


def check_still_ours(save: str) -> None:
    """Before a save, on every rank. Raises UserError: another run has taken the folder over."""
    found = _read(Path(save, LOCK))
    if not _is_ours(found):
        raise UserError(
            f"--save {save}: {_described(found)} has taken it over from this run, whose launcher is gone; this one ends"
        )


def run_name() -> str:
    """The same on all ranks of a launch; of another one too, where both were given the same port."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ.get(name, "-") for name in names)


def _process() -> dict[str, Any]:
    """This one and no other, whatever the launch is called."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _stat(os.getpid())[_BORN]}


def _is_ours(found: dict[str, Any]) -> bool:
    """Whether the lock names this run, or none: rank 0, which wrote it, looks for itself, others for their launch."""
    own = {"run": run_name()} | (_process() if rank() == 0 else {})
    return found.get("run") is None or own.items() <= found.items()


def _read(path: Path) -> dict[str, Any]:
    """Nothing where there is no lock, or none that says anything."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(path: Path, found: dict[str, Any]) -> bool:
    """Whether the run that the lock names still writes here, and is no orphan."""
    if found.get("host") == socket.gethostname():
        stat = _stat(found.get("pid"))
        if stat and stat[_BORN] == found.get("born"):
            return int(stat[_PARENT]) == found.get("parent")
        return _is_locked(path)  # by a process of another container
    before, deadline = _time_of(path), time.monotonic() + _SECONDS_TO_SEE_ONE
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if _time_of(path) != before:
            return True
    return False


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _time_of(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _stat(pid: Any) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where there is no such process."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return []
    return [] if fields[0] == "Z" else fields


def _touch(path: Path) -> None:
    while _is_ours(_read(path)):
        try:
            os.utime(path)
        except OSError:
            return
        time.sleep(_SECONDS_BETWEEN_TOUCHES)


def _described(found: dict[str, Any]) -> str:
    job = f" of job {found['job']}" if found.get("job") else ""
    return f"process {shown(found.get('pid'))} on {shown(found.get('host'))}{job}, since {shown(found.get('since'))}"
