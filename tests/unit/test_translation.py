"""The prompts are those that Hy-MT2's README gives, filled in one pass."""

import hashlib
import json
from pathlib import Path

import pytest

from hymeg.data import translation
from hymeg.data.rows import RowReader
from hymeg.data.translation import LANGUAGES, PROMPTS, language_names

PUBLISHED = json.loads((Path(__file__).parent / "published/hy_mt2_prompts.json").read_text())
TERMS = [("sea", "Meer"), ("sky", "Himmel"), ("sun", "Sonne")]
VALUES = {
    "source_lang": "English",
    "target_lang": "German",
    "source_text": "The sea.",
    "text": TERMS,
    "user_preferences": ["Be brief", "Be kind"],
    "target_style": "poetry",
    "format_type": "JSON",
    "background_text": "A novel.",
}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_prompts_are_the_published_ones(language):
    assert list(PROMPTS) == list(PUBLISHED)
    for kind, texts in PUBLISHED.items():
        expected = texts[language].replace("3、……\n4、", "3、").replace("3. ...\n4. ", "3. ")
        for term in [term for pair in TERMS for term in pair]:
            expected = expected.replace("{text}", term, 1)
        for preference in VALUES["user_preferences"]:
            expected = expected.replace("{user_preferences}", preference, 1)
        for name, value in VALUES.items():
            expected = expected.replace(f"{{{name}}}", str(value))
        assert PROMPTS[kind][language].render(VALUES) == expected


def test_other_prompts_ask_for_another_index():
    prompts = Path(translation.__file__).with_name("translation_prompts.json").read_bytes()
    assert RowReader().fingerprint.endswith(f"-{hashlib.sha256(prompts).hexdigest()[:16]}")


def test_one_term_gives_one_line_and_preferences_are_numbered():
    assert (
        PROMPTS["terminology"]["en"]
        .render(VALUES | {"text": [("a", "b")]})
        .startswith("Reference the following translations:\na translates to b\n\nTranslate")
    )
    numbered = PROMPTS["personalization"]["zh"].render(VALUES | {"user_preferences": ["甲", "乙", "丙"]})
    assert numbered.endswith("1、甲\n2、乙\n3、丙\n4、将【待翻译文本】翻译为 German。")


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_what_looks_like_a_placeholder_in_a_row_stays(kind, language):
    prompt = PROMPTS[kind][language]
    odd = "{target_lang} {text} {{var}} ${number} {user_preferences}"
    values = {name: odd for name in VALUES} | {"text": [(odd, odd)], "user_preferences": [odd]}
    rendered = prompt.render(values)
    occurrences = {name: 1 for name in prompt.placeholders} | {"text": 2}
    assert rendered.count(odd) >= sum(occurrences[name] for name in prompt.placeholders)
    plain = {name: "X" for name in VALUES} | {"text": [("X", "X")], "user_preferences": ["X"]}
    assert rendered.replace(odd, "X") == prompt.render(plain)


def test_braces_that_are_no_placeholders_stay():
    assert "（如 {{var}}、${var}、%s、%d 等）" in PROMPTS["structured"]["zh"].render(VALUES)


def test_every_kind_of_prompt_can_be_asked_for_in_a_row():
    fields = {
        "terminology": {"terminology": {"sea": "Meer"}},
        "style": {"target_style": "poetry"},
        "personalization": {"user_preferences": ["Be brief"]},
        "structured": {"format_type": "JSON"},
        "background": {"background_text": "A novel."},
    }
    reader = RowReader()
    for kind in PROMPTS:
        row = {
            "source_lang": "en",
            "target_lang": "de",
            "source": "The sea.",
            "target": "Das Meer.",
            "prompt": kind,
        } | fields.get(kind, {})
        [request, answer] = reader.parse("a.jsonl", 1, json.dumps(row).encode()).messages
        assert "The sea." in request["content"]
        assert "German" in request["content"]
        assert answer["content"] == "Das Meer."


@pytest.mark.parametrize(
    ("given", "english", "chinese"),
    [
        ("de", "German", "德语"),
        ("German", "German", "德语"),
        ("german", "German", "德语"),
        ("德语", "German", "德语"),
        ("pt-BR", "Portuguese", "葡萄牙语"),
        ("en_US", "English", "英语"),
        ("zh-CN", "Chinese", "中文"),
        ("zh-Hans", "Chinese", "中文"),
        ("zh-TW", "Traditional Chinese", "繁体中文"),
        ("zh-Hant-TW", "Traditional Chinese", "繁体中文"),
        ("zh_Hant_HK", "Traditional Chinese", "繁体中文"),
        ("zh-Hans-CN", "Chinese", "中文"),
        ("zh-yue", "Cantonese", "粤语"),
        ("EN-US", "English", "英语"),
        ("zh_Hant", "Traditional Chinese", "繁体中文"),
        ("fil", "Filipino", "菲律宾语"),
        ("Klingon", "Klingon", "Klingon"),
        ("Simplified Chinese", "Chinese", "中文"),
        ("简体中文", "Chinese", "中文"),
        ("汉语", "Chinese", "中文"),
        ("zh-HK", "Traditional Chinese", "繁体中文"),
        ("zh_MO", "Traditional Chinese", "繁体中文"),
    ],
)
def test_a_language_goes_by_its_name_in_the_prompts_language(given, english, chinese):
    assert language_names(given)[:2] == (english, chinese)


@pytest.mark.parametrize("name", ["Classical Chinese", "old chinese", "中文（文言）"])
def test_a_name_may_say_that_it_is_a_kind_of_chinese(name):
    assert language_names(name) == (name, name, True)
    assert not language_names("Old Church Slavonic").is_chinese


def test_the_readmes_languages_are_known():
    for code, (english, chinese) in LANGUAGES.items():
        assert language_names(english)[:2] == language_names(chinese)[:2] == language_names(code)[:2]
        assert english.isascii() and english.istitle() and chinese.endswith(("语", "文"))
    assert len(LANGUAGES) == 38
    assert [code for code in LANGUAGES if language_names(code).is_chinese] == ["zh", "zh-Hant", "yue"]
