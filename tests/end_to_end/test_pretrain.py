"""The commands of a first day: a recipe under torchrun, its log and TensorBoard, the same command again to resume."""

import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.dist_files import COMMON_STATE_KEY
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.hf.config import HyConfig
from hymeg.planning.flops import training_flops
from hymeg.reporting.reading import read_run

ROOT = Path(__file__).parents[2]
ALONE = {
    key: value
    for key, value in os.environ.items()
    if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
}
RECIPE = """\
seq-length: 64
micro_batch_size: 1
global-batch-size: 4
lr: 1e-3
lr-decay-style: constant
log-interval: 2
eval-interval: 4
eval-iters: 1
save-interval: 4
tensor-model-parallel-size: 2
mock-data: true
"""


def run(*words: str, processes: int = 2, fails: bool = False) -> str:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "pretrain_hy.py"), *words],
        env=ALONE | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) is fails, done.stdout[-4000:]
    return done.stdout


def iterations(log: str) -> dict[int, str]:
    return {int(found.group(1)): found.group(0) for found in re.finditer(r" iteration +(\d+)/.*", log)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_checkpoint(folder / "model", layout="fused", num_mtp_layers=1)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def lives(folder):
    """The logs of a run's first life and of its second, started by the same words but for the number of iterations."""
    model, out = str(folder / "model"), str(folder / "out")
    words = [
        "--config",
        str(folder / "recipe.yaml"),
        "--hf-model",
        model,
        "--pretrained-checkpoint",
        model,
        "--load",
        out,
        "--save",
        out,
    ]
    words += ["--tensorboard-dir", str(folder / "tensorboard"), "--bf16"]
    return run(*words, "--train-iters", "4"), run(*words, "--train-iters", "8")


def test_first_life_starts_from_the_published_weights(lives, folder):
    first, _ = lives
    assert (
        first.count(
            f"hymeg: {folder / 'model'} is a Hugging Face folder: converting it, once, to "
            f"{folder / 'out' / 'hf_weights'}/model-"
        )
        == 1
    )
    assert "loading release distributed checkpoint" in first
    assert first.count("hymeg: no CUDA: training on CPU") == 1
    assert (folder / "out" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert "GPTModel IS DEPRECATED" not in first and "Traceback" not in first


def test_second_life_resumes(lives):
    first, second = (iterations(log) for log in lives)
    assert max(first) == 4 and min(second) == 5 and max(second) == 8
    assert "converting" not in lives[1] and "at iteration 4" in lives[1]
    assert float(re.search(r"consumed samples: +(\d+)", second[8]).group(1)) == 32


def test_record_has_the_figures_of_the_log_and_of_both_lives(lives, folder):
    run = read_run(folder / "out")
    lines = iterations(lives[0]) | iterations(lives[1])
    assert sorted(lines) == [1, 2, 4, 5, 6, 8]
    for series, name in (
        (run.losses["lm loss"], r"lm loss: ([\d.E+-]+) "),
        (run.losses["mtp_1 loss"], r"mtp_1 loss: ([\d.E+-]+) "),
        (run.curves["gradient norm"], r"grad norm: ([\d.]+) "),
        (run.curves["learning rate"], r"learning rate: ([\d.E+-]+) "),
    ):
        assert [iteration for iteration, _ in series] == sorted(lines)
        said = [float(re.search(name, lines[iteration]).group(1)) for iteration, _ in series]
        assert [value for _, value in series] == pytest.approx(said, rel=1e-3)
    # Of two evaluations at one step, in training and at its end, the later.
    pattern = r"validation loss at iteration (\d)(?: on validation set)? \| lm loss value: (\S+) "
    held_out = dict(re.findall(pattern, "".join(lives)))
    expected = [(int(iteration), pytest.approx(float(loss), rel=1e-5)) for iteration, loss in held_out.items()]
    assert run.losses["lm loss, validation"] == expected and len(expected) == 2
    assert (run.saves, run.resumes) == ([4, 8], [4])
    assert run.starts[1]["layout"]["tensor_model_parallel_size"] == 2 and run.starts[1]["world_size"] == 2
    config = HyConfig.from_dir(folder / "model")
    chosen = run.counts.sum(axis=2)[[1, 2, 4, 5]]  # of the lines that stand for one step or two
    layers = sum(kind == "sparse" for kind in config.mlp_layer_types) + 1
    tokens = 4 * 64 * config.num_experts_per_tok
    assert [sorted(row[row > 0].tolist()) for row in chosen[:, :-1]] == [
        [n * tokens] * (layers - 1) for n in (1, 2, 1, 2)
    ]


def test_log_line(lives, folder):
    line = iterations(lives[0])[4]
    seconds = float(re.search(r"elapsed time per iteration \(ms\): ([\d.]+)", line).group(1)) / 1e3
    tokens = float(re.search(r"tokens/s: ([\d,]+)", line).group(1).replace(",", ""))
    assert tokens == pytest.approx(4 * 64 / seconds, abs=1)
    tflops = float(re.search(r"\(TFLOP/s/GPU\): ([\d.e+-]+) \|", line).group(1))
    flops = training_flops(HyConfig.from_dir(folder / "model"), 4, 64)
    assert tflops == pytest.approx(flops / seconds / 2 / 1e12, rel=1e-2)
    assert (
        re.search(r"lm loss: [\d.E+]+ \|", line)
        and re.search(r"mtp_1 loss: [\d.E+]+ \|", line)
        and re.search(r"grad norm: [\d.]+ \|", line)
    )
    layers = re.search(r"expert load max/mean: ([\d.]+) \(by layer (.*?)\)", line)
    loads = dict(entry.split(":") for entry in layers.group(2).split())
    assert list(loads) == ["1", "2", "3", "4"] and max(map(float, loads.values())) == float(layers.group(1)) >= 1


def test_tensorboard(lives, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    for name in (
        "lm loss",
        "grad-norm",
        "tokens-per-second",
        "model-tflops-per-gpu",
        "expert-load/layer-1",
        "expert-load/layer-4",
    ):
        assert name in names
    assert [event.step for event in events.Scalars("tokens-per-second")][-1] == 8


def test_what_was_saved_is_a_model_of_its_own(lives, folder):
    """The saved folder exports to Hugging Face without the folder that training began with, and transformers loads
    it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = folder / "export"
    command = [
        sys.executable,
        str(ROOT / "tools" / "convert_checkpoint.py"),
        "dist-to-hf",
        "--dist",
        str(folder / "out"),
        "--hf",
        str(export),
        "--verify",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert HyConfig.from_dir(export) == HyConfig.from_dir(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(export)
    tokens = AutoTokenizer.from_pretrained(export)("hello", return_tensors="pt").input_ids
    assert model(tokens).logits.isfinite().all() and model.dtype == torch.bfloat16


def test_when_rank_0_cannot_convert_every_rank_ends_with_its_message(folder, tmp_path):
    model = str(folder / "model")
    (tmp_path / "hf_weights").write_text("in the way")
    words = [
        "--config",
        str(folder / "recipe.yaml"),
        "--hf-model",
        model,
        "--load",
        model,
        "--save",
        str(tmp_path),
        "--train-iters",
        "1",
    ]
    log = run(*words, fails=True)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and errors[0].startswith(f"error: {model} must be converted")
        and str(tmp_path / "hf_weights") in errors[0]
    )


def test_what_a_hostile_object_in_a_checkpoint_wants_is_not_done(folder, tmp_path):
    """Megatron unpickles the objects of a checkpoint; the first, its flags, before anything else."""
    model, hostile = str(folder / "model"), b"cposix\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "was-here").encode()
    hf_to_dist(model, tmp_path / "dist", workers=1)
    with zipfile.ZipFile(tmp_path / "dist/release/__1_0.distcp", "w") as archive:
        for name, data in {"data.pkl": hostile, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
    metadata = tmp_path / "dist/release/.metadata"
    stored = pickle.loads(metadata.read_bytes())
    next(place for index, place in stored.storage_data.items() if index.fqn == COMMON_STATE_KEY).length = (
        (tmp_path / "dist/release/__1_0.distcp").stat().st_size
    )
    metadata.write_bytes(pickle.dumps(stored))
    (tmp_path / "dist/release/checksums.sfv").unlink()  # an attacker would write his own
    words = [
        "--config",
        str(folder / "recipe.yaml"),
        "--hf-model",
        model,
        "--train-iters",
        "1",
        "--tensor-model-parallel-size",
        "1",
    ]
    log = run(*words, "--load", str(tmp_path / "dist"), processes=1, fails=True)
    assert "Weights only load failed" in log or "weights_only" in log
    assert not (tmp_path / "was-here").exists()
