"""Parquet reads as JSON lines do, and what is wrong with it is told."""

import datetime
import importlib.util

import pyarrow
import pyarrow.parquet
import pytest
from corpora import all_rows, read_back, udhr_texts, write_rows

from hymeg.data import text_files
from hymeg.data.corpus import preprocess
from hymeg.data.rows import RowReader
from hymeg.data.text_files import read_batches
from hymeg.errors import UserError


def write_parquet(path, **columns):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    return path


def test_parquet_reads_as_json_lines_do(tmp_path, tokenizer_dir):
    texts = udhr_texts("zh") * 20
    write_parquet(tmp_path / "a.parquet", number=range(len(texts)), text=texts)
    write_rows(tmp_path / "a.jsonl", texts)
    for suffix in ("parquet", "jsonl"):
        summary = preprocess([tmp_path / f"a.{suffix}"], tmp_path / suffix, tokenizer_dir)
        assert summary.num_bytes_read == summary.total_bytes
    assert read_back(tmp_path / "parquet_text_document") == read_back(tmp_path / "jsonl_text_document")


def test_parquet_batches_are_bounded_and_tell_how_far_the_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BATCH_BYTES", 1000)
    texts = [f"{number:0{10 + number % 40}}" for number in range(3000)]
    path = write_parquet(tmp_path / "a.parquet", text=texts, other=["x" * 100] * 3000)
    batches = list(read_batches(str(path), ("text",)))
    rows = [row for batch in batches for row in batch.rows]
    assert rows == [(number, {"text": text}) for number, text in enumerate(texts, start=1)]
    assert all(sum(len(row["text"]) for _, row in batch.rows) < 1050 for batch in batches)
    assert len(batches) < 150
    assert all(batch.num_bytes_read > 0 for batch in batches)
    assert sum(batch.num_bytes_read for batch in batches) == path.stat().st_size


def test_conversations_of_parquet_are_rows_too(tmp_path):
    messages = [
        {"role": "user", "content": "hi", "reasoning_content": None},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    ]
    path = write_parquet(tmp_path / "a.parquet", messages=[messages], source=[None], reasoning_effort=["low"])
    [(number, raw)] = all_rows(path)
    conversation = RowReader().parse(str(path), number, raw)
    assert conversation.messages == [{"role": "user", "content": "hi"}, messages[1]]
    assert (conversation.reasoning_effort, conversation.where) == ("low", f"{path}: row 1")


def test_what_a_struct_of_parquet_lacks_is_not_made_up(tmp_path):
    def calling(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "42"},
        ]

    def tool(name, **properties):
        function = {"name": name, "parameters": {"type": "object", "properties": properties}}
        return {"type": "function", "function": function}

    rows = [
        {"messages": calling("weather", {"city": "Bern"}), "tools": [tool("weather", city={"type": "string"})]},
        {
            "messages": calling("add", {"a": 1, "b": [2, None], "deep": [{"c": {"d": 0.5, "e": False}}]}),
            "tools": [tool("add", a={"type": "number"}, b={"type": "array"})],
        },
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [RowReader().parse("a.parquet", number, row) for number, row in all_rows(tmp_path / "a.parquet")]
    assert [conversation.messages for conversation in read] == [row["messages"] for row in rows]
    assert [conversation.tools for conversation in read] == [row.get("tools") for row in rows]
    assert [conversation.where for conversation in read] == [f"a.parquet: row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None], "row 2: 'text' is null; a string is needed"),
        ([1, 2], "row 1: 'text' is 1; a string"),
        ([b"a", b"\n\xff"], r"row 2: not UTF-8: byte b'\\xff'"),
        (pyarrow.array([b"a", b"\xe4"], pyarrow.binary()).view(pyarrow.string()), r"row 2: not UTF-8: byte b'\\xe4'"),
        ([datetime.date(2000, 1, 2)], "row 1: 'text' is {'date': '2000-01-02'}; a string"),
        ([{"a": "b"}], "row 1: 'text' is {'a': 'b'}; a string"),
    ],
    ids=["null", "numbers", "bytes", "latin-1", "dates", "structs"],
)
def test_a_bad_row_of_parquet_is_named(tmp_path, tokenizer_dir, column, message):
    path = write_parquet(tmp_path / "a.parquet", text=column)
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        preprocess([path], tmp_path / "corpus", tokenizer_dir)


def test_a_missing_column_is_named(tmp_path, tokenizer_dir):
    path = write_parquet(tmp_path / "a.parquet", content=["a"])
    with pytest.raises(
        UserError, match=r"a.parquet: no column 'text' among \['content'\]; --json-keys names the columns to read"
    ):
        preprocess([path], tmp_path / "corpus", tokenizer_dir)


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"^.*a.parquet: two columns are called 'text', of which"):
        list(read_batches(str(path)))


def test_a_cut_parquet_file_is_named(tmp_path, tokenizer_dir):
    path = write_parquet(tmp_path / "a.parquet", text=[str(number) for number in range(1000)])
    whole = path.read_bytes()
    for broken in (whole[:-20], b"PAR1" + b"\x00" * 500 + whole[504:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a.parquet: is no parquet file or a broken one: \w"):
            preprocess([path], tmp_path / "corpus", tokenizer_dir)


def test_without_pyarrow_parquet_is_refused_with_what_to_install(tmp_path, tokenizer_dir, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"a.parquet: reading parquet needs pyarrow; install it \(pip install 'hymeg\[parquet\]'\)"
    ):
        preprocess([path], tmp_path / "corpus", tokenizer_dir)
