"""What torchrun says last on the screen is what went wrong: the error's own line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """\
import os, sys, types
from hymeg import errors
from hymeg.errors import UserError, exit_on_user_error
from hymeg.launch.rank import exit_code_of
errors._SECONDS_FOR_RANK_0 = 1.0
args = types.SimpleNamespace(exit_signal_handler=False, curr_iteration=41)
def train():
    what = sys.argv[1 + int(os.environ["RANK"])]
    if what == "wrong":
        raise UserError("--tp: no such flag")
    if what == "broken":
        raise RuntimeError("out of\\nmemory")
    if what == "nan":
        sys.exit(16)
    import time; time.sleep(60)
with exit_on_user_error():
    sys.exit(exit_code_of(train, args))
"""


def torchrun(folder: Path, ranks: list[str], *options: str) -> subprocess.CompletedProcess:
    (folder / "rank.py").write_text(RANK)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(ranks)), *options]
    return subprocess.run(
        [sys.executable, *launcher, str(folder / "rank.py"), *ranks],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HYMEG_PLATFORM": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("ranks", "options", "line"),
    [
        (["wrong", "wrong"], [], "error: --tp: no such flag"),
        (["wrong", "wrong"], ["--max-restarts", "1"], "error: --tp: no such flag"),
        (["waits", "wrong"], [], "error: rank 1: --tp: no such flag"),
    ],
    ids=["two ranks", "started again", "the second rank alone"],
)
def test_a_users_error_is_the_last_thing_on_the_screen(tmp_path, ranks, options, line):
    """Above torchrun's last rule; and as a line of its own once, whatever number of ranks or restarts meet it."""
    done = torchrun(tmp_path, ranks, *options)
    screen = done.stdout.splitlines()
    assert screen[-2] == f"  traceback : {line}" and set(screen[-1]) == {"="}
    assert [text for text in screen if text.startswith("error:")] == [line]
    assert "exitcode  : 2 " in done.stdout


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("broken", "rank 1 on {host}, in iteration 42: RuntimeError: out of memory"),
        ("nan", "a result was not valid (NaN, or another of Megatron's checks): saved, to be computed again"),
    ],
)
def test_of_another_failure_rank_host_iteration_and_exception_are_the_last_thing(tmp_path, what, line):
    done = torchrun(tmp_path, ["waits", what])
    assert done.stdout.splitlines()[-2].startswith(f"  traceback : {line.format(host=os.uname().nodename)}")
    assert ("in iteration 42\n" in done.stdout) is (what == "broken")  # the traceback's own end
