"""tools/preprocess_data.py as a user runs it: the datasets, the last lines, the exit codes, and nothing left behind by
a run that failed.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hymeg import platform
from hymeg.hf.tokenizer import EOS, train_tiny_tokenizer

ROOT = Path(__file__).parents[2]
UDHR = sorted((ROOT / "examples/data/udhr").glob("*.jsonl"))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tiny_tokenizer((path.read_text(encoding="utf-8") for path in UDHR), vocab_size=1000).save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="module")
def large_input(tmp_path_factory):
    """Several batches of documents of many lengths."""
    texts = [json.loads(line)["text"] for path in UDHR for line in path.read_text(encoding="utf-8").splitlines()]
    path = tmp_path_factory.mktemp("input") / "large.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(7000):
            file.write(json.dumps({"text": f"{number} " + texts[number * 7 % len(texts)]}, ensure_ascii=False) + "\n")
    assert path.stat().st_size > 2 << 20
    return path


def preprocess_data(*arguments, **options):
    command = [sys.executable, ROOT / "tools/preprocess_data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, **options)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer_dir, large_input):
    outputs = {}
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "corpus"
        done = preprocess_data(
            "--input",
            *UDHR,
            large_input,
            "--output",
            prefix,
            "--tokenizer",
            tokenizer_dir,
            "--workers",
            workers,
        )
        assert done.returncode == 0, done.stderr
        first, end, last = done.stdout.splitlines()
        assert end == f"each ends with {EOS}"
        assert last == f"--data-path {prefix}_text_document"
        assert first.startswith("7,150 documents, ")
        outputs[workers] = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    assert sorted(outputs[1]) == [f"corpus_text_document.{suffix}" for suffix in ("bin", "checksums.sfv", "idx")]
    assert outputs[1] == outputs[2]

    platform.install()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = [
        json.loads(line)["text"]
        for path in (*UDHR, large_input)
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    dataset = IndexedDataset(str(prefix) + "_text_document")
    assert len(dataset) == len(texts) == len(dataset.document_indices) - 1
    for index in (*range(150), *range(150, len(texts), 97)):
        assert dataset[index].tolist() == [
            *tokenizer.encode(texts[index], add_special_tokens=False),
            tokenizer.eos_token_id,
        ]


def test_a_bad_row_far_into_the_input_ends_in_one_line_and_no_files(tmp_path, tokenizer_dir, large_input):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(large_input.read_bytes() + b'{"txt": "misspelt"}\n')
    done = preprocess_data(
        "--input", path, "--output", tmp_path / "corpus", "--tokenizer", tokenizer_dir, "--workers", 1
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        f"error: {path}: line 7001: no key 'text' among ['txt']; --json-keys names the keys to read"
        in done.stderr.splitlines()
    )
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_in_one_line_and_no_files(tmp_path, tokenizer_dir, large_input):
    def no_file_above_64_kib():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = preprocess_data(
        "--input",
        large_input,
        "--output",
        tmp_path / "corpus",
        "--tokenizer",
        tokenizer_dir,
        preexec_fn=no_file_above_64_kib,
    )
    assert done.returncode == 2
    assert (
        f"error: {tmp_path}: cannot be written: File too large; make room there, or give another --output"
        in done.stderr.splitlines()
    )
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []
