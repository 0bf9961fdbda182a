"""The fingerprint of weights, which checkpoints of adapters hold."""

import hashlib

import torch

from hymeg.checkpoint.fingerprint import part_of_fingerprint, shown_fingerprint


def test_the_fingerprint_of_a_base_is_the_sum_that_is_written_down():
    """Computed again with Python's whole numbers: what a checkpoint holds must be the same in every version."""

    def signed(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    def factor(number: int) -> int:
        number = signed(number * 0x9E3779B97F4A7C15)
        number = signed((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9)
        return signed((number ^ (number >> 27)) * 0x94D049BB133111EB) | 1

    rows = torch.tensor([[1.0, -2.5, 0.0], [3e-3, 7.0, -1e20]])
    bits = rows.bfloat16().view(torch.int16).tolist()
    seed = int.from_bytes(hashlib.sha256(b"decoder.weight").digest()[:7], "big")
    expected = sum(
        number * factor(column + 5) * factor(row + 40 + seed)
        for row, numbers in enumerate(bits)
        for column, number in enumerate(numbers)
    )
    found = part_of_fingerprint("decoder.weight", rows, 40, 5)
    assert shown_fingerprint(found) == f"{expected % 2**48:012x}"
    assert part_of_fingerprint("decoder.weight", rows[:0]) == 0
