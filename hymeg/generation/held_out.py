"""Held-out rows as questions, what a model made of them as examples, and these as figures and lines of a file.

Rows are those of training (`hymeg.data.rows`). A translation asks for its target, a conversation for the assistant's
last message. The model itself is not used here: who has one answers the questions.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hymeg.data.rows import RowReader
from hymeg.data.text_files import check_row_file, read_batches
from hymeg.data.translation import NEEDED
from hymeg.errors import UserError, located
from hymeg.generation.alarms import alarms, crossed, rates
from hymeg.generation.judging import METRICS, Example, Scores, scores, scores_by_pair
from hymeg.generation.prompts import chat_prompt
from hymeg.generation.replies import Answer
from hymeg.generation.sampling import Sampling
from hymeg.hf.config import HyConfig
from hymeg.hf.tokenizer import control_tokens, rendered

_REASONING, _CONTENT = "reasoning of 3f9c", "content of 3f9c"


class Question(NamedTuple):
    """A row.

    Attributes:
        prompt: tokens, up to where the assistant speaks.
        asked: the source of a translation, the last message before the answer of a conversation.
        reference: what the row answers, without its reasoning.
        num_reference_tokens: with it.
        effort: of reasoning, that the row asks for and its reference shows.
        translation: source and languages of one, by the row's keys.
        row: as it stands in the file.
        number: its line there.
    """

    prompt: list[int]
    asked: str
    reference: str
    num_reference_tokens: int
    effort: str | None
    translation: dict[str, str]
    row: dict[str, Any]
    number: int


class HeldOut:
    """Questions from a file.

    Args:
        path: of rows as for training.
        tokenizer: with its chat template.
        config: the model's.
        num_rows: that are asked, spread evenly over the file; None: all.

    Raises:
        UserError: the file or one of these rows cannot be used, or a row is too long for the model.
    """

    def __init__(
        self, path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, config: HyConfig, num_rows: int | None = None
    ):
        if tokenizer.chat_template is None:
            raise UserError("the tokenizer has no chat template, by which rows become prompts")
        self.tokenizer = tokenizer
        path = check_row_file(path)
        rows = [row for batch in read_batches(path) for row in batch.rows]
        if not rows:
            raise UserError(f"{path}: holds no rows; give held-out rows, as for training")
        num_rows = len(rows) if num_rows is None else min(num_rows, len(rows))
        reader = RowReader()
        self.questions = [self._question(reader, path, *rows[i * len(rows) // num_rows]) for i in range(num_rows)]
        self.max_new_tokens = 16 + 2 * max(question.num_reference_tokens for question in self.questions)
        longest = max(self.questions, key=lambda question: len(question.prompt))
        if len(longest.prompt) + self.max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"{path}: a row has a prompt of {len(longest.prompt):,} tokens, and answers may have "
                f"{self.max_new_tokens:,}, twice the longest reference: more than the model's context of "
                f"{config.max_position_embeddings:,} (max_position_embeddings); leave the longest rows out"
            )
        self._special = control_tokens(tokenizer)  # by id: a text may spell one
        self._closing = _closing(tokenizer) or ""
        begun_by = (number for number, token in self._special.items() if self._closing.startswith(token))
        self._closing_token = next(begun_by, None)

    @property
    def prompts(self) -> list[list[int]]:
        return [question.prompt for question in self.questions]

    def sampling(self, stop_ids: Sequence[int]) -> Sampling:
        """The likeliest token each time, so that evaluations differ by the weights alone; up to twice the longest
        reference, beyond which a translation is of no use.
        """
        return Sampling(max_new_tokens=self.max_new_tokens, stop_ids=tuple(stop_ids))

    def examples(self, answers: Iterable[Answer]) -> list[Example]:
        """What `answers` say, question by question."""
        return [self._example(question, answer) for question, answer in zip(self.questions, answers, strict=True)]

    def _question(self, reader: RowReader, path: str, number: int, row: bytes | dict) -> Question:
        conversation = reader.parse(path, number, row)
        *before, last = conversation.messages
        with located(conversation.where):
            if last["role"] != "assistant" or not (last.get("content") or "").strip() or not before:
                raise UserError("ends without an answer in words, with which to compare; leave it out")
            prompt = chat_prompt(self.tokenizer, before, conversation.tools, conversation.reasoning_effort)
        row = row if isinstance(row, dict) else json.loads(row)
        translation = {}
        if all(row.get(key) is not None for key in NEEDED):
            translation = {"source": row["source"]} | {key: row[key].strip() for key in ("source_lang", "target_lang")}
        texts = [last.get("reasoning_content") or "", last["content"]]
        num_tokens = sum(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))
        asked = translation.get("source", str(before[-1].get("content")))
        effort = conversation.reasoning_effort
        if effort != "no_think" and not last.get("reasoning_content"):
            effort = None  # where the reference does not think either
        return Question(prompt, asked, last["content"], num_tokens, effort, translation, row, number)

    def _example(self, question: Question, answer: Answer) -> Example:
        tokens, thinking = answer.tokens, None
        if self._closing_token in tokens:
            at = tokens.index(self._closing_token)
            thinking, tokens = self._text(tokens[:at]), tokens[at + 1 :]
        text = self._text(tokens)
        if self._closing_token is None and self._closing and self._closing in text:  # a template that writes it as text
            thinking, _, text = text.partition(self._closing)
        return Example(
            question.reference,
            text.strip(),
            answer.ended,
            tuple(self._special[token] for token in tokens if token in self._special),
            **question.translation,
            thinking=thinking,
            effort=question.effort,
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token not in self._special])


def _closing(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template writes between reasoning and answer; None where it has no place for reasoning."""
    message = {"role": "assistant", "reasoning_content": _REASONING, "content": _CONTENT}
    try:
        text = rendered(tokenizer, [{"role": "user", "content": "?"}, message], effort="high", is_training=True)
    except UserError:
        return None
    between = re.search(f"{re.escape(_REASONING)}(.*?){re.escape(_CONTENT)}", text, re.DOTALL)
    return between[1].strip() or None if between else None


def figures(examples: Sequence[Example]) -> dict[str, Any]:
    """Of all examples: `overall` and by `pairs` the number of `texts` and each metric from 0 to 100; `signatures` by
    metric; `alarms`, the share of the texts in which each fired.
    """
    overall = scores(examples)
    return {
        "overall": _rounded(overall),
        "pairs": {pair: _rounded(found) for pair, found in scores_by_pair(examples).items()},
        "signatures": overall.signatures,
        "alarms": {name: round(share, 4) for name, share in rates([alarms(one) for one in examples]).items()},
    }


def _rounded(found: Scores) -> dict[str, float]:
    return {"texts": found.num_texts} | {metric: round(value, 4) for metric, value in found.values.items()}


def line(found: dict[str, Any]) -> str:
    """`figures` on one line: the scores, and the alarms that are above their thresholds."""
    said = [f"{name}: {found['overall'][name]:.2f}" for name in METRICS]
    said += [f"ALARM {alarm}" for alarm in crossed(found["alarms"])]
    return " | ".join([*said, f"texts: {found['overall']['texts']}"])


def rows(questions: Sequence[Question], examples: Sequence[Example]) -> list[dict[str, Any]]:
    """A line of a file for each: what was asked and answered, and what is wrong with it."""
    return [
        {
            "row": question.number,
            "source": question.asked,
            "reference": example.reference,
            "hypothesis": example.hypothesis,
            "pair": example.pair,
            "ended": example.ended,
            "alarms": list(alarms(example)),
        }
        for question, example in zip(questions, examples, strict=True)
    ]
