"""Translations as conversations: the prompts that Hy-MT2 was trained on, in Chinese and English, and the names of its
languages.

The prompts are data: `translation_prompts.json` beside this file, and a file of the same form may replace kinds or add
some. Which fields a row must have follows from the placeholders of its prompt; `hymeg.data.rows` reads them.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hymeg.errors import UserError
from hymeg.hf.files import read_json, shown

SHIPPED_PROMPTS = Path(__file__).with_name("translation_prompts.json")
PROMPT_LANGUAGES = ("zh", "en")
FIELDS = {  # placeholder: the row's key
    "source_lang": "source_lang",
    "target_lang": "target_lang",
    "source_text": "source",
    "text": "terminology",
    "user_preferences": "user_preferences",
    "target_style": "target_style",
    "format_type": "format_type",
    "background_text": "background_text",
}
_REQUIRED = ("target_lang", "source_text")
_OCCURRENCES_ON_ITS_LINE = {"text": 2, "user_preferences": 1}  # of the placeholders whose line is repeated
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
    "simplified chinese": "zh",
    "简体中文": "zh",
    "汉语": "zh",
}
_CODES = {name.casefold(): code for code, names in LANGUAGES.items() for name in (code, *names)} | _OTHER_NAMES
_CODE_FORM = re.compile(r"([a-z]{2,3})(?:[-_][A-Za-z0-9]{2,8})*")


class LanguageNames(NamedTuple):
    """A language's name in each language of prompts."""

    en: str
    zh: str
    is_chinese: bool


@functools.lru_cache(4096)
def language_names(language: str) -> LanguageNames:
    """The names of a code ("de", "pt-BR") or a name in either language; any other name stands for
    itself. Raises UserError for a code that is not in `LANGUAGES`."""
    form = _CODE_FORM.fullmatch(language)
    code = _CODES.get(language.replace("_", "-").casefold()) or (form and _CODES.get(form[1]))
    if code:
        return LanguageNames(*LANGUAGES[code], code in _CHINESE)
    if form:
        raise UserError(
            f"{shown(language)} is not among the language codes {', '.join(LANGUAGES)}; give the language's name"
        )
    return LanguageNames(language, language, "chinese" in language.casefold() or "中文" in language)


class Prompt:
    """One prompt in one language."""

    def __init__(self, text: str):
        self.placeholders = set(_PLACEHOLDER.findall(text)) - {"number"}
        self._lines = [(line, self._repeated(line)) for line in text.split("\n")]

    @staticmethod
    def _repeated(line: str) -> str | None:
        return next((name for name in _PLACEHOLDER.findall(line) if name in _OCCURRENCES_ON_ITS_LINE), None)

    def render(self, values: dict[str, str | list]) -> str:
        """The prompt with `values` in place of its placeholders; what looks like a placeholder in a value stays.

        Args:
            values: for each placeholder a string; for "text" a list of (source term, target term), for
                "user_preferences" a list of strings.
        """
        lines, number = [], 0
        for line, repeated in self._lines:
            for item in values[repeated] if repeated else [None]:
                number += "{number}" in line
                of_line = values | {"number": str(number), "user_preferences": item}
                terms = iter(item) if repeated == "text" else iter(())
                lines.append(_PLACEHOLDER.sub(functools.partial(_value, of_line, terms), line))
        return "\n".join(lines)


def _value(values: dict[str, str | list], terms: Iterator[str], match: re.Match) -> str:
    return next(terms) if match[1] == "text" else values[match[1]]


class Prompts:
    """Kinds of prompt, each in Chinese, English or both: `prompts.kinds[kind][language]`."""

    def __init__(self, kinds: dict[str, dict[str, str]]):
        self.kinds = {
            kind: {language: Prompt(text) for language, text in texts.items()} for kind, texts in kinds.items()
        }
        self.fingerprint = hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest()[:16]


def load_prompts(path: str | os.PathLike | None = None) -> Prompts:
    """The shipped prompts; kinds in the file `path` replace those of the same name or add to them.

    A file holds `{kind: {"zh": prompt, "en": prompt}}`, where either language may be absent; under "about" it may say
    what it likes. Placeholders are the keys of `FIELDS` and {number}. The line with {text} (twice: source term, target
    term) is repeated for each pair of the row's "terminology", the line with {user_preferences} for each of its
    preferences, and {number} counts.

    Raises:
        UserError: the file cannot be read or is not of this form.
    """
    kinds = _read(SHIPPED_PROMPTS)
    if path is not None:
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"{path}: is no file; give a JSON file with prompts")
            kinds |= _read(path)
        except UserError as error:
            raise UserError(f"--translation-prompts {error}") from error
    return Prompts(kinds)


def _read(path: str | os.PathLike) -> dict[str, dict[str, str]]:
    kinds = read_json(path)
    if not isinstance(kinds, dict):
        raise UserError(f"{path}: holds {shown(kinds)}; an object is needed: {{kind: {{'zh': prompt, 'en': prompt}}}}")
    kinds = {kind: texts for kind, texts in kinds.items() if kind != "about"}
    if not kinds:
        raise UserError(f"{path}: holds no prompt; an object is needed: {{kind: {{'zh': prompt, 'en': prompt}}}}")
    for kind, texts in kinds.items():
        if not isinstance(texts, dict) or not texts or not set(texts) <= set(PROMPT_LANGUAGES):
            raise UserError(
                f"{path}: {shown(kind)} is {shown(texts)}; an object with a prompt under 'zh', 'en' or both is needed"
            )
        for language, text in texts.items():
            _check(f"{path}: {shown(kind)}, {language!r}", text)
    return kinds


def _check(where: str, text: object) -> None:
    """Raises UserError where `text` is no prompt."""
    if not isinstance(text, str):
        raise UserError(f"{where}: is {shown(text)}; a string is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: holds {shown(text[error.start])}, half of a surrogate pair, which is no text"
        ) from error
    names = _PLACEHOLDER.findall(text)
    if unknown := [name for name in names if name not in FIELDS and name != "number"]:
        known = ", ".join(f"{{{name}}}" for name in (*FIELDS, "number"))
        raise UserError(f"{where}: unknown placeholder {{{unknown[0]}}}; known are {known}")
    if missing := [name for name in _REQUIRED if name not in names]:
        raise UserError(
            f"{where}: the placeholder {{{missing[0]}}} is missing; every prompt needs {{target_lang}} and "
            f"{{source_text}}"
        )
    for name, occurrences in _OCCURRENCES_ON_ITS_LINE.items():
        on_lines = [count for line in text.split("\n") if (count := _PLACEHOLDER.findall(line).count(name))]
        if on_lines not in ([], [occurrences]):
            raise UserError(
                f"{where}: {{{name}}} stands on {len(on_lines)} lines, {max(on_lines)} times on one; needed is one "
                f"line with {occurrences} of it, "
                "which is repeated for each ({number} counts)"
            )
    if any({"text", "user_preferences"} <= set(_PLACEHOLDER.findall(line)) for line in text.split("\n")):
        raise UserError(
            f"{where}: {{text}} and {{user_preferences}} stand on one line; each needs a line of its own, which is "
            "repeated"
        )
