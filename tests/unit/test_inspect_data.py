"""inspect_data shows a row as it is trained and counts a file as it will be packed; what cannot be trained on is
told.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hymeg.data import text_files
from hymeg.data.chat import ChatEncoder
from hymeg.data.index_building import RowEncoder, build_indices
from hymeg.data.inspection import Summary, fit, histogram, read_row, summarize
from hymeg.data.row_index import RowIndex, index_folder, is_built
from hymeg.data.rows import RowReader
from hymeg.errors import UserError
from hymeg.hf.tokenizer import train_tiny_tokenizer

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("inspect_data", ROOT / "tools/inspect_data.py")
inspect_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(inspect_data)
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


@pytest.fixture
def inspect(tokenizer_dir, tmp_path, monkeypatch, capsys):
    """Runs the command in this process; its output and errors. Indices are kept in the test's folder."""

    def run(*arguments, cache=tmp_path / "cache"):
        monkeypatch.chdir(ROOT)
        words = ["--tokenizer", tokenizer_dir, *(["--data-cache-path", cache] if cache else [])]
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, [*arguments, *words])])
        inspect_data.main()
        return capsys.readouterr()

    return run


def index_of(path, tokenizer_dir, cache):
    settings = (str(tokenizer_dir), None, True)
    folder = index_folder(str(path), str(cache), RowEncoder(*settings).fingerprint)
    build_indices({str(path): folder}, settings)
    return RowIndex(folder, str(path))


# The examples


@pytest.mark.parametrize("name", ROW_FILES)
def test_every_example_row_can_be_trained_on(tokenizer_dir, tmp_path, name):
    index = index_of(EXAMPLES / name, tokenizer_dir, tmp_path)
    summary = summarize(index)
    assert (index.bad_rows, len(summary.lengths)) == ([], len(example_rows(name)))
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


def test_weights_are_shown(inspect, tmp_path):
    [row] = [json.loads((EXAMPLES / "conversations.jsonl").read_bytes().splitlines()[0])]
    rows = [row, row | {"weight": 0.5}, row | {"weight": 0}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = inspect(path).out
    assert "left out  1 rows, whose weight is 0 in every turn\n" in said and " weighed" in said
    assert ", of weight 0.5\n" in inspect(path, "--row", 2).out
    assert "weight" not in inspect(path, "--row", 1).out


def test_a_summary_counts_good_rows(tmp_path, tokenizer_dir, encoder, monkeypatch):
    """Whatever the number of rows that it looks at together."""
    good = (EXAMPLES / "conversations.jsonl").read_bytes().splitlines()[:3]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good[0], b"{", b"", *good[1:]]))
    index, reader = index_of(path, tokenizer_dir, tmp_path), RowReader()
    encoded = [encoder.encode(reader.parse("a", 1, raw)) for raw in good]
    for rows_at_once in (1, 2, 3, 4096):
        monkeypatch.setattr("hymeg.data.inspection._ROWS_AT_ONCE", rows_at_once)
        summary = summarize(index)
        assert summary.lengths.tolist() == [len(tokens.token_ids) for tokens in encoded]
        assert summary.num_trained.tolist() == [tokens.trained.sum() for tokens in encoded]
        assert summary.first_trained.tolist() == [tokens.trained.tolist().index(True) for tokens in encoded]


def test_what_fits_is_what_training_would_do():
    summary = Summary(np.array([101, 51, 51, 301]), np.array([10, 10, 10, 10]), np.array([90, 40, 40, 101]))
    assert fit(summary, 100) == (1, 200, 1, 3, 1.0, 0.75)
    assert fit(summary, 300) == (0, 0, 0, 2, 500 / 600, 500 / 1200)


def test_a_histogram_counts_every_row_once():
    lengths = np.array([1, 2, 3, 4, 7, 8, 1023, 1024, 1 << 40])
    classes = histogram(lengths)
    assert [count for _, _, count in classes[:4]] == [1, 2, 2, 1]
    assert sum(count for _, _, count in classes) == len(lengths) and classes[-1][2] == 1
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


def test_the_command_counts_files_and_makes_the_index_that_training_looks_for(inspect, tmp_path, tokenizer_dir):
    path = EXAMPLES / "translations_heldout.jsonl"
    done = inspect(path, EXAMPLES / "conversations.jsonl", "--seq-length", 400)
    first, second = done.out.split(f"{EXAMPLES / 'conversations.jsonl'}\n")
    assert "\nrows      180\ntokens    " in first and "packed  " in first and "--sft-truncation" in first
    assert "\nrows      " in second and done.err.startswith("hymeg: indices made: 2, ")
    folder = index_folder(str(path), str(tmp_path / "cache"), RowEncoder(str(tokenizer_dir)).fingerprint)
    assert is_built(folder, str(path)) and f"index     {folder}\n" in first
    again = inspect(path, EXAMPLES / "conversations.jsonl", "--seq-length", 400)
    assert (again.out, again.err) == (done.out, "")


def test_the_index_lies_beside_the_file_where_no_other_place_is_named(inspect, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((EXAMPLES / "conversations.jsonl").read_bytes())
    inspect(path, cache=None)
    assert [entry.name[:8] for entry in (tmp_path / "a.jsonl.cache").iterdir()] == ["a.jsonl-"]


def test_the_command_counts_turns(inspect, tmp_path):
    """Those of effort high without reasoning are told: the model in use would think before it says anything."""
    question = {"role": "user", "content": "a"}
    answers = [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    rows = [
        {"messages": [question, answer] * 2, "reasoning_effort": effort}
        for answer, effort in ((answers[0], "high"), (answers[1], "high"), (answers[0], "low"))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "turns     6, 2 of effort high without reasoning, 2 with reasoning\n" in inspect(tmp_path / "a.jsonl").out


def test_keys_that_were_left_alone_are_listed_with_counts(inspect, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BATCH_BYTES", 1)  # a batch a row
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages, "id": number} | ({"topic": "x"} if number % 3 else {}) for number in range(1500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "\nleft alone: 'id' in 1,500 rows, 'topic' in 1,000 rows\n" in inspect(tmp_path / "a.jsonl").out
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert "left alone" not in inspect(tmp_path / "b.jsonl").out


def test_bad_rows_are_counted_by_reason(inspect, tmp_path, capsys):
    good = (EXAMPLES / "conversations.jsonl").read_bytes().splitlines()[0]
    late = json.dumps({"messages": [*json.loads(good)["messages"], {"role": "system", "content": "late"}]}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b'{"messages": []}', late, b'{"messages": []}', b'{"messages": 7}']))
    message = f"^{path}: line 2: 'messages' is .*training stops at it, unless with --sft-bad-rows skip"
    with pytest.raises(UserError, match=message):
        inspect(path)
    out = capsys.readouterr().out
    assert "rows      1\n" in out and "4 of 5 rows cannot be trained on and are left out\n" in out
    assert f"  3: 'messages' is ... (the first: {path}: line 2: " in out
    assert "  1: a message: the chat template renders what stands before it differently" in out


def test_the_command_shows_what_is_trained(inspect, tmp_path):
    row = {"messages": [{"role": "user", "content": "a ⟦b\n人"}, {"role": "assistant", "content": "人🙂"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    done = inspect(tmp_path / "a.jsonl", "--row", 1)
    shown = done.out.replace("|", "")
    assert "<｜hy_User｜>a ⟦b\n人<｜hy_Assistant｜>⟦<think></think>人🙂<eos:6124c78e>⟧\n" in shown
    assert "|人|🙂|<eos:6124c78e>⟧" in done.out
    assert done.err == "" and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("examples/data/conversations.jsonl", "--row", 0), "--row is 0; at least 1 is needed"),
        (("examples/data/conversations.jsonl", "--workers", 0), "--workers is 0; at least 1 is needed"),
        (("examples/data/conversations.jsonl", "LICENSE", "--row", 1), "--row 1: needs one file, found 2"),
        (("constraints.txt", "constraints.txt"), "constraints.txt: plain text is for pre-training; conversations come"),
        (("examples/data/conversations.jsonl",) * 2, "FILE examples/data/conversations.jsonl: the same file as"),
        (
            ("examples/data/conversations.jsonl", "--seq-length", 10**30),
            f"--seq-length is {10**30}; from 1 to 16777216 is possible",
        ),
        (("LICENSE", "--row", 1), "LICENSE: its name does not tell what it holds; "),
    ],
)
def test_the_command_refuses_what_it_cannot_show(inspect, arguments, message):
    with pytest.raises(UserError) as caught:
        inspect(*arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_command_refuses_in_one_line(tmp_path, tokenizer_dir):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    command = [sys.executable, ROOT / "tools/inspect_data.py", tmp_path / "a.jsonl", "--tokenizer", tokenizer_dir]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/a.jsonl: no row can be trained on, of 1; the first: {tmp_path}/a.jsonl: line 1: "
        "'messages' is []; a list of {'role', 'content'} is needed"
    )


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
