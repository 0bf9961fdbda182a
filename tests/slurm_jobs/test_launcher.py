"""The launcher of a node, with a stand-in for torchrun's ranks: signals, exit codes, and nothing left behind. And what is checked before a start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hymeg.errors import UserError
from hymeg.launch.checks import Run, check_num_gpus, check_run, gpu_problems, read_run
from hymeg.launch.elastic import ending, judge
from hymeg.launch.health import compare

ROOT = Path(__file__).parents[2]
RANK = """\
import os, signal, subprocess, sys, time
from pathlib import Path
folder, manner = Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
helper = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # what a rank may start: a helper that dies of any signal
(folder / f"helper{rank}").write_text(str(helper.pid))
time.sleep(1)  # not listening yet
told = []
signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
(folder / f"rank{rank}").write_text(str(os.getpid()))
while not told:
    time.sleep(0.05)
    if manner == "exit" and rank == "1":
        sys.exit(int(sys.argv[3]))
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
        self.shell = subprocess.Popen(
            ["bash", "-c", '"$@" & wait $!', "shell", *command], cwd=ROOT, env=os.environ | {"HYMEG_TEST_MARK": str(folder)}, start_new_session=True
        )

    def wait_for(self, name: str) -> str:
        for _ in range(1200):
            path = self.folder / name
            if path.exists() and (text := path.read_text()):
                return text
            time.sleep(0.1)
        raise AssertionError(f"{name} did not appear")

    def signal_all(self, number: int) -> None:
        """As Slurm does: to every process of the step, but for the shell, which stands for Slurm's daemon."""
        for process in psutil.Process(self.shell.pid).children(recursive=True):
            process.send_signal(number)

    def processes_ended(self, seconds: float = 60) -> bool:
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
    """Sent before they listen as well: they leave with 75, their helpers have not died of it before, and end with them."""
    job = launch("wait")
    job.wait_for("helper0"), job.wait_for("helper1")
    job.signal_all(number)
    assert job.shell.wait(120) == 75
    assert [job.wait_for(f"alive{rank}") for rank in (0, 1)] == ["None", "None"]
    assert job.result()[0] == "75" and job.processes_ended()


def test_a_users_error_of_one_rank_is_the_exit_code(launch):
    job = launch("exit", "2")
    assert job.shell.wait(120) == 2
    assert job.result() == ["2", "rank 1 exited with 2\n"] and job.processes_ended()


def test_a_killed_rank_is_named(launch):
    job = launch("wait")
    rank = int(job.wait_for("rank1"))
    os.kill(rank, signal.SIGKILL)
    assert job.shell.wait(120) == 1
    assert job.result() == ["1", "rank 1 was killed by SIGKILL\n"] and job.processes_ended()


def test_without_its_parent_nothing_lives_on(launch):
    """Slurm's step daemon was killed: nobody else would end the ranks."""
    job = launch("wait")
    job.wait_for("rank0"), job.wait_for("rank1")
    job.shell.kill()
    job.shell.wait()
    assert job.result() == ["1", "Slurm's step daemon on this node is gone\n"] and job.processes_ended()


def test_the_failure_of_another_node_ends_this_one(launch, tmp_path):
    """Its ranks would hang in a collective."""
    job = launch("wait")
    job.wait_for("rank0")
    (tmp_path / "n1.result").write_text("1.0 1 rank 2 was killed by SIGKILL\n")
    assert job.shell.wait(120) == 1
    assert job.result() == ["1", "stopped, for n1 has failed\n"] and job.processes_ended()


def test_exit_codes_of_ranks():
    assert judge({75}) == 75
    assert judge({75, -9}) == 1 and judge({1, 75}) == 1
    assert judge({1, 2}) == 2 and judge({-9, 2}) == 2
    assert ending(3) == "exited with 3" and ending(-11) == "was killed by SIGSEGV"


def test_busy_or_missing_gpus_are_named():
    table = "0, 4, 81559\n1, 62345, 81559\n[GPU is lost]\n"
    assert list(gpu_problems(table, 2)) == ["GPU 1 is not idle: 61 of 80 GiB are in use; end what runs there (see nvidia-smi)"]
    assert "shows 2 working GPUs, 3 are needed" in next(gpu_problems(table, 3))
    assert list(gpu_problems("0, 4, 81559\n1, 4, 81559\n", 2)) == []


def test_what_differs_between_nodes_is_said_of_the_node(tmp_path):
    def facts(torch="2.13.0", **others):
        return {"problems": [], "versions": {"torch": torch}, "clock": 0.0, "tokens": {str(tmp_path): "token"}} | others

    for node in ("n1", "n2", "n3", "n4"):
        (tmp_path / f".hymeg-health-{node}").write_text("token")
    heard = {"n0": facts(), "n1": facts(), "n2": facts("2.12.0"), "n3": facts(clock=-61.2), "n4": facts(tokens={str(tmp_path): ""})}
    found = dict(compare(heard, ["n0", "n1", "n2", "n3", "n4", "n5"], [tmp_path], "token", 180))
    assert list(found) == ["n2", "n3", "n4", "n5"]
    assert "torch is 2.12.0, but 2.13.0 on n0" in found["n2"] and "-61 s off that of n0" in found["n3"]
    assert "not the same folder as on n0" in found["n4"] and "no word within 180 s" in found["n5"]


def test_number_of_gpus_is_held_against_the_recipes_name():
    recipe = "examples/hy3/continue_256xh100_80gb_bf16.yaml"
    assert check_num_gpus(recipe, 32, 8, any_number=False) is None
    assert check_num_gpus("examples/tiny_cpu/pretrain_fp32.yaml", 1, 1, any_number=False) is None
    assert "this job has 64 nodes x 8 = 512" in check_num_gpus(recipe, 64, 8, any_number=False)
    with pytest.raises(UserError, match=r"256 GPUs.*31 nodes x 8 = 248.*--nodes 32"):
        check_num_gpus(recipe, 31, 8, any_number=False)
    assert "2 nodes x 8 = 16" in check_num_gpus(recipe, 2, 8, any_number=True)


def test_a_requeued_job_must_find_its_checkpoints(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save: out\nload: elsewhere\n")
    assert read_run(str(recipe), ["--lr", "1", "--load=out"]) == Run("out", "out")
    check_run(Run("out", "out/"))
    with pytest.raises(UserError, match="--save out with --load elsewhere"):
        check_run(read_run(str(recipe), []))
    with pytest.raises(UserError, match="no --save"):
        check_run(Run(None, "out"))
    recipe.write_text("save: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        read_run(str(recipe), [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no recipe is given: examples/launch_local.sh RECIPE.yaml"),
        ("--lr 1", "--lr stands where the recipe belongs"),
        ("nowhere.yaml", "nowhere.yaml: no readable file"),
        ("examples/tiny_cpu/pretrain_fp32.yaml", "HYMEG_PROCESSES_PER_NODE 'two' is no number of processes"),
    ],
)
def test_launch_local_says_what_is_wrong_in_one_line(words, said):
    environment = os.environ | {"HYMEG_PROCESSES_PER_NODE": "two"}
    done = subprocess.run(["examples/launch_local.sh", *words.split()], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
