"""A recipe: a flat YAML file whose keys are Megatron's flags, with dashes or underscores.

`key: value` is `--key value`; `key: true` is the bare switch and `key: false` its opposite; a list gives several
values; `null` leaves the flag out. Numbers stay as written: 1e-5 is text to YAML, and argparse reads it. The command
line wins: it gives a flag another value, and undoes a switch with --no-SWITCH.
"""

import argparse
import math
import re
from typing import Any, NamedTuple

import yaml

from hymeg.errors import UserError
from hymeg.training.flag_names import hint, opposite, plain
from hymeg.training.refusals import named

_ONE_A_LINE = "write one 'key: value' a line, with a space after the colon"
_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


class Setting(NamedTuple):
    """One line of a recipe."""

    where: str  # "FILE, line N"
    words: list[str]  # what the command line would say; none for null


def read_settings(path: str, parser: argparse.ArgumentParser) -> list[Setting]:
    """What the file says, in its order.

    Raises:
        UserError: not readable, not YAML, not flat, a flag set twice, an unknown key, no value, or a value where the
            flag takes none. Whether a value fits its flag is for argparse to say.
    """
    options = {plain(option): option for option in parser._option_string_actions if option.startswith("--")}
    dests = {action.dest: action.option_strings[-1] for action in reversed(parser._actions)}
    settings, seen = [], {}
    for key_node, value_node in _mapping(path):
        where, key = f"{path}, line {key_node.start_mark.line + 1}", str(key_node.value)
        if isinstance(value_node, yaml.MappingNode):
            raise UserError(
                f"{where}: {key!r} holds a section; recipes are flat: put its keys at the left margin, without {key!r}"
            )
        option = options.get(key.replace("_", "-"))
        if option is None:
            near = f"; did you mean {dests[key]}?" if key in dests else hint(key, options.values())
            raise UserError(
                f"{where}: unknown key {key!r}{near.replace('--', '')} (keys are the flags of pretrain_hy.py, without "
                "--)"
            )
        if option in ("--config", "--help"):
            raise UserError(f"{where}: {key!r} belongs on the command line, not in a recipe; remove the line")
        dest = parser._option_string_actions[option].dest
        if dest in seen:
            raise UserError(f"{where}: {key!r} is set in line {seen[dest]} already; keep one of the two")
        seen[dest] = key_node.start_mark.line + 1
        settings.append(Setting(where, _words(f"{where}: {key!r}", option, value_node, parser)))
    return settings


def setting_line(name: str, value: Any) -> str:
    """The line of a recipe that `read_settings` reads as `--name value`: True for a switch, otherwise a number, a text,
    one of Megatron's enums, or a list of them.
    """
    text = yaml.safe_dump(named(value), default_flow_style=True, width=math.inf, allow_unicode=True)
    return f"{name}: {text.removesuffix('...\n').rstrip()}"


def _mapping(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", "not UTF-8 text")
        raise UserError(f"--config {path}: {what}; give a YAML file whose keys are Megatron's flags") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        advice = "indent with spaces, not tabs" if r"'\t'" in problem else _ONE_A_LINE
        raise UserError(f"--config {path}{where}: not YAML ({problem}); {advice}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}, line 1: found a {root.id}; {_ONE_A_LINE}")
    return root.value


def _words(said: str, option: str, node: yaml.Node, parser: argparse.ArgumentParser) -> list[str]:
    if node.value == "":
        raise UserError(f"{said} has no value; give one, remove the line, or write null to leave the flag out")
    if node.tag == _NULL:
        return []
    action, is_bool = parser._option_string_actions[option], node.tag == _BOOL
    if action.nargs == 0:
        if not is_bool:
            raise UserError(f"{said} is a switch, found {_text(said, node)!r}; write true or false, without quotes")
        if yaml.SafeLoader("").construct_object(node):
            return [option]
        undo = parser._option_string_actions.get(opposite(option))
        if undo is None or undo.dest != action.dest:
            raise UserError(f"{said} can only be true; remove the line")
        return [opposite(option)]
    if is_bool:
        raise UserError(f"{said} takes a value, found {node.value}; give one, or quote it if {node.value} is the value")
    takes_several = action.nargs not in (None, "?")
    if isinstance(node, yaml.SequenceNode):
        values = [_text(said, item) for item in node.value]
        # A flag of one word whose value is a list by itself, such as moe-layer-freq.
        return [option, *values] if takes_several else [f"{option}=[{','.join(values)}]"]
    if takes_several:
        return [option, *_text(said, node).split()]
    return [f"{option}={_text(said, node)}"]


def _text(said: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{said} holds a {node.id} inside a list; give plain values")
    if re.match(r"~/|\$\{?\w", node.value):
        raise UserError(
            f"{said} is {node.value!r}, but a recipe expands neither ~ nor $VARIABLES; write it out, or give it on the "
            "command line"
        )
    return node.value
