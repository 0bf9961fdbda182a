"""`--sft`, from the flags to the samples: what is said of the data, what decides the order, which rows are left out."""

import json
from types import SimpleNamespace

import pytest
from megatron.core import num_microbatches_calculator as batches

from hymeg.data.index_building import RowEncoder, build_indices
from hymeg.data.row_index import index_folder
from hymeg.errors import UserError
from hymeg.training.data_record import text_record
from hymeg.training.row_data import RowData, settle_rows
from hymeg.training.schedule import check_last_batch, samples_to_the_end, set_iterations
from hymeg.training.step import training_sets

CONFIG = SimpleNamespace(vocab_size=600, pad_token_id=0)
BAD = '{"messages": []}'


def write(path, *numbers):
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        if isinstance(n, int)
        else n
        for n in numbers
    ]
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "a.jsonl", *range(20)), write(tmp_path / "b.jsonl", *range(20, 30))


@pytest.fixture
def arguments(tmp_path, tokenizer_dir):
    """As they are parsed, but for what a test gives."""

    def build(**given):
        settings = {
            "hf_model": str(tokenizer_dir),
            "data_cache_path": str(tmp_path / "cache"),
            "sft_truncation": "error",
            "sft_bad_rows": "stop",
            "calculate_per_token_loss": True,
            "packed": True,
            "micro_batch_size": 1,
            "eval_micro_batch_size": None,
            "context_parallel_size": 1,
            "data_parallel_size": 1,
            "seq_length": 64,
            "seed": 1,
            "eval_iters": 10,
            "eval_interval": 5,
            "eval_global_batch_size": 2,
            "global_batch_size": 4,
            "lr_warmup_iters": 0,
            "lr_decay_style": "linear",
        }
        absent = (
            "data_path train_data_path valid_data_path test_data_path split mock_data "
            "virtual_pipeline_model_parallel_size train_epochs train_iters train_samples lr_warmup_fraction save "
            "lr_decay_iters"
        )
        explicit = {dest: (f"--{dest.replace('_', '-')}", "") for dest in given}
        args = SimpleNamespace(**dict.fromkeys(absent.split()) | settings | given | {"explicit": explicit})
        settle_rows(args)
        return args

    return build


def made(args):
    """The data, and what was said of them."""
    said = []
    return RowData(args, CONFIG, said.append), said


def test_evaluation_on_what_is_trained_on_is_said(arguments, files, tmp_path):
    """Under whatever name it lies there."""
    (tmp_path / "copy").mkdir()
    copy = write(tmp_path / "copy/a.jsonl", *range(20))
    given = {"valid_data_path": [files[1], copy], "test_data_path": [files[0]]}
    _, said = made(arguments(data_path=[files[0]], **given, eval_iters=1))
    assert [line for line in said if "trained on too" in line] == [
        f"{path} is trained on too: its loss says nothing about new data"
        for path in (f"--valid-data-path {copy}", f"--test-data-path {files[0]}")
    ]


def test_bad_rows_stop_the_run_or_are_left_out_and_counted(arguments, tmp_path):
    path = write(tmp_path / "a.jsonl", *range(10), BAD, *range(10, 20), BAD)
    with pytest.raises(UserError, match=r"^.*a.jsonl: line 11: 'messages' is .*\(--sft-bad-rows skip leaves such rows"):
        made(arguments(data_path=[path], split="100,0,0"))
    data, said = made(arguments(data_path=[path], split="100,0,0", sft_bad_rows="skip"))
    assert said[0] == f"{path}: 2 of 22 rows cannot be trained on and are left out"
    assert said[1].startswith(f"{path}:   2: 'messages' is ... (the first: {path}: line 11: ")
    assert data.record()["train_data"][0][-2:] == [0, 20]
    with pytest.raises(UserError, match=r"a.jsonl: line 11: 'messages' is .*\(--sft-bad-rows skip leaves such rows"):
        made(arguments(data_path=[path], split="100,0,0"))  # though there is an index now


def test_rows_of_weight_0_are_left_out_and_counted(arguments, tmp_path):
    path = write(tmp_path / "a.jsonl", *range(12))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    write(tmp_path / "a.jsonl", *(json.loads(line) | {"train": n > 1} for n, line in enumerate(lines)))
    data, said = made(arguments(data_path=[path], split="100,0,0"))
    assert said[0] == f"{path}: 2 rows are left out, whose weight is 0 in every turn"
    assert data.sources[0][0].counts.rows == 10


def test_data_sets_are_named_by_place_and_file(arguments, files):
    args = arguments(
        data_path=["0.5", files[0], "0.5", files[1]], split="100,0,0", sft_rows=True, full_validation=False
    )
    assert training_sets(args) == ["0-a", "1-b"]
    data, _ = made(args)
    samples = data.datasets(args, (40, None, 0))[0]
    assert [samples[n]["dataset_id"] for n in range(40)] == [samples.sequence(n)[0] for n in range(40)]


def test_an_index_that_was_made_before_the_job_is_used(arguments, files, tokenizer_dir, tmp_path, monkeypatch):
    folder = index_folder(files[0], str(tmp_path / "cache"), RowEncoder(str(tokenizer_dir)).fingerprint)
    build_indices({files[0]: folder}, (str(tokenizer_dir), None, True))
    monkeypatch.setattr("hymeg.data.index_building.read_batches", None)
    assert made(arguments(data_path=[files[0]], split="100,0,0"))[1][0].startswith(f"training data {files[0]}: 20 rows")


CHANGES = {
    "the files": {"data_path": ["{b}"]},
    "their order": {"data_path": ["{b}", "{a}"]},
    "their weights": {"data_path": ["0.5", "{a}", "0.5", "{b}"]},
    "--split": {"split": "80,20,0"},
    "--seed": {"seed": 2},
    "--seq-length": {"seq_length": 128},
    "packing": {"packed": False},
    "--sft-truncation": {"sft_truncation": "drop"},
    "context parallelism of packed rows": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_order_is_in_the_record(arguments, files, changes):
    first, second = files
    given = {"data_path": [first, second], "split": "100,0,0"}
    changed = {
        key: [word.format(a=first, b=second) for word in value] if isinstance(value, list) else value
        for key, value in changes.items()
    }
    before, again, after = (made(arguments(**given | more))[0].record() for more in ({}, {}, changed))
    assert before == again == json.loads(json.dumps(before))
    assert before != after


def test_text_that_was_trained_on_before_is_in_the_record(arguments, files):
    """Whose samples are counted on: so many of the rows would never come."""
    args = arguments(data_path=[files[0]])
    args.data_args_path = args.per_split_data_args_path = None
    args.train_iters = 10
    text, rows = text_record(args), made(args)[0].record()
    assert [key for key in text.keys() & rows.keys() if text[key] != rows[key]] == ["sft"]


def test_other_bytes_of_a_file_are_in_the_record(arguments, files, tmp_path):
    before = made(arguments(data_path=[files[0]]))[0].record()
    write(tmp_path / "a.jsonl", *range(1, 21))
    assert made(arguments(data_path=[files[0]]))[0].record() != before


def test_without_evaluation_there_is_no_data_set_for_it(arguments, files):
    """Megatron's loaders refuse a data set of no samples."""
    args = arguments(data_path=[files[0]], eval_iters=0)
    args.full_validation = False
    data, _ = made(args)
    train, validation, test = data.datasets(args, (4, 0, 0))
    assert len(train) == 4 and validation is None and test is None


def test_all_test_data_are_used_once(arguments, files):
    """However much there is for validation; what --eval-iters says is said of both."""
    given = {"valid_data_path": [files[1]], "test_data_path": [files[0]], "packed": False}
    for more, num_samples in (({}, 20), ({"eval_iters": 3}, 6)):
        args = arguments(data_path=[files[0]], **given, **more)
        args.full_validation = False
        *_, test = made(args)[0].datasets(args, (4, 2 * args.eval_iters, 2 * args.eval_iters))
        assert len(test) == num_samples == args.test_iters * args.eval_global_batch_size
        assert [test.sequence(number)[1] for number in range(num_samples)] == list(range(num_samples))


@pytest.mark.parametrize("given", [{"split": "80,0,20"}, {"test_data_path": True}])
def test_test_data_that_are_not_used_are_spoken_of(arguments, files, given):
    """Megatron tests where it validates, and there alone."""
    given = {dest: [files[1]] if value is True else value for dest, value in given.items()}
    args = arguments(data_path=[files[0]], **given)
    args.eval_iters, args.full_validation = 100, False
    data, said = made(args)
    assert said[-1] == "the test data are not used, since there are no data for validation: give some of these too"
    assert data.datasets(args, (4, 0, 0))[1:] == (None, None)


EPOCHS = "--train-iters {} set: --train-epochs {} of {} sequences, 4 an iteration"


@pytest.mark.parametrize(
    ("epochs", "num_rows", "iterations", "filled"),
    [
        (1, 8, 2, ""),
        (1, 9, 3, "; the last batch is filled up with 3 of the next epoch"),
        (3, 5, 4, "; the last batch is filled up with 1 of the next epoch"),
    ],
)
def test_epochs_are_counted_in_iterations(arguments, tmp_path, epochs, num_rows, iterations, filled):
    """Of the sequences that are trained on alone, whatever is left for validation; a save then comes at the end."""
    path = write(tmp_path / "c.jsonl", *range(num_rows + 2))
    split = f"{num_rows},2,0"
    args = arguments(data_path=[path], split=split, packed=False, train_epochs=epochs, save_interval=99)
    args.save = "somewhere"
    del args.explicit["save_interval"]
    said = []
    set_iterations(args, made(args)[0].num_training_sequences, said.append)
    assert said == [EPOCHS.format(iterations, epochs, num_rows) + filled]
    assert args.train_iters == args.save_interval == iterations


def test_epochs_of_several_files_are_all_of_their_sequences(arguments, files):
    args = arguments(data_path=list(files), split="100,0,0", packed=False, train_epochs=2, save_interval=7, save="s")
    set_iterations(args, made(args)[0].num_training_sequences, lambda line: None)
    assert (args.train_iters, args.save_interval) == (15, 7)


def test_epochs_that_are_none_are_refused(arguments, files):
    with pytest.raises(UserError, match=r"--train-epochs 2: --data-path gives weights, .*; leave the weights out, or"):
        arguments(data_path=["0.5", files[0], "0.5", files[1]], train_epochs=2)
    args = arguments(data_path=[files[1]], split="100,0,0", packed=False, train_epochs=2, global_batch_size=21)
    with pytest.raises(UserError, match="--train-epochs 2: 10 sequences an epoch do not fill one --global-batch-size"):
        set_iterations(args, made(args)[0].num_training_sequences, lambda line: None)
    args.global_batch_size, args.lr_warmup_iters = 4, 5
    with pytest.raises(UserError, match="--lr-warmup-iters 5 is not below --train-iters 5"):
        set_iterations(args, made(args)[0].num_training_sequences, lambda line: None)


def test_another_batch_is_in_the_record_where_epochs_are_counted_in_it(arguments, files):
    records = [
        made(arguments(data_path=[files[0]], train_epochs=epochs, global_batch_size=batch))[0].record()
        for epochs, batch in ((2, 4), (3, 4), (2, 8), (None, 4), (None, 8))
    ]
    assert records[0] == records[1] != records[2] and records[3] == records[4]


LIFE = {"eval_interval": 3, "eval_iters": 5, "eval_global_batch_size": 2, "train_iters": 10, "skip_train": False}
LIFE |= {"phase_transition_iterations": None, "start_eval_at_iter": None}


def resumed(iteration, consumed_valid_samples, **given):
    progress = {"iteration": iteration, "consumed_train_samples": 4 * iteration}
    return SimpleNamespace(**LIFE | progress | {"consumed_valid_samples": consumed_valid_samples} | given)


@pytest.mark.parametrize("first", [None, 5])
def test_a_resume_under_the_same_flags_draws_what_the_run_drew(first):
    skipped = (first or 0) // 3
    num_samples = (40, (10 // 3 + 1 - skipped) * 10, 10)
    for iteration in range(10):
        args = resumed(iteration, max(0, iteration // 3 - skipped) * 10, start_eval_at_iter=first)
        assert samples_to_the_end(args, num_samples) == num_samples


def test_a_resume_with_fewer_evaluations_has_samples_for_all_that_come():
    """6 evaluations lie behind it, two and that at the end before it; Megatron counts 4 in all."""
    assert samples_to_the_end(resumed(6, 60), (40, 40, 10)) == (40, 60 + 2 * 10, 10)
    assert samples_to_the_end(resumed(6, 60, skip_train=True), (40, 10, 10)) == (40, 10, 10)
    assert samples_to_the_end(resumed(6, 60), (40, None, 10)) == (40, None, 10)  # --full-validation


def test_a_run_with_nothing_left_to_train_has_a_sample_left():
    """Megatron's sampler asserts that there is one. The evaluation at the end is made again."""
    assert samples_to_the_end(resumed(10, 30), (40, 40, 10)) == (41, 40, 10)
    assert samples_to_the_end(resumed(20, 60), (40, 40, 10)) == (81, 70, 10)


def test_batches_of_several_sizes_that_end_beyond_the_samples_are_refused(monkeypatch):
    """4, 4, 8 and 8 samples: Megatron counts the last batch, for which the data end."""
    sizes = "0:4 512:8"  # from 512 tokens on
    calculator = batches.StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, sizes, seq_length=64)
    monkeypatch.setattr(batches, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", calculator)
    check_last_batch(SimpleNamespace(train_samples=24, step_batch_size_schedule=sizes))
    assert batches.get_current_global_batch_size() == 4
    with pytest.raises(UserError, match=r"^--train-samples 23: .* 0:4 512:8 end at 16 or 24 samples; give one of th"):
        check_last_batch(SimpleNamespace(train_samples=23, step_batch_size_schedule=sizes))
