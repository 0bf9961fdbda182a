"""The fingerprint of weights, which checkpoints of adapters hold."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from hymeg import platform

platform.install()

from hymeg.checkpoint.fingerprint import MODULUS, part_of_fingerprint, shown_fingerprint  # noqa: E402
from hymeg.checkpoint.mapping import VOCABULARY_KEYS  # noqa: E402
from hymeg.training.adapters import _part  # noqa: E402


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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("num_padding", [2, 8])
def test_parts_of_the_vocabulary_make_the_whole_without_its_padding(axis, num_padding):
    """The last of eight ranks may hold nothing but padding."""
    whole = torch.randn(16 - num_padding, 16)
    padded = torch.cat([whole, torch.full((num_padding, 16), torch.nan)])
    key, total = VOCABULARY_KEYS[0], 0
    for number, part in enumerate(padded.chunk(8, axis)):
        offset = (2 * number, 0) if axis == 0 else (0, 2 * number)
        total += _part(SimpleNamespace(key=key, data=part, global_shape=(16, 16), global_offset=offset), len(whole))
    assert total % MODULUS == part_of_fingerprint(key, whole)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_of_experts_make_the_whole(axis):
    whole = torch.randn(4, 6, 8)
    total = 0
    for number, part in enumerate(whole.chunk(2, axis)):
        offset = tuple(number * part.shape[a] if a == axis else 0 for a in range(3))
        total += _part(SimpleNamespace(key="x", data=part, global_shape=(4, 6, 8), global_offset=offset), 0)
    assert total % MODULUS == part_of_fingerprint("x", whole.view(24, 8))
