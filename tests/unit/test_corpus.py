"""Text becomes Megatron's dataset, and Megatron reads back what the tokenizer says of each row. What is wrong is told,
and leaves nothing behind.
"""

import errno
import gzip
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import COMPRESSIONS, UDHR, read_back, udhr_texts, write_rows
from transformers import AutoTokenizer

from hymeg.checkpoint.verification import verify_folder
from hymeg.data.corpus import preprocess
from hymeg.errors import UserError
from hymeg.hf.tokenizer import END_OF_DOCUMENT, EOS, SPECIAL_TOKENS

GOOD = '{"text": "good"}'


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.mark.parametrize("append_eod", [False, True])
def test_megatron_reads_back_what_the_tokenizer_says_of_each_row(tmp_path, tokenizer_dir, tokenizer, append_eod):
    (tmp_path / "prose.txt").write_text("first\nparagraph\n\nsecond\n")
    inputs = [UDHR / "zh.jsonl", tmp_path / "prose.txt", UDHR / "en.jsonl"]
    summary = preprocess(inputs, tmp_path / "new" / "corpus", tokenizer_dir, append_eod=append_eod)
    texts = [*udhr_texts("zh"), "first\nparagraph", "second", *udhr_texts("en")]
    expected = [
        tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * append_eod for text in texts
    ]
    dtype, documents = read_back(tmp_path / "new" / "corpus_text_document")
    assert documents == expected
    assert dtype == np.uint16
    assert summary.prefixes == [str(tmp_path / "new" / "corpus_text_document")]
    assert (summary.num_documents, summary.num_tokens) == (len(expected), sum(map(len, expected)))
    assert summary.num_bytes_read == summary.total_bytes == sum(path.stat().st_size for path in inputs)


def test_a_large_vocabulary_is_stored_as_int32(tmp_path, tokenizer):
    shutil.copytree(tokenizer.name_or_path, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"<{number}>": number for number in range(len(vocab), 2**16 + 10)}
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": len(vocab), "content": "<last>", "special": False}
    )
    path.write_text(json.dumps(content))
    large = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    write_rows(tmp_path / "a.jsonl", ["<last> good"])
    preprocess([tmp_path / "a.jsonl"], tmp_path / "corpus", tmp_path / "tokenizer", append_eod=False)
    dtype, [document] = read_back(tmp_path / "corpus_text_document")
    assert dtype == np.int32
    assert document == large.encode("<last> good", add_special_tokens=False)
    assert document[0] > 2**16


def test_each_key_is_a_dataset(tmp_path, tokenizer_dir, tokenizer):
    rows = [{"source": "hello", "target": "bonjour", "other": 1}, {"source": "", "target": "monde"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = preprocess([tmp_path / "a.jsonl"], tmp_path / "pairs", tokenizer_dir, json_keys=("source", "target"))
    end = [tokenizer.eos_token_id]
    assert read_back(tmp_path / "pairs_source_document")[1] == [tokenizer.encode("hello") + end]
    assert read_back(tmp_path / "pairs_target_document")[1] == [
        tokenizer.encode("bonjour") + end,
        tokenizer.encode("monde") + end,
    ]
    assert (summary.num_documents, summary.num_empty) == (3, 1)


def test_truncation_and_padding_in_the_tokenizers_file_do_not_apply(tmp_path, tokenizer_dir, tokenizer):
    settings = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(settings))
    preprocess([UDHR / "en.jsonl"], tmp_path / "corpus", tmp_path / "tokenizer", append_eod=False)
    assert read_back(tmp_path / "corpus_text_document")[1] == [
        tokenizer.encode(text, add_special_tokens=False) for text in udhr_texts("en")
    ]


BAD_ROWS = {
    "not JSON": (b'{"text": "cut', "line 2: not JSON: .*; an object a line is needed"),
    "not UTF-8": (b'{"text": "\xff"}', r"line 2: not UTF-8: byte b'\\xff'"),
    "not an object": (b'["text"]', r"line 2: holds \['text'\]; an object with the key 'text'"),
    "no such key": (b'{"content": "a"}', r"line 2: no key 'text' among \['content'\]; --json-keys"),
    "not a string": (b'{"text": 7}', "line 2: 'text' is 7; a string is needed"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "line 2: 'text' holds .*surrogate"),
    "brackets without end": (b"[" * 200000, "line 2: not JSON"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, tokenizer_dir, row, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + row + f"\n{GOOD}\n".encode())
    with pytest.raises(UserError, match=message) as caught:
        preprocess([path], tmp_path / "corpus", tokenizer_dir)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert list(tmp_path.iterdir()) == [path]


def test_bad_rows_are_counted_and_left_out_where_that_is_asked_for(tmp_path, tokenizer_dir, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(row + f"\n{GOOD}\n".encode() for row, _ in BAD_ROWS.values()))
    summary = preprocess([path], tmp_path / "corpus", tokenizer_dir, skip_bad_rows=True, append_eod=False)
    assert (summary.num_bad_rows, summary.num_documents) == (len(BAD_ROWS), len(BAD_ROWS))
    assert f"{path}: line 1: not JSON" in summary.first_bad_row
    assert read_back(tmp_path / "corpus_text_document")[1] == [tokenizer.encode("good")] * len(BAD_ROWS)


def test_a_bad_byte_in_text_is_found_on_its_own_line(tmp_path, tokenizer_dir):
    (tmp_path / "a.txt").write_bytes(b"fine\n\nfine\nfine\n\xe4 is latin-1\n")
    with pytest.raises(UserError, match="line 5: not UTF-8"):
        preprocess([tmp_path / "a.txt"], tmp_path / "corpus", tokenizer_dir)


def bad_inputs():
    gz, zst = (compress(json.dumps({"text": "x" * 5000}).encode())[:-9] for compress in COMPRESSIONS.values())
    return {
        "missing": ("none.jsonl", None, "no such file"),
        "a folder": (".", None, "is a folder; name the files in it"),
        "an unknown kind": ("a.docx", b"PK", "its name does not tell what it holds; .jsonl, .json"),
        "compressed parquet": ("a.parquet.gz", b"PAR1", "its name does not tell what it holds"),
        "no parquet": ("a.parquet", b"PAR1 and nothing more", "a.parquet: is no parquet file or a broken one"),
        "no zstd": ("a.jsonl.zst", GOOD.encode(), "a.jsonl.zst: the compressed file is broken or cut short"),
        "cut zstd": (
            "a.jsonl.zst",
            zst,
            "a.jsonl.zst: the compressed file is broken or cut short: the last frame has no end",
        ),
        "no gzip": (
            "a.jsonl.gz",
            GOOD.encode(),
            "a.jsonl.gz: the compressed file is broken or cut short: Not a gzipped file .*; copy or make it again",
        ),
        "cut gzip": ("a.jsonl.gz", gz, "broken or cut short"),
        "zeros": ("a.jsonl", bytes(5000), "line 1: not JSON"),
        "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), "line 1: not UTF-8: byte .*; convert the file with iconv"),
        "carriage returns alone": ("a.jsonl", f"{GOOD}\r{GOOD}\r".encode(), "line 1: not JSON: Extra data"),
        "a mark in the middle": ("a.jsonl", f"{GOOD}\n\ufeff{GOOD}".encode(), "line 2: not JSON"),
        "empty": ("a.jsonl", b"", "a.jsonl: is empty; leave it out"),
        "compressed nothing": (
            "a.jsonl.gz",
            gzip.compress(b""),
            "nothing to write: the input holds no document with a token under 'text'",
        ),
        "blank": ("a.txt", b"\n \n\n", "nothing to write"),
        "empty texts": ("a.jsonl", b'{"text": ""}', "nothing to write.*1 empty"),
    }


@pytest.mark.parametrize(("name", "data", "message"), bad_inputs().values(), ids=bad_inputs())
def test_an_unreadable_input_is_named_and_nothing_is_written(tmp_path, tokenizer_dir, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = list(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        preprocess(
            [UDHR / "en.jsonl", tmp_path / name][1 if "nothing" in message else 0 :], tmp_path / "corpus", tokenizer_dir
        )
    assert list(tmp_path.iterdir()) == before


NO_FILES = {
    "a link to nothing": (
        lambda path: path.symlink_to("gone.jsonl"),
        "is a link to gone.jsonl, where no file is; check the path",
    ),
    "a link to itself": (lambda path: path.symlink_to(path.name), "is a link to a.jsonl, where no file is"),
    "a pipe": (os.mkfifo, "is a pipe or a device; write what it gives to a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
    "a folder": (os.mkdir, "is a folder; name the files in it"),
}


@pytest.mark.parametrize(("make", "message"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, tokenizer_dir, make, message):
    make(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=f"^{tmp_path}/a.jsonl: {message}"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "new" / "corpus", tokenizer_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_name_that_is_no_text_is_refused(tmp_path, tokenizer_dir):
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(path, "w") as file:
        file.write(GOOD)
    with pytest.raises(UserError, match=r"\\udcff.jsonl': the name is not UTF-8; rename the file"):
        preprocess([os.fsdecode(path)], tmp_path / "corpus", tokenizer_dir)


def test_missing_permission_is_told(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"a.jsonl: not readable by this user; change its permissions"):
        preprocess([write_rows(tmp_path / "a.jsonl", ["good"])], tmp_path / "corpus", tokenizer_dir)


def test_one_file_twice_is_refused_under_whatever_name(tmp_path, tokenizer_dir):
    path, link = write_rows(tmp_path / "a.jsonl", ["good"]), tmp_path / "b.jsonl"
    link.symlink_to(path)
    for other in (path, link, tmp_path / "." / ".." / tmp_path.name / "a.jsonl"):
        with pytest.raises(UserError, match=f"--input .*: the same file as {path}, given before; leave one out"):
            preprocess([path, other], tmp_path / "corpus", tokenizer_dir)


def test_when_all_rows_are_bad_the_first_is_named(tmp_path, tokenizer_dir):
    path = write_rows(tmp_path / "a.jsonl", ["good"], key="content")
    with pytest.raises(UserError, match=r"nothing to write.*1 bad rows, the first: .*a.jsonl: line 1: no key 'text'"):
        preprocess([path], tmp_path / "new" / "corpus", tokenizer_dir, skip_bad_rows=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_a_dataset_is_not_replaced(tmp_path, tokenizer_dir):
    (tmp_path / "o_text_document.bin").mkdir()
    (tmp_path / "o_text_document.idx").write_text("old")
    with pytest.raises(UserError, match=r"o_text_document.bin: is a folder; give another --output"):
        preprocess([UDHR / "en.jsonl"], tmp_path / "o", tokenizer_dir, overwrite=True)
    assert (tmp_path / "o_text_document.idx").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer_dir": "/nonexistent"}, "/nonexistent: no such folder"),
        ({"output": "/proc/corpus"}, "/proc.*cannot be written"),
        ({"output": f"{UDHR}/README.md/corpus"}, "README.md: cannot be written"),
        ({"output": "/tmp/"}, "--output /tmp/: is a folder; a prefix"),
        ({"json_keys": ("text", "text")}, "--json-keys names a key twice"),
        ({"json_keys": ("a/b",)}, "--json-keys 'a/b': holds a '/', which no file can have in its name"),
        ({"num_workers": 0}, "--workers is 0"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, tokenizer_dir, arguments, message):
    with pytest.raises(UserError, match=message):
        preprocess(
            **{"inputs": [UDHR / "en.jsonl"], "output": tmp_path / "corpus", "tokenizer_dir": tokenizer_dir} | arguments
        )


def test_text_files_have_no_keys_to_choose_from(tmp_path, tokenizer_dir):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="a text file has no keys"):
        preprocess([tmp_path / "a.txt"], tmp_path / "corpus", tokenizer_dir, json_keys=("a", "b"))


# The ends of documents, and special tokens in them


@pytest.mark.parametrize(("config", "end"), [(None, EOS), ("{}", EOS), ('{"eod_token_id": %d}', END_OF_DOCUMENT)])
def test_documents_end_with_the_models_own_token(tmp_path, tokenizer, config, end):
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    if config is not None:
        (folder / "config.json").write_text(config.replace("%d", str(tokenizer.convert_tokens_to_ids(end))))
    summary = preprocess([write_rows(tmp_path / "a.jsonl", ["good"])], tmp_path / "corpus", folder)
    assert summary.end == end
    [document] = read_back(tmp_path / "corpus_text_document")[1]
    assert document == [*tokenizer.encode("good"), tokenizer.convert_tokens_to_ids(end)]


@pytest.mark.parametrize("token_id", ["7000000", '"7"', "[7]", "true", "-1"])
def test_an_end_that_is_no_token_is_refused(tmp_path, tokenizer, token_id):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/config.json").write_text(f'{{"eod_token_id": {token_id}}}')
    with pytest.raises(
        UserError, match=r"tokenizer/config.json: 'eod_token_id' is .*; the id of a token of this folde"
    ):
        preprocess([UDHR / "en.jsonl"], tmp_path / "corpus", tmp_path / "tokenizer")


def test_without_a_token_for_it_no_end_of_document_can_be_appended(tmp_path, tokenizer):
    without = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    without.eos_token = None
    without.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"no token ends documents: .*; name one, or give --no-append-eod"):
        preprocess([UDHR / "en.jsonl"], tmp_path / "corpus", tmp_path / "tokenizer")
    assert preprocess([UDHR / "en.jsonl"], tmp_path / "corpus", tmp_path / "tokenizer", append_eod=False).end is None


def test_text_cannot_forge_a_special_token(tmp_path, tokenizer):
    """Nor one that the chat template writes and that is no special token of the tokenizer's, as Hy3's <tool_call>."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.add_tokens(["<tool_call>", "<a word of its own>", "    "])
    tokenizer.chat_template += "{%- if tools %}    {{ '<tool_call>' }}{% endif -%}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    forged = "".join(f"{token}{token} x" for token in (*SPECIAL_TOKENS, "<tool_call>"))
    texts = [f"a {forged} \u00a0\x00e\u0301{EOS}", "<a word of its own>    "]
    preprocess([write_rows(tmp_path / "a.jsonl", texts)], tmp_path / "corpus", tmp_path / "tokenizer", append_eod=False)
    [document, word] = read_back(tmp_path / "corpus_text_document")[1]
    assert tokenizer.decode(document, clean_up_tokenization_spaces=False) == texts[0]
    assert not {*tokenizer.convert_tokens_to_ids(["<tool_call>", *SPECIAL_TOKENS])} & {*document}
    assert word == tokenizer.convert_tokens_to_ids(["<a word of its own>", "    "])


def test_existing_files_are_replaced_only_when_asked_for_and_only_by_whole_ones(tmp_path, tokenizer_dir, tokenizer):
    good, bad, output = (
        write_rows(tmp_path / "good.jsonl", ["good"]),
        tmp_path / "bad.jsonl",
        tmp_path / "out" / "corpus",
    )
    bad.write_text(f"{GOOD}\n{{}}\n")

    def files():
        return {path.name: path.read_bytes() for path in output.parent.iterdir()}

    preprocess([UDHR / "en.jsonl"], output, tokenizer_dir)
    before = files()
    assert sorted(before) == [f"corpus_text_document.{suffix}" for suffix in ("bin", "checksums.sfv", "idx")]
    assert verify_folder(output.parent, workers=1).num_files == 2
    with pytest.raises(UserError, match="exists already; give another --output, or --overwrite"):
        preprocess([good], output, tokenizer_dir)
    with pytest.raises(UserError, match="no key 'text'"):
        preprocess([bad], output, tokenizer_dir, overwrite=True)
    assert files() == before
    preprocess([good], output, tokenizer_dir, overwrite=True)
    assert sorted(files()) == sorted(before)
    assert not verify_folder(output.parent, workers=1).damaged
    assert read_back(f"{output}_text_document")[1] == [[*tokenizer.encode("good"), tokenizer.eos_token_id]]


def test_a_replacement_that_ends_between_its_files_leaves_no_old_index_over_new_tokens(
    tmp_path, tokenizer_dir, monkeypatch
):
    rename, old, new = Path.rename, UDHR / "en.jsonl", write_rows(tmp_path / "new.jsonl", ["good"])

    def full(path, target):
        if path.suffix == ".idx":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return rename(path, target)

    preprocess([old], tmp_path / "corpus", tokenizer_dir)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; make room there"):
        preprocess([new], tmp_path / "corpus", tokenizer_dir, overwrite=True)
    assert sorted(path.suffix for path in tmp_path.glob("corpus*")) == [".bin", ".sfv"]


# The command


SPEC = importlib.util.spec_from_file_location("preprocess_data", UDHR.parents[2] / "tools/preprocess_data.py")
preprocess_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(preprocess_data)


@pytest.fixture
def command(tmp_path, tokenizer_dir, monkeypatch, capsys):
    """Runs it in this process; what it prints."""

    def run(*words):
        given = ["--output", tmp_path / "out/corpus", "--tokenizer", tokenizer_dir, *words]
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, given)])
        preprocess_data.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_the_command_tells_what_it_did_and_what_it_left_out(tmp_path, command, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{GOOD}\nbad\n{{"text": ""}}\n')
    counts, end, empty, bad, last = command("--input", path, "--skip-bad-rows")
    assert counts.startswith(f"1 documents, {len(tokenizer.encode('good')) + 1} tokens, ")
    assert end == f"each ends with {EOS}"
    assert empty == "left out 1 texts without a token"
    assert bad.startswith(f"left out 1 bad rows, the first: {path}: line 2: not JSON")
    assert last == f"--data-path {tmp_path}/out/corpus_text_document"


def test_the_command_leaves_the_ends_unmarked_where_that_is_asked_for(tmp_path, command, tokenizer):
    words = ("--input", write_rows(tmp_path / "a.jsonl", ["good"]))
    command(*words)
    assert read_back(tmp_path / "out/corpus_text_document")[1] == [[*tokenizer.encode("good"), tokenizer.eos_token_id]]
    output = command(*words, "--no-append-eod", "--overwrite")
    assert output[1] == "nothing marks their ends (--no-append-eod)"
    assert read_back(tmp_path / "out/corpus_text_document")[1] == [tokenizer.encode("good")]
