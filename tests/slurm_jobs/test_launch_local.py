"""The same without Slurm: examples/launch_local.sh, and the plain torchrun line of docs/slurm.md."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small_training
from cluster import free_port

pytestmark = pytest.mark.timeout(1200)  # three starts, each of which takes ten times longer on a busy machine
ROOT = Path(__file__).parents[2]
STEPS = ["--train-iters", "60"]
ENVIRONMENT = os.environ | {
    "HYMEG_PLATFORM": "cpu",
    "HYMEG_PROCESSES_PER_NODE": "2",
    "HYMEG_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def start():
    """Start a command; when the test ends, however it does, so does what it has started."""
    started = []

    def start(command: list[object], log: Path) -> subprocess.Popen:
        with log.open("w") as output:
            started.append(
                subprocess.Popen(
                    [str(word) for word in command], cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output
                )
            )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()


def torchrun_of_two_nodes(start, training: Path) -> str:
    """Its whole log."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "run1"]
    words = [
        "pretrain_hy.py",
        "--config",
        training / "recipe.yaml",
        *small_training.flags(training, training / "plain"),
        *STEPS,
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        *rendezvous,
        *words,
    ]
    nodes = [start(command, training / f"plain{node}.log") for node in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0]
    return "".join((training / f"plain{node}.log").read_text() for node in (0, 1))


def test_a_training_that_was_told_to_leave_goes_on_as_if_left_in_peace(start, training):
    expected = small_training.losses(torchrun_of_two_nodes(start, training))
    assert sorted(expected) == list(range(1, 61))
    command = [
        "examples/launch_local.sh",
        training / "recipe.yaml",
        *small_training.flags(training, training / "local"),
        *STEPS,
    ]
    logs = [training / "local0.log", training / "local1.log"]

    first = start(command, logs[0])
    while not logs[0].read_text():  # the ranks live, and don't listen yet
        assert first.poll() is None, logs[0].read_text()[-3000:]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75
    assert start(command, logs[1]).wait() == 0, logs[1].read_text()[-3000:]

    before, after = (small_training.losses(log.read_text()) for log in logs)
    assert min(after) == max(before) + 1
    assert before | after == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no recipe is given: examples/launch_local.sh RECIPE.yaml"),
        ("--lr 1", "--lr stands where the recipe belongs"),
        ("nowhere.yaml", "nowhere.yaml: no readable file"),
        ("examples", "examples: no readable file"),
        ("examples/tiny_cpu/pretrain_fp32.yaml", "HYMEG_PROCESSES_PER_NODE 'two'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, said):
    environment = ENVIRONMENT | {"HYMEG_PROCESSES_PER_NODE": "two"}
    done = subprocess.run(
        ["examples/launch_local.sh", *words.split()], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr


def test_a_python_without_torch_is_said_in_one_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    command = ["examples/launch_local.sh", "examples/tiny_cpu/pretrain_fp32.yaml"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | {"HYMEG_VENV": str(tmp_path / "empty")}, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "empty/bin/python has not what hymeg needs" in done.stderr
    )


def test_no_gpu_is_said_in_one_line(tmp_path):
    """With a driver that has lost them all."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "HYMEG_PROCESSES_PER_NODE"}
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "HYMEG_VENV": "/nowhere"}
    command = ["examples/launch_local.sh", "examples/tiny_cpu/pretrain_fp32.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: no GPU is visible; ")
    )
