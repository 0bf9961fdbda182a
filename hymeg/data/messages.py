"""The messages and tools of a row, in the names and forms of several trainers, as a chat template takes them.

Taken are OpenAI's messages ({"role", "content"}), ShareGPT's ({"from", "value"}) and the mixtures of both that public
data hold; docs/data.md has the tables. What has no place in a message is refused: nothing is left out in silence.
"""

import re
from typing import Any

from hymeg.data.fields import SWITCHES, WEIGHTS, decoded, weight_of, wrong
from hymeg.errors import UserError, located
from hymeg.files import shown

ROLES = ("system", "user", "assistant", "tool")
_CALLS = "function_call"  # a ShareGPT turn that holds nothing but calls
_OTHER_ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": _CALLS,
    "tool_call": _CALLS,
}
_OTHER_KEYS = {"from": "role", "value": "content", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
_WEIGHT = (*WEIGHTS, *SWITCHES)
_MESSAGE_KEYS = ("role", "content", "name")
_KEYS_OF_ROLE = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("tool_call_id",)}
_IN_A_STRING = "JSON is needed in this string"
_THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*", re.DOTALL)


def read_messages(key: str, value: Any) -> list[dict]:
    """The messages under `key` of a row: without keys whose value is null, always with "content"; an assistant's has a
    "weight" (float) where that is not 1.

    Raises:
        UserError: a message is of no known form, or none is an assistant's.
    """
    if not isinstance(value, list) or not value:
        raise wrong({key: value}, key, "a list of {'role', 'content'} is needed")
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise UserError(f"message {number} is {shown(item)}; {{'role', 'content'}} is needed")
        with located(f"message {number}"):
            _add(messages, _message(item))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no message is an assistant's; there is nothing to learn from such a row: leave it out")
    return messages


def _add(messages: list[dict], message: dict) -> None:
    """Calls behind what the assistant says are one turn, written as two."""
    if message["role"] == _CALLS:
        message["role"] = "assistant"
        if messages and messages[-1]["role"] == "assistant" and "reasoning_content" not in message:
            if message.get("weight") != messages[-1].get("weight"):
                raise UserError(
                    "has another weight than the message before, which is of the same turn; give both the same"
                )
            messages[-1]["tool_calls"] = messages[-1].get("tool_calls", []) + message["tool_calls"]
            return
    messages.append(message)


def _message(value: dict) -> dict:
    message = {key: item for key, item in value.items() if item is not None}
    for other, key in _OTHER_KEYS.items():
        if other in message:
            if key in message:
                raise UserError(f"has {key!r} and also {other!r}, which mean the same; keep one")
            message[key] = message.pop(other)
    role = message.get("role")
    if role not in ROLES:
        key, roles = ("from", _OTHER_ROLES) if "from" in value else ("role", ROLES)
        if not isinstance(role, str) or role not in _OTHER_ROLES:
            raise wrong(value, key, f"{', '.join(roles)} are possible")
        role = message["role"] = _OTHER_ROLES[role]
    weight = 1.0
    if message.keys() != {"role", "content"} or role == _CALLS:  # most have these two
        weight = _take_weight(role, message)
        if role == "assistant":
            _read_calls(message)
        known = _MESSAGE_KEYS + _KEYS_OF_ROLE.get(role, ())
        if unknown := sorted(message.keys() - set(known)):
            raise UserError(
                f"{shown(unknown[0])} has no place in a message of role {role}, whose keys are {', '.join(known)}; "
                "leave it out"
            )
        for key in message.keys() - {"content", "tool_calls"}:
            if not isinstance(message[key], str):
                raise wrong(message, key, "a string is needed")
    if role == _CALLS:
        _read_call_turn(message)
    else:
        _read_content(role, message, value)
    return message if weight == 1 else message | {"weight": weight}


def _take_weight(role: str, message: dict) -> float:
    """What the message says of it, taken out; 1 of one that is no turn of the assistant's, which may only say 0."""
    given = {key: message.pop(key) for key in _WEIGHT if key in message}
    weight = weight_of(given, _WEIGHT)
    if role in ("assistant", _CALLS) or not given:
        return weight
    if weight != 0:
        [(key, value), *_] = given.items()
        remedy = "only the assistant's turns are trained: leave it out"
        raise UserError(f"{key!r} is {shown(value)} in a message of role {role}; {remedy}")
    return 1.0


def _read_calls(message: dict) -> None:
    """OpenAI's "tool_calls", and "function_call", its name when a turn had one call only."""
    calls = read_functions("tool_calls", message.pop("tool_calls", None), are_calls=True)
    if "function_call" in message:
        if calls:
            raise UserError("has 'tool_calls' and also 'function_call', which mean the same; keep one")
        calls = read_functions("function_call", [message.pop("function_call")], are_calls=True)
    if calls:
        message["tool_calls"] = calls
        message.setdefault("content", "")


def _read_call_turn(message: dict) -> None:
    """ShareGPT's turn of calls: JSON, of one call or of a list of them."""
    calls = message.get("content")
    if isinstance(calls, str):
        if thought := _THOUGHT.match(calls):
            message["reasoning_content"], calls = thought[1], calls[thought.end() :]
        with located("the function call"):
            calls = decoded(calls, _IN_A_STRING)
    calls = read_functions("function_call", [calls] if isinstance(calls, dict) else calls, are_calls=True)
    if not calls:
        raise UserError("holds no function call; leave the row out")
    message |= {"content": "", "tool_calls": calls}


def _read_content(role: str, message: dict, value: dict) -> None:
    """Sets "content", and "reasoning_content" where that stands before it in tags, as it is written where no field is
    made for it.
    """
    content = message.get("content")
    key = "value" if "value" in value else "content"
    if isinstance(content, list) and content:
        content = "".join(_part(number, part) for number, part in enumerate(content, start=1))
    if not isinstance(content, str):
        raise wrong(value, key, "a string is needed")
    if role == "assistant" and "reasoning_content" not in message and (thought := _THOUGHT.match(content)):
        content = content[thought.end() :]
        if thought[1]:
            message["reasoning_content"] = thought[1]
    if role in ("user", "assistant") and "tool_calls" not in message and not content.strip():
        raise UserError(f"{key!r} is empty; an empty {role} turn teaches nothing: leave the row out")
    message["content"] = content


def _part(number: int, part: Any) -> str:
    """The text of {"type": "text", "text": ...}."""
    given = {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else {}
    if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
        needed = "{'type': 'text', 'text'} is needed: these models read text only"
        raise UserError(f"part {number} is {shown(part)}; {needed}")
    return given["text"]


def read_functions(key: str, value: Any, are_calls: bool) -> list[dict] | None:
    """Functions or calls of them: [{"type": "function", "function": {"name", ...}}, ...]; the outer object may be
    missing, and strings of JSON stand for what is in them. None where there are none.

    Raises:
        UserError: it is no such list; the arguments of a call, the parameters of a function are no object.
    """
    if isinstance(value, str) and value.strip():
        with located(repr(key)):
            value = decoded(value, _IN_A_STRING)
    if value in (None, [], ""):
        return None
    if not isinstance(value, list) or not all(map(_is_function, value)):
        raise wrong({key: value}, key, "a list of {'type': 'function', 'function': {'name', ...}} is needed")
    return [_function(item, are_calls) for item in value]


def _is_function(item: Any) -> bool:
    function = item.get("function", item) if isinstance(item, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"] != ""


def _function(item: dict, is_call: bool) -> dict:
    """`item` with its outer object; a call with an object under "arguments"."""
    if "function" in item:
        outer, function = item, dict(item["function"])
    else:
        outer = {key: item[key] for key in ("type", "id") if key in item}
        function = {key: value for key, value in item.items() if key not in outer}
    key = "arguments" if is_call else "parameters"
    what, given = f"the {key} of {shown(function['name'])}", function.get(key)
    if isinstance(given, str):
        with located(what):
            given = decoded(given, _IN_A_STRING) if given.strip() else {}
    if given is None and is_call:
        given = {}
    if given is not None:
        if not isinstance(given, dict):
            raise UserError(f"{what} are {shown(given)}; an object is needed, which may be a string of JSON")
        function[key] = given
    return {"type": "function"} | outer | {"function": function}
