"""Batches encoded by several processes: in order, in bounded memory, and who dies is told."""

import os

import pytest

from hymeg.data.text_files import Batch
from hymeg.data.workers import encode_all
from hymeg.errors import UserError


def batches(number):
    return [Batch(f"{index}", [], index) for index in range(number)]


def repeated(times):
    """Encodes a batch as its path, so many times."""
    return lambda batch: batch.path * times


def failing():
    def encode(batch):
        raise UserError(f"batch {batch.path} is bad")

    return encode


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_come_in_order_and_are_not_all_read_at_once(num_workers):
    read = []
    encoded = encode_all(map(lambda batch: read.append(batch) or batch, batches(50)), repeated, (3,), num_workers)
    assert next(encoded) == "000"
    assert len(read) <= 2 * num_workers
    assert list(encoded) == [f"{index}" * 3 for index in range(1, 50)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_wrong_with_a_batch_is_said(num_workers):
    with pytest.raises(UserError, match=r"^batch 0 is bad$"):
        list(encode_all(batches(3), failing, (), num_workers))


def test_a_process_that_dies_is_told_in_one_line():
    with pytest.raises(UserError, match=r"^a worker process died, .*; try fewer --workers \(2 now\)$"):
        list(encode_all(batches(3), os._exit, (3,), 2))
