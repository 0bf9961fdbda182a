"""What a chat template makes of a conversation, and where in it the assistant's turns begin and end, found by
rendering.

The template sees the conversation once with a marker in place of each text, cut off before and after every turn, with
and without the generation prompt: that gives the template's own text, the places of the messages' texts and the bounds
of the turns. All this depends on the form of a conversation only, so that a form is analysed once. A template that does
not keep to the order of turns is refused.
"""

import functools
import json
import re
import secrets
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hymeg.data.rows import Conversation
from hymeg.errors import UserError
from hymeg.hf.files import shown

_MARK = secrets.token_hex(8)  # that no row can hold
_MARKER = re.compile(f"<{_MARK}-([0-9]+)>")
_TEXTS = ("content", "reasoning_content")


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


class ChatTemplate:
    """The chat template of `tokenizer`, whose EOS token must end the assistant's turns; `fast` is the tokenizer below
    it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fast: Tokenizer):
        self._tokenizer = tokenizer
        self._fast = fast
        self._added = fast.get_added_tokens_decoder()
        self._num_ids = max(fast.get_vocab().values()) + 1
        # Not the unknown token: it stands for a character that is not in the vocabulary.
        self._special_ids = {token_id for token_id, token in self._added.items() if token.special} - {
            tokenizer.unk_token_id
        }
        self._analysed = functools.lru_cache(1024)(self._analyse)
        self._is_special = functools.lru_cache(16)(self._lookup)

    def form(self, conversation: Conversation) -> tuple[Form, list[str]]:
        """The conversation's form, and the texts that make it the conversation (`Form.filled`).

        Raises:
            UserError: the template refuses the conversation, leaves a text out, or does not render it turn by turn.
        """
        structure, texts = _without_texts(conversation)
        return self._analysed(structure), texts

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, effort: str | None = None, prompt: bool = False
    ) -> str:
        """What the template makes of `messages`; with `prompt`, followed by the beginning of the assistant's turn."""
        given = {} if effort is None else {"reasoning_effort": effort}
        try:
            # A batch of one, because one conversation may not be empty.
            [text] = self._tokenizer.apply_chat_template(
                [messages], tools=tools, tokenize=False, add_generation_prompt=prompt, is_training=True, **given
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = next(iter(str(error).strip().splitlines()), "")
            raise UserError(f"the chat template cannot render it: {reason or type(error).__name__}") from error
        return text

    def rendered(self, conversation: Conversation, form: Form, texts: list[str]) -> str:
        """What the template makes of the conversation. Raises UserError where that is not `form` filled with `texts`:
        it may look into them.
        """
        expected = form.filled(texts)
        text = self.render(conversation.messages, conversation.tools, conversation.reasoning_effort)
        if text != expected:
            at = next(
                (index for index, (one, other) in enumerate(zip(text, expected, strict=False)) if one != other),
                min(len(text), len(expected)),
            )
            raise UserError(
                f"the chat template changes the text of a message: {shown(expected[at : at + 40])} becomes "
                f"{shown(text[at : at + 40])}; "
                "give the text as the template leaves it (often: no space at its ends)"
            )
        return text

    def _analyse(self, structure: str) -> Form:
        """The form of conversations of one structure (`_without_texts`). Raises UserError where its turns have no sound
        bounds.
        """
        messages, tools, effort = json.loads(structure)
        text = self.render(messages, tools, effort)
        controls = self._controls(text)
        unseen = set(_MARKER.findall(_plain_json([messages, tools]))) - set(_MARKER.findall(text))
        for number, message in enumerate(messages, start=1):
            for key, value in message.items():
                if unseen.intersection(_MARKER.findall(_plain_json(value))):
                    raise UserError(
                        f"message {number}: the chat template leaves out its {key!r}; it cannot be trained with this "
                        "tokenizer's template"
                    )
        if unseen:
            raise UserError(
                "the chat template leaves out 'tools'; they cannot be trained with this tokenizer's template"
            )
        special_ids = frozenset(self._special_ids | {control.token_id for control in controls})
        self._check_structure(messages, tools, special_ids)
        turns = [
            self._turn(messages, number, tools, effort, text, controls)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        control_ids = np.array([control.token_id for control in controls], np.int32)
        return Form(text, _MARKER.split(text), controls, control_ids, turns, special_ids, self._is_special(special_ids))

    def _controls(self, text: str) -> list[Control]:
        """The added tokens in `text`, in their order."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        found = [
            Control(token_id, *offsets)
            for token_id, offsets in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self._added
        ]
        # Not the unknown token in place of a character, nor an added token that is also a piece of plain text.
        return [
            control for control in found if text[control.start : control.end] == self._added[control.token_id].content
        ]

    def _check_structure(self, messages: list[dict], tools: list[dict] | None, special_ids: frozenset[int]) -> None:
        """Raises UserError where anything but the texts holds a special token's text: there it could not be told from
        the template's own.
        """
        for control in self._controls(_plain_json([messages, tools])):
            if control.token_id in special_ids:
                token = self._added[control.token_id].content
                raise UserError(
                    f"{shown(token)} is a special token of this tokenizer; only texts may hold it, not 'tools', "
                    "'tool_calls' or names"
                )

    def _turn(
        self,
        messages: list[dict],
        number: int,
        tools: list[dict] | None,
        effort: str | None,
        text: str,
        controls: list[Control],
    ) -> tuple[int, int]:
        """The numbers of the controls that open and end the turn `messages[number]` of the assistant in `text`, the
        whole conversation.
        """
        where = f"message {number + 1}"
        before = self.render(messages[:number], tools, effort)
        prompted = self.render(messages[:number], tools, effort, prompt=True)
        after = self.render(messages[: number + 1], tools, effort)
        if not (text.startswith(after) and after.startswith(before) and prompted.startswith(before)):
            raise UserError(
                f"{where}: the chat template renders what stands before it differently when more follows, so that the "
                "assistant would not be trained "
                "on what it sees in use; system messages belong at the start, and earlier reasoning must stay"
            )
        prompt = [control.token_id for control in self._controls(prompted) if control.start == len(before)]
        inside = [
            index
            for index, control in enumerate(controls)
            if len(before) <= control.start and control.end <= len(after)
        ]
        if not inside or controls[inside[0]].start != len(before) or [controls[inside[0]].token_id] != prompt:
            raise UserError(
                f"{where}: the chat template does not open it with the special token of its generation prompt (perhaps "
                "because the turn before is "
                "the assistant's too: make them one); such rows are refused"
            )
        ends = [index for index in inside if controls[index].token_id == self._tokenizer.eos_token_id]
        trained = text[controls[inside[0]].end : controls[ends[-1]].start] if ends else ""
        if not ends or _MARKER.findall(text[controls[ends[-1]].end : len(after)]):
            raise UserError(
                f"{where}: the chat template does not end it with the EOS token {shown(self._tokenizer.eos_token)}, "
                "and the model would never learn "
                "to stop; the checkpoint's own template and eos_token are needed"
            )
        own = set(_MARKER.findall(_plain_json(messages[number])))
        if own != set(_MARKER.findall(trained)) or len(_MARKER.findall(trained)) != sum(
            found in own for found in _MARKER.findall(text)
        ):
            raise UserError(
                f"{where}: the chat template puts its text elsewhere, or other text into it; such templates are refused"
            )
        return inside[0], ends[-1]

    def _lookup(self, special_ids: frozenset[int]) -> np.ndarray:
        is_special = np.zeros(self._num_ids, bool)
        is_special[list(special_ids)] = True
        return is_special


def _without_texts(conversation: Conversation) -> tuple[str, list[str]]:
    """The conversation as JSON with a marker in place of each text of a message and each name of a function; and
    those.
    """
    texts = []

    def marked(text: str) -> str:
        texts.append(text)
        return f"<{_MARK}-{len(texts) - 1}>"

    def nameless(item: dict) -> dict:
        function = item.get("function", item)
        named = function | {"name": marked(function["name"])}
        return item | {"function": named} if "function" in item else named

    messages = []
    for message in conversation.messages:
        message = {key: marked(value) if key in _TEXTS and value else value for key, value in message.items()}
        if "tool_calls" in message:
            message["tool_calls"] = [nameless(call) for call in message["tool_calls"]]
        messages.append(message)
    tools = conversation.tools and [nameless(tool) for tool in conversation.tools]
    return json.dumps([messages, tools, conversation.reasoning_effort]), texts


def _plain_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
