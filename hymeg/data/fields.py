"""Values of a row, and what is said of wrong ones. Where the row stands is said by who reads it."""

import json
from typing import Any

from hymeg.errors import UserError
from hymeg.files import parse_row, shown

WEIGHTS = ("weight", "loss_weight", "loss_scale")
SWITCHES = ("loss", "train", "training", "trainable")
"""Keys by which trainers say how much, and whether, a turn or a row is trained."""
_LEAST_WEIGHT, _LARGEST_WEIGHT = 1e-6, 1e6  # products of two are far from the bounds of fp32


def wrong(row: dict, key: str, needed: str) -> UserError:
    found = f"is {shown(row[key])}" if key in row else f"is missing among {shown(list(row))}"
    return UserError(f"{key!r} {found}; {needed}")


def not_text(error: UnicodeError) -> str:
    """What is said of bytes that are no UTF-8, and of a string that has none."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {shown(error.object[error.start : error.start + 1])}; convert the file with iconv"
    return f"holds {shown(error.object[error.start])}, half of a surrogate pair, which is no text"


def decoded(text: str, *needed: str) -> Any:
    """`parse_row`, which moreover raises UserError where a string is no text."""
    value = parse_row(text, *needed)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(not_text(error)) from error
    return value


def text_of(row: dict, key: str) -> str:
    """The string under `key`. Raises UserError where there is none, or nothing but blanks in it."""
    value = row.get(key)
    if not isinstance(value, str):
        raise wrong(row, key, "a string is needed")
    if not value.strip():
        raise UserError(f"{key!r} is empty; there is nothing to learn from such a row: leave it out")
    return value


def one_of(row: dict, keys: tuple[str, ...]) -> tuple[str, Any]:
    """Which of `keys`, names of the same thing, the row has, and its value; the first name and None where it has none.
    Raises UserError where two of them differ.
    """
    given = [key for key in keys if key in row] or keys[:1]
    for other in given[1:]:
        if row[other] != row[given[0]]:
            raise UserError(f"has {given[0]!r} and also {other!r}, which mean the same; keep one")
    return given[0], row.get(given[0])


def weight_of(row: dict, keys: tuple[str, ...]) -> float:
    """How much is trained what the row or message says under one of `keys`; 1 where it says nothing. Raises UserError
    where two of them differ, or one is no weight.
    """
    key, value = one_of(row, keys)
    if value is None:
        return 1.0
    if key in SWITCHES and value not in (True, False):
        raise wrong(row, key, "true or false is needed (a weight goes under 'weight')")
    if not isinstance(value, int | float) or not (value == 0 or _LEAST_WEIGHT <= value <= _LARGEST_WEIGHT):
        raise wrong(row, key, f"0 or a number from {_LEAST_WEIGHT:g} to {_LARGEST_WEIGHT:g} is needed")
    return float(value)
