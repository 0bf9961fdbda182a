"""A resume says where its data are not those, or not in the order, that the checkpoint was trained on."""

import json
from types import SimpleNamespace

import pytest

from hymeg.checkpoint.dist_files import TRACKER
from hymeg.checksums import sum_of, write_manifest
from hymeg.training.data_record import compare_and_keep, contents_record, text_record


def start(folder, record, iteration=None, **others):
    """What a run says that goes on from `iteration` (None: from what `folder` names), if from any."""
    said = []
    args = {"load": str(folder), "save": str(folder), "finetune": False, "ckpt_step": iteration, "train_iters": 50}
    args |= others
    compare_and_keep(SimpleNamespace(**args), record, said.append)
    return said


def save(folder, iteration):
    """As a checkpoint of that iteration would."""
    folder.mkdir(exist_ok=True)
    (folder / TRACKER).write_text(f"{iteration}\n")


@pytest.fixture
def folder(tmp_path):
    """Trained to iteration 10 on A."""
    assert start(tmp_path / "run", {"data": "A", "seed": 1}) == []
    save(tmp_path / "run", 10)
    return tmp_path / "run"


def test_the_same_data_are_nothing_to_talk_about(folder):
    assert start(folder, {"data": "A", "seed": 1}) == []


def test_a_run_at_its_end_is_said(folder):
    said = [f"nothing left to train: {folder} is at iteration 10 of --train-iters 10"]
    assert start(folder, {"data": "A"}, train_iters=10) == said
    assert start(folder, {"data": "A"}, train_iters=11) == start(folder, {"data": "A"}, train_iters=None) == []
    assert start(folder, {"data": "A"}, train_iters=10, finetune=True) == []


def test_what_has_changed_is_said_until_something_was_trained_on_it(folder):
    """A run that dies before its first checkpoint has not made the old one another."""
    said = start(folder, {"data": "B", "seed": 1})
    assert said == [
        f"the data are not in the order that {folder} was trained on: data was 'A' and is 'B'; samples may come twice "
        "or never"
    ]
    assert start(folder, {"data": "B", "seed": 1}) == said
    save(folder, 20)
    assert start(folder, {"data": "B", "seed": 1}) == []
    assert len(start(folder, {"data": "C", "seed": 2})) == 2


def test_a_step_back_is_compared_with_what_it_was_trained_on(folder):
    start(folder, {"data": "B"})
    save(folder, 20)
    assert start(folder, {"data": "A"}, iteration=10) == []
    save(folder, 15)
    assert start(folder, {"data": "A"}) == []
    assert [entry["data"] for entry in json.loads((folder / "data.json").read_text())] == [
        {"data": "A", "seed": 1},
        {"data": "A"},
        {"data": "A"},
    ]


def test_the_record_goes_with_the_run_to_another_folder(folder, tmp_path):
    other = tmp_path / "other"
    assert start(folder, {"data": "A"}, save=str(other)) == []
    save(other, 10)  # nothing trained there yet
    assert len(start(other, {"data": "B"})) == 1


@pytest.mark.parametrize("others", [{"finetune": True}, {"load": None}])
def test_who_begins_anew_is_not_compared(folder, others):
    assert start(folder, {"data": "B"}, **others) == []


def test_a_model_that_was_converted_or_has_no_record_is_not_compared(folder):
    save(folder, "release")
    assert start(folder, {"data": "B"}) == []
    save(folder, 10)
    (folder / "data.json").write_text("{}")
    assert start(folder, {"data": "C"}, save=None) == []
    (folder / "data.json").unlink()
    assert start(folder, {"data": "C"}, save=None) == []


def test_epochs_counted_in_other_batches_are_said(folder):
    start(folder, {"global_batch_size": 8})
    save(folder, 20)
    [said] = start(folder, {"global_batch_size": 16})
    assert "--train-epochs is counted, are not those that" in said and "global_batch_size was 8 and is 16" in said
    assert said.endswith("before or after so many epochs; give --train-samples, a sample a sequence, in its place")


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, False),
        ({"train_samples": 80, "train_iters": None}, False),
        ({"train_iters": 11}, True),
        ({"global_batch_size": 16}, True),
        ({"seed": 2}, True),
        ({"seq_length": 64}, True),
        ({"split": "9,1,0"}, True),
        ({"data_path": ["b"]}, True),
        ({"micro_batch_size": 4}, False),
    ],
)
def test_text_is_in_another_order_where_the_number_of_samples_is_another(changes, differs):
    args = dict.fromkeys(
        ("train_samples", "data_args_path", "train_data_path", "per_split_data_args_path", "mock_data")
    ) | {"train_iters": 10, "global_batch_size": 8, "seed": 1, "seq_length": 32, "split": "1", "data_path": ["a"]}
    before, after = (text_record(SimpleNamespace(**args | more)) for more in ({}, changes))
    assert (before != after) is differs


def test_other_contents_and_another_tokenizer_are_said(folder, tmp_path):
    """By checksums where there are some, else by lengths."""
    prefix, model = tmp_path / "corpus_text_document", tmp_path / "model"
    model.mkdir()
    args = SimpleNamespace(text_prefixes=[str(prefix)], hf_model=str(model))

    def write(tokens: bytes, tokenizer: str = "{}", has_sums: bool = True) -> None:
        (model / "tokenizer.json").write_text(tokenizer)
        files = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx")]
        for file in files:
            file.write_bytes(tokens)
        if has_sums:
            write_manifest(f"{prefix}.checksums.sfv", {file.name: sum_of(tokens) for file in files})

    def said() -> list[str]:
        return start(folder, {"data": "A", "seed": 1} | contents_record(args))

    write(b"one")
    assert said() == []
    save(folder, 20)
    assert said() == []
    write(b"two", "{ }")
    contents, tokenizer = said()
    assert contents.startswith(
        f"the data are not those that {folder} was trained on: contents of {prefix} was '3 bytes"
    )
    assert tokenizer.startswith(f"the tokenizer is not the one that {folder} was trained on: tokenizer.json was")
    write(b"one")
    assert said() == []
    write(b"longer", has_sums=False)  # the checksums are still those of what was there before
    assert len(said()) == 1 and "and is '6 bytes and 6 bytes'" in said()[0]
    prefix.with_name(f"{prefix.name}.checksums.sfv").unlink()
    assert len(said()) == 1 and "and is '6 bytes and 6 bytes'" in said()[0]
