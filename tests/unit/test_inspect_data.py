"""inspect_data shows a row as it is trained and counts a file as it will be packed; what cannot be trained on is
told.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hymeg.data.chat import ChatEncoder
from hymeg.data.inspection import Summary, fit, histogram, read_row, summarize
from hymeg.data.rows import RowReader
from hymeg.errors import UserError
from hymeg.hf.tokenizer import train_tiny_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/data"
ROW_FILES = ("translations.jsonl", "translations_heldout.jsonl", "conversations.jsonl")


def example_rows(name):
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tiny_tokenizer([row["source"] for row in example_rows("translations_heldout.jsonl")], 600).save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="module")
def encoder(tokenizer_dir):
    return ChatEncoder(tokenizer_dir)


def inspect(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools/inspect_data.py", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


# The examples


@pytest.mark.parametrize("name", ROW_FILES)
def test_every_example_row_can_be_trained_on(encoder, name):
    summary = summarize(EXAMPLES / name, RowReader(), encoder)
    assert (summary.bad_rows, len(summary.lengths)) == (0, len(example_rows(name)))
    assert summary.num_trained.min() > 3
    assert (summary.num_trained < summary.lengths).all()


def test_held_out_rows_share_no_sentence_with_the_others():
    held_out = {row[key] for row in example_rows("translations_heldout.jsonl") for key in ("source", "target")}
    seen = {row[key] for row in example_rows("translations.jsonl") for key in ("source", "target")}
    seen |= {
        line
        for row in example_rows("conversations.jsonl")
        for message in row["messages"]
        for line in message["content"].splitlines()
    }
    assert not held_out & seen


def test_the_examples_are_every_ordered_pair_of_languages():
    rows = example_rows("translations.jsonl") + example_rows("translations_heldout.jsonl")
    pairs = [(row["source_lang"], row["target_lang"]) for row in rows]
    assert {pair: pairs.count(pair) for pair in pairs} == {
        pair: 50 for pair in itertools.permutations(["en", "fr", "es", "de", "zh"], 2)
    }


# Counting


def test_a_summary_counts_rows_and_names_the_first_bad_one(tmp_path, encoder):
    good = (EXAMPLES / "conversations.jsonl").read_bytes().splitlines()[:3]
    late = json.dumps({"messages": [*json.loads(good[0])["messages"], {"role": "system", "content": "late"}]}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good[0], b"{", late, b"", *good[1:]]))
    summary = summarize(path, RowReader(), encoder)
    reader = RowReader()
    encoded = [encoder.encode(reader.parse("a", 1, raw)) for raw in good]
    assert summary.lengths.tolist() == [len(tokens.token_ids) for tokens in encoded]
    assert summary.num_trained.tolist() == [tokens.trained.sum() for tokens in encoded]
    assert summary.first_trained.tolist() == [tokens.trained.tolist().index(True) for tokens in encoded]
    assert summary.bad_rows == 2
    assert "a.jsonl: line 2: not JSON" in summary.first_bad_row


def test_a_file_without_rows_is_refused(tmp_path, encoder):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(
        UserError, match=r"a.jsonl: holds no row; give a file with conversations or translations, one a line"
    ):
        summarize(tmp_path / "a.jsonl", RowReader(), encoder)


def test_what_fits_is_what_training_would_do():
    summary = Summary(np.array([101, 51, 51, 301]), np.array([10, 10, 10, 10]), np.array([90, 40, 40, 101]))
    assert fit(summary, 100) == (1, 200, 1, 3, 1.0, 0.75)
    assert fit(summary, 300) == (0, 0, 0, 2, 500 / 600, 500 / 1200)


def test_a_histogram_counts_every_row_once():
    lengths = np.array([1, 2, 3, 4, 7, 8, 1023, 1024, 1 << 40])
    classes = histogram(lengths)
    assert [count for _, _, count in classes[:4]] == [1, 2, 2, 1]
    assert sum(count for _, _, count in classes) == len(lengths)
    for shortest, longest, count in classes:
        assert count == sum(shortest <= length <= longest for length in lengths)


@pytest.mark.parametrize(
    ("line", "message"),
    [(2, "--row 2: line 2 of .* is blank; the next row is in line 3"), (9, "--row 9: .* has no row in line 9")],
)
def test_a_row_that_is_not_there_is_named(tmp_path, encoder, line, message):
    rows = (EXAMPLES / "conversations.jsonl").read_bytes().splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(rows[:2]))
    with pytest.raises(UserError, match=message):
        read_row(tmp_path / "a.jsonl", line, RowReader(), encoder)
    assert read_row(tmp_path / "a.jsonl", 3, RowReader(), encoder).trained.any()


# The command


def test_the_command_counts_a_file(tokenizer_dir):
    done = inspect(EXAMPLES / "translations_heldout.jsonl", "--tokenizer", tokenizer_dir, "--seq-length", 400)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rows      180\ntokens    ")
    assert "packed  " in done.stdout
    assert "--sft-truncation" in done.stdout


def test_the_command_shows_what_is_trained(tmp_path, tokenizer_dir):
    row = {"messages": [{"role": "user", "content": "a ⟦b\n人"}, {"role": "assistant", "content": "人🙂"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    done = inspect(tmp_path / "a.jsonl", "--tokenizer", tokenizer_dir, "--row", 1)
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.replace("|", "")
    assert "<｜hy_User｜>a ⟦b\n人<｜hy_Assistant｜>⟦<think></think>人🙂<eos:6124c78e>⟧\n" in shown
    assert "|人|🙂|<eos:6124c78e>⟧" in done.stdout


def test_the_command_refuses_in_one_line(tmp_path, tokenizer_dir):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    done = inspect(tmp_path / "a.jsonl", "--tokenizer", tokenizer_dir)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: rows that cannot be trained on: 1; training stops at the first: {tmp_path}/a.jsonl: line 1: "
        "'messages' is []; a list of {'role', 'content'} is needed\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("examples/data/conversations.jsonl", "--row", 0), "--row is 0; at least 1 is needed"),
        (
            ("examples/data/conversations.jsonl", "--seq-length", 10**30),
            f"--seq-length is {10**30}; from 1 to 16777216 is possible",
        ),
        (("LICENSE", "--row", 1), "LICENSE: its name does not tell what it holds; "),
        (
            ("constraints.txt",),
            "constraints.txt: plain text is for pre-training; conversations come as JSON lines (.jsonl)",
        ),
    ],
)
def test_the_command_refuses_what_it_cannot_show(tokenizer_dir, arguments, message):
    done = inspect(*arguments, "--tokenizer", tokenizer_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_who_reads_the_output_may_stop(tokenizer_dir):
    command = [
        sys.executable,
        ROOT / "tools/inspect_data.py",
        EXAMPLES / "conversations.jsonl",
        "--tokenizer",
        tokenizer_dir,
        "--row",
        "1",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
