"""One row of a fine-tuning file: read, checked and turned into a conversation. What a conversation becomes is the chat
template's business (`hymeg.data.chat`).

A row is an object of one of three forms, known by the keys that it must have; docs/data.md has the tables.

Conversations: "messages" or "conversations" (`hymeg.data.messages`)
Instructions: "instruction" and "output", with "input"?, "history"?: Alpaca's, put together as LLaMA-Factory does
Translations: "source" and "target", "source_lang" and "target_lang" (`hymeg.data.translation`)

All may have "system", "tools", "reasoning_effort" and "weight", also by their other names. What other
trainers read in a row and hymeg does not is refused; any other key is left alone, and counted.
"""

import difflib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from hymeg.data import translation
from hymeg.data.fields import SWITCHES, WEIGHTS, decoded, not_text, one_of, text_of, weight_of, wrong
from hymeg.data.messages import read_functions, read_messages
from hymeg.data.text_files import place
from hymeg.errors import UserError, located
from hymeg.files import shown

REASONING_EFFORTS = ("no_think", "low", "high")
_THINKING = ("thinking", "enable_thinking")
_EFFORT = ("reasoning_effort", *_THINKING, "chat_template_kwargs")
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_WEIGHT = (*WEIGHTS, "sample_weight", *SWITCHES)
_JUDGEMENTS = ("label", "kto_tag")  # which ask for something else than what hymeg does where they are false
_LEARNED = "rows are answers to be learned"
_FOREIGN = {  # key, where a value asks for something: the remedy
    **dict.fromkeys(_JUDGEMENTS, f"{_LEARNED}: leave this one out"),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages"),
        f"{_LEARNED}: make the better one a message",
    ),
    **dict.fromkeys(
        ("reasoning", "reasoning_content"),
        "write reasoning into the assistant's message, and how much is asked for under 'reasoning_effort'",
    ),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"),
        "these models read text only: leave the row out",
    ),
}


class Conversation(NamedTuple):
    """What the chat template is given."""

    messages: list[dict]
    reasoning_effort: str | None = None  # None: the template's own default
    tools: list[dict] | None = None
    where: str = ""  # file and line, for messages
    weights: tuple[float, ...] = ()  # of the loss of each of the assistant's turns; none: each is 1


class RowReader:
    """Reads rows of all forms.

    Attributes:
        fingerprint: equal for readers that make the same of a row.
        ignored: of the rows read so far, how many had each of the keys that were left alone.
    """

    fingerprint = f"5-{translation.FINGERPRINT}"

    def __init__(self):
        self.ignored: Counter[str] = Counter()

    def parse(self, path: str, line: int, row: bytes | dict) -> Conversation:
        """The conversation in line `line` of the file `path`, which is given as JSON or, of parquet, as an object.
        Raises UserError where it is no good, with file, line and key.
        """
        where = place(path, line)
        with located(where):
            return self.read(row)._replace(where=where)

    def read(self, row: bytes | dict) -> Conversation:
        """`parse`, of a row from anywhere."""
        row = _read(row)
        form = _form(row)
        others = row.keys() - form.keys
        _check_names(others, form)
        self.ignored.update(others)
        _check_nothing_else_is_asked(row)
        messages = _with_system(row, form.messages(row))
        tools = read_functions(*one_of(row, _TOOLS), are_calls=False)
        weights = _weights(weight_of(row, _WEIGHT), messages)
        return Conversation(messages, _effort(row), tools, weights=weights)


def _read(row: bytes | dict) -> dict:
    """The row, without keys whose value is null."""
    if isinstance(row, bytes):
        try:
            row = decoded(row.decode())
        except UnicodeDecodeError as error:
            raise UserError(not_text(error)) from error
    if not isinstance(row, dict):
        remedy = " (jq -c '.[]' makes lines of a list)" if isinstance(row, list) else ""
        raise UserError(f"holds {shown(row)}; an object is needed, such as {{'messages': [...]}}{remedy}")
    return {key: value for key, value in row.items() if value is not None}


class _Form(NamedTuple):
    needed: frozenset[str]  # the keys by which it is known
    keys: frozenset[str]  # that have a meaning in it
    messages: Callable[[dict], list[dict]]


def _form(row: dict) -> _Form:
    forms = [form for form in _FORMS if row.keys() >= form.needed]
    if len(forms) == 1:
        return forms[0]
    if forms:
        one, other, *_ = (" and ".join(map(repr, sorted(form.needed))) for form in forms)
        raise UserError(f"has {one} and also {other}, which are two forms of row; keep one")
    for form, hints in ((_INSTRUCTION, {"instruction"}), (_TRANSLATION, set(translation.NEEDED))):
        if row.keys() & hints:
            return form
    raise UserError(
        f"has the keys {shown(list(row))}; needed are 'messages' or 'conversations' for a conversation, 'instruction' "
        "and 'output' for an instruction, 'source_lang', 'target_lang', 'source' and 'target' for a translation"
    )


def _instruction(row: dict) -> list[dict]:
    """ "input" stands on a line of its own below "instruction"; "history" are earlier questions and answers."""
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise wrong(row, "history", "[[question, answer], ...] is needed")
    question = [text_of(row, key) for key in ("instruction", "input") if row.get(key, "") != ""]
    question = "\n".join(question or [text_of(row, "instruction")])
    messages = []
    for asked, answered in [*history, [question, text_of(row, "output")]]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return read_messages("history", messages)


def _translation(row: dict) -> list[dict]:
    request = translation.request(row)
    return [{"role": "user", "content": request}, {"role": "assistant", "content": text_of(row, "target")}]


def _make_form(needed: tuple[str, ...], others: tuple[str, ...], messages: Callable[[dict], list[dict]]) -> _Form:
    keys = frozenset((*needed, *others, *_SYSTEM, *_TOOLS, *_EFFORT, *_WEIGHT, *_FOREIGN))
    return _Form(frozenset(needed), keys, messages)


_INSTRUCTION = _make_form(("instruction", "output"), ("input", "history"), _instruction)
_TRANSLATION = _make_form(("source", "target"), translation.KEYS, _translation)
_FORMS = (
    _make_form(("messages",), (), lambda row: read_messages("messages", row["messages"])),
    _make_form(("conversations",), (), lambda row: read_messages("conversations", row["conversations"])),
    _INSTRUCTION,
    _TRANSLATION,
)
_ALL_KEYS = frozenset().union(*(form.keys for form in _FORMS))


def _check_names(others: set[str], form: _Form) -> None:
    """Raises UserError where a key, which has no meaning in rows of that form, looks like a slip of the pen."""
    for key in others:
        if meant := _meant(key, form):
            raise UserError(
                f"unknown key {shown(key)}; {meant!r} is known: mend the name, or rename the key if it is something "
                "else"
            )


@functools.lru_cache(4096)
def _meant(key: str, form: _Form) -> str | None:
    if key in _ALL_KEYS:
        return None
    return next(iter(difflib.get_close_matches(key, form.keys - _FOREIGN.keys(), n=1, cutoff=0.85)), None)


def _check_nothing_else_is_asked(row: dict) -> None:
    for key in row.keys() & _FOREIGN.keys():
        if row[key] is False if key in _JUDGEMENTS else row[key]:
            raise UserError(
                f"{key!r} is {shown(row[key])}, which hymeg does not do; {_FOREIGN[key]} (or rename the key if it is "
                "something else)"
            )


def _with_system(row: dict, messages: list[dict]) -> list[dict]:
    key, system = one_of(row, _SYSTEM)
    if system in (None, ""):
        return messages
    if not isinstance(system, str):
        raise wrong(row, key, "a string is needed")
    given = [message["content"] for message in messages if message["role"] == "system"]
    if given not in ([], [system]):
        raise UserError(f"has {key!r} and also another system message; keep one")
    return messages if given else [{"role": "system", "content": system}, *messages]


def _weights(of_row: float, messages: list[dict]) -> tuple[float, ...]:
    """Those of the assistant's turns, taken out of `messages`, times the row's; none where all are 1."""
    weights = [of_row * message.pop("weight", 1.0) for message in messages if message["role"] == "assistant"]
    return () if all(weight == 1 for weight in weights) else tuple(weights)


def _effort(row: dict) -> str | None:
    """That of all which the row says about it."""
    given = {key: row[key] for key in _EFFORT if key in row}
    arguments = given.pop("chat_template_kwargs", {})
    if not isinstance(arguments, dict) or not arguments.keys() <= set(_EFFORT):
        needed = "of what a template is given, rows may say 'reasoning_effort' only; leave the rest out"
        raise wrong(row, "chat_template_kwargs", needed)
    given |= {f"chat_template_kwargs: {key}": value for key, value in arguments.items() if value is not None}
    if not given:
        return None
    possible = set(REASONING_EFFORTS).intersection(*(_efforts(given, key) for key in given))
    if len(possible) != 1:
        raise UserError(
            f"{shown(given)} {'leaves open how much' if possible else 'contradicts itself'}; give 'reasoning_effort' "
            f"alone: {', '.join(REASONING_EFFORTS)}"
        )
    return possible.pop()


def _efforts(given: dict[str, Any], key: str) -> set[str]:
    """Which efforts the value under `key` may mean."""
    if isinstance(given[key], bool) and key.endswith(_THINKING):
        return {"low", "high"} if given[key] else {"no_think"}
    if given[key] not in REASONING_EFFORTS:
        raise wrong(given, key, f"{', '.join(REASONING_EFFORTS)} are possible")
    return {given[key]}
