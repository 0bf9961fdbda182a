"""A loss that is NaN: the first start saves and leaves with 16, the next, on another node, computes it again and leaves
with 17.
"""

import os
import subprocess
import sys
from pathlib import Path

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--mock-data --init-from-scratch --seq-length 32 --micro-batch-size 1 --global-batch-size 1 --train-iters 6 "
    "--lr 1e30 --lr-decay-style constant --clip-grad 0 --eval-iters 0 --log-interval 1"
)


def test_a_loss_that_is_not_a_number_is_computed_again_by_the_next_start(tmp_path):
    write_tiny_checkpoint(tmp_path / "model")
    folders = ["--hf-model", tmp_path / "model", "--load", tmp_path / "out", "--save", tmp_path / "out"]
    command = [sys.executable, ROOT / "pretrain_hy.py", *map(str, folders), *FLAGS.split()]
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nhere = os.uname()\nos.uname = lambda: os.uname_result((here[0], 'another', *here[2:]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYMEG_PLATFORM": "cpu"}
    elsewhere = environment | {"PYTHONPATH": f"{tmp_path}:{environment.get('PYTHONPATH', '')}"}
    lives = [subprocess.run(command, env=node, capture_output=True, text=True) for node in (environment, elsewhere)]
    assert [life.returncode for life in lives] == [16, 17], lives[-1].stderr[-3000:]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "1"  # the last that was valid
    assert "iteration        2/" not in "".join(life.stdout for life in lives)
