"""The same without Slurm: examples/launch_local.sh, with the losses of the plain torchrun line of docs/slurm.md."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_training
from small_training import ENVIRONMENT

pytestmark = pytest.mark.timeout(1200)  # five processes start, each of which takes ten times longer on a busy machine
ROOT = Path(__file__).parents[2]
NUM_STEPS = 16


def test_a_training_that_was_told_to_leave_goes_on_as_if_left_in_peace(start, training, losses_left_in_peace):
    command = [
        "examples/launch_local.sh",
        training / "recipe.yaml",
        *small_training.flags(training, training / "local"),
        "--train-iters",
        NUM_STEPS,
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
    expected = {step: losses_left_in_peace[step] for step in range(1, NUM_STEPS + 1)}
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


@pytest.mark.parametrize("given", [None, "", "max_split_size_mb:128"])
def test_the_allocator_of_gpu_memory(tmp_path, given):
    """Seen by a python that only says what it sees. An empty setting is one too: NCCL's user buffers need it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text(f"PATH={tmp_path}/bin:$PATH\n")
    (tmp_path / "bin/python").write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$PYTORCH_CUDA_ALLOC_CONF|$*"\n')
    (tmp_path / "bin/python").chmod(0o755)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTORCH_CUDA_ALLOC_CONF"}
    environment |= {"HYMEG_VENV": str(tmp_path)} | ({} if given is None else {"PYTORCH_CUDA_ALLOC_CONF": given})
    command = ["examples/launch_local.sh", "examples/tiny_cpu/pretrain_fp32.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = "expandable_segments:True" if given is None else given
    assert done.stdout.startswith(f"{expected}|-m hymeg.launch.node -- --standalone --nproc-per-node 2 "), done.stderr


@pytest.mark.parametrize("driver", ["", "echo NVIDIA-SMI has failed; exit 9", None])
def test_no_gpu_is_said_in_one_line(tmp_path, driver):
    """With a driver that has lost them all, one that does not run, and none."""
    if driver is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    elif shutil.which("nvidia-smi"):
        pytest.skip("this machine has nvidia-smi")
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "HYMEG_PROCESSES_PER_NODE"}
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "HYMEG_VENV": "/nowhere"}
    command = ["examples/launch_local.sh", "examples/tiny_cpu/pretrain_fp32.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: no GPU is visible; ")
    )
