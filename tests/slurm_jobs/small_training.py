"""A training for two processes: its files, its command line, its losses."""

import os
import re
import sys
from pathlib import Path

import numpy as np

from hymeg import platform
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint

ENVIRONMENT = os.environ | {
    "HYMEG_PLATFORM": "cpu",
    "HYMEG_PROCESSES_PER_NODE": "2",
    "HYMEG_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
}
NUM_STEPS, SAVE_INTERVAL = 64, 6
RECIPE = f"""\
seq-length: 32
micro-batch-size: 1
global-batch-size: 2
train-iters: {NUM_STEPS}
lr: 1e-3
lr-decay-style: constant
log-interval: 1
eval-iters: 0
save-interval: {SAVE_INTERVAL}
num-workers: 0
"""


def write(folder: Path) -> None:
    """`model`, `text`, `recipe.yaml`."""
    platform.install()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    config = write_tiny_checkpoint(folder / "model", dtype="fp32")
    builder = IndexedDatasetBuilder(f"{folder}/text.bin", dtype=np.uint16)
    random = np.random.default_rng(0)
    for _ in range(300):
        builder.add_document(random.integers(0, config.vocab_size, 60), [60])
    builder.finalize(f"{folder}/text.idx")
    (folder / "recipe.yaml").write_text(RECIPE)


def flags(folder: Path, out: Path) -> list[str]:
    model, data = (
        folder / "model",
        ["--data-path", folder / "text", "--split", "100,0,0", "--data-cache-path", out / "cache"],
    )
    words = [
        "--hf-model",
        model,
        "--pretrained-checkpoint",
        model,
        "--load",
        out / "checkpoints",
        "--save",
        out / "checkpoints",
        *data,
    ]
    return [str(word) for word in words]


def losses(log: str) -> dict[int, float]:
    """Step -> loss, with the seven digits of the log."""
    return {
        int(step): float(loss) for step, loss in re.findall(r" iteration +(\d+)/.* lm loss: (\d\.\d+E[+-]\d+) ", log)
    }
