"""What a person asks, as tokens: plain text, a chat, a translation; and how the publisher would have answers drawn."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hymeg.data import translation
from hymeg.errors import UserError
from hymeg.files import read_json, shown
from hymeg.generation.sampling import Sampling
from hymeg.hf.config import TOKEN_IDS, HyConfig
from hymeg.hf.tokenizer import rendered

GENERATION_CONFIG = "generation_config.json"
_UNAPPLIED = {  # what would change answers, and the value that does not
    **dict.fromkeys(
        ("min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "min_length", "min_new_tokens"), 0
    ),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), 0),
    **dict.fromkeys(("typical_p", "num_beams", "guidance_scale"), 1),
    **dict.fromkeys(("stop_strings", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")),
    **dict.fromkeys(("penalty_alpha", "top_h", "exponential_decay_length_penalty", "forced_eos_token_id")),
}
_HAN, _KANA_HANGUL = re.compile("[\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff\uac00-\ud7af]")


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text to be continued, behind BOS where the tokenizer has one."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return tokens if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *tokens]


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list[dict] | None = None,
    effort: str | None = None,
) -> list[int]:
    """Messages by the checkpoint's chat template, up to where the assistant speaks.

    Args:
        effort: of reasoning: no_think, low, high; None leaves it to the template.

    Raises:
        UserError: there is no template, it refuses them, or a message or tool holds one of the tokenizer's special
            tokens.
    """
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; continue plain text with --raw instead")
    for what, said in (("a message", messages), ("'tools'", tools)):
        text = json.dumps(said, ensure_ascii=False)
        if found := [token for token in tokenizer.all_special_tokens if token in text]:
            raise UserError(f"{what} holds {shown(found[0])}, a special token: it would open or end a turn; reword it")
    text = rendered(tokenizer, messages, tools, effort, add_generation_prompt=True)
    if unnamed := [tool["function"]["name"] for tool in tools or () if tool["function"]["name"] not in text]:
        raise UserError(f"the chat template leaves out the tool {shown(unnamed[0])}; leave 'tools' out")
    return tokenizer.encode(text, add_special_tokens=False)


def translation_request(text: str, target: str, source: str | None = None) -> str:
    """What Hy-MT2 is asked, in Chinese where the source is Chinese.

    Args:
        target, source: codes or names of languages; without a source, text in Chinese characters is Chinese.

    Raises:
        UserError: there is no such language.
    """
    return translation.request({"source": text, "source_lang": source or source_language(text), "target_lang": target})


def source_language(text: str) -> str:
    """As far as the prompt's language depends on it."""
    return "zh" if _HAN.search(text) and not _KANA_HANGUL.search(text) else "en"


def unapplied(folder: str | os.PathLike) -> Iterator[str]:
    """What to say of generation_config.json in `folder`, where it asks for more than `Sampling` has."""
    path = Path(folder) / GENERATION_CONFIG
    for name, value in (read_json(path) if path.is_file() else {}).items():
        if value is not None and name in _UNAPPLIED and value != _UNAPPLIED[name]:
            yield f"{path}: {name} {shown(value)} is not applied: answers are drawn without it"


def published_sampling(folder: str | os.PathLike, config: HyConfig) -> Sampling:
    """As generation_config.json in `folder` has it; greedy, up to EOS, where it says nothing.

    Raises:
        UserError: a value cannot be.
    """
    path = Path(folder) / GENERATION_CONFIG
    given: dict[str, Any] = read_json(path) if path.is_file() else {}
    if type(given) is not dict:
        raise UserError(f"{path}: holds {shown(given)}; an object is needed")
    if (found := given.get("eos_token_id")) is not None and not (
        TOKEN_IDS.accepts(found) and max(found if type(found) is list else [found]) < config.vocab_size
    ):
        raise UserError(
            f"{path}: eos_token_id is {shown(found)}; {TOKEN_IDS.needed} below {config.vocab_size} is needed"
        )
    fields = {field.name for field in dataclasses.fields(Sampling)} - {"seed", "stop_ids"}
    chosen = {name: given[name] for name in fields if given.get(name) is not None}
    for name, value in chosen.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: {name!r} is {shown(value)}; a number is needed")
    draws = given.get("do_sample", "temperature" in chosen)
    chosen["temperature"] = chosen.get("temperature", 1.0) if draws else 0.0
    stop_ids = given.get("eos_token_id", config.eos_token_id)
    stop_ids = tuple(stop_ids if isinstance(stop_ids, list) else [] if stop_ids is None else [stop_ids])
    try:
        return Sampling(**chosen, stop_ids=stop_ids)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
