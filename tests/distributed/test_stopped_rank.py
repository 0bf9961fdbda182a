"""A rank that stops does not hold the others for ever."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak  # Megatron's shortest timeout is a minute
def test_the_others_end_and_say_where_they_waited(command, tmp_path):
    """Rank, host, iteration and exception are the last lines on the screen, though the stopped rank hears no signal."""
    argv = command("--distributed-timeout-minutes 1 --log-interval 1", steps=100_000)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYMEG_PLATFORM": "cpu", "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [*launcher, str(ROOT / "pretrain_hy.py"), *argv], env=environment, stdout=said, stderr=said
        )
        while not re.search(r"iteration +3/", (tmp_path / "said").read_text()):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        ranks = psutil.Process(process.pid).children()
        ranks[0].send_signal(signal.SIGSTOP)
        process.wait(timeout=400)
    lines = (tmp_path / "said").read_text().splitlines()
    assert re.fullmatch(
        rf"  traceback : rank 1 on {os.uname().nodename}, in iteration \d+: \w*Error: .*[Tt]imed out.*", lines[-2]
    ), lines[-40:]
    assert not psutil.wait_procs(ranks, timeout=60)[1]
