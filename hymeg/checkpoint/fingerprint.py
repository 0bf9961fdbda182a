"""What tells one model's weights from another's, in whatever pieces they are at hand: a sum over all their elements.

Each element counts as the 16 bits of its bf16 form, times a factor of its column, times one of its row and tensor; all
modulo 2^48. So parts may be added in any order, by whoever holds them, and a change of any element changes the sum, but
for one of a fraction of bf16's precision.
"""

import hashlib

import torch

MODULUS = 2**48
_ELEMENTS = 2**22  # at a time


def part_of_fingerprint(key: str, rows: torch.Tensor, first_row: int = 0, first_column: int = 0) -> int:
    """The summand of `rows` `[n, columns]`, which are rows and columns, from these on, of the distributed tensor `key`
    seen as a matrix of its last axis.
    """
    if rows.numel() == 0:
        return 0
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    columns = _factors(torch.arange(rows.shape[1], device=rows.device) + first_column)
    total, step = 0, max(1, _ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        bits = rows[start : start + step].to(torch.bfloat16).contiguous().view(torch.int16).long()
        of_rows = _factors(torch.arange(len(bits), device=rows.device) + first_row + start + seed)
        total += int(((bits * columns).sum(1) * of_rows).sum())
    return total % MODULUS


def shown_fingerprint(total: int) -> str:
    """The sum of all parts, as it is written down."""
    return f"{total % MODULUS:012x}"


def _factors(numbers: torch.Tensor) -> torch.Tensor:
    """An odd factor for each number (int64), as good as drawn: the mixing of splitmix64 (Steele et al. 2014)."""
    numbers = numbers * -7046029254386353131
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    return (numbers ^ (numbers >> 27)) * -7723592293110705685 | 1
