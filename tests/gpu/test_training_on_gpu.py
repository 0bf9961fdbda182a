"""pretrain_hy.py on a GPU: ten steps under either layer spec, the same bits twice, weights that cross between CPU and
GPU unchanged.

On a CPU tests/distributed, tests/end_to_end and tests/unit hold the same promises for the local spec.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import LOCAL, TE
from safetensors.torch import load_file

from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIXED = (
    "--mock-data --seq-length 64 --micro-batch-size 2 --global-batch-size 2 --eval-iters 0 --log-interval 1 --lr 1e-3"
)


def train(folder: str, flags: str, on: str | None = None) -> list[str]:
    """The logged losses, as printed: `7.123456E+00`."""
    command = [sys.executable, str(ROOT / "pretrain_hy.py"), "--hf-model", folder, *FIXED.split(), *flags.split()]
    # The other tests' world of one process stands in this process's environment.
    environment = {name: value for name, value in os.environ.items() if name not in WORLD} | (
        {"HYMEG_PLATFORM": on} if on else {}
    )
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return re.findall(r"lm loss: (\S+)", done.stdout)


def weights(dist: Path, target: Path) -> dict[str, torch.Tensor]:
    dist_to_hf(dist, target)
    return {name: tensor for file in sorted(target.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_ten_steps_under_both_specs(checkpoints, precision):
    folder = checkpoints("tiny")
    losses = [
        [
            float(loss)
            for loss in train(folder, f"--load {folder} --lr-decay-style constant --train-iters 10 {precision} {spec}")
        ]
        for spec in (LOCAL, TE)
    ]
    assert len(losses[0]) == len(losses[1]) == 10
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-2
    assert losses[0][0] - losses[0][-1] > 0.1, "it must have learned"


@pytest.mark.parametrize("flags", [pytest.param(LOCAL, id="local"), pytest.param(TE, id="te")])
def test_deterministic_mode_gives_the_same_losses_twice(checkpoints, flags):
    folder = checkpoints("tiny")
    first, second = (
        train(folder, f"--load {folder} --train-iters 4 --bf16 --deterministic-mode {flags}") for _ in range(2)
    )
    assert len(first) == 4 and first == second


@pytest.mark.parametrize("path", [("cpu", "cuda"), ("cuda", "cpu")], ids="-".join)
def test_weights_cross_unchanged(checkpoints, tmp_path, path):
    """Saved by one, loaded by the other, trained a step at a learning rate that has decayed to 0 and saved again: every
    bit; and the optimizer's state was accepted."""
    folder = checkpoints("tiny", num_nextn_predict_layers=1)
    spec = {"cpu": LOCAL, "cuda": TE}
    common = "--bf16 --use-distributed-optimizer --weight-decay 0 --lr-decay-style linear --lr-decay-iters 2"
    common += f" --min-lr 0 --train-iters 3 --exit-interval {{}} --save {tmp_path}/{{}}"
    train(folder, f"{spec[path[0]]} --load {folder} {common.format(2, 'first')}", on=path[0])
    train(folder, f"{spec[path[1]]} --load {tmp_path}/first {common.format(3, 'second')}", on=path[1])
    first, second = (weights(tmp_path / name, tmp_path / f"{name}-hf") for name in ("first", "second"))
    original = load_file(f"{folder}/model.safetensors")
    assert first.keys() == second.keys() == original.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"].float(), original["lm_head.weight"]), "the first must have trained"


@pytest.mark.parametrize("flags", [pytest.param(LOCAL, id="local"), pytest.param(TE, id="te")])
def test_the_converters_output_trains_as_the_files_do(checkpoints, tmp_path, flags):
    folder = checkpoints("tiny")
    hf_to_dist(Path(folder), tmp_path / "dist")
    losses = [train(folder, f"--load {load} --train-iters 1 {flags}") for load in (folder, tmp_path / "dist")]
    assert losses[0] == losses[1] != []
