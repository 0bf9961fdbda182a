"""The checkpoint's tokenizer, loaded with errors a person can act on; and a small tokenizer of Hy's form for tiny
checkpoints.

Chat templates differ between Hy's releases, and so do the literals of their special tokens: for a real checkpoint its
own template and its own tokens count, never the ones below. Those have the form of Hy-MT2-30B-A3B's.
"""

import json
import os
from collections.abc import Container, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hymeg.errors import UserError
from hymeg.files import read_json, shown
from hymeg.hf.config import CONFIG_FILE, HyConfig, local_directory

BOS = "<｜hy_begin▁of▁sentence｜>"
PAD = "<｜hy_▁pad▁｜>"
USER = "<｜hy_User｜>"
ASSISTANT = "<｜hy_Assistant｜>"
EOS = "<eos:6124c78e>"
END_OF_DOCUMENT = "<｜hy_place▁holder▁no▁8｜>"
THINK = "<think>"
END_OF_THINK = "</think>"
REASONING_MODE = "<｜reasoning_mode｜>"
# In the order of their ids.
SPECIAL_TOKENS = (BOS, PAD, USER, ASSISTANT, EOS, END_OF_DOCUMENT, THINK, END_OF_THINK, REASONING_MODE)
SMALLEST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Reasoning of turns before the last question is dropped unless training, and only training closes the last answer with
# EOS.
CHAT_TEMPLATE = """\
{%- set effort = reasoning_effort or 'no_think' -%}
{%- if effort not in ['no_think', 'low', 'high'] -%}
    {{- raise_exception('reasoning_effort must be no_think, low or high, not ' ~ effort) -}}
{%- endif -%}
{%- set position = namespace(last_user=-1) -%}
{{- '<｜hy_begin▁of▁sentence｜>' -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content -}}
    {%- elif message.role == 'user' -%}
        {%- set position.last_user = loop.index0 -%}
    {%- elif message.role != 'assistant' -%}
        {{- raise_exception('role must be system, user or assistant, not ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- '<｜reasoning_mode｜>reasoning_effort:' ~ effort -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<｜hy_User｜>' ~ message.content -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<｜hy_Assistant｜><think>' -}}
        {%- if message.reasoning_content and (is_training or loop.index0 > position.last_user) -%}
            {{- message.reasoning_content -}}
        {%- endif -%}
        {{- '</think>' ~ message.content -}}
        {%- if is_training or not loop.last -%}
            {{- '<eos:6124c78e>' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<｜hy_Assistant｜><think>' ~ ('</think>' if effort == 'no_think' else '') -}}
{%- endif -%}
"""


def load_tokenizer(directory: str | os.PathLike, config: HyConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint's folder `directory`; nothing is fetched and no code from the folder is run.

    Args:
        directory: a folder with tokenizer.json and tokenizer_config.json.
        config: the model's; with it, every token id must lie inside `config.vocab_size`.

    Raises:
        UserError: a file is missing or broken, or the vocabulary is larger than the model's.
    """
    directory = local_directory(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing; the checkpoint's tokenizer files are needed")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a broken file makes transformers and tokenizers raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error
    if config is not None:
        largest_token, largest_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if largest_id >= config.vocab_size:
            raise UserError(
                f"{directory}: token {largest_token!r} has id {largest_id}, outside the model's vocabulary; ids below "
                f"vocab_size ({config.vocab_size}) are possible: tokenizer and config.json do not belong together"
            )
    return tokenizer


def end_of_document_id(directory: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document of text: "eod_token_id" in the config.json of `directory`, else the tokenizer's
    EOS, if it has one. (A chat's turns end with EOS in any case.)

    Raises:
        UserError: config.json cannot be read, or names no token of the tokenizer's.
    """
    path = Path(directory) / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    token_id = config.get("eod_token_id") if isinstance(config, dict) else None
    if token_id is None:
        return tokenizer.eos_token_id
    if type(token_id) is not int or token_id not in tokenizer.get_vocab().values():
        raise UserError(
            f"{path}: 'eod_token_id' is {shown(token_id)}; the id of a token of this folder's tokenizer is needed"
        )
    return token_id


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that no text may hold, by their ids: special ones, and other added tokens that the chat template
    writes.
    """
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in str(tokenizer.chat_template))
    }


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer below, for which all is text, also what looks like one of its `control_tokens`."""
    return without_special(tokenizer.backend_tokenizer, control_tokens(tokenizer))


def without_special(tokenizer: Tokenizer, special_ids: Container[int]) -> Tokenizer:
    """A copy of the tokenizer for which these tokens do not exist in text, and that cuts and pads nothing."""
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["id"] in special_ids
    settings["truncation"] = settings["padding"] = None
    text_only = Tokenizer.from_str(json.dumps(settings))
    text_only.encode_special_tokens = True  # that is, as the text that they are
    return text_only


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list[dict] | None = None,
    effort: str | None = None,
    **settings: bool,
) -> str:
    """What the chat template makes of `messages`, which may be none; `settings` are transformers' and the template's.

    Raises:
        UserError: it does not render them.
    """
    given = settings if effort is None else settings | {"reasoning_effort": effort}
    try:
        [text] = tokenizer.apply_chat_template([messages], tools=tools, tokenize=False, **given)
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(f"the chat template cannot render it: {_first_line(error) or type(error).__name__}") from error
    return text


def train_tiny_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, trained on `texts`, with Hy's special tokens (the last
    ids) and chat template.

    The same texts give the same tokenizer.

    Raises:
        UserError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}; at least {SMALLEST_VOCAB_SIZE} are needed for the 256 bytes and the special "
            "tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
