"""A recipe: a flat YAML file whose keys are Megatron's flags, with dashes or underscores."""

import argparse
from typing import Any

import yaml

from hymeg.errors import UserError, nearest


def read_as_flags(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The command-line words that say what the file says.

    `key: value` is `--key value`; `true` is the bare flag; `false` and `null` leave it out (a flag with a `--no-` form is given that for `false`); a
    list gives several values.

    Raises:
        UserError: not readable, not YAML, not flat, a key twice, an unknown key, or a value where the flag takes none.
    """
    flags = {
        option.removeprefix("--").replace("_", "-"): action for option, action in parser._option_string_actions.items() if option.startswith("--")
    }
    words = []
    for key, value, line in _entries(path):
        action = flags.get(key.replace("_", "-"))
        if action is None:
            raise UserError(
                f"{path}, line {line}: unknown key {key!r}{nearest(key.replace('_', '-'), flags)} Keys are Megatron's flags without dashes in front"
            )
        if key in ("config", "help"):
            raise UserError(f"{path}, line {line}: {key!r} belongs on the command line, not in a recipe")
        words += _words(path, line, key.replace("_", "-"), value, action)
    return words


def _entries(path: str) -> list[tuple[str, Any, int]]:
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a YAML file whose keys are Megatron's flags") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not UTF-8 text; give a YAML file whose keys are Megatron's flags") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}, line 1: expected 'flag: value' lines, found a {root.id}")
    entries, seen = [], {}
    loader = yaml.SafeLoader("")
    for key_node, value_node in root.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        name = key.replace("_", "-")
        if name in seen:
            raise UserError(f"{path}, line {line}: key {key!r} stands in line {seen[name]} already; keep one")
        seen[name] = line
        if isinstance(value_node, yaml.MappingNode):
            raise UserError(f"{path}, line {line}: {key!r} holds a section; recipes are flat: put its keys at the left margin")
        # Numbers stay as written (1e-5 is a string to YAML), argparse reads them; only true, false and null mean something here.
        plain = value_node.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")
        if isinstance(value_node, yaml.SequenceNode):
            value = [str(item.value) for item in value_node.value]
        else:
            value = loader.construct_object(value_node) if plain else str(value_node.value)
        entries.append((key, value, line))
    return entries


def _words(path: str, line: int, name: str, value: Any, action: argparse.Action) -> list[str]:
    takes_no_value = action.nargs == 0
    negative = next((o for o in action.option_strings if o.startswith("--no-") and f"--{o[5:]}" in action.option_strings), None)
    if value is None or value is False:
        if value is False and not takes_no_value:
            raise UserError(f"{path}, line {line}: {name!r} takes a value, found false; leave the line out instead")
        return [negative] if negative and value is False else []
    if value is True:
        if not takes_no_value:
            raise UserError(f"{path}, line {line}: {name!r} takes a value, found true")
        return [f"--{name}"]
    if takes_no_value:
        raise UserError(f"{path}, line {line}: {name!r} is a switch: true or false, found {value!r}")
    if isinstance(value, list):
        if action.nargs in ("+", "*"):
            return [f"--{name}", *value]
        # A flag of one word whose value is a list by itself, such as moe-layer-freq.
        return [f"--{name}", f"[{','.join(value)}]"]
    if action.nargs in ("+", "*"):
        return [f"--{name}", *value.split()]
    return [f"--{name}={value}"]
