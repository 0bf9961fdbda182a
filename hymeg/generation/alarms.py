"""What is wrong with a generated text in ways that a loss does not show: it repeats itself, leaks a special token, does
not end.

Each alarm has a threshold for the share of texts in which it fires; a few fire on sound models too. Where the
reference does the same (a list, a name that is not translated), none fires.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hymeg.data.translation import language_code
from hymeg.generation.judging import Example


class Alarm(NamedTuple):
    """Its name, what it says, and the share of texts above which it is said."""

    name: str
    meaning: str
    threshold: float


ALARMS = (
    Alarm("repetition", "a stretch of text stands there three times or more, one after another", 0.05),
    Alarm("special token", "a special token inside", 0.02),
    Alarm("no end", "cut off at the limit: no EOS", 0.05),
    Alarm("empty", "nothing but blanks", 0.02),
    Alarm("script", "most letters are of another script than the target language's", 0.05),
    Alarm("length", "less than half or more than twice as long as the reference", 0.10),
    Alarm("copy", "the source, or nearly", 0.05),
    Alarm("thinking", "thinking where none was asked for, or none where it was", 0.05),
)
_SMALLEST_REPETITION = 32
_LENGTH_SLACK = 10  # characters, for short texts
_NEARLY = 0.8  # of the trigrams
_FEW_LETTERS = 8

_KANA = frozenset(("HIRAGANA", "KATAKANA"))
_LANGUAGES = {  # by the first word of Unicode's names of the letters that they are written with
    "ARABIC": ("ar", "fa", "ur", "ug", "kk"),
    "BENGALI": ("bn",),
    "CJK": ("zh", "zh-Hant", "yue", "ja"),
    "CYRILLIC": ("ru", "uk", "kk", "mn"),
    "DEVANAGARI": ("hi", "mr"),
    "GUJARATI": ("gu",),
    "HANGUL": ("ko",),
    "HEBREW": ("he",),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "KHMER": ("km",),
    "LATIN": ("en", "fr", "pt", "es", "tr", "it", "de", "vi", "ms", "id", "tl", "pl", "cs", "nl", "kk"),
    "MONGOLIAN": ("mn",),
    "MYANMAR": ("my",),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "THAI": ("th",),
    "TIBETAN": ("bo",),
}


def alarms(example: Example) -> tuple[str, ...]:
    """The names of those that fire, in the order of `ALARMS`.

    Those of translations (script, copy) need the row's languages and source, that of thinking an effort.
    """
    fired = {
        "repetition": repeats(example.hypothesis) and not repeats(example.reference),
        "special token": bool(example.special_tokens),
        "no end": not example.ended,
        "thinking": example.effort is not None and bool(example.thinking) == (example.effort == "no_think"),
    }
    if not example.hypothesis.strip():
        fired["empty"] = True
    else:
        ratio = (len(example.hypothesis) + _LENGTH_SLACK) / (len(example.reference) + _LENGTH_SLACK)
        fired["length"] = not 0.5 <= ratio <= 2
        fired["script"] = _has_other_script(example)
        fired["copy"] = _is_copy(example)
    return tuple(alarm.name for alarm in ALARMS if fired.get(alarm.name))


def rates(fired: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of texts in which each alarm fired, by name, 0 where it did in none.

    Args:
        fired: of each text the names that `alarms` gave.
    """
    counts = Counter(name for names in fired for name in names)
    return {alarm.name: counts[alarm.name] / max(len(fired), 1) for alarm in ALARMS}


def crossed(shares: dict[str, float]) -> list[str]:
    """A line for each alarm whose rate is above its threshold."""
    return [
        f"{alarm.name}: {shares[alarm.name]:.0%} of the texts, above {alarm.threshold:.0%} ({alarm.meaning})"
        for alarm in ALARMS
        if shares[alarm.name] > alarm.threshold
    ]


def repeats(text: str) -> bool:
    """Whether some stretch of `text` is there three times or more, one after another, over 32 characters together."""
    letters = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    for period in range(1, len(letters) // 3 + 1):
        different = np.flatnonzero(letters[period:] != letters[:-period])
        longest_run = np.diff(different, prepend=-1, append=len(letters) - period).max() - 1  # of equal ones
        if longest_run + period >= max(3 * period, _SMALLEST_REPETITION):
            return True
    return False


def _has_other_script(example: Example) -> bool:
    code = language_code(example.target_lang or "")
    wanted = {script for script, codes in _LANGUAGES.items() if code in codes}
    found, due = _scripts(example.hypothesis), _scripts(example.reference)
    if not wanted or not found.total() or _share(due, wanted) < 0.5:
        return False
    # Of all that is written in Chinese characters, Japanese has kana in between.
    without_kana = wanted > _KANA and _share(due, _KANA) > 0 and found.total() >= _FEW_LETTERS
    return _share(found, wanted) < 0.5 or (without_kana and _share(found, _KANA) == 0)


def _scripts(text: str) -> Counter[str]:
    """How many letters of each script, by the first word of their Unicode names."""
    return Counter(unicodedata.name(letter, "?").split(" ")[0] for letter in text if letter.isalpha())


def _share(scripts: Counter[str], wanted: set[str] | frozenset[str]) -> float:
    return sum(scripts[script] for script in wanted) / max(scripts.total(), 1)


def _is_copy(example: Example) -> bool:
    if example.source is None:
        return False
    return _in_common(example.hypothesis, example.source) >= _NEARLY > _in_common(example.reference, example.source)


def _in_common(one: str, other: str) -> float:
    """The share of their character trigrams that two texts have in common (Dice's coefficient)."""
    one, other = (Counter(zip(text, text[1:], text[2:], strict=False)) for text in (f" {one} ", f" {other} "))
    return 2 * (one & other).total() / (one.total() + other.total())
