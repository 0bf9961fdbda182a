"""Conversations -> tokens, by the checkpoint's own chat template; and which of the tokens are trained: exactly the
assistant's.

The text of a message is never a special token, nor another token that the template's source names. Where it holds the
literal of one ("<｜hy_Assistant｜>", "</think>"), the row is cut at the tokens that the template wrote itself
(`hymeg.data.chat_template` knows which) and each stretch between them is tokenized as if the vocabulary had no such
tokens. All other rows are tokenized in one piece, as serving does.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hymeg.data.chat_template import ChatTemplate, Form
from hymeg.data.rows import Conversation
from hymeg.errors import UserError, located
from hymeg.files import shown
from hymeg.hf.tokenizer import load_tokenizer, without_special

_VERSION = 2  # of what this module makes of the same row, tokenizer and template


class Tokens(NamedTuple):
    """One conversation."""

    token_ids: np.ndarray
    """`[tokens]`, int32."""
    trained: np.ndarray
    """`[tokens]`, bool: the assistant's, from behind the token that opens its turn up to and including EOS, but for
    turns of weight 0."""
    weights: np.ndarray | None = None
    """`[tokens]`, fp32: of the loss of each token, 0 where it is not trained. None: 1 where it is."""


class ChatEncoder:
    """Encodes conversations with the tokenizer and chat template in the folder `tokenizer_dir`.

    Args:
        vocab_size: the model's; with it, every token id must be smaller.

    Attributes:
        fingerprint: equal for encoders that make the same tokens of the same conversations.
        tokenizer: transformers' tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded, has no chat template or no EOS token, or does not fit the model.
    """

    def __init__(self, tokenizer_dir: str | os.PathLike, vocab_size: int | None = None):
        self.tokenizer = load_tokenizer(tokenizer_dir)
        # A copy of its own: transformers changes settings of the tokenizer's from call to call.
        self._fast = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        with located(str(tokenizer_dir)):
            _check(self.tokenizer, vocab_size)
            self._template = ChatTemplate(self.tokenizer, self._fast)
            self._template.render([{"role": "user", "content": "?"}])
        decisive = [_VERSION, self._fast.to_str(), self.tokenizer.chat_template, self.tokenizer.special_tokens_map]
        self.fingerprint = hashlib.sha256(json.dumps(decisive, default=str).encode()).hexdigest()[:16]
        self._without = functools.lru_cache(16)(functools.partial(without_special, self._fast))

    def encode(self, conversation: Conversation) -> Tokens:
        """`encode_batch` for one conversation. Raises the UserError."""
        [encoded] = self.encode_batch([conversation])
        if isinstance(encoded, UserError):
            raise encoded
        return encoded

    def encode_batch(self, conversations: list[Conversation]) -> list[Tokens | UserError]:
        """The tokens of each conversation. In the place of one that the template refuses, leaves a text out of or
        changes, or that cannot be rendered turn by turn, stands the UserError, whose message begins with its `where`.
        """
        forms = [_tried(conversation, self._template.form, conversation) for conversation in conversations]
        texts = [form[2] for form in forms if not isinstance(form, UserError)]
        encodings = iter(self._fast.encode_batch_fast(texts, add_special_tokens=False))
        return [
            form
            if isinstance(form, UserError)
            else _tried(
                conversation, self._tokens, *form[:2], np.array(next(encodings).ids, np.int32), conversation.weights
            )
            for conversation, form in zip(conversations, forms, strict=True)
        ]

    def _tokens(self, form: Form, texts: list[str], token_ids: np.ndarray, turn_weights: tuple[float, ...]) -> Tokens:
        """`token_ids` with their mask; encoded again where a text has become a special token."""
        (positions,) = np.nonzero(form.is_special[token_ids])
        if not np.array_equal(token_ids[positions], form.control_ids):
            token_ids, positions = self._encode_stretches(form, texts)
        weights = np.zeros(len(token_ids), np.float32)
        for (opening, end), weight in zip(form.turns, turn_weights or [1.0] * len(form.turns), strict=True):
            weights[positions[opening] + 1 : positions[end] + 1] = weight
        return Tokens(token_ids, weights > 0, weights if turn_weights else None)

    def _encode_stretches(self, form: Form, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The token ids, and the positions of the controls among them."""
        encodings = self._without(form.special_ids).encode_batch_fast(form.stretches(texts), add_special_tokens=False)
        stretches = [np.array(encoding.ids, np.int32) for encoding in encodings]
        for stretch in stretches:
            for token_id in stretch[form.is_special[stretch]].tolist():
                token = self.tokenizer.convert_ids_to_tokens(token_id)
                raise UserError(
                    f"a message holds {shown(token)}, a special token that this tokenizer cannot take for plain text; "
                    "reword it"
                )
        closed = [np.append(stretch, token) for stretch, token in zip(stretches, form.control_ids, strict=False)]
        return np.concatenate([*closed, stretches[-1]]), np.cumsum(list(map(len, closed))) - 1


def _check(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raises UserError where no conversation could be encoded."""
    if vocab_size is not None and (largest_id := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UserError(
            f"token ids go up to {largest_id}, but the model's vocab_size is {vocab_size}: tokenizer and model do not "
            "belong together"
        )
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; put the checkpoint's chat_template.jinja there (or its "
            "tokenizer_config.json with a chat_template)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token (eos_token in tokenizer_config.json), which ends the assistant's turns"
        )


def _tried[T](conversation: Conversation, work: Callable[..., T], *args: object) -> T | UserError:
    """What `work` returns, or its UserError with the conversation's place."""
    try:
        return work(*args)
    except UserError as error:
        return UserError(f"{conversation.where}: {error}" if conversation.where else str(error))
