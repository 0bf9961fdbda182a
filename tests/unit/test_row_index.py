"""The index of a file of rows: what the encoder says, made once, made anew when anything has changed, and never
half.
"""

import json
import os

import numpy as np
import pytest

from hymeg.data.chat import ChatEncoder
from hymeg.data.row_index import RowEncoder, RowIndex, build_index, index_folder, is_built
from hymeg.data.rows import RowReader
from hymeg.errors import UserError
from hymeg.hf.tiny_checkpoint import write_tiny_checkpoint

ROW = {"messages": [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "And to you"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_checkpoint(folder / "hf")
    return str(folder / "hf")


@pytest.fixture
def settings(tokenizer):
    return tokenizer, None, None


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    translations = [
        {"source_lang": "en", "target_lang": "fr", "source": "word " * n, "target": "mot " * n} for n in range(1, 30)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [ROW, *translations, ROW]) + "\n\n")
    return path


def at(path, settings):
    return index_folder(str(path), path.parent / "cache", RowEncoder(*settings).fingerprint)


def test_it_holds_what_the_encoder_says(rows, settings):
    build_index(str(rows), at(rows, settings), settings)
    index, reader, encoder = RowIndex(at(rows, settings)), RowReader(), ChatEncoder(settings[0])
    lines = rows.read_bytes().splitlines()[:-1]
    assert index.lines.tolist() == list(range(1, len(lines) + 1))
    num_trained = 0
    for number, line in enumerate(lines):
        expected = encoder.encode(reader.parse("", number + 1, line))
        assert np.array_equal(index[number].token_ids, expected.token_ids)
        assert np.array_equal(index[number].trained, expected.trained)
        num_trained += expected.trained.sum()
    assert index.num_trained == num_trained > 0
    assert index.lengths().sum() == index.starts[-1]


def test_several_processes_make_the_same(rows, settings, tmp_path):
    for workers in (1, 2):
        build_index(str(rows), tmp_path / str(workers), settings, workers)
    for name in ("tokens.bin", "starts.npy", "lines.npy"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_anything_that_changes_tokens_asks_for_another(rows, settings, tmp_path):
    before = at(rows, settings)
    build_index(str(rows), before, settings)
    assert is_built(before) and at(rows, settings) == before
    os.utime(rows, ns=(0, 0))
    assert at(rows, settings) != before
    config = tmp_path / "other"
    write_tiny_checkpoint(config)
    with open(config / "chat_template.jinja", "a") as template:
        template.write("{# changed #}")
    assert RowEncoder(str(config), None, None).fingerprint != RowEncoder(*settings).fingerprint


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": os.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "lines.npy", "index.json"])
def test_a_damaged_index_is_none_and_is_made_again(rows, settings, name, damage):
    folder = at(rows, settings)
    build_index(str(rows), folder, settings)
    damage(folder / name)
    assert not is_built(folder)
    build_index(str(rows), folder, settings)
    assert is_built(folder)


def test_damaged_arrays_beside_it_are_made_again(rows, settings):
    build_index(str(rows), at(rows, settings), settings)
    index = RowIndex(at(rows, settings))
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
        build_index(str(rows), at(rows, settings), settings, report=grow)
    assert os.listdir(rows.parent / "cache") == []


def test_a_long_name_leaves_room_for_the_index(rows, settings):
    long = rows.rename(rows.with_name("n" * 200 + "文" * 10 + ".jsonl"))
    build_index(str(long), at(long, settings), settings)
    assert is_built(at(long, settings))


def test_a_wrong_row_is_named_and_nothing_is_left(rows, settings):
    rows.write_text(json.dumps(ROW) + '\n{"messages": []}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: line 2"):
        build_index(str(rows), at(rows, settings), settings)
    assert os.listdir(rows.parent / "cache") == []


def test_without_a_row_there_is_nothing_to_train_on(rows, settings):
    rows.write_text("\n\n")
    with pytest.raises(UserError, match="holds no row"):
        build_index(str(rows), at(rows, settings), settings)


def test_what_a_killed_build_left_is_removed(rows, settings):
    folder = at(rows, settings)
    left = folder.with_name(f".{folder.name}.{os.uname().nodename}.999999999.partial")
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(bytes(8))
    assert not is_built(folder)
    build_index(str(rows), folder, settings)
    assert os.listdir(folder.parent) == [folder.name]


def test_where_nothing_can_be_written_it_is_said(rows, settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*--data-cache-path"):
        build_index(str(rows), tmp_path / "file" / "index", settings)
