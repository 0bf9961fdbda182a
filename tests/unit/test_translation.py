"""The prompts are those that Hy-MT2's README gives, filled in one pass; a file of others is checked before it is
used.
"""

import json
import os
from pathlib import Path

import pytest

from hymeg.data.rows import RowReader
from hymeg.data.translation import LANGUAGES, language_names, load_prompts
from hymeg.errors import UserError

PUBLISHED = Path(__file__).parents[3] / "shared/data/hy_mt2_prompts.json"
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
    if not PUBLISHED.exists():
        pytest.skip("the published prompts do not lie beside the checkout")
    published = json.loads(PUBLISHED.read_text())
    prompts = load_prompts()
    assert list(prompts.kinds) == list(published)
    for kind, texts in published.items():
        expected = texts[language].replace("3、……\n4、", "3、").replace("3. ...\n4. ", "3. ")
        for term in [term for pair in TERMS for term in pair]:
            expected = expected.replace("{text}", term, 1)
        for preference in VALUES["user_preferences"]:
            expected = expected.replace("{user_preferences}", preference, 1)
        for name, value in VALUES.items():
            expected = expected.replace(f"{{{name}}}", str(value))
        assert prompts.kinds[kind][language].render(VALUES) == expected


def test_one_term_gives_one_line_and_preferences_are_numbered():
    prompts = load_prompts().kinds
    assert (
        prompts["terminology"]["en"]
        .render(VALUES | {"text": [("a", "b")]})
        .startswith("Reference the following translations:\na translates to b\n\nTranslate")
    )
    numbered = prompts["personalization"]["zh"].render(VALUES | {"user_preferences": ["甲", "乙", "丙"]})
    assert numbered.endswith("1、甲\n2、乙\n3、丙\n4、将【待翻译文本】翻译为 German。")


@pytest.mark.parametrize("kind", load_prompts().kinds)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_what_looks_like_a_placeholder_in_a_row_stays(kind, language):
    prompt = load_prompts().kinds[kind][language]
    odd = "{target_lang} {text} {{var}} ${number} {user_preferences}"
    values = {name: odd for name in VALUES} | {"text": [(odd, odd)], "user_preferences": [odd]}
    rendered = prompt.render(values)
    occurrences = {name: 1 for name in prompt.placeholders} | {"text": 2}
    assert rendered.count(odd) >= sum(occurrences[name] for name in prompt.placeholders)
    plain = {name: "X" for name in VALUES} | {"text": [("X", "X")], "user_preferences": ["X"]}
    assert rendered.replace(odd, "X") == prompt.render(plain)


def test_braces_that_are_no_placeholders_stay():
    assert "（如 {{var}}、${var}、%s、%d 等）" in load_prompts().kinds["structured"]["zh"].render(VALUES)


def test_every_kind_of_prompt_can_be_asked_for_in_a_row():
    fields = {
        "terminology": {"terminology": {"sea": "Meer"}},
        "style": {"target_style": "poetry"},
        "personalization": {"user_preferences": ["Be brief"]},
        "structured": {"format_type": "JSON"},
        "background": {"background_text": "A novel."},
    }
    reader = RowReader()
    for kind in load_prompts().kinds:
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
        ("zh_Hant", "Traditional Chinese", "繁体中文"),
        ("fil", "Filipino", "菲律宾语"),
        ("Klingon", "Klingon", "Klingon"),
    ],
)
def test_a_language_goes_by_its_name_in_the_prompts_language(given, english, chinese):
    assert language_names(given)[:2] == (english, chinese)


def test_the_readmes_languages_are_known():
    assert len(LANGUAGES) == 38
    assert [code for code in LANGUAGES if language_names(code).is_chinese] == ["zh", "zh-Hant", "yue"]


# A file of prompts


def load(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_prompts(path)


def test_a_file_adds_kinds_and_replaces_them(tmp_path):
    prompts = load(
        tmp_path,
        {
            "about": "mine",
            "default": {"en": "{source_lang}>{target_lang}: {source_text}"},
            "new": {"zh": "{source_text}{target_lang}"},
        },
    )
    assert list(prompts.kinds) == [*load_prompts().kinds, "new"]
    assert list(prompts.kinds["default"]) == ["en"]
    assert prompts.kinds["default"]["en"].render(VALUES) == "English>German: The sea."
    assert prompts.fingerprint != load_prompts().fingerprint


GOOD = "{target_lang}: {source_text}"
WRONG_FILES = {
    "not JSON": ("{", "line 1, column 2: not valid JSON"),
    "a list": ([], r"holds \[\]; an object is needed"),
    "empty": ({"about": "x"}, "holds no prompt; an object is needed"),
    "a prompt without language": (
        {"a": GOOD},
        "'a' is '{target_lang}: {source_text}'; an object with a prompt under 'zh', 'en' or both is needed",
    ),
    "another language": ({"a": {"de": GOOD}}, "'a' is {'de': .*; an object with a prompt under 'zh', 'en' or both"),
    "no language": ({"a": {}}, "'a' is {}; an object"),
    "not a string": ({"a": {"en": 7}}, "'a', 'en': is 7; a string is needed"),
    "half a surrogate pair": ({"a": {"en": GOOD + "\ud800"}}, "'a', 'en': holds .*surrogate"),
    "unknown placeholder": (
        {"a": {"en": GOOD + "{tone}"}},
        r"'a', 'en': unknown placeholder {tone}; known are {source_lang}, .*{number}",
    ),
    "no source": (
        {"a": {"zh": "{target_lang}"}},
        "'a', 'zh': the placeholder {source_text} is missing; every prompt needs",
    ),
    "no target": ({"a": {"en": "{source_text}"}}, "'a', 'en': the placeholder {target_lang} is missing"),
    "braced twice": ({"a": {"en": "{{target_lang}} {source_text}"}}, "the placeholder {target_lang} is missing"),
    "one term": (
        {"a": {"en": GOOD + "\n{text}"}},
        r"{text} stands on 1 lines, 1 times on one; needed is one line with 2 of it",
    ),
    "preferences twice": (
        {"a": {"en": GOOD + "\n1 {user_preferences}\n2 {user_preferences}"}},
        "{user_preferences} stands on 2 lines, 1 times on one",
    ),
    "both on a line": (
        {"a": {"en": GOOD + "\n{text}{text}{user_preferences}"}},
        "{text} and {user_preferences} stand on one line",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=f"^--translation-prompts {tmp_path}/prompts.json: (.*: )?{message}") as caught:
        load(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"^--translation-prompts /none\.json: cannot be read: No such file"):
        load_prompts("/none.json")


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(
            UserError, match=f"^--translation-prompts {path}: is no file; give a JSON file with prompts"
        ):
            load_prompts(path)
