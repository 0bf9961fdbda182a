"""Scores are those of sacrebleu's own command; each alarm fires for the fault that it is for, and none for sound
translations.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU

from hymeg.generation.alarms import ALARMS, alarms, crossed, rates, repeats
from hymeg.generation.judging import CHATS, Example, bleu_tokenizer, scores, scores_by_pair

HELD_OUT = Path(__file__).parents[2] / "examples" / "data" / "translations_heldout.jsonl"
ROWS = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]


def example(row: dict, hypothesis: str, **others) -> Example:
    return Example(row["target"], hypothesis, True, (), row["source"], row["source_lang"], row["target_lang"], **others)


def spoiled(text: str, number: int) -> str:
    """A word left out here, two exchanged there: scores between 0 and 100, other ones for each text."""
    words = list(text) if " " not in text else text.split(" ")
    del words[number % 3 :: 5]
    words[1:3] = words[2:0:-1]
    return ("" if " " not in text else " ").join(words)


EXAMPLES = [example(row, spoiled(row["target"], number)) for number, row in enumerate(ROWS)]


def command(tmp_path, examples: list[Example], *arguments: str) -> dict[str, tuple[float, str]]:
    """What the `sacrebleu` command says, score and signature by metric."""
    for name in ("reference", "hypothesis"):
        (tmp_path / name).write_text("".join(f"{getattr(one, name)}\n" for one in examples))
    files = [tmp_path / "reference", "-i", tmp_path / "hypothesis"]
    words = [sys.executable, "-m", "sacrebleu", *files, "-w", "12", "--force", *arguments]
    said = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return {one["name"]: (one["score"], one["signature"]) for one in (said if isinstance(said, list) else [said])}


@pytest.mark.parametrize(
    ("pair", "tokenizer", "word_order", "chrf"),
    [("en-zh", "zh", "0", "chrF"), ("en-zh", "zh", "2", "chrF++"), ("zh-fr", "13a", "2", "chrF++")],
)
def test_scores_of_a_pair_are_those_of_sacrebleus_command(tmp_path, pair, tokenizer, word_order, chrf):
    examples = [one for one in EXAMPLES if one.pair == pair]
    found = scores_by_pair(EXAMPLES)[pair]
    theirs = command(tmp_path, examples, "-m", "bleu", "chrf", "--tokenize", tokenizer, "--chrf-word-order", word_order)
    assert found.num_texts == len(examples) == 9
    ours = found.values
    for name, (score, signature) in zip(("BLEU", chrf), theirs.values(), strict=True):
        assert ours[name] == pytest.approx(score, abs=1e-9) and 0 < score < 100
        assert found.signatures[name] == signature


def test_scores_of_languages_with_different_tokenizers_are_those_of_texts_tokenized_before(tmp_path):
    by_name = {"zh": BLEU(tokenize="zh").tokenizer, "13a": BLEU(tokenize="13a").tokenizer}
    tokenized = [
        Example(*(by_name[bleu_tokenizer(one.target_lang)](text) for text in (one.reference, one.hypothesis)))
        for one in EXAMPLES
    ]
    found = scores(EXAMPLES)
    theirs = command(tmp_path, tokenized, "-m", "bleu", "--tokenize", "none")
    assert found.values["BLEU"] == pytest.approx(theirs["BLEU"][0], abs=1e-9)
    assert "tok:13a+zh" in found.signatures["BLEU"]
    theirs = command(tmp_path, EXAMPLES, "-m", "chrf")
    assert found.values["chrF"] == pytest.approx(theirs["chrF2"][0], abs=1e-9)


def test_pairs_have_codes_whatever_the_rows_call_their_languages():
    names = Example("a", "a", source="a", source_lang="English", target_lang="zh_TW")
    unknown = Example("a", "a", source="a", source_lang="Klingon", target_lang="德语")
    assert (names.pair, unknown.pair, Example("a", "a").pair) == ("en-zh-Hant", "Klingon-de", CHATS)
    assert list(scores_by_pair([Example("a", "a"), unknown, names])) == ["Klingon-de", "en-zh-Hant", CHATS]
    assert [bleu_tokenizer(name) for name in ("Chinese", "yue", "ja", "Korean", "de-AT", "Klingon", None)] == [
        *("zh", "zh", "char", "char", "13a", "13a", "13a")
    ]


def test_no_texts_have_no_scores():
    with pytest.raises(ValueError, match="no texts"):
        scores([])


def test_no_alarm_fires_for_sound_translations():
    fired = [alarms(example(row, row["target"])) for row in ROWS] + [alarms(one) for one in EXAMPLES]
    assert set(fired) == {()}
    assert crossed(rates(fired)) == []


ROW = next(row for row in ROWS if (row["source_lang"], row["target_lang"]) == ("en", "de"))
JAPANESE = {"source": "All human beings are born free.", "source_lang": "en", "target_lang": "ja"}


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (example(ROW, ROW["target"][:60] + " und so weiter" * 4), "repetition"),
        (example(ROW, ROW["target"][:60] + "!" * 40), "repetition"),
        (example(ROW, f"{ROW['target'][:40]} {ROW['target'][:40]} {ROW['target'][:40]} "), "repetition"),
        (Example(ROW["target"], ROW["target"], special_tokens=("<|extra_0|>",)), "special token"),
        (Example(ROW["target"], ROW["target"], ended=False), "no end"),
        (example(ROW, " \n"), "empty"),
        (example(ROW, "Все люди рождаются свободными и равными в своем достоинстве. " + "а" * 20), "script"),
        (Example("人は生まれながらにして自由である。", "人生而自由平等尊严权利。", **JAPANESE), "script"),
        (example(ROW, ROW["target"][: len(ROW["target"]) // 3]), "length"),
        (example(ROW, ROW["target"] + ROW["target"][::-1] + ROW["target"][1::2]), "length"),
        (example(ROW, ROW["source"].replace(" the ", " ")), "copy"),
        (Example("Four.", "Four.", effort="high"), "thinking"),
        (Example("Four.", "Four.", effort="no_think", thinking="2 + 2"), "thinking"),
    ],
)
def test_each_fault_fires_its_alarm_and_no_other(broken, name):
    assert alarms(broken) == (name,)
    told = crossed(rates([alarms(broken)] + [()] * 4))
    assert len(told) == 1 and told[0].startswith(f"{name}: 20% of the texts, above ")


def test_every_alarm_is_shown_to_fire():
    shown = test_each_fault_fires_its_alarm_and_no_other.pytestmark[0].args[1]
    assert {name for _, name in shown} == {alarm.name for alarm in ALARMS}


def test_what_the_reference_does_as_well_fires_nothing():
    line = "| --- | --- | --- | --- | --- | --- | --- |"
    name = {"source": "Microsoft Azure OpenAI Service", "source_lang": "en", "target_lang": "zh"}
    for text, others in ((line, {}), ("Microsoft Azure OpenAI Service", name)):
        assert alarms(Example(text, text, **others)) == ()
    assert alarms(Example("人人生而自由。", "人人生而平等。", **JAPANESE)) == ()
    assert alarms(Example("Four.", "Four.", thinking="2 + 2", effort="low")) == ()


def test_repetitions_are_found_at_any_place_and_of_any_length():
    for period in (1, 2, 7, 11, 50):
        unit = "".join(chr(97 + i % 26) + str(i) for i in range(period))[:period]
        copies = -(-32 // period) if period < 11 else 3
        whole = unit * copies
        assert repeats(f"before {whole} behind") == (len(whole) >= 32)
        assert not repeats(f"before {whole[:-1][: 2 * period + period - 1 if period >= 11 else 31]}#behind")
    assert not repeats("") and not repeats("never twice the same word in this line of text here")


def test_an_alarm_is_said_above_its_threshold_only():
    half = [("no end",)] * 5 + [()] * 95
    assert crossed(rates(half)) == [] and len(crossed(rates([("no end",), *half]))) == 1
    assert rates([]) == {alarm.name: 0 for alarm in ALARMS}
