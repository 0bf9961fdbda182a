"""`--sft`, from the flags to the samples: what is said of the data, what decides the order, which rows are left out."""

import json
from types import SimpleNamespace

import pytest

from hymeg.data.index_building import RowEncoder, build_indices
from hymeg.data.row_index import index_folder
from hymeg.errors import UserError
from hymeg.training.row_data import RowData, settle_rows

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
        }
        absent = (
            "data_path train_data_path valid_data_path test_data_path split mock_data "
            "virtual_pipeline_model_parallel_size"
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


def test_validation_on_what_is_trained_on_is_said(arguments, files, tmp_path):
    """Under whatever name it lies there."""
    (tmp_path / "copy").mkdir()
    copy = write(tmp_path / "copy/a.jsonl", *range(20))
    _, said = made(arguments(data_path=[files[0]], valid_data_path=[files[1], copy], eval_iters=1))
    assert [line for line in said if "trained on too" in line] == [
        f"--valid-data-path {copy} is trained on too: its loss says nothing about new data"
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
