"""A Slurm on this machine for tests, its jobs, and the programs that stand in for a training."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "local_cluster.sh"
JOB = "examples/slurm/train.sbatch"
SECONDS = 900  # for whatever is waited for: starts take ten times longer on a busy machine
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing() -> str | None:
    """Why no cluster can be started here, after an attempt to install what is missing."""
    programs = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    if programs and shutil.which("apt-get") is None:
        return f"{', '.join(programs)} not installed, and there is no apt-get"
    if programs:
        for words in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
            done = subprocess.run(
                ["apt-get", "-qq", *words],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
            )
        if done.returncode != 0:
            return f"apt-get install slurm-wlm failed: {done.stderr.strip()[-200:]}"
    return None


def free_port() -> int:
    """Below those that the system hands out to connections, one of which would take it before it is listened at."""
    while True:
        try:
            with socket.create_server(("", random.randrange(10000, 32000))) as server:
                return server.getsockname()[1]
        except OSError:
            continue


class Cluster:
    """`with Cluster(folder)`: daemons and jobs are gone at the end, whatever happened. Jobs start processes that bear
    `mark`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.mark = f"{folder}-{os.getpid()}"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "HYMEG_TEST_MARK": self.mark,
            "HYMEG_PLATFORM": "cpu",
            "HYMEG_PROCESSES_PER_NODE": "1",
            "HYMEG_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> "Cluster":
        started = subprocess.run(
            ["bash", SCRIPT, "start", self.folder],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if started.returncode != 0:
            pytest.skip(f"Slurm does not start here: {' '.join((started.stdout + started.stderr).split())[-500:]}")
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(
            ["bash", SCRIPT, "stop", self.folder], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS
        )
        for pid in self.processes():
            os.kill(pid, 9)

    def run(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, folder: Path, *words: object, sbatch: str = "", **variables: object) -> "Job":
        """Submit examples/slurm/train.sbatch with `words`; logs and output in `folder`."""
        folder.mkdir(exist_ok=True)
        environment = self.environment | {"HYMEG_LOG_DIR": str(folder / "logs"), "HYMEG_PORT": str(free_port())}
        environment |= {name: str(value) for name, value in variables.items()}
        command = [
            "sbatch",
            "--parsable",
            "--output",
            folder / "output",
            "--gpus-per-node",
            "1",
            "--time",
            "60",
            *sbatch.split(),
            JOB,
            *words,
        ]
        done = subprocess.run(
            [str(word) for word in command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), folder)

    def processes(self, **variables: str) -> dict[int, str]:
        """Those that a job of this cluster has started, with these variables, and that still run: process id -> command
        line.
        """
        wanted = {f"{name}={value}".encode() for name, value in ({"HYMEG_TEST_MARK": self.mark} | variables).items()}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    found[int(folder.name)] = (
                        (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found


class Job:
    def __init__(self, cluster: Cluster, number: str, folder: Path):
        self.cluster, self.number, self.folder = cluster, number, folder
        self.logs = folder / "logs" / f"slurm-{number}"

    @property
    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""

    @property
    def history(self) -> list[str]:
        path = self.logs / "history"
        return path.read_text().splitlines() if path.exists() else []

    def log(self, start: int) -> str:
        return "".join(path.read_text() for path in sorted((self.logs / f"start-{start}").glob("*.log")))

    def shown(self, field: str) -> str:
        return re.search(
            rf"\b{field}=(\S*)", self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        ).group(1)

    def step(self, start: int) -> int:
        try:
            return int((self.logs / f"start-{start}" / "step").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def processes(self, **variables: str) -> dict[int, str]:
        return self.cluster.processes(SLURM_JOB_ID=self.number, **variables)

    def kill(self, **variables: str) -> None:
        for pid in self.processes(**variables):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, condition: Callable[[], bool], what: str, seconds: int = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = self.state() in FINAL
            if (ended and not condition()) or time.monotonic() > end:
                logs = "\n".join(
                    f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.logs.glob("start-*/*.log"))
                )
                raise AssertionError(
                    f"{what}: {'the job has ended' if ended else 'time is up'}\n{self.history}\n{self.output}\n{logs}"
                )
            time.sleep(0.2)

    def state(self) -> str:
        return self.shown("JobState")

    def ended(self) -> str:
        """Wait for the end; returns state and exit code."""
        self.wait(lambda: self.state() in FINAL, "end")
        return f"{self.state()} {self.shown('ExitCode')}"

    def requeued(self, restarts: int) -> None:
        """Wait until the job was requeued, and let it start soon: Slurm would wait for two minutes, and refuses a start
        in the same second.
        """
        back = ("PENDING", "RUNNING", *FINAL)  # on a busy machine it may have gone on by itself
        self.wait(lambda: int(self.shown("Restarts")) >= restarts and self.state() in back, f"requeue {restarts}")
        if self.state() == "PENDING":
            self.cluster.run("bash", "-c", f"scontrol update JobId={self.number} StartTime=now+5 || true")
