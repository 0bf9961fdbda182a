"""Values of a row, and what is said of wrong ones."""

import json
from typing import Any

from hymeg.errors import UserError
from hymeg.files import parse_row, shown


def decoded(where: str, text: str, *needed: str) -> Any:
    """`parse_row`, which moreover raises UserError where a string is no text."""
    value = parse_row(where, text, *needed)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: holds {shown(error.object[error.start])}, half of a surrogate pair, which is no text"
            ) from error
    return value


def text_of(where: str, row: dict, key: str) -> str:
    """The string under `key`. Raises UserError where there is none, or nothing but blanks in it."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} {found(row, key)}; a string is needed")
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; there is nothing to learn from such a row: leave it out")
    return value


def one_of(where: str, row: dict, keys: tuple[str, ...]) -> tuple[str, Any]:
    """Which of `keys`, names of the same thing, the row has, and its value; the first name and None where it has none.
    Raises UserError where two of them differ.
    """
    given = [key for key in keys if key in row] or keys[:1]
    for other in given[1:]:
        if row[other] != row[given[0]]:
            raise UserError(f"{where}: has {given[0]!r} and also {other!r}, which mean the same; keep one")
    return given[0], row.get(given[0])


def found(row: dict, key: str) -> str:
    return f"is {shown(row[key])}" if key in row else f"is missing among {shown(list(row))}"
