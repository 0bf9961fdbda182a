"""The index of a text run, written before there are process groups, is the one that the run asks for."""

import contextlib
import os

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training import training
from megatron.training.arguments import validate_args
from single_process import ensure_world

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.data.pretraining import build_datasets, build_index
from hymeg.errors import UserError
from hymeg.training.arguments import parse
from hymeg.training.data_paths import settle_full_validation
from hymeg.training.preflight import preflight


class Tokenizer:
    eod, pad, vocab_size, unique_identifiers = 0, 1, 900, {"class": "made up"}


@pytest.fixture
def text(tmp_path):
    for name in ("a", "b"):
        builder = IndexedDatasetBuilder(f"{tmp_path}/{name}.bin", dtype=np.uint16)
        for _ in range(200):
            builder.add_document(np.arange(60), [60])
        builder.finalize(f"{tmp_path}/{name}.idx")
    write_tiny_checkpoint(tmp_path / "model")
    return tmp_path


def without_world(build) -> None:
    """As before any process group: Megatron's builder then works for this rank alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: False)
        build()


@pytest.mark.parametrize(
    "words",
    [
        "--data-path {0}/a --train-iters 20",
        "--data-path 30 {0}/a 70 {0}/b --train-iters 300",
        "--data-path {0}/a {0}/b --train-samples 70 --split 90,5,5",
        "--train-data-path {0}/a --valid-data-path {0}/b --train-iters 20 --eval-interval 5",
        "--data-path {0}/a --train-iters 20 --split 100,0,0 --eval-iters 0",
    ],
    ids=["one file", "a blend over several epochs", "samples", "a file each", "no evaluation"],
)
def test_nothing_is_left_to_write_for_the_run(text, monkeypatch, words):
    ensure_world()
    args = arguments(text, monkeypatch, words)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        iterations = args.train_iters
        without_world(lambda: build_index(args, Tokenizer()))
        assert args.train_iters == iterations  # Megatron's schedule goes by it; a rank that builds nothing has its own
        training.update_train_iters(args)
        before = {path: path.stat().st_mtime_ns for path in (text / "cache").iterdir()}
        train, valid, _ = build_datasets(args, Tokenizer(), training.get_train_valid_test_num_samples(), lambda: True)
    assert sum("sample_index" in path.name for path in before) >= 1 + (valid is not None)
    assert {path: path.stat().st_mtime_ns for path in (text / "cache").iterdir()} == before
    assert len(train) >= 70


def arguments(text, monkeypatch, words):
    """Those of a run, for Megatron's functions too, and its configuration checked."""
    batch = "--seq-length 32 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --eval-iters 2 --init-from-scratch"
    cache = f"--data-cache-path {text}/cache"
    args, config = parse(["--hf-model", str(text / "model"), *f"{batch} {cache} {words.format(text)}".split()])
    preflight(args, config, lambda note: None)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        validate_args(args)
    args.iteration = 0
    monkeypatch.setattr(training, "get_args", lambda: args)
    return args


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--train-iters 200 --split 100,0,0 --eval-iters 0", "gives 748 samples for training, and the run takes 800;"),
        (
            "--train-iters 100 --eval-interval 10",
            r"gives 74 samples for validation, and the run takes 88; .* as in 37 \S+a 37 \S+b, or",
        ),
        ("--train-iters 10 --split 90,10,0 --eval-iters 9", None),
    ],
    ids=["training", "validation", "enough"],
)
def test_data_sets_without_weights_that_a_run_would_use_up_are_refused_at_its_start(text, monkeypatch, words, said):
    args = arguments(text, monkeypatch, "--data-path {0}/a {0}/b " + words)
    told = contextlib.nullcontext() if said is None else pytest.raises(UserError, match=said)
    with told:
        without_world(lambda: build_index(args, Tokenizer()))


def test_ranks_draw_as_much_of_all_validation_data_each_sample_counted_once(text, monkeypatch):
    """374 samples for four ranks."""
    words = "--train-data-path {0}/a --valid-data-path {0}/a {0}/b --multiple-validation-sets --full-validation"
    args = arguments(text, monkeypatch, f"{words} --train-iters 20")
    args.data_parallel_size = 4
    ensure_world()
    for dataset in build_datasets(args, Tokenizer(), (80, None, 8), lambda: True)[1]:
        assert len(dataset) == 376 and len(dataset.dataset) == 374
        assert all(dataset[index]["loss_mask"].any() for index in (0, 373))
        assert not any(dataset[index]["loss_mask"].any() for index in (374, 375))


def test_all_validation_data_are_evaluated_as_megatron_draws_them(text, monkeypatch):
    words = "--train-data-path {0}/a --valid-data-path {0}/a {0}/b --multiple-validation-sets --full-validation"
    args = arguments(text, monkeypatch, f"{words} --train-iters 20 --global-batch-size 16 --micro-batch-size 4")
    args.eval_iters, args.data_parallel_size = 1, 2
    settle_full_validation(args)
    assert (args.eval_micro_batch_size, args.eval_global_batch_size, args.eval_iters) == (1, 2, 8)
    assert training.get_train_valid_test_num_samples() == (320, None, 16)
    args.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(UserError, match=r"^--full-validation fails in .* with virtual pipeline stages; leave it"):
        settle_full_validation(args)


@pytest.mark.parametrize("words", ["--mock-data", "--data-path {0}/a --dataloader-fast-cache-load"])
def test_what_has_no_index_to_write_writes_none(text, monkeypatch, words):
    args, _ = parse(["--hf-model", str(text / "model"), *words.format(text).split()])
    monkeypatch.setattr(training, "get_args", lambda: args)
    args.train_iters = 20
    without_world(lambda: build_index(args, Tokenizer()))
    assert not (text / "cache").exists() and not (text / "a").exists()
