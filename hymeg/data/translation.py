"""Rows of translations as questions: the prompts that Hy-MT2 was trained on, in Chinese and English, and the names of
its languages.

The prompts are data, `translation_prompts.json` beside this file. Which fields a row must have follows from the
placeholders of its prompt.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.data.fields import text_of, wrong
from hymeg.errors import UserError, located
from hymeg.files import shown

NEEDED = ("source", "target", "source_lang", "target_lang")
_FIELDS = {  # placeholder, but for those of languages: the row's key
    "source_text": "source",
    "text": "terminology",
    "user_preferences": "user_preferences",
    "target_style": "target_style",
    "format_type": "format_type",
    "background_text": "background_text",
}
KEYS = (*NEEDED, *_FIELDS.values(), "prompt", "prompt_lang")
_REPEATED = {"text", "user_preferences"}  # a line with one of them stands once for each item of the row's list
_PLACEHOLDER = re.compile(r"(?<![{$])\{([a-z_]+)\}(?!\})")  # {{var}} and ${var} are text

# Code: (English name, Chinese name), those of the Hy-MT2 README.
LANGUAGES = {
    "zh": ("Chinese", "中文"),
    "en": ("English", "英语"),
    "fr": ("French", "法语"),
    "pt": ("Portuguese", "葡萄牙语"),
    "es": ("Spanish", "西班牙语"),
    "ja": ("Japanese", "日语"),
    "tr": ("Turkish", "土耳其语"),
    "ru": ("Russian", "俄语"),
    "ar": ("Arabic", "阿拉伯语"),
    "ko": ("Korean", "韩语"),
    "th": ("Thai", "泰语"),
    "it": ("Italian", "意大利语"),
    "de": ("German", "德语"),
    "vi": ("Vietnamese", "越南语"),
    "ms": ("Malay", "马来语"),
    "id": ("Indonesian", "印尼语"),
    "tl": ("Filipino", "菲律宾语"),
    "hi": ("Hindi", "印地语"),
    "zh-Hant": ("Traditional Chinese", "繁体中文"),
    "pl": ("Polish", "波兰语"),
    "cs": ("Czech", "捷克语"),
    "nl": ("Dutch", "荷兰语"),
    "km": ("Khmer", "高棉语"),
    "my": ("Burmese", "缅甸语"),
    "fa": ("Persian", "波斯语"),
    "gu": ("Gujarati", "古吉拉特语"),
    "ur": ("Urdu", "乌尔都语"),
    "te": ("Telugu", "泰卢固语"),
    "mr": ("Marathi", "马拉地语"),
    "he": ("Hebrew", "希伯来语"),
    "bn": ("Bengali", "孟加拉语"),
    "ta": ("Tamil", "泰米尔语"),
    "uk": ("Ukrainian", "乌克兰语"),
    "bo": ("Tibetan", "藏语"),
    "kk": ("Kazakh", "哈萨克语"),
    "mn": ("Mongolian", "蒙古语"),
    "ug": ("Uyghur", "维吾尔语"),
    "yue": ("Cantonese", "粤语"),
}
_CHINESE = ("zh", "zh-Hant", "yue")
_OTHER_NAMES = {
    "fil": "tl",
    "zh-tw": "zh-Hant",
    "zh-hk": "zh-Hant",
    "zh-mo": "zh-Hant",
    "zh-yue": "yue",
    "simplified chinese": "zh",
    "简体中文": "zh",
    "汉语": "zh",
}
_CODES = {name.casefold(): code for code, names in LANGUAGES.items() for name in (code, *names)} | _OTHER_NAMES
_CODE_FORM = re.compile(r"(?:[a-z]{2,3}|[A-Z]{2,3})(?:[-_][A-Za-z0-9]{2,8})*")


class LanguageNames(NamedTuple):
    """A language's name in each language of prompts."""

    en: str
    zh: str
    is_chinese: bool


@functools.lru_cache(4096)
def language_names(language: str) -> LanguageNames:
    """The names of a code ("de", "pt-BR") or a name in either language; any other name stands for
    itself. Raises UserError for a code that is not in `LANGUAGES`."""
    if code := language_code(language):
        return LanguageNames(*LANGUAGES[code], code in _CHINESE)
    if _CODE_FORM.fullmatch(language):
        raise UserError(
            f"{shown(language)} is not among the language codes {', '.join(LANGUAGES)}; give the language's name"
        )
    return LanguageNames(language, language, "chinese" in language.casefold() or "中文" in language)


def language_code(language: str) -> str | None:
    """The code in `LANGUAGES` of a code or name; None for a language that is not there."""
    name = language.replace("_", "-").casefold()
    while name not in _CODES and "-" in name and _CODE_FORM.fullmatch(language):
        name = name.rpartition("-")[0]  # zh-Hant-TW is zh-Hant
    return _CODES.get(name)


class Prompt:
    """One prompt in one language."""

    def __init__(self, text: str):
        self.placeholders = set(_PLACEHOLDER.findall(text)) - {"number"}
        self._lines = [
            (line, next(iter(_REPEATED.intersection(_PLACEHOLDER.findall(line))), None)) for line in text.split("\n")
        ]

    def render(self, values: dict[str, str | list]) -> str:
        """The prompt with `values` in place of its placeholders; what looks like a placeholder in a value stays.

        Args:
            values: for each placeholder a string; for "text" a list of (source term, target term), for
                "user_preferences" a list of strings.
        """
        lines, number, values = [], 0, dict(values)
        for line, repeated in self._lines:
            for item in values[repeated] if repeated else [None]:
                number += "{number}" in line
                values["number"] = str(number)
                lines.append(_filled(line, values, item))
        return "\n".join(lines)


def _filled(line: str, values: dict[str, str | list], item: str | tuple[str, str] | None) -> str:
    """`item`: of the list that the line is repeated for; of a pair, one after the other."""
    parts = iter([item] if isinstance(item, str) else item or ())
    return _PLACEHOLDER.sub(lambda match: next(parts) if match[1] in _REPEATED else values[match[1]], line)


_FILE = Path(__file__).with_name("translation_prompts.json").read_bytes()
FINGERPRINT = hashlib.sha256(_FILE).hexdigest()[:16]
"""Of the prompts."""
PROMPTS = {
    kind: {language: Prompt(text) for language, text in texts.items()}
    for kind, texts in json.loads(_FILE).items()
    if kind != "about"
}
"""By kind and language."""


def request(row: dict) -> str:
    """What the user says in a translation row. Raises UserError where a field is missing, wrong or has no place in the
    row's prompt.
    """
    names = {key: _language(row, key) for key in ("source_lang", "target_lang")}
    kind, language = _kind(row, "zh" if names["source_lang"].is_chinese else "en")
    prompt = PROMPTS[kind][language]
    values = {key: getattr(name, language) for key, name in names.items()}
    for placeholder, key in _FIELDS.items():
        if placeholder in prompt.placeholders:
            values[placeholder] = _READ_FIELD.get(key, text_of)(row, key)
        elif key in row:
            kinds = [kind for kind, prompts in PROMPTS.items() if placeholder in prompts[language].placeholders]
            raise UserError(
                f"{key!r} has no place in the {shown(kind)} prompt; set 'prompt' to {' or '.join(map(repr, kinds))}, "
                "or leave it out"
            )
    return prompt.render(values)


def _kind(row: dict, default_language: str) -> tuple[str, str]:
    kind, language = row.get("prompt", "default"), row.get("prompt_lang", default_language)
    if not isinstance(kind, str) or kind not in PROMPTS:
        raise wrong(
            row, "prompt", f"kinds of prompt are {', '.join(PROMPTS)}; for a prompt of your own write 'messages'"
        )
    if language not in tuple(PROMPTS[kind]):
        raise wrong(row, "prompt_lang", f"{', '.join(PROMPTS[kind])} are possible")
    return kind, language


def _language(row: dict, key: str) -> LanguageNames:
    name = text_of(row, key).strip()
    if len(name.splitlines()) > 1:
        raise wrong(row, key, "the name or code of a language is needed")
    with located(repr(key)):
        return language_names(name)


def _terms(row: dict, key: str) -> list[tuple[str, str]]:
    value = row.get(key)
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or not pairs or not all(_are_texts(pair) and len(pair) == 2 for pair in pairs):
        needed = "[[source term, target term], ...] or {source term: target term} is needed"
        raise wrong(row, key, needed)
    return pairs


def _preferences(row: dict, key: str) -> list[str]:
    if not _are_texts(row.get(key)):
        raise wrong(row, key, "a list of strings is needed")
    return row[key]


def _are_texts(value: Any) -> bool:
    is_filled = isinstance(value, list | tuple) and bool(value)
    return is_filled and all(isinstance(text, str) and text.strip() for text in value)


_READ_FIELD = {"terminology": _terms, "user_preferences": _preferences}
