"""What generated texts are worth against references: chrF, chrF++ and BLEU by sacrebleu, per language pair and overall.

Pure functions on texts. Each score comes with sacrebleu's signature, by which it can be cited and made again. What is
wrong with a single text is in `hymeg.generation.alarms`.
"""

import dataclasses
import re
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF

from hymeg.data.translation import language_code

_TOKENIZERS = {
    **dict.fromkeys(("zh", "zh-Hant", "yue"), "zh"),
    # no blanks between words; for Japanese and Korean, because sacrebleu's own tokenizers need MeCab
    **dict.fromkeys(("ja", "ko", "th", "km", "my", "bo"), "char"),
}
METRICS = ("chrF", "chrF++", "BLEU")
CHATS = "chats"
"""In place of a language pair, of rows that are no translations."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A held-out row and what the model made of it.

    Attributes:
        reference: the row's own answer.
        hypothesis: the model's, without special tokens and without its thinking.
        ended: whether a stop token ended it.
        special_tokens: those inside it, as literals.
        source, source_lang, target_lang: of a translation; languages by code or name.
        thinking: what stands before the answer; None where nothing was opened or closed.
        effort: of thinking, that was asked for; None: the template's default.
    """

    reference: str
    hypothesis: str
    ended: bool = True
    special_tokens: tuple[str, ...] = ()
    source: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    thinking: str | None = None
    effort: str | None = None

    @property
    def pair(self) -> str:
        """ "en-de"; languages without a code by their names."""
        if self.source_lang is None or self.target_lang is None:
            return CHATS
        return "-".join(language_code(language) or language for language in (self.source_lang, self.target_lang))


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a set of texts, by metric: from 0 to 100, and sacrebleu's signatures."""

    num_texts: int
    values: dict[str, float]
    signatures: dict[str, str]


def bleu_tokenizer(target_lang: str | None) -> str:
    """sacrebleu's name of the one for a target language (`--tokenize`)."""
    return _TOKENIZERS.get(language_code(target_lang or "") or "", "13a")


def scores(examples: Sequence[Example]) -> Scores:
    """Of all examples as one corpus, as sacrebleu scores it.

    Where their languages have different tokenizers, n-grams are counted by each language's own and BLEU is that of the
    sums: what sacrebleu gives with `--tokenize none` for texts tokenized before.

    Raises:
        ValueError: there are none.
    """
    if not examples:
        raise ValueError("no texts to score")
    values, signatures = {}, {}
    for name, metric in (("chrF", CHRF()), ("chrF++", CHRF(word_order=2))):
        values[name] = metric.corpus_score(*_texts(examples)).score
        signatures[name] = str(metric.get_signature())
    values["BLEU"], signatures["BLEU"] = _bleu(examples)
    return Scores(len(examples), values, signatures)


def scores_by_pair(examples: Sequence[Example]) -> dict[str, Scores]:
    """Of the examples of each language pair, by its name in order, chats last."""
    pairs: dict[str, list[Example]] = {}
    for example in examples:
        pairs.setdefault(example.pair, []).append(example)
    return {pair: scores(pairs[pair]) for pair in sorted(pairs, key=lambda pair: (pair == CHATS, pair))}


def _bleu(examples: Sequence[Example]) -> tuple[float, str]:
    """BLEU and its signature."""
    by_tokenizer: dict[str, list[Example]] = {}
    for example in examples:
        by_tokenizer.setdefault(bleu_tokenizer(example.target_lang), []).append(example)
    parts = []
    for tokenizer, those in by_tokenizer.items():
        metric = BLEU(tokenize=tokenizer, force=True)  # force: no warning where a text looks as if it were tokenized
        parts.append(metric.corpus_score(*_texts(those)))
    whole = BLEU.compute_bleu(
        correct=[sum(counts) for counts in zip(*(part.counts for part in parts), strict=True)],
        total=[sum(totals) for totals in zip(*(part.totals for part in parts), strict=True)],
        sys_len=sum(part.sys_len for part in parts),
        ref_len=sum(part.ref_len for part in parts),
        smooth_method="exp",
    )
    signature = re.sub(r"(?<=\|)tok:[^|]*", f"tok:{'+'.join(sorted(by_tokenizer))}", str(metric.get_signature()))
    return whole.score, signature


def _texts(examples: Sequence[Example]) -> tuple[list[str], list[list[str]]]:
    """As sacrebleu takes them."""
    return [example.hypothesis for example in examples], [[example.reference for example in examples]]
