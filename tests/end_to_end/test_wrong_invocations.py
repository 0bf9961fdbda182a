"""pretrain_hy.py as a user starts it, with something wrong: one line from rank 0, exit code 2, nothing of ours in a
traceback.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
NEEDED = "--train-iters 10 --lr 1e-4 --seq-length 32 --mock-data --init-from-scratch"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong") / "model"
    write_tiny_checkpoint(folder)
    return str(folder)


def start(*words: str, num_processes: int | None = None) -> subprocess.CompletedProcess:
    launcher = (
        []
        if num_processes is None
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    )
    command = [sys.executable, *launcher, str(ROOT / "pretrain_hy.py"), *words]
    alone = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    }
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=alone | {"OMP_NUM_THREADS": "1", "HYMEG_PLATFORM": "cpu"},
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--tp 2",
            "error: unknown argument --tp; did you mean --tensor-model-parallel-size? (--help lists all flags)\n",
        ),
        (f"{NEEDED} --load {{model}}2", "error: --load {model}2: no such folder; did you mean {model}? "),
    ],
    ids=["before the model is known", "after everything else"],
)
def test_one_process_says_one_line_and_exits_with_2(model, words, line):
    done = start("--hf-model", model, *words.format(model=model).split())
    assert done.returncode == 2
    assert done.stderr.startswith(line.format(model=model)), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_of_two_processes_rank_0_speaks_for_both(model):
    """Of what Megatron's own validation refuses, on every rank."""
    done = start("--hf-model", model, *NEEDED.split(), "--distribute-saved-activations", num_processes=2)
    line = "error: Megatron refuses this combination of flags"
    assert done.returncode != 0
    errors = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(line)
    # torchrun adds a report, and its own traceback, when a process has failed.
    assert done.stderr.splitlines()[-2].startswith(f"  traceback : {line}")
    assert "exitcode  : 2 " in done.stderr
    assert f'File "{ROOT}/hymeg' not in done.stderr and 'pretrain_hy.py", line' not in done.stderr
