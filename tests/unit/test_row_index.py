"""The index of a file of rows: what the encoder says, made once, made anew when anything has changed, and never
half.
"""

import fcntl
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.checksums import MANIFEST
from hymeg.data import index_building, row_index
from hymeg.data.chat import ChatEncoder
from hymeg.data.index_building import RowEncoder, build_indices, build_missing, told_bad_rows, worthwhile_workers
from hymeg.data.row_index import RowIndex, built_beside, index_folder, is_built
from hymeg.data.rows import RowReader
from hymeg.errors import UserError

ROW = {"messages": [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "And to you"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_checkpoint(folder / "hf")
    return str(folder / "hf")


@pytest.fixture
def settings(tokenizer):
    return tokenizer, None, False


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    translations = [
        {"source_lang": "en", "target_lang": "fr", "source": "word " * n, "target": "mot " * n} for n in range(1, 30)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [ROW, *translations, ROW]) + "\n\n")
    return path


def at(path, settings):
    return index_folder(str(path), str(path.parent / "cache"), RowEncoder(*settings).fingerprint)


def build(path, settings, **others):
    """The folder of its index, made."""
    folder = at(path, settings)
    build_indices({str(path): folder}, settings, **others)
    return folder


def test_it_holds_what_the_encoder_says(rows, settings):
    index, reader, encoder = RowIndex(build(rows, settings), str(rows)), RowReader(), ChatEncoder(settings[0])
    lines = rows.read_bytes().splitlines()[:-1]
    assert index.lines.tolist() == list(range(1, len(lines) + 1))
    for number, line in enumerate(lines):
        expected = encoder.encode(reader.parse("", number + 1, line))
        assert np.array_equal(index[number].token_ids, expected.token_ids)
        assert np.array_equal(index[number].trained, expected.trained)
    assert index.lengths().sum() == index.starts[-1]
    assert (index.bad_rows, index.counts) == ([], {"turns": len(lines)})


USER, ASSISTANT = ROW["messages"]
WEIGHED = [
    ROW | {"weight": 0.3},
    {"messages": [USER, ASSISTANT | {"train": False}, USER, ASSISTANT, USER, ASSISTANT | {"weight": 2.5}]},
    ROW | {"weight": 0},
    ROW,
    {"messages": [USER, ASSISTANT | {"weight": 0}]},
]


@pytest.fixture
def weighed(tmp_path):
    path = tmp_path / "weighed.jsonl"
    path.write_text("\n".join(map(json.dumps, WEIGHED)))
    return path


def test_weights_are_kept_and_rows_of_none_are_left_out(weighed, settings):
    """The token that opens a turn, and the EOS before it, part the turns."""
    index, encoder = RowIndex(build(weighed, settings), str(weighed)), ChatEncoder(settings[0])
    plain, turn = (encoder.encode(RowReader().parse("", 1, {"messages": ROW["messages"] * n})) for n in (3, 1))
    of_turns = [0] * 3
    bounds = np.flatnonzero(np.diff(plain.trained.astype(int), prepend=0, append=0)).reshape(3, 2)
    for number, weight in enumerate((0, 1, 2.5)):
        of_turns[number] = np.zeros(len(plain.trained), np.float32)
        of_turns[number][slice(*bounds[number])] = weight
    expected = [turn.trained * np.float32(0.3), sum(of_turns), turn.trained]
    assert (index.lines.tolist(), index.num_without_weight) == ([1, 2, 4], 2)
    for number, weights in enumerate(expected):
        assert index[number].weights.dtype == np.float32
        assert np.array_equal(index[number].weights, weights) and np.array_equal(index[number].trained, weights > 0)
    assert index.counts == {"turns": 5, "turns weighed": 2, "turns not trained": 1}


def test_turns_that_are_trained_or_not_need_no_weights(rows, settings, tmp_path):
    """And a weight of 1 changes nothing in what is kept."""
    lines = [json.loads(line) for line in rows.read_text().splitlines() if line]
    marked = tmp_path / "marked.jsonl"
    marked.write_text("\n".join(json.dumps({"weight": 1} | row) for row in [*lines, WEIGHED[2]]))
    plain, same = build(rows, settings), build(marked, settings)
    for name in ("tokens.bin", "starts.npy", "lines.npy"):
        assert (plain / name).read_bytes() == (same / name).read_bytes()
    assert not (same / "weights.npy").exists() and RowIndex(same, str(marked))[0].weights is None


def test_without_any_weight_there_is_nothing_to_train_on(tmp_path, settings):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(WEIGHED[2]) + "\n" + json.dumps(WEIGHED[4]))
    with pytest.raises(UserError, match=r"rows\.jsonl: every turn of every row has weight 0 \(or train: false\)"):
        build(path, settings)


@pytest.mark.parametrize("name", ["weights.npy", "turns.npy"])
def test_damaged_weights_are_made_again(weighed, settings, name):
    folder = build(weighed, settings)
    for damage in DAMAGES.values():
        assert is_built(folder, str(weighed))
        damage(folder / name)
        assert not is_built(folder, str(weighed))
        build(weighed, settings)


def test_an_index_that_knows_no_weights_is_made_again(rows, settings):
    folder = build(rows, settings)
    summary = json.loads((folder / "index.json").read_text())
    os.unlink(folder / MANIFEST)
    (folder / "index.json").write_text(json.dumps(summary))
    assert is_built(folder, str(rows))
    del summary["is_weighted"]
    (folder / "index.json").write_text(json.dumps(summary))
    assert not is_built(folder, str(rows))


def test_several_processes_make_the_same_of_many_files_together(rows, settings, tmp_path, monkeypatch):
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\n".join(rows.read_bytes().splitlines()[5:9]))
    monkeypatch.setattr("hymeg.data.text_files.BATCH_BYTES", 2000)
    reports = []
    for workers in (1, 2):
        folders = {str(path): tmp_path / f"{path.stem} {workers}" for path in (rows, other)}
        build_indices(folders, settings, workers, reports.append)
    for stem, first in (("rows", rows), ("other", other)):
        for name in ("tokens.bin", "starts.npy", "lines.npy", "index.json"):
            assert (tmp_path / f"{stem} 1" / name).read_bytes() == (tmp_path / f"{stem} 2" / name).read_bytes()
        assert len(RowIndex(tmp_path / f"{stem} 1", str(first))) == {"rows": 31, "other": 4}[stem]
    num_bytes, last = rows.stat().st_size + other.stat().st_size, reports[-1]
    assert len(reports) >= 8 and reports[: len(reports) // 2] == reports[len(reports) // 2 :]
    assert (last.path, last.num_bytes, last.num_rows) == (str(other), num_bytes, 35)
    assert last.num_tokens == sum(RowIndex(folder, path).starts[-1] for path, folder in folders.items())


def test_workers_are_started_for_all_files_together_and_for_every_core(tmp_path, monkeypatch):
    monkeypatch.setattr(index_building, "_BYTES_PER_WORKER", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    paths = [tmp_path / f"{number}" for number in range(20)]
    for path in paths:
        path.write_bytes(bytes(500))
    assert [worthwhile_workers(list(map(str, paths[:number]))) for number in (0, 1, 4, 9, 20)] == [1, 1, 2, 4, 6]


def test_anything_that_changes_tokens_asks_for_another(rows, settings, tmp_path):
    before = build(rows, settings)
    assert is_built(before, str(rows)) and at(rows, settings) == before
    config = tmp_path / "other"
    write_tiny_checkpoint(config)
    with open(config / "chat_template.jinja", "a") as template:
        template.write("{# changed #}")
    assert RowEncoder(str(config)).fingerprint != RowEncoder(*settings).fingerprint


def spoil(path, place):
    """One byte of the file, with its size and times kept, as `rsync --inplace -t` or `cp -p` would leave it."""
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"#")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["start", "middle", "end"])
def test_a_byte_that_changed_is_noticed_wherever_it_is(rows, settings, monkeypatch, place):
    monkeypatch.setattr(row_index, "_END_BYTES", 64)
    before = build(rows, settings)
    spoil(rows, int(place * (rows.stat().st_size - 3)))
    if place != 0.5:  # the ends are part of the folder's name: the old index stays for who has the old file
        assert at(rows, settings) != before
    assert not is_built(at(rows, settings), str(rows))


def test_a_touched_file_is_compared_and_not_tokenized_again(rows, settings, monkeypatch):
    folder, compared = build(rows, settings), []
    digest = row_index.content_digest
    monkeypatch.setattr(row_index, "content_digest", lambda path: compared.append(path) or digest(path))
    assert is_built(folder, str(rows)) and not compared
    os.utime(rows, ns=(0, 0))
    assert is_built(at(rows, settings), str(rows)) and compared == [str(rows)]
    assert is_built(folder, str(rows)) and len(compared) == 1  # known from now on


def test_a_copy_shares_the_index_under_its_own_name(rows, settings, tmp_path):
    folder = build(rows, settings)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / rows.name
    copy.write_bytes(rows.read_bytes())
    again = index_folder(str(copy), str(tmp_path / "cache"), RowEncoder(*settings).fingerprint)
    assert again == folder and is_built(folder, str(copy))
    assert RowIndex(folder, str(copy)).path == str(copy) != RowIndex(folder, str(rows)).path


def test_two_files_that_differ_in_the_middle_alone_do_not_share_an_index(rows, settings, tmp_path, monkeypatch):
    """In a common folder, under one name: the rows of one would stand for those of both."""
    monkeypatch.setattr(row_index, "_END_BYTES", 64)
    other = tmp_path / "other" / rows.name
    other.parent.mkdir()
    other.write_text(rows.read_text().replace("mot mot ", "non non "))
    fingerprint = RowEncoder(*settings).fingerprint
    folders = {str(path): index_folder(str(path), str(tmp_path / "cache"), fingerprint) for path in (rows, other)}
    assert len(set(folders.values())) == 1
    with pytest.raises(UserError, match=f"^{other}: has the name, length, beginning and end of {rows}, and .* rename"):
        build_missing(folders, settings, io.StringIO())
    other.write_text(rows.read_text())
    build_missing(folders, settings, io.StringIO())


def test_older_indices_are_named_when_another_is_made(rows, settings):
    old, output = build(rows, settings), io.StringIO()
    (old.parent / f"another-{'0' * 16}").mkdir()
    with open(rows, "a") as file:
        file.write(json.dumps(ROW) + "\n")
    build_missing({str(rows): at(rows, settings)}, settings, output)
    done, told = output.getvalue().splitlines()
    index = RowIndex(at(rows, settings), str(rows))
    assert done == f"hymeg: indices made: 1, 32 rows, {index.starts[-1]:,} tokens"
    assert told == (f"hymeg: {rows}: 1 older indices, 0.0 GB, to delete if no run uses them: {old}")
    output.truncate(0)
    build_missing({str(rows): at(rows, settings)}, settings, output)
    assert output.getvalue() == ""


# Rows that cannot be trained on

BAD_ROWS = (
    b'{"messages": []}',
    json.dumps({"messages": [*ROW["messages"], {"role": "system", "content": "late"}]}).encode(),
    b"{",
    b'{"messages": []}',
)


@pytest.fixture
def bad_rows(rows):
    good = rows.read_bytes().splitlines()
    rows.write_bytes(b"\n".join([good[0], BAD_ROWS[0], good[1], *BAD_ROWS[1:], good[2]]))
    return rows


@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_a_bad_row_is_named_and_nothing_is_left(rows, settings, number):
    rows.write_bytes(json.dumps(ROW).encode() + b"\n" + BAD_ROWS[number])
    with pytest.raises(UserError, match=r"rows\.jsonl: line 2: .* \(--sft-bad-rows skip leaves such rows out\)$"):
        build(rows, settings)
    assert not list(rows.parent.glob("cache/*"))


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(bad_rows, settings):
    index = RowIndex(build(bad_rows, (*settings[:2], True)), str(bad_rows))
    assert index.lines.tolist() == [1, 3, 7]
    encoder, lines = ChatEncoder(settings[0]), bad_rows.read_bytes().splitlines()
    for row, line in enumerate(index.lines):
        expected = encoder.encode(RowReader().parse("", 1, lines[line - 1]))
        assert np.array_equal(index[row].token_ids, expected.token_ids)
    assert [(entry.count, entry.first.split(": ")[1]) for entry in index.bad_rows] == [
        (2, "line 2"),
        (1, "line 4"),
        (1, "line 5"),
    ]
    told = told_bad_rows(index.bad_rows, len(index))
    assert told[0] == "4 of 7 rows cannot be trained on and are left out"
    assert told[1].startswith(f"  2: 'messages' is ... (the first: {bad_rows}: line 2: 'messages' is [];")
    assert len(told) == 4 and told_bad_rows([], 3) == []


def test_many_reasons_are_not_told_apart(rows, settings, monkeypatch):
    monkeypatch.setattr(index_building, "_MAX_REASONS", 2)
    bad = [json.dumps({"messages": [{"role": f"role {letter}", "content": "a"}]}) for letter in "abcd"]
    rows.write_text("\n".join([json.dumps(ROW), *bad]))
    index = RowIndex(build(rows, (*settings[:2], True)), str(rows))
    assert [(entry.count, entry.reason[-8:]) for entry in index.bad_rows] == [
        (1, "'role a'"),
        (1, "'role b'"),
        (2, " reasons"),
    ]


def test_where_no_row_is_good_the_first_is_named(rows, settings):
    rows.write_bytes(b"\n".join(BAD_ROWS))
    with pytest.raises(
        UserError, match=r"rows\.jsonl: no row can be trained on, of 4; the first: .*: line 1: 'messages'"
    ):
        build(rows, (*settings[:2], True))


# Damage, and builds that end early

DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": os.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "lines.npy", "index.json"])
def test_a_damaged_index_is_none_and_is_made_again(rows, settings, name, damage):
    folder = build(rows, settings)
    damage(folder / name)
    assert not is_built(folder, str(rows))
    build(rows, settings)
    assert is_built(folder, str(rows)) and os.listdir(folder.parent) == [folder.name]


def test_damaged_arrays_beside_it_are_made_again(rows, settings):
    index = RowIndex(build(rows, settings), str(rows))
    for damage in DAMAGES.values():
        assert index.cached("name", lambda: {"numbers": np.arange(9)})["numbers"].sum() == 36
        assert index.is_cached("name")
        damage(index.folder / "name" / "numbers.npy")
        assert not index.is_cached("name")


def test_a_file_that_grows_while_it_is_read_is_refused(rows, settings):
    def grow(progress):
        with open(rows, "a") as file:
            file.write(json.dumps(ROW) + "\n")

    with pytest.raises(UserError, match=r"rows\.jsonl: has changed while it was read; start again once it is complete"):
        build(rows, settings, report=grow)
    assert os.listdir(rows.parent / "cache") == []


def test_a_long_name_leaves_room_for_the_index(rows, settings):
    long = rows.rename(rows.with_name("n" * 200 + "文" * 10 + ".jsonl"))
    assert is_built(build(long, settings), str(long))


def test_without_a_row_there_is_nothing_to_train_on(rows, settings):
    rows.write_text("\n\n")
    with pytest.raises(UserError, match="holds no row"):
        build(rows, settings)


def test_what_a_killed_build_left_is_removed_and_what_is_under_way_is_not(tmp_path):
    """Whoever writes holds a lock: that of a process is gone with it, and holds across containers of one name."""
    folder, build = tmp_path / "index", f".index.{os.uname().nodename}."
    for name in ("11.partial", "12.partial", "14.partial"):
        (tmp_path / f"{build}{name}" / "seen").mkdir(parents=True)
    (tmp_path / ".index.elsewhere.11.partial").mkdir()
    for number in (11, 12, 16):  # killed while it wrote, alive, killed before it wrote
        (tmp_path / f"{build}{number}.lock").touch()
    with open(tmp_path / f"{build}12.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with built_beside(folder, lambda: False) as partial:
            (partial / "a.bin").write_bytes(b"new")
            there = [sys.executable, "-c", "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'r+'), 6)"]
            tried = subprocess.run([*there, str(partial.with_suffix(".lock"))], capture_output=True, text=True)
            assert "BlockingIOError" in tried.stderr  # another build would see that this one lives
    left = [f"{build}12.lock", f"{build}12.partial", ".index.elsewhere.11.partial", folder.name]
    assert sorted(os.listdir(tmp_path)) == sorted(left)
    assert os.listdir(folder) == ["a.bin"]


def test_a_lock_that_was_taken_for_a_leftover_s_is_made_anew(tmp_path, monkeypatch):
    real, taken = fcntl.flock, []

    def flock(file, how):
        if how == fcntl.LOCK_EX and not taken:
            taken.append(file.name)
            os.unlink(file.name)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with built_beside(tmp_path / "index", lambda: False) as partial:
        assert os.path.exists(taken[0]) and taken[0] == str(partial.with_suffix(".lock"))
    assert os.listdir(tmp_path) == ["index"]


@pytest.mark.parametrize(("is_good", "content"), [(True, b"theirs"), (False, b"mine")])
def test_who_comes_second_keeps_what_the_first_one_made(tmp_path, is_good, content):
    """Two jobs started together: nothing that is whole is deleted."""
    folder = tmp_path / "index"
    with built_beside(folder, lambda: is_good) as partial:
        (partial / "a.bin").write_bytes(b"mine")
        folder.mkdir()
        (folder / "a.bin").write_bytes(b"theirs")
    assert (folder / "a.bin").read_bytes() == content
    assert os.listdir(tmp_path) == ["index"]


def test_where_nothing_can_be_written_it_is_said(rows, settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*--data-cache-path"):
        build_indices({str(rows): tmp_path / "file" / "index"}, settings)
