"""Held-out rows become the prompts that serving would make of them, answers the texts that are judged."""

import json
from pathlib import Path

import pytest
import sacrebleu

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.errors import UserError
from hymeg.generation.held_out import HeldOut, figures, line, rows
from hymeg.generation.judging import bleu_tokenizer
from hymeg.generation.replies import Answer
from hymeg.hf.config import HyConfig
from hymeg.hf.tokenizer import END_OF_THINK, text_tokenizer, train_tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
CONFIG = HyConfig.from_dict(TINY_CONFIG)
TRANSLATION = {"source": "Good day", "target": "Guten Tag", "source_lang": "en", "target_lang": "de"}
CHAT = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "reasoning_content": "two and two", "content": "Four."},
    ],
    "reasoning_effort": "high",
}

UNREASONED = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}]} | {
    "reasoning_effort": "low"
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tiny_tokenizer(["Good day", "Guten Tag", "two and two is four"], 500)


@pytest.fixture
def held_out(tokenizer, tmp_path):
    def make(*given: dict, **options) -> HeldOut:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))
        return HeldOut(path, tokenizer, options.pop("config", CONFIG), **options)

    return make


def test_a_prompt_is_what_the_template_makes_for_serving(held_out, tokenizer):
    found = held_out(TRANSLATION, CHAT)
    said = [tokenizer.decode(prompt) for prompt in found.prompts]
    assert said[0].endswith("Good day<｜hy_Assistant｜><think></think>") and "into German" in said[0]
    assert said[1].endswith("effort:high<｜hy_User｜>2 + 2?<｜hy_Assistant｜><think>")
    assert [(one.asked, one.reference) for one in found.questions] == [("Good day", "Guten Tag"), ("2 + 2?", "Four.")]
    longest = len(tokenizer.encode("two and two")) + len(tokenizer.encode("Four."))
    assert found.sampling([3]).max_new_tokens == 16 + 2 * max(longest, len(tokenizer.encode("Guten Tag")))
    assert found.sampling([3]).temperature == 0 and found.sampling([3]).stop_ids == (3,)


def test_blanks_around_a_language_make_no_other_pair_nor_tokenizer(held_out):
    found = held_out(TRANSLATION | {"target": "早上好", "source_lang": "en ", "target_lang": " Chinese"})
    [example] = found.examples([Answer([], True)])
    assert (example.pair, bleu_tokenizer(example.target_lang)) == ("en-zh", "zh")


def test_a_conversation_is_none_where_the_keys_of_a_translation_are_null(held_out):
    """As parquet has them, where a file holds both."""
    [question] = held_out(CHAT | dict.fromkeys(TRANSLATION)).questions
    assert (question.asked, question.translation) == ("2 + 2?", {})


def test_tools_that_the_template_leaves_out_are_refused(held_out):
    """In training too."""
    with pytest.raises(UserError, match="line 1: the chat template leaves out the tool 'weather'; leave 'tools' out"):
        held_out(CHAT | {"tools": [{"name": "weather"}]})


def test_rows_are_spread_evenly_over_the_file(held_out):
    given = [TRANSLATION | {"source": str(number)} for number in range(10)]
    assert [one.asked for one in held_out(*given, num_rows=4).questions] == ["0", "2", "5", "7"]
    assert len(held_out(*given, num_rows=99).questions) == len(held_out(*given).questions) == 10


@pytest.mark.parametrize(
    ("row", "text", "expected", "alarms"),
    [
        (TRANSLATION, " Guten Tag\n", ("Guten Tag", (), None), []),
        (TRANSLATION, "Guten<｜hy_User｜> Tag", ("Guten Tag", ("<｜hy_User｜>",), None), ["special token"]),
        (CHAT, "two and two</think>Four.", ("Four.", (), "two and two"), []),
        (CHAT, "</think>Four.", ("Four.", (), ""), ["thinking"]),
        (CHAT, "Four.", ("Four.", (), None), ["thinking"]),
        (UNREASONED, "</think>Four.", ("Four.", (), ""), []),
        (CHAT | {"reasoning_effort": "no_think"}, "so</think>Four.", ("Four.", (), "so"), ["thinking"]),
    ],
)
def test_an_answer_is_taken_apart(held_out, tokenizer, row, text, expected, alarms):
    found = held_out(row)
    [example] = found.examples([Answer(tokenizer.encode(text), True)])
    assert (example.hypothesis, example.special_tokens, example.thinking) == expected
    [said] = rows(found.questions, [example])
    assert (said["alarms"], said["pair"]) == (alarms, "en-de" if row is TRANSLATION else "chats")


@pytest.mark.parametrize("text", ["Write <｜hy_User｜> there.", "Then </think> ends it."])
def test_what_an_answer_spells_is_no_special_token(held_out, tokenizer, text):
    found = held_out({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]})
    [example] = found.examples([Answer(text_tokenizer(tokenizer).encode(text).ids, True)])
    assert (example.hypothesis, example.special_tokens, example.thinking) == (text, (), None)


def test_figures_are_those_of_sacrebleu_on_the_lines_of_the_file(held_out, tokenizer):
    given = [json.loads(text) for text in (EXAMPLES / "translations_heldout.jsonl").read_text().splitlines()]
    given = [row for row in given if row["target_lang"] != "zh"]
    found = held_out(*given, num_rows=12, config=HyConfig.from_dict(TINY_CONFIG | {"max_position_embeddings": 10**5}))
    answers = [Answer(tokenizer.encode(one.reference[:-9]), True) for one in found.questions]
    examples = found.examples(answers)
    written = rows(found.questions, examples)
    hypotheses, references = ([row[name] for row in written] for name in ("hypothesis", "reference"))
    judged = figures(examples)
    assert judged["overall"] == {
        "texts": 12,
        "chrF": round(sacrebleu.corpus_chrf(hypotheses, [references]).score, 4),
        "chrF++": round(sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score, 4),
        "BLEU": round(sacrebleu.corpus_bleu(hypotheses, [references]).score, 4),
    }
    assert set(judged["pairs"]) == {row["pair"] for row in written}
    assert judged["signatures"]["chrF"].startswith("nrefs:1") and not any(judged["alarms"].values())
    assert line(judged) == (
        f"chrF: {judged['overall']['chrF']:.2f} | chrF++: {judged['overall']['chrF++']:.2f} | "
        f"BLEU: {judged['overall']['BLEU']:.2f} | texts: 12"
    )
    cut_off = figures(found.examples([Answer(answer.tokens, number > 0) for number, answer in enumerate(answers)]))
    assert cut_off["alarms"]["no end"] == round(1 / 12, 4) and "| ALARM no end: 8% of the texts" in line(cut_off)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT["messages"][:1]}, "line 1"),
        ({"source": "a", "target": "b", "source_lang": "en"}, "'target_lang' is missing"),
        (TRANSLATION | {"source": "<｜hy_User｜>"}, "a special token"),
        (TRANSLATION | {"target": "long " * 10**4}, "more than the model's context"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(held_out, row, said):
    with pytest.raises(UserError, match=said):
        held_out(row)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = train_tiny_tokenizer(["a"], 300)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        HeldOut(EXAMPLES / "translations.jsonl", tokenizer, CONFIG)


def test_reasoning_that_the_template_ends_in_plain_text_is_taken_off(tmp_path):
    tokenizer = train_tiny_tokenizer(["two and two is four"], 500)
    tokenizer.chat_template = tokenizer.chat_template.replace(END_OF_THINK, "</reasoned>")
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT) + "\n")
    found = HeldOut(tmp_path / "rows.jsonl", tokenizer, CONFIG)
    [example] = found.examples([Answer(tokenizer.encode("two and two</reasoned>Four."), True)])
    assert (example.hypothesis, example.thinking) == ("Four.", "two and two")
