"""One tiny checkpoint, with and without multi-token prediction, and random text to train on, for all worlds.

The text holds the padding token here and there, which Megatron's dataset masks: micro-batches differ in how many tokens
they train.
"""

from hymeg import platform

platform.install()

import flag_help  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from worlds import Worlds  # noqa: E402

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint  # noqa: E402

flag_help.read_once()

SEQ_LENGTH, GLOBAL_BATCH = 32, 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`trunk/` and `mtp/`: fp32 checkpoints; `text.bin`, `text.idx`: documents of random tokens."""
    folder = tmp_path_factory.mktemp("worlds")
    write_tiny_checkpoint(folder / "trunk", dtype="fp32")
    config = write_tiny_checkpoint(folder / "mtp", dtype="fp32", num_mtp_layers=1)
    _write_text(folder / "text", config.vocab_size)
    return folder


def _write_text(prefix, vocab_size: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    random = np.random.default_rng(0)
    for _ in range(300):
        length = int(random.integers(5, 200))
        builder.add_document(random.integers(0, vocab_size, length), [length])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="session")
def command(folder):
    """A training's command line. Few tokens: two experts that score the same to the last bit are chosen by rounding,
    and then layouts differ.
    """

    def build(*flags: str, checkpoint: str = "trunk", load: str | None = None, steps: int = 3) -> list[str]:
        model = str(folder / checkpoint)
        fixed = f"--seq-length {SEQ_LENGTH} --micro-batch-size 1 --train-iters {steps} --eval-iters 0 --num-workers 0"
        rate = "--lr 1e-3 --lr-decay-style constant"
        batch = [] if "--global-batch-size" in flags else ["--global-batch-size", str(GLOBAL_BATCH)]
        data = ["--data-path", str(folder / "text"), "--split", "100,0,0", "--data-cache-path", str(folder / "cache")]
        return [
            "--hf-model",
            model,
            "--load",
            load or model,
            *data,
            *fixed.split(),
            *rate.split(),
            *batch,
            *" ".join(flags).split(),
        ]

    return build


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    started = Worlds(tmp_path_factory.mktemp("forks") / "logs")
    yield started
    started.end()


@pytest.fixture(scope="session")
def one_process(worlds, command):
    """What one process computes: `{name: steps}`. Everything else is held against it."""
    cases = {
        "trunk": command(steps=4),
        "mtp": command(checkpoint="mtp", steps=4),
        "bf16": command("--bf16"),
        "recompute": command(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", checkpoint="mtp"
        ),
        "large micro-batch": command("--micro-batch-size 4"),
        "bias update": command("--moe-router-bias-update-rate 1e-2"),
    }
    return worlds.cases(1, cases)
