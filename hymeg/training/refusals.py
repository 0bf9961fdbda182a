"""Flags that are refused, as the table says (`hymeg/flag_table.py`), and how a flag is shown to who typed it."""

import argparse
import enum
import os
import re
from collections.abc import Mapping
from typing import Any

from hymeg.errors import UserError
from hymeg.flag_table import ON_CPU, WITHOUT, Row

Sources = dict[str, tuple[str, str]]
"""Destination -> the option as it was typed, and "FILE, line N" or, for the command line, ""."""


def refuse(
    parser: argparse.ArgumentParser,
    said: dict[str, Any],
    sources: Sources,
    defaults: Mapping,
    args: Mapping,
    rows: list[Row],
) -> None:
    """Refuse what was said where one of `rows` does. `args`: what all flags have become, for rows that need another."""
    for dest, value in said.items():
        option = sources[dest][0]
        for row in rows:
            if not row.names(dest) or (refused := row.refused(named(value), named(defaults.get(dest)))) is None:
                continue
            instead = row.instead or f"leave {option} out"
            if row.when == WITHOUT:
                if any(is_set(args, need) for need in row.needs.split()):
                    continue
                reason, instead = f"{WITHOUT} {_needed(parser, row.needs)}", f"add that, or {instead}"
            elif row.when == ON_CPU:
                is_chosen = os.environ.get("HYMEG_PLATFORM") == "cpu"
                where = "HYMEG_PLATFORM=cpu chose it" if is_chosen else "torch sees no GPU"
                reason = f"{ON_CPU} ({where}): {row.why}"
            else:
                reason = f"{row.when}: {row.why}"
            raise UserError(f"{shown_flag(option, refused)} {reason}; {instead}")


def is_set(args: Mapping[str, Any], need: str) -> bool:
    """Whether `args` are such that `need`, one word of `Row.needs`, holds."""
    dest, sign, wanted = re.fullmatch(r"(\w+)([=>]?)(.*)", need).groups()
    found = named(args[dest])
    if sign == ">":
        return found > int(wanted)
    if sign == "=":
        return not set(found if isinstance(found, list) else [found]).isdisjoint(wanted.split(","))
    return bool(found)


def _needed(parser: argparse.ArgumentParser, needs: str) -> str:
    """The flags of `Row.needs`, for a message."""
    flags = []
    for need in needs.split():
        dest, sign, wanted = re.fullmatch(r"(\w+)([=>]?)(.*)", need).groups()
        option = next(action.option_strings[-1] for action in parser._actions if action.dest == dest)
        above = {"": "", "=": f" {wanted.split(',')[0]}", ">": f" above {wanted}"}[sign]
        flags.append(f"{option}{above}")
    return " or ".join(flags)


def named(value: Any) -> Any:
    """`value`, an enum's members by their names."""
    if isinstance(value, list | tuple):
        return [named(item) for item in value]
    return value.name if isinstance(value, enum.Enum) else value


def shown_flag(option: str, value: Any) -> str:
    """The flag as the user gave it."""
    if isinstance(value, bool):
        return option
    return f"{option} {shown_value(value)}"


def shown_value(value: Any) -> str:
    """A flag's value as a user would type it, cut where it is long."""
    names = named(value)
    text = " ".join(map(str, names)) if isinstance(names, list) else str(names)
    return text if len(text) <= 40 else text[:37] + "..."
