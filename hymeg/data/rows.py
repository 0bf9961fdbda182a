"""One line of a fine-tuning file: read, checked and turned into a conversation. What a conversation becomes is the chat
template's business (`hymeg.data.chat`).

A row is an object of one of two forms. Keys that it does not know are left alone (an "id", say), but for those that
look like a slip of the pen.

Conversations: {"messages": [...], "reasoning_effort"?, "tools"?}
    A message is {"role", "content"}; roles are system, user, assistant and tool, contents strings. An assistant's may
    have "reasoning_content" and "tool_calls" (its content may then be null), a tool's "tool_call_id"; "name" is passed
    on. "tools" is a list of function definitions.

Translations: {"source_lang", "target_lang", "source", "target", "prompt"?, "prompt_lang"?, "reasoning_effort"?, ...}
    "source_lang" and "target_lang" are names or codes of languages. "prompt" is the kind: default (when absent),
    terminology, style, personalization, delimiters, structured, background, or one of `--translation-prompts`.
    "prompt_lang" is zh or en; when absent, zh where the source is Chinese and en elsewhere, as in the publisher's own
    data. Kinds with further fields: terminology "terminology" ([[source term, target term], ...] or an object), style
    "target_style", personalization "user_preferences" (a list of strings), structured "format_type", background
    "background_text".
"""

import difflib
import json
import os
from typing import Any, NamedTuple

from hymeg.data.text_files import place
from hymeg.data.translation import FIELDS, PROMPT_LANGUAGES, Prompt, language_names, load_prompts
from hymeg.errors import UserError
from hymeg.hf.files import parse_row, shown

ROLES = ("system", "user", "assistant", "tool")
REASONING_EFFORTS = ("no_think", "low", "high")
_MESSAGE_KEYS = ("role", "content", "name")
_KEYS_OF_ROLE = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("tool_call_id",)}
_CONVERSATION_KEYS = ("messages", "reasoning_effort", "tools")
_TRANSLATION_KEYS = (*FIELDS.values(), "target", "prompt", "prompt_lang", "reasoning_effort")
_ALL_KEYS = {*_CONVERSATION_KEYS, *_TRANSLATION_KEYS}


class Conversation(NamedTuple):
    """What the chat template is given."""

    messages: list[dict]
    reasoning_effort: str | None = None  # None: the template's own default
    tools: list[dict] | None = None
    where: str = ""  # file and line, for messages


class RowReader:
    """Reads rows of both forms. `fingerprint` tells apart readers that read the same row differently.

    Args:
        prompts: the file of `--translation-prompts`, if any.

    Raises:
        UserError: that file is wrong.
    """

    def __init__(self, prompts: str | os.PathLike | None = None):
        self._prompts = load_prompts(prompts)
        self.fingerprint = f"1-{self._prompts.fingerprint}"

    def parse(self, path: str, line: int, raw: bytes) -> Conversation:
        """The conversation in line `line` of the file `path`. Raises UserError where it is no good, with file, line and
        key.
        """
        where = place(path, line)
        row = _read(where, raw)
        effort = _effort(where, row)
        if "messages" in row:
            if "source" in row and "target" in row:
                raise UserError(
                    f"{where}: has 'messages' and also 'source' and 'target'; a row is either a conversation or a "
                    "translation"
                )
            _check_keys(where, row, _CONVERSATION_KEYS)
            return Conversation(_messages(where, row["messages"]), effort, _tools(where, row.get("tools")), where)
        if not any(key in row for key in ("source", "target", "source_lang", "target_lang")):
            raise UserError(
                f"{where}: has the keys {shown(list(row))}; needed are 'messages' for a conversation, "
                "'source_lang', 'target_lang', 'source' and 'target' for a translation"
            )
        _check_keys(where, row, _TRANSLATION_KEYS)
        messages = [
            {"role": "user", "content": self._request(where, row)},
            {"role": "assistant", "content": _text(where, row, "target")},
        ]
        return Conversation(messages, effort, None, where)

    def _request(self, where: str, row: dict) -> str:
        """What the user of a translation row says."""
        names = {key: _language(where, row, key) for key in ("source_lang", "target_lang")}
        kind, language = self._kind(where, row, "zh" if names["source_lang"].is_chinese else "en")
        prompt: Prompt = self._prompts.kinds[kind][language]
        values = {key: getattr(name, language) for key, name in names.items()}
        for placeholder, key in FIELDS.items():
            if key in names:
                continue
            if placeholder in prompt.placeholders:
                values[placeholder] = _READ_FIELD.get(key, _text)(where, row, key)
            elif key in row:
                raise UserError(
                    f"{where}: {key!r} has no place in the {shown(kind)} prompt; {self._kinds_with(placeholder)}, or "
                    "leave it out"
                )
        return prompt.render(values)

    def _kind(self, where: str, row: dict, default_language: str) -> tuple[str, str]:
        kind, kinds = row.get("prompt", "default"), self._prompts.kinds
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(
                f"{where}: 'prompt' is {shown(kind)}; kinds of prompt are {', '.join(kinds)} (--translation-prompts "
                "adds others)"
            )
        language = row.get("prompt_lang")
        if language is None:
            return kind, default_language if default_language in kinds[kind] else next(iter(kinds[kind]))
        if language not in PROMPT_LANGUAGES or language not in kinds[kind]:
            raise UserError(
                f"{where}: 'prompt_lang' is {shown(language)}; the {shown(kind)} prompt exists in "
                f"{', '.join(kinds[kind])}"
            )
        return kind, language

    def _kinds_with(self, placeholder: str) -> str:
        kinds = [
            kind
            for kind, prompts in self._prompts.kinds.items()
            if any(placeholder in prompt.placeholders for prompt in prompts.values())
        ]
        return f"set 'prompt' to {' or '.join(map(repr, kinds))}" if kinds else "no kind of prompt has it"


def _read(where: str, raw: bytes) -> dict:
    """The object in `raw`, without keys whose value is null; all strings in it are text."""
    try:
        row = parse_row(where, raw.decode())
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8: byte {shown(raw[error.start : error.start + 1])}; convert the file with iconv"
        ) from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: holds {shown(error.object[error.start])}, half of a surrogate pair, which is no text"
        ) from error
    if not isinstance(row, dict):
        remedy = " (jq -c '.[]' makes lines of a list)" if isinstance(row, list) else ""
        raise UserError(
            f"{where}: holds {shown(row)}; an object with 'messages', or with 'source' and 'target', is needed{remedy}"
        )
    return {key: value for key, value in row.items() if value is not None}


def _check_keys(where: str, row: dict, known: tuple[str, ...]) -> None:
    for key in row.keys() - _ALL_KEYS:
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise UserError(
                f"{where}: unknown key {shown(key)}; {close[0]!r} is known: mend the name, or rename the key if it is "
                "something else"
            )


def _effort(where: str, row: dict) -> str | None:
    effort = row.get("reasoning_effort")
    if effort is not None and effort not in REASONING_EFFORTS:
        raise UserError(f"{where}: 'reasoning_effort' is {shown(effort)}; {', '.join(REASONING_EFFORTS)} are possible")
    return effort


def _text(where: str, row: dict, key: str) -> str:
    """The string under `key`, which is more than blank."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} {_found(row, key)}; a string is needed")
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; there is nothing to learn from such a row: leave it out")
    return value


def _found(row: dict, key: str) -> str:
    return f"is {shown(row[key])}" if key in row else f"is missing among {shown(list(row))}"


def _language(where: str, row: dict, key: str):
    name = _text(where, row, key).strip()
    if len(name.splitlines()) > 1:
        raise UserError(f"{where}: {key!r} is {shown(name)}; the name or code of a language is needed")
    try:
        return language_names(name)
    except UserError as error:
        raise UserError(f"{where}: {key!r}: {error}") from error


def _terms(where: str, row: dict, key: str) -> list[tuple[str, str]]:
    value = row.get(key)
    pairs = list(value.items()) if isinstance(value, dict) else value
    good = (
        isinstance(pairs, list) and pairs and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    )
    if not good or not all(isinstance(term, str) and term.strip() for pair in pairs for term in pair):
        raise UserError(
            f"{where}: {key!r} {_found(row, key)}; [[source term, target term], ...] or {{source term: target term}} "
            "is needed"
        )
    return pairs


def _preferences(where: str, row: dict, key: str) -> list[str]:
    value = row.get(key)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(preference, str) and preference.strip() for preference in value)
    ):
        raise UserError(f"{where}: {key!r} {_found(row, key)}; a list of strings is needed")
    return value


_READ_FIELD = {"terminology": _terms, "user_preferences": _preferences}


def _messages(where: str, value: Any) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: 'messages' is {shown(value)}; a list of {{'role', 'content'}} is needed")
    messages = [_message(f"{where}: message {number}", message) for number, message in enumerate(value, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}: no message is an assistant's; there is nothing to learn from such a row: leave it out"
        )
    return messages


def _message(where: str, value: Any) -> dict:
    """The message, without keys whose value is null; "content" is always there."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shown(value)}; {{'role', 'content'}} is needed")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: 'role' {_found(value, 'role')}; {', '.join(ROLES)} are possible")
    known = _MESSAGE_KEYS + _KEYS_OF_ROLE.get(role, ())
    if unknown := sorted(message.keys() - set(known)):
        raise UserError(
            f"{where}: {shown(unknown[0])} has no place in a message of role {role}, whose keys are "
            f"{', '.join(known)}; leave it out"
        )
    for key in message.keys() - {"content", "tool_calls"}:
        if not isinstance(message[key], str):
            raise UserError(f"{where}: {key!r} is {shown(message[key])}; a string is needed")
    if "tool_calls" in message:
        message["content"] = message.get("content", "")
        _check_functions(where, "tool_calls", message["tool_calls"])
    _check_content(where, role, message)
    return message


def _check_content(where: str, role: str, message: dict) -> None:
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' {_found(message, 'content')}; a string is needed")
    if role in ("user", "assistant") and "tool_calls" not in message and not content.strip():
        raise UserError(f"{where}: 'content' is empty; an empty {role} turn teaches nothing: leave the row out")


def _tools(where: str, value: Any) -> list[dict] | None:
    if value is None:
        return None
    _check_functions(where, "tools", value)
    return value


def _check_functions(where: str, key: str, value: Any) -> None:
    """Raises UserError unless it is a list of {"function": {"name": ...}} or {"name": ...}."""
    good = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    functions = [item.get("function", item) for item in value] if good else []
    if not good or not all(
        isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
        for function in functions
    ):
        raise UserError(
            f"{where}: {key!r} is {shown(value)}; a list of {{'type': 'function', 'function': {{'name', ...}}}} is "
            "needed"
        )
