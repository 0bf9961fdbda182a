"""What a chat template makes of a conversation, and where in it the assistant's turns begin and end, found by
rendering.

The template sees the conversation once with a marker in place of each text, which gives the template's own text, the
places of the messages' texts and the special tokens. Each turn of the assistant is then rendered at the end of a short
history (what stands before the first turn, the turn before, what lies between), cut off before and behind it, with and
without the generation prompt: the whole must be made of just these pieces. So a conversation of n turns costs n small
renderings, and both they and the forms of conversations are analysed once. Where the short history tells something
else than the whole one, the whole one counts. A template that does not keep to the order of turns is refused.
"""

import contextlib
import functools
import json
import re
import secrets
from collections import Counter
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hymeg.data.rows import Conversation
from hymeg.errors import UserError, located
from hymeg.files import shown
from hymeg.hf.tokenizer import rendered

_MARK = secrets.token_hex(8)  # that no row can hold
_MARKER = re.compile(f"<{_MARK}-([0-9]{{6}})>")
_TEXTS = ("content", "reasoning_content")


def _marker(number: int) -> str:
    """All are of one length, so that numbering them otherwise moves nothing."""
    return f"<{_MARK}-{number:06d}>"


class Control(NamedTuple):
    """A special token that the template itself writes."""

    token_id: int
    start: int  # characters of `Form.text`
    end: int


class Form(NamedTuple):
    """What conversations have in common that differ only in their texts."""

    text: str  # with markers
    pieces: list[str]  # the template's text, number of a message's text, the template's text, ...
    controls: list[Control]
    control_ids: np.ndarray
    turns: list[tuple[int, int]]  # the assistant's: the numbers of the controls that open and end it
    special_ids: frozenset[int]  # what no text of a message may become
    is_special: np.ndarray  # bool, by token id

    def filled(self, texts: list[str]) -> str:
        pieces = self.pieces.copy()
        pieces[1::2] = [texts[int(number)] for number in pieces[1::2]]
        return "".join(pieces)

    def stretches(self, texts: list[str]) -> list[str]:
        """What stands before, between and behind the controls."""
        starts = [0, *(control.end for control in self.controls)]
        ends = [*(control.start for control in self.controls), len(self.text)]
        return [
            _MARKER.sub(lambda match: texts[int(match[1])], self.text[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]


class _Turn(NamedTuple):
    """The last turn of a history."""

    lead: str  # what the template writes between the assistant's turn before, or the start, and this one
    text: str
    eos: int  # where in `text` its EOS token stands


class ChatTemplate:
    """The chat template of `tokenizer`, whose EOS token must end the assistant's turns; `fast` is the tokenizer below
    it.

    No text becomes a special token, nor an added token that the template's source names: those are the template's own
    (the rule of transformers' `sanitize_control_tokens`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fast: Tokenizer):
        self._tokenizer = tokenizer
        self._added = fast.get_added_tokens_decoder()
        self._id_of = {token.content: token_id for token_id, token in self._added.items()}
        self._literal = _pattern(self._added.values())
        named = set(self._literal.findall(str(tokenizer.chat_template)))
        # Not the unknown token: it stands for a character that is not in the vocabulary.
        self._special_ids = {
            token_id for token_id, token in self._added.items() if token.special or token.content in named
        } - {tokenizer.unk_token_id}
        self._analysed = functools.lru_cache(256)(self._analyse)
        self._last_turn = functools.lru_cache(1024)(self._find_last_turn)
        self._context = functools.lru_cache(1024)(self._find_context)
        ids = np.arange(max(fast.get_vocab().values()) + 1)
        self._is_special = functools.lru_cache(16)(lambda special_ids: np.isin(ids, list(special_ids)))

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, effort: str | None = None, prompt: bool = False
    ) -> str:
        """What the template makes of `messages`; with `prompt`, followed by the beginning of the assistant's turn."""
        return rendered(self._tokenizer, messages, tools, effort, add_generation_prompt=prompt, is_training=True)

    def form(self, conversation: Conversation) -> tuple[Form, list[str], str]:
        """The conversation's form, the texts that make it the conversation (`Form.filled`), and the conversation as the
        template renders it.

        Raises:
            UserError: the template refuses the conversation, leaves a text out or changes it, or does not render it
                turn by turn.
        """
        text = self.render(conversation.messages, conversation.tools, conversation.reasoning_effort)
        if any("tool_calls" in message for message in conversation.messages):
            # Arguments and ids differ from row to row: without them forms and turns are analysed once. A template that
            # does more with them than to print them needs them.
            with contextlib.suppress(UserError):
                return self._form(conversation, text, without_arguments=True)
        return self._form(conversation, text, without_arguments=False)

    def _form(self, conversation: Conversation, text: str, without_arguments: bool) -> tuple[Form, list[str], str]:
        structure, texts, arguments = _without_texts(conversation, without_arguments)
        form = self._analysed(structure)
        self._check_no_special("\n".join(arguments), form.special_ids)
        expected = form.filled(texts)
        if text != expected:
            at = next(
                (index for index, (one, other) in enumerate(zip(text, expected, strict=False)) if one != other),
                min(len(text), len(expected)),
            )
            raise UserError(
                f"the chat template changes the text of a message: {shown(expected[at : at + 40])} becomes "
                f"{shown(text[at : at + 40])}; give the text as the template leaves it (often: no space at its ends)"
            )
        return form, texts, text

    def _analyse(self, structure: str) -> Form:
        """The form of conversations of one structure (`_without_texts`). Raises UserError where its turns have no sound
        bounds.
        """
        messages, tools, effort = json.loads(structure)
        text = self.render(messages, tools, effort)
        _check_nothing_is_left_out(messages, tools, text)
        controls = self._controls(text)
        special_ids = frozenset(self._special_ids | {control.token_id for control in controls})
        self._check_no_special(structure, special_ids)
        turns = self._turns(messages, tools, effort, text, controls)
        control_ids = np.array([control.token_id for control in controls], np.int32)
        return Form(text, _MARKER.split(text), controls, control_ids, turns, special_ids, self._is_special(special_ids))

    def _controls(self, text: str) -> list[Control]:
        """The added tokens in `text`, in their order: the leftmost, of those the longest, as tokenizers finds them."""
        return [Control(self._id_of[match[0]], *match.span()) for match in self._literal.finditer(text)]

    def _check_no_special(self, text: str, special_ids: frozenset[int]) -> None:
        """Raises UserError where `text`, which is no text of a message, holds a special token's: there it could not be
        told from the template's own.
        """
        for control in self._controls(text):
            if control.token_id in special_ids:
                token = self._added[control.token_id].content
                raise UserError(
                    f"{shown(token)} is a special token of this tokenizer; only texts may hold it, not 'tools', "
                    "'tool_calls' or names"
                )

    def _turns(
        self, messages: list[dict], tools: list[dict] | None, effort: str | None, text: str, controls: list[Control]
    ) -> list[tuple[int, int]]:
        """The numbers of the controls that open and end each of the assistant's turns in `text`, the whole
        conversation.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        number_at = {control.start: number for number, control in enumerate(controls)}
        occurrences = Counter(_MARKER.findall(text))
        turns, end, previous = [], 0, 0
        for number in numbers:
            whole = messages[: number + 1]
            since = [_without_arguments(messages[previous]), *messages[previous + 1 : number + 1]]
            short = whole if number == numbers[0] else messages[: numbers[0]] + since
            previous = number
            with located(f"message {number + 1}"):
                try:
                    turn = self._next_turn(text, end, short, tools, effort)
                except UserError:
                    turn = self._next_turn(text, end, whole, tools, effort)
                inside = _MARKER.findall(turn.text)
                if sum(occurrences[marker] for marker in set(inside)) != len(inside):
                    raise UserError(_ELSEWHERE)
            start = end + len(turn.lead)
            turns.append((number_at[start], number_at[start + turn.eos]))
            end = start + len(turn.text)
        return turns

    def _next_turn(
        self, text: str, start: int, history: list[dict], tools: list[dict] | None, effort: str | None
    ) -> _Turn:
        """The turn that ends `history`, with the markers that it has there. Raises UserError unless `text` goes on with
        it at `start`.
        """
        numbers = {_marker(number)[-7:-1]: number for number in range(len(tools or ()))}  # the tools keep theirs
        before, last = (
            _MARKER.sub(lambda match: _marker(numbers.setdefault(match[1], len(numbers))), _plain_json(part))
            for part in (history[:-1], history[-1])
        )
        turn = self._last_turn(before, last, _plain_json(tools), effort)
        own = list(map(int, numbers))
        lead, own_text = (_MARKER.sub(lambda match: _marker(own[int(match[1])]), part) for part in turn[:2])
        if not (text.startswith(lead, start) and text.startswith(own_text, start + len(lead))):
            raise UserError(_DIFFERENTLY)
        return _Turn(lead, own_text, turn.eos)

    def _find_last_turn(self, history: str, last: str, tools: str, effort: str | None) -> _Turn:
        """The assistant's turn `last` behind `history`; all are JSON. Raises UserError where it has no sound bounds."""
        before, lead, prompt = self._context(history, tools, effort)
        message = json.loads(last)
        after = self.render([*json.loads(history), message], json.loads(tools), effort)
        if not after.startswith(before):
            raise UserError(_DIFFERENTLY)
        text = after[len(before) :]
        controls, opening = self._controls(text), self._controls(prompt)[:1]
        if not opening or opening[0].start != 0 or controls[:1] != opening:
            raise UserError(
                "the chat template does not open it with the special token of its generation prompt (perhaps because "
                "the turn before is the assistant's too: make them one); such rows are refused"
            )
        if not text.startswith(prompt):
            raise UserError(_not_behind_the_prompt(prompt, message, effort))
        ends = [control for control in controls if control.token_id == self._tokenizer.eos_token_id]
        if not ends or _MARKER.search(text, ends[-1].end):
            raise UserError(
                f"the chat template does not end it with the EOS token {shown(self._tokenizer.eos_token)}, and the "
                "model would never learn to stop; the checkpoint's own template and eos_token are needed"
            )
        if set(_MARKER.findall(text)) != set(_MARKER.findall(last)):
            raise UserError(_ELSEWHERE)
        return _Turn(lead, text, ends[-1].start)

    def _find_context(self, history: str, tools: str, effort: str | None) -> tuple[str, str, str]:
        """What the template makes of `history`; the part of it behind the assistant's last turn; and the generation
        prompt behind it.
        """
        messages, tools = json.loads(history), json.loads(tools)
        before, prompted = (self.render(messages, tools, effort, prompt) for prompt in (False, True))
        previous = max((end for end, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
        earlier = self.render(messages[:previous], tools, effort) if previous else ""
        if not (before.startswith(earlier) and prompted.startswith(before)):
            raise UserError(_DIFFERENTLY)
        return before, before[len(earlier) :], prompted[len(before) :]


_DIFFERENTLY = (
    "the chat template renders what stands before it differently when more follows, so that the assistant would not be "
    "trained on what it sees in use; system messages belong at the start, and earlier reasoning must stay"
)
_ELSEWHERE = "the chat template puts its text elsewhere, or other text into it; such templates are refused"


def _not_behind_the_prompt(prompt: str, message: dict, effort: str | None) -> str:
    if message.get("reasoning_content"):
        return (
            f"has reasoning, but under reasoning_effort {effort or 'no_think (when absent)'} the model in use goes on "
            f"behind {shown(prompt)}; give reasoning_effort low or high, or leave the reasoning out"
        )
    return (
        f"the chat template does not begin it with its generation prompt {shown(prompt)}, so that the assistant would "
        "not be trained on what it sees in use; such rows are refused"
    )


def _pattern(added_tokens) -> re.Pattern:
    """Finds the added tokens in a text."""
    literals = [
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in sorted(added_tokens, key=lambda token: -len(token.content))
    ]
    return re.compile("|".join(literals) or "(?!)")


def _check_nothing_is_left_out(messages: list[dict], tools: list[dict] | None, text: str) -> None:
    """Raises UserError where a marker in `messages` or `tools` is not in `text`."""
    seen = set(_MARKER.findall(text))
    of_messages = [
        (f"message {number}: the chat template leaves out its {key!r}; it", value)
        for number, message in enumerate(messages, start=1)
        for key, value in message.items()
    ]
    for what, value in [*of_messages, ("the chat template leaves out 'tools'; they", tools)]:
        if not seen.issuperset(_MARKER.findall(_plain_json(value))):
            raise UserError(f"{what} cannot be trained with this tokenizer's template")


def _without_arguments(message: dict) -> dict:
    """A turn whose calls have none: what follows does not depend on them."""

    def emptied(item: dict) -> dict:
        return item | {"arguments": {}} if isinstance(item.get("arguments"), dict) else item

    return json.loads(_plain_json(message), object_hook=emptied) if "tool_calls" in message else message


def _without_texts(conversation: Conversation, without_arguments: bool) -> tuple[str, list[str], list[str]]:
    """The conversation as JSON with a marker in place of each text of a message and each name of a function, those of
    `tools` first; these texts; and those of them that are arguments.

    Args:
        without_arguments: whether the arguments of calls count as texts too, strings as they are and others as JSON,
            and ids of calls are left out.
    """
    texts, arguments = [], []

    def marked(text: str) -> str:
        texts.append(text)
        return _marker(len(texts) - 1)

    def argument(value: object) -> str:
        arguments.append(value if isinstance(value, str) else _plain_json(value))
        return marked(arguments[-1])

    def nameless(item: dict) -> dict:
        function = item.get("function", item)
        function = function | {"name": marked(function["name"])}
        if without_arguments and isinstance(function.get("arguments"), dict):
            function["arguments"] = {key: argument(value) for key, value in function["arguments"].items()}
        return item | {"function": function} if "function" in item else function

    tools = conversation.tools and [nameless(tool) for tool in conversation.tools]
    messages = []
    for message in conversation.messages:
        message = {key: marked(value) if key in _TEXTS and value else value for key, value in message.items()}
        if "tool_calls" in message:
            message["tool_calls"] = [nameless(call) for call in message["tool_calls"]]
        if without_arguments:
            message.pop("tool_call_id", None)
            for call in message.get("tool_calls", ()):
                call.pop("id", None)
        messages.append(message)
    return _plain_json([messages, tools, conversation.reasoning_effort]), texts, arguments


def _plain_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
