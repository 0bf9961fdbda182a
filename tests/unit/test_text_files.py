"""Files of text, plain and compressed, read in batches that fit into memory."""

import subprocess
import sys

import pytest
from corpora import COMPRESSIONS, UDHR, all_rows

from hymeg.data import text_files
from hymeg.data.text_files import read_batches
from hymeg.errors import UserError


def test_json_lines_keep_their_numbers_and_lose_their_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert all_rows(path) == [(1, b'{"text": "a"}'), (4, b'{"text": "b"}')]


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\n  still one\n\n \t \n\ntwo\n\nthree\nstill three")
    assert all_rows(path) == [(3, b"one\n  still one"), (8, b"two"), (10, b"three\nstill three")]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_compressed_files_read_as_plain_ones(tmp_path, language, suffix):
    plain, path = UDHR / f"{language}.jsonl", tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](plain.read_bytes()))
    assert all_rows(path) == all_rows(plain)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_frames_one_after_another_are_one_file(tmp_path, suffix):
    compress, path = COMPRESSIONS[suffix], tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"one\n\nt") + compress(b"") + compress(b"wo" * 5000))
    assert all_rows(path) == [(1, b"one"), (3, b"t" + b"wo" * 5000)]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_well_compressed_rows_do_not_fill_the_memory(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix]((b" " * 50_000 + b"{}\n") * 4000))  # 200 MB
    program = f"""
import resource
from hymeg.data.rows import RowReader
from hymeg.data.text_files import read_batches
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(len(batch.rows) for batch in read_batches({str(path)!r})) == 4000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kib = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert kib < 60_000


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_batches_are_bounded_and_tell_how_far_the_file_is_read(tmp_path, monkeypatch, suffix):
    data = b"".join(b'{"text": "%d"}\n\n' % number for number in range(3000))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESSIONS.get(path.suffix, bytes)(data))
    whole = all_rows(path)
    monkeypatch.setattr(text_files, "BATCH_BYTES", 1000)
    batches = list(read_batches(str(path)))
    assert [row for batch in batches for row in batch.rows] == whole
    assert len(whole) == 3000
    assert all(sum(len(row) for _, row in batch.rows) < 1020 for batch in batches)
    assert sum(batch.num_bytes_read for batch in batches) == path.stat().st_size


def test_a_document_of_many_lines_is_as_long_as_they_are_together(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_bytes((b"x" * 49 + b"\n" + b"x" * 49 + b"\n\n") * 5)
    assert len(all_rows(path)) == 5
    path.write_bytes(b"short\n\n" + (b"x" * 33 + b"\n") * 3)
    with pytest.raises(UserError, match="line 3: a document of more than"):
        all_rows(path)


@pytest.mark.parametrize(("name", "first_line"), [("a.jsonl", 2), ("a.txt", 3)])
def test_a_row_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name, first_line):
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 100)
    path = tmp_path / name
    path.write_bytes(b"short\n\nlong\n" + b"x" * 200 if name.endswith(".txt") else b"short\n" + b"x" * 200)
    with pytest.raises(UserError, match=f"line ({first_line}|{first_line + 1}): a document of more than"):
        all_rows(path)
