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
from hymeg.data.fields import SWITCHES, WEIGHTS, decoded, found, one_of, text_of, weight_of
from hymeg.data.messages import read_functions, read_messages
from hymeg.data.text_files import place
from hymeg.errors import UserError
from hymeg.files import shown

REASONING_EFFORTS = ("no_think", "low", "high")
_THINKING = ("thinking", "enable_thinking")
_EFFORT = ("reasoning_effort", *_THINKING, "chat_template_kwargs")
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_WEIGHT = (*WEIGHTS, "sample_weight", *SWITCHES)


class _Foreign(NamedTuple):
    """What other trainers read in a row and hymeg does not."""

    means_nothing: Callable[[Any], bool]  # of a value that asks for nothing else than what hymeg does
    remedy: str


_JUDGEMENT = _Foreign(lambda value: value is not False, "rows are answers to be learned: leave this one out")
_PREFERENCE = _Foreign(lambda value: not value, "rows are answers to be learned: make the better one a message")
_PICTURE = _Foreign(lambda value: not value, "these models read text only: leave the row out")
_FOREIGN = {
    **dict.fromkeys(("label", "kto_tag"), _JUDGEMENT),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _PICTURE),
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

    fingerprint = f"3-{translation.FINGERPRINT}"

    def __init__(self):
        self.ignored: Counter[str] = Counter()

    def parse(self, path: str, line: int, row: bytes | dict) -> Conversation:
        """The conversation in line `line` of the file `path`, which is given as JSON or, of parquet, as an object.
        Raises UserError where it is no good, with file, line and key.
        """
        where = place(path, line)
        row = _read(where, row)
        form = _form(where, row)
        if others := row.keys() - form.keys:
            for key in others:
                _check_key(where, key, form)
            self.ignored.update(others)
        if not _FOREIGN.keys().isdisjoint(row):
            _check_foreign(where, row)
        messages = _with_system(where, row, form.messages(where, row))
        tools = read_functions(where, *one_of(where, row, _TOOLS), are_calls=False)
        weights = _weights(1.0 if row.keys().isdisjoint(_WEIGHT) else weight_of(where, row, _WEIGHT), messages)
        return Conversation(messages, _effort(where, row), tools, where, weights)


def _read(where: str, row: bytes | dict) -> dict:
    """The row, without keys whose value is null."""
    if isinstance(row, bytes):
        try:
            row = decoded(where, row.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8: byte {shown(row[error.start : error.start + 1])}; convert the file with iconv"
            ) from error
    if not isinstance(row, dict):
        remedy = " (jq -c '.[]' makes lines of a list)" if isinstance(row, list) else ""
        raise UserError(f"{where}: holds {shown(row)}; an object is needed, such as {{'messages': [...]}}{remedy}")
    return {key: value for key, value in row.items() if value is not None}


class _Form(NamedTuple):
    needed: frozenset[str]  # the keys by which it is known
    keys: frozenset[str]  # that have a meaning in it
    messages: Callable[[str, dict], list[dict]]


def _form(where: str, row: dict) -> _Form:
    forms = [form for form in _FORMS if row.keys() >= form.needed]
    if len(forms) == 1:
        return forms[0]
    if forms:
        one, other, *_ = (" and ".join(map(repr, sorted(form.needed))) for form in forms)
        raise UserError(f"{where}: has {one} and also {other}, which are two forms of row; keep one")
    for form, hints in ((_INSTRUCTION, ("instruction",)), (_TRANSLATION, translation.NEEDED)):
        if any(key in row for key in hints):
            return form
    raise UserError(
        f"{where}: has the keys {shown(list(row))}; needed are 'messages' or 'conversations' for a conversation, "
        "'instruction' and 'output' for an instruction, 'source_lang', 'target_lang', 'source' and 'target' for a "
        "translation"
    )


def _instruction(where: str, row: dict) -> list[dict]:
    """ "input" stands on a line of its own below "instruction"; "history" are earlier questions and answers."""
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError(f"{where}: 'history' is {shown(history)}; [[question, answer], ...] is needed")
    question = [text_of(where, row, key) for key in ("instruction", "input") if row.get(key, "") != ""]
    question = "\n".join(question or [text_of(where, row, "instruction")])
    messages = []
    for asked, answered in [*history, [question, text_of(where, row, "output")]]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return read_messages(where, "history", messages)


def _translation(where: str, row: dict) -> list[dict]:
    request = translation.request(where, row)
    return [{"role": "user", "content": request}, {"role": "assistant", "content": text_of(where, row, "target")}]


def _make_form(needed: tuple[str, ...], others: tuple[str, ...], messages: Callable[[str, dict], list[dict]]) -> _Form:
    keys = frozenset((*needed, *others, *_SYSTEM, *_TOOLS, *_EFFORT, *_WEIGHT, *_FOREIGN))
    return _Form(frozenset(needed), keys, messages)


_INSTRUCTION = _make_form(("instruction", "output"), ("input", "history"), _instruction)
_TRANSLATION = _make_form(("source", "target"), translation.KEYS, _translation)
_FORMS = (
    _make_form(("messages",), (), lambda where, row: read_messages(where, "messages", row["messages"])),
    _make_form(("conversations",), (), lambda where, row: read_messages(where, "conversations", row["conversations"])),
    _INSTRUCTION,
    _TRANSLATION,
)
_ALL_KEYS = frozenset().union(*(form.keys for form in _FORMS))


def _check_key(where: str, key: str, form: _Form) -> None:
    """Raises UserError where `key`, which has no meaning in rows of that form, looks like a slip of the pen."""
    if meant := _meant(key, form):
        raise UserError(
            f"{where}: unknown key {shown(key)}; {meant!r} is known: mend the name, or rename the key if it is "
            "something else"
        )


@functools.lru_cache(4096)
def _meant(key: str, form: _Form) -> str | None:
    if key in _ALL_KEYS:
        return None
    return next(iter(difflib.get_close_matches(key, form.keys - _FOREIGN.keys(), n=1, cutoff=0.85)), None)


def _check_foreign(where: str, row: dict) -> None:
    for key in row.keys() & _FOREIGN.keys():
        if not _FOREIGN[key].means_nothing(row[key]):
            raise UserError(
                f"{where}: {key!r} is {shown(row[key])}, which hymeg does not do; {_FOREIGN[key].remedy} (or rename "
                "the key if it is something else)"
            )


def _with_system(where: str, row: dict, messages: list[dict]) -> list[dict]:
    key, system = one_of(where, row, _SYSTEM)
    if system in (None, ""):
        return messages
    if not isinstance(system, str):
        raise UserError(f"{where}: {key!r} {found(row, key)}; a string is needed")
    given = [message["content"] for message in messages if message["role"] == "system"]
    if given not in ([], [system]):
        raise UserError(f"{where}: has {key!r} and also another system message; keep one")
    return messages if given else [{"role": "system", "content": system}, *messages]


def _weights(of_row: float, messages: list[dict]) -> tuple[float, ...]:
    """Those of the assistant's turns, taken out of `messages`, times the row's; none where all are 1."""
    weights = [of_row * message.pop("weight", 1.0) for message in messages if message["role"] == "assistant"]
    return () if all(weight == 1 for weight in weights) else tuple(weights)


def _effort(where: str, row: dict) -> str | None:
    """That of all which the row says about it."""
    if row.keys().isdisjoint(_EFFORT):
        return None
    given = {key: row[key] for key in _EFFORT if key in row}
    arguments = given.pop("chat_template_kwargs", {})
    if not isinstance(arguments, dict) or not arguments.keys() <= set(_EFFORT):
        raise UserError(
            f"{where}: 'chat_template_kwargs' is {shown(arguments)}; of what a template is given, rows may say "
            "'reasoning_effort' only; leave the rest out"
        )
    given |= {f"chat_template_kwargs: {key}": value for key, value in arguments.items() if value is not None}
    possible = set(REASONING_EFFORTS)
    for key, value in given.items():
        possible &= _efforts(where, key, value)
    if len(possible) != 1 and given:
        raise UserError(
            f"{where}: {shown(given)} {'leaves open how much' if possible else 'contradicts itself'}; give "
            f"'reasoning_effort' alone: {', '.join(REASONING_EFFORTS)}"
        )
    return next(iter(possible)) if given else None


def _efforts(where: str, key: str, value: Any) -> set[str]:
    """Which efforts `value` may mean."""
    if isinstance(value, bool) and key.endswith(_THINKING):
        return {"low", "high"} if value else {"no_think"}
    if value not in REASONING_EFFORTS:
        raise UserError(f"{where}: {key!r} is {shown(value)}; {', '.join(REASONING_EFFORTS)} are possible")
    return {value}
