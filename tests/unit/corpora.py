"""What the tests of reading and of preprocessing text share."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from hymeg.data.text_files import read_batches

UDHR = Path(__file__).parents[2] / "examples/data/udhr"
COMPRESSIONS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def udhr_texts(language):
    return [json.loads(line)["text"] for line in (UDHR / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def all_rows(path):
    return [row for batch in read_batches(str(path)) for row in batch.rows]


def read_back(prefix):
    """(dtype, the documents as lists of token ids) of a dataset, by Megatron's reader."""
    dataset = IndexedDataset(str(prefix))
    boundaries = dataset.document_indices.tolist()
    documents = [np.concatenate(dataset[start:end]).tolist() for start, end in itertools.pairwise(boundaries)]
    return dataset.index.dtype, documents
