"""The launcher of a node, with a stand-in for torchrun's ranks: signals, exit codes, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cluster
import psutil
import pytest

from hymeg import platform
from hymeg.launch.elastic import ending, explained, judge
from hymeg.launch.rank import exit_code_of

platform.install()

ROOT = Path(__file__).parents[2]
SECONDS = 500  # for whatever is waited for: starts take ten times longer on a busy machine
RANK = """\
import os, signal, subprocess, sys, time
from pathlib import Path
folder, manner = Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
# What a rank may start: a helper that dies of any signal.
helper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
(folder / f"helper{rank}").write_text(str(helper.pid))
time.sleep(1)  # not listening yet
told = []
signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
(folder / f"rank{rank}").write_text(str(os.getpid()))
if manner == "wrong":
    from hymeg.errors import UserError, exit_on_user_error
    with exit_on_user_error():
        raise UserError("--tp: no such flag")
while not told:
    time.sleep(0.05)
    if manner == "exit":
        sys.exit(int(sys.argv[3 + int(rank)]))
    if (folder / "end").exists():
        sys.exit(0)
(folder / f"alive{rank}").write_text(str(helper.poll()))
sys.exit(75)
"""


class Launched:
    """The launcher over two ranks, as a child of a shell that can be killed."""

    def __init__(self, folder: Path, *manner: str):
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        words = ["--standalone", "--nproc-per-node", "2", str(folder / "rank.py"), str(folder), *manner]
        command = [sys.executable, "-m", "hymeg.launch.node", "--folder", str(folder), "--name", "n0", "--", *words]
        with (folder / "log").open("w") as log:
            self.shell = subprocess.Popen(
                ["bash", "-c", '"$@" & wait $!', "shell", *command],
                cwd=ROOT,
                env=os.environ | {"HYMEG_TEST_MARK": str(folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, name: str) -> str:
        for _ in range(10 * SECONDS):
            path = self.folder / name
            if path.exists() and (text := path.read_text()):
                return text
            time.sleep(0.1)
        raise AssertionError(f"{name} did not appear")

    def signal_all(self, number: int) -> None:
        """As Slurm does: to every process of the step, but for the shell, which stands for Slurm's daemon."""
        for process in psutil.Process(self.shell.pid).children(recursive=True):
            process.send_signal(number)

    def processes_ended(self, seconds: float = SECONDS) -> bool:
        """All but the shell, and what outlives its parents otherwise: a helper in a session of its own."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all(process.pid == self.shell.pid for process in marked(self.folder)):
                return True
            time.sleep(0.1)
        return False

    def result(self) -> list[str]:
        return self.wait_for("n0.result").split(maxsplit=2)[1:]


def marked(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HYMEG_TEST_MARK") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def launch(tmp_path):
    yield lambda *manner: Launched(tmp_path, *manner)
    for process in marked(tmp_path):
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_every_process_reaches_the_ranks_alone(launch, number):
    """Sent before they listen as well: they leave with 75, their helpers have not died of it before, and end with
    them.
    """
    job = launch("wait")
    job.wait_for("helper0"), job.wait_for("helper1")
    job.signal_all(number)
    assert job.shell.wait(SECONDS) == 75
    assert [job.wait_for(f"alive{rank}") for rank in (0, 1)] == ["None", "None"]
    assert job.result()[0] == "75" and job.processes_ended()
    said = f"hymeg: n0: {signal.Signals(number).name}: the ranks are told to save and leave\n"
    assert (job.folder / "log").read_text().count(said) == 1


def test_a_users_error_of_one_rank_is_the_exit_code(launch):
    job = launch("exit", "1", "2")
    assert job.shell.wait(SECONDS) == 2
    assert job.result() == ["2", "rank 1 exited with 2\n"] and job.processes_ended()


def test_ranks_that_are_done(launch):
    job = launch("exit", "0", "0")
    assert job.shell.wait(SECONDS) == 0
    assert job.result() == ["0", "all ranks are done\n"] and job.processes_ended()


def test_what_the_rank_has_said_is_the_reason(launch):
    """And the ranks that are deaf to torchrun's signal do not keep it waiting, nor say the same again."""
    job = launch("wrong")
    assert job.shell.wait(SECONDS) == 2
    assert job.result() == ["2", "rank 0 exited with 2: error: --tp: no such flag\n"] and job.processes_ended()
    log = (job.folder / "log").read_text()
    assert log.splitlines()[-1] == "hymeg: n0: rank 0 exited with 2: error: --tp: no such flag"
    assert [line for line in log.splitlines() if line.startswith("error: ")] == ["error: --tp: no such flag"]


def test_a_killed_rank_is_named(launch):
    job = launch("wait")
    rank = int(job.wait_for("rank1"))
    os.kill(rank, signal.SIGKILL)
    (job.folder / "end").touch()  # for the other rank, which is deaf: torchrun would kill it after half a minute
    assert job.shell.wait(SECONDS) == 1
    assert job.result() == ["1", "rank 1 was killed by SIGKILL\n"] and job.processes_ended()


def test_without_its_parent_nothing_lives_on(launch):
    """Slurm's step daemon was killed: nobody else would end the ranks."""
    job = launch("wait")
    job.wait_for("rank0"), job.wait_for("rank1")
    job.shell.kill()
    job.shell.wait()
    assert job.result() == ["1", "Slurm's step daemon on this node is gone\n"] and job.processes_ended()


def test_without_the_launcher_nothing_lives_on(launch):
    """It was killed itself, out of memory say."""
    job = launch("wait")
    job.wait_for("rank0"), job.wait_for("rank1")
    psutil.Process(job.shell.pid).children()[0].kill()
    assert job.shell.wait(SECONDS) == 128 + signal.SIGKILL and job.processes_ended()


def test_the_failure_of_another_node_ends_this_one(launch, tmp_path):
    """Its ranks would hang in a collective."""
    job = launch("wait")
    job.wait_for("rank0")
    (tmp_path / "n1.result").write_text("1.0 1 rank 2 was killed by SIGKILL\n")
    assert job.shell.wait(SECONDS) == 1
    assert job.result() == ["1", "stopped, for n1 has failed\n"] and job.processes_ended()


def test_exit_codes_of_ranks():
    assert judge({75}) == 75
    assert judge({75, -9}) == 1 and judge({1, 75}) == 1
    assert judge({1, 2}) == 2 and judge({-9, 2}) == 2
    assert judge({16}) == 1 and judge({17}) == 1  # Megatron's, of results that are not valid: a new start
    assert ending(3) == "exited with 3" and ending(-11) == "was killed by SIGSEGV"


def failure(exit_code: int, timestamp: int, said: str | None = None):
    message = "To enable traceback see" if said is None else {"message": "", "extraInfo": {"py_callstack": said}}
    return SimpleNamespace(exitcode=exit_code, timestamp=timestamp, message=message)


@pytest.mark.parametrize(
    ("failures", "code", "why"),
    [
        # The first to fail is the cause, and the others, which hang in a collective then, are not.
        ({0: failure(1, 9, "late"), 1: failure(1, 5, "early")}, 1, "rank 1 exited with 1: early"),
        ({0: failure(75, 3), 1: failure(-9, 5)}, 1, "rank 1 was killed by SIGKILL"),
        ({0: failure(1, 3), 1: failure(2, 5, "error: --tp")}, 2, "rank 1 exited with 2: error: --tp"),
        ({0: failure(75, 3), 1: failure(75, 3)}, 75, "all ranks have saved and left"),
        ({0: failure(16, 3, "not valid")}, 1, "rank 0 exited with 16: not valid"),
    ],
)
def test_the_rank_that_failed_first_is_the_reason(failures, code, why):
    assert explained(failures) == (code, why)


class Signals:
    def __init__(self, received: bool):
        self.received = received

    def signals_received(self) -> list[bool]:
        return [False, self.received]


@pytest.mark.parametrize(
    ("leaves_with", "signal_received", "flags", "code"),
    [
        (0, True, {}, 75),
        (0, True, {"exit_signal_handler": False}, 0),
        (0, False, {}, 0),
        (0, False, {"exit_duration_in_mins": 5}, 75),
        (0, False, {"exit_duration_in_mins": 5, "exit_interval": 10}, 0),  # after step 10
        (0, False, {"exit_duration_in_mins": 5, "exit_interval": 4}, 75),
        (0, False, {"exit_duration_in_mins": 5, "phase_transition_iterations": [10]}, 0),
        (0, False, {"exit_duration_in_mins": 5, "exit_signal_handler": False}, 0),  # torchrun alone: as Megatron says
        (16, True, {}, 16),
        (17, False, {}, 17),
    ],
)
def test_exit_code_of_a_rank_that_leaves_before_the_last_step(monkeypatch, leaves_with, signal_received, flags, code):
    """75 where the launcher is to start the same command again; Megatron's own for results that are not valid."""
    import megatron.training

    monkeypatch.setattr(megatron.training, "get_signal_handler", lambda: Signals(signal_received))
    args = {"exit_signal_handler": True, "exit_signal": signal.SIGUSR2, "exit_duration_in_mins": None}
    args |= {"exit_interval": None, "phase_transition_iterations": None, "curr_iteration": 9}
    before = signal.getsignal(signal.SIGUSR2)
    try:
        assert exit_code_of(lambda: sys.exit(leaves_with), SimpleNamespace(**args | flags)) == code
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_why_the_tests_of_slurm_are_skipped(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cluster.missing() == "slurmctld, slurmd, munged not installed, and there is no apt-get"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cluster.missing() == "a Slurm of our own needs root"
