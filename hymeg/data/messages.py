"""The messages and tools of a row, in the names and forms of several trainers, as a chat template takes them.

Taken are OpenAI's messages ({"role", "content"}), ShareGPT's ({"from", "value"}) and the mixtures of both that public
data hold; docs/data.md has the tables. What has no place in a message is refused: nothing is left out in silence.
"""

import re
from typing import Any

from hymeg.data.fields import SWITCHES, WEIGHTS, decoded, found, weight_of
from hymeg.errors import UserError
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
_MESSAGE_KEYS = ("role", "content", "name")
_KEYS_OF_ROLE = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("tool_call_id",)}
_IN_A_STRING = "JSON is needed in this string"
_THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*", re.DOTALL)


def read_messages(where: str, key: str, value: Any) -> list[dict]:
    """The messages under `key` of the row at `where`: without keys whose value is null, always with "content"; an
    assistant's has a "weight" (float) where that is not 1.

    Raises:
        UserError: a message is of no known form, or none is an assistant's.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} is {shown(value)}; a list of {{'role', 'content'}} is needed")
    messages = []
    for number, item in enumerate(value, start=1):
        message = _message(f"{where}: message {number}", item)
        if message["role"] == _CALLS:
            message["role"] = "assistant"
            if messages and messages[-1]["role"] == "assistant" and "reasoning_content" not in message:
                # One turn, written as two.
                if message.get("weight") != messages[-1].get("weight"):
                    raise UserError(
                        f"{where}: message {number}: has another weight than the message before, which is of the same "
                        "turn; give both the same"
                    )
                messages[-1]["tool_calls"] = messages[-1].get("tool_calls", []) + message["tool_calls"]
                continue
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}: no message is an assistant's; there is nothing to learn from such a row: leave it out"
        )
    return messages


def _message(where: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shown(value)}; {{'role', 'content'}} is needed")
    message = {key: item for key, item in value.items() if item is not None}
    if not _OTHER_KEYS.keys().isdisjoint(message):
        _rename(where, message)
    role = message.get("role")
    if role not in ROLES:
        role = message["role"] = _role(where, value, role)
    weight = 1.0
    if message.keys() != {"role", "content"} or role == _CALLS:  # most have these two
        weight = _take_weight(where, role, message)
        if role == "assistant":
            _read_calls(where, message)
        known = _MESSAGE_KEYS + _KEYS_OF_ROLE.get(role, ())
        if unknown := sorted(message.keys() - set(known)):
            raise UserError(
                f"{where}: {shown(unknown[0])} has no place in a message of role {role}, whose keys are "
                f"{', '.join(known)}; leave it out"
            )
        for key in message.keys() - {"content", "tool_calls"}:
            if not isinstance(message[key], str):
                raise UserError(f"{where}: {key!r} is {shown(message[key])}; a string is needed")
    if role == _CALLS:
        _read_call_turn(where, message)
    else:
        _read_content(where, role, message, value)
    return message if weight == 1 else message | {"weight": weight}


def _rename(where: str, message: dict) -> None:
    """The keys of other trainers become the template's."""
    for other, key in _OTHER_KEYS.items():
        if other in message:
            if key in message:
                raise UserError(f"{where}: has {key!r} and also {other!r}, which mean the same; keep one")
            message[key] = message.pop(other)


def _role(where: str, value: dict, role: Any) -> str:
    if isinstance(role, str) and role in _OTHER_ROLES:
        return _OTHER_ROLES[role]
    key, roles = ("from", _OTHER_ROLES) if "from" in value else ("role", ROLES)
    raise UserError(f"{where}: {key!r} {found(value, key)}; {', '.join(roles)} are possible")


def _take_weight(where: str, role: str, message: dict) -> float:
    """What the message says of it, taken out; 1 of one that is no turn of the assistant's, which may only say 0."""
    given = {key: message.pop(key) for key in (*WEIGHTS, *SWITCHES) if key in message}
    weight = weight_of(where, given)
    if role in ("assistant", _CALLS) or not given:
        return weight
    if weight != 0:
        key, value = next(iter(given.items()))
        raise UserError(
            f"{where}: {key!r} is {shown(value)} in a message of role {role}; only the assistant's turns are trained: "
            "leave it out"
        )
    return 1.0


def _read_calls(where: str, message: dict) -> None:
    """OpenAI's "tool_calls", and "function_call", its name when a turn had one call only."""
    calls = read_functions(where, "tool_calls", message.pop("tool_calls", None), are_calls=True)
    if "function_call" in message:
        if calls:
            raise UserError(f"{where}: has 'tool_calls' and also 'function_call', which mean the same; keep one")
        calls = read_functions(where, "function_call", [message.pop("function_call")], are_calls=True)
    if calls:
        message["tool_calls"] = calls
        message.setdefault("content", "")


def _read_call_turn(where: str, message: dict) -> None:
    """ShareGPT's turn of calls: JSON, of one call or of a list of them."""
    calls = message.get("content")
    if isinstance(calls, str):
        thought = _THOUGHT.match(calls)
        if thought:
            message["reasoning_content"], calls = thought[1], calls[thought.end() :]
        calls = decoded(f"{where}: the function call", calls, _IN_A_STRING)
    calls = read_functions(where, "function_call", [calls] if isinstance(calls, dict) else calls, True)
    if not calls:
        raise UserError(f"{where}: holds no function call; leave the row out")
    message |= {"content": "", "tool_calls": calls}


def _read_content(where: str, role: str, message: dict, value: dict) -> None:
    """Sets "content", and "reasoning_content" where that stands before it in tags, as it is written where no field is
    made for it.
    """
    content = message.get("content")
    key = "value" if "value" in value else "content"
    if isinstance(content, list) and content:
        content = "".join(_part(f"{where}: part {number}", part) for number, part in enumerate(content, start=1))
    if not isinstance(content, str):
        raise UserError(f"{where}: {key!r} {found(value, key)}; a string is needed")
    if role == "assistant" and "reasoning_content" not in message and (thought := _THOUGHT.match(content)):
        content = content[thought.end() :]
        if thought[1]:
            message["reasoning_content"] = thought[1]
    if role in ("user", "assistant") and "tool_calls" not in message and not content.strip():
        raise UserError(f"{where}: {key!r} is empty; an empty {role} turn teaches nothing: leave the row out")
    message["content"] = content


def _part(where: str, part: Any) -> str:
    """The text of {"type": "text", "text": ...}."""
    given = {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else {}
    if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
        raise UserError(f"{where} is {shown(part)}; {{'type': 'text', 'text'}} is needed: these models read text only")
    return given["text"]


def read_functions(where: str, key: str, value: Any, are_calls: bool) -> list[dict] | None:
    """Functions or calls of them: [{"type": "function", "function": {"name", ...}}, ...]; the outer object may be
    missing, and strings of JSON stand for what is in them. None where there are none.

    Raises:
        UserError: it is no such list; the arguments of a call, the parameters of a function are no object.
    """
    if isinstance(value, str) and value.strip():
        value = decoded(f"{where}: {key!r}", value, _IN_A_STRING)
    if value in (None, [], ""):
        return None
    if not isinstance(value, list) or not all(map(_is_function, value)):
        raise UserError(
            f"{where}: {key!r} is {shown(value)}; a list of {{'type': 'function', 'function': {{'name', ...}}}} is "
            "needed"
        )
    return [_function(where, item, are_calls) for item in value]


def _is_function(item: Any) -> bool:
    function = item.get("function", item) if isinstance(item, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"] != ""


def _function(where: str, item: dict, is_call: bool) -> dict:
    """`item` with its outer object; a call with an object under "arguments"."""
    if "function" in item:
        outer, function = item, dict(item["function"])
    else:
        outer = {key: item[key] for key in ("type", "id") if key in item}
        function = {key: value for key, value in item.items() if key not in outer}
    key = "arguments" if is_call else "parameters"
    given = function.get(key)
    if isinstance(given, str):
        what = f"{where}: the {key} of {shown(function['name'])}"
        given = decoded(what, given, _IN_A_STRING) if given.strip() else {}
    if given is None and is_call:
        given = {}
    if given is not None:
        if not isinstance(given, dict):
            raise UserError(
                f"{where}: the {key} of {shown(function['name'])} are {shown(given)}; an object is needed, which may "
                "be a string of JSON"
            )
        function[key] = given
    return {"type": "function"} | outer | {"function": function}
