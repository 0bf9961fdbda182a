"""Rows of both forms become conversations; a wrong row is named by file, line and key, with what was found and what to
do.
"""

import json

import pytest

from hymeg.data.rows import Conversation, RowReader
from hymeg.errors import UserError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
TRANSLATION = {"source_lang": "en", "target_lang": "de", "source": "Hello", "target": "Hallo"}


@pytest.fixture(scope="module")
def reader():
    return RowReader()


def parse(reader, row):
    raw = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
    return reader.parse("data/a.jsonl", 12, raw)


def chat(*messages, **others):
    return {"messages": list(messages) or [USER, ASSISTANT], **others}


def translation(**changes):
    return {key: value for key, value in (TRANSLATION | changes).items() if value is not ...}


# Good rows


def test_a_conversation_keeps_its_messages(reader):
    row = chat(
        {"role": "system", "content": ""}, USER, ASSISTANT | {"reasoning_content": "hm"}, reasoning_effort="high", id=7
    )
    assert parse(reader, row) == Conversation(row["messages"], "high", None, "data/a.jsonl: line 12")


def test_null_is_as_good_as_absent(reader):
    row = chat(
        USER | {"name": None},
        ASSISTANT | {"reasoning_content": None, "tool_calls": None},
        reasoning_effort=None,
        tools=None,
    )
    assert parse(reader, row)[:3] == ([USER, ASSISTANT], None, None)
    assert (
        parse(reader, translation(prompt=None, prompt_lang=None, terminology=None)).messages
        == parse(reader, TRANSLATION).messages
    )


def test_a_call_needs_no_content(reader):
    call = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    result = {"role": "tool", "content": "", "tool_call_id": "1"}
    row = chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, ASSISTANT, tools=tools)
    conversation = parse(reader, row)
    assert conversation.messages == [
        USER,
        {"role": "assistant", "tool_calls": [call], "content": ""},
        result,
        ASSISTANT,
    ]
    assert conversation.tools == tools


def test_a_translation_is_a_question_and_an_answer(reader):
    row = translation(reasoning_effort="low", domain="greetings")
    prompt = "Translate the following text into German. Note that you should only output the translated result without any additional explanation:"
    messages = [{"role": "user", "content": f"{prompt}\n\nHello"}, {"role": "assistant", "content": "Hallo"}]
    assert parse(reader, row) == Conversation(messages, "low", None, "data/a.jsonl: line 12")


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({}, "Translate the following text into German."),
        ({"target_lang": "zh"}, "Translate the following text into Chinese."),
        ({"source_lang": "zh-CN"}, "将以下文本翻译为 德语，"),
        ({"source_lang": "Cantonese"}, "将以下文本翻译为 德语，"),
        ({"source_lang": "fr", "prompt_lang": "zh", "target_lang": "Italian"}, "将以下文本翻译为 意大利语，"),
        (
            {"source_lang": "中文", "prompt_lang": "en", "target_lang": "日语"},
            "Translate the following text into Japanese.",
        ),
        ({"target_lang": "Swiss German"}, "Translate the following text into Swiss German."),
    ],
)
def test_the_prompt_is_chinese_for_chinese_sources_unless_the_row_says_otherwise(reader, changes, beginning):
    assert parse(reader, translation(**changes)).messages[0]["content"].startswith(beginning)


def test_metadata_is_left_alone(reader):
    assert parse(reader, chat(source="wmt", lang="de", meta={"a": [1]})).messages == [USER, ASSISTANT]


def test_readers_with_other_prompts_have_other_fingerprints(tmp_path, reader):
    (tmp_path / "prompts.json").write_text(json.dumps({"mine": {"en": "{target_lang}: {source_text}"}}))
    other = RowReader(tmp_path / "prompts.json")
    assert other.fingerprint != reader.fingerprint == RowReader().fingerprint
    assert parse(other, translation(prompt="mine")).messages[0]["content"] == "German: Hello"


# Wrong rows

KINDS = "default, terminology, style, personalization, delimiters, structured, background"
WRONG_ROWS = {
    "not JSON": (b'{"messages": [', "not JSON: Expecting value.*; an object a line is needed"),
    "not UTF-8": (b'{"messages": "\xff"}', r"not UTF-8: byte b'\\xff'; convert the file with iconv"),
    "not an object": (b'"a"', "holds 'a'; an object with 'messages', or with 'source' and 'target', is needed$"),
    "a list of rows": (b'["a"]', r"holds \['a'\]; an object with .* is needed \(jq -c '.\[\]' makes lines of a list\)"),
    "a zero byte": (b'{"messages": "a\0b"}', "not JSON: Invalid control character"),
    "half a surrogate pair in UTF-8": (b'{"messages": "\xed\xa0\x80"}', r"not UTF-8: byte b'\\xed'"),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        "holds .*, half of a surrogate pair, which is no text",
    ),
    "brackets without end": (b"[" * 200000, "not JSON"),
    "a number of thousands of digits": (b'{"id": ' + b"1" * 10000 + b"}", "not JSON: Exceeds the limit"),
    "another form": (
        {"conversations": []},
        r"has the keys \['conversations'\]; needed are 'messages' for a conversation, 'source_lang', 'target_lang'",
    ),
    "both forms": (chat(**TRANSLATION), "has 'messages' and also 'source' and 'target'; a row is either"),
    "no messages": ({"messages": []}, r"'messages' is \[\]; a list of {'role', 'content'} is needed"),
    "messages null": ({"messages": None}, r"has the keys \[\]; needed are 'messages'"),
    "messages a string": ({"messages": "hi"}, "'messages' is 'hi'; a list"),
    "message a string": (chat("hi"), "message 1 is 'hi'; {'role', 'content'} is needed"),
    "no role": (
        chat({"content": "hi"}),
        r"message 1: 'role' is missing among \['content'\]; system, user, assistant, tool are possible",
    ),
    "unknown role": (
        chat(USER, {"role": "bot", "content": "x"}),
        "message 2: 'role' is 'bot'; system, user, assistant, tool are possible",
    ),
    "role a list": (chat({"role": ["user"], "content": "x"}), r"message 1: 'role' is \['user'\]; system"),
    "no content": (
        chat(USER, {"role": "assistant"}),
        r"message 2: 'content' is missing among \['role'\]; a string is needed",
    ),
    "content a list": (
        chat(USER | {"content": [{"type": "text", "text": "hi"}]}),
        r"message 1: 'content' is \[{.*; a string is needed",
    ),
    "empty content": (
        chat(USER, ASSISTANT | {"content": " \n"}),
        "message 2: 'content' is empty; an empty assistant turn teaches nothing: leave the row",
    ),
    "content a number": (chat(USER, ASSISTANT | {"content": 42}), "message 2: 'content' is 42; a string is needed"),
    "content lists in a list": (
        chat(USER, ASSISTANT | {"content": [["a"], ["b"]]}),
        r"message 2: 'content' is \[\['a'\], \['b'\]\]; a string",
    ),
    "messages in a list of their own": (chat([USER, ASSISTANT]), r"message 1 is \[{.*; {'role', 'content'} is needed"),
    "content null": (chat(USER | {"content": None}), "message 1: 'content' is missing"),
    "reasoning a number": (
        chat(USER, ASSISTANT | {"reasoning_content": 1}),
        "message 2: 'reasoning_content' is 1; a string is needed",
    ),
    "a user's reasoning": (
        chat(USER | {"reasoning_content": "x"}),
        "message 1: 'reasoning_content' has no place in a message of role user, whose keys",
    ),
    "a weight": (
        chat(USER, ASSISTANT | {"weight": 0}),
        "message 2: 'weight' has no place in a message of role assistant, whose keys are role, content, name",
    ),
    "no assistant": (
        chat(USER),
        "no message is an assistant's; there is nothing to learn from such a row: leave it out",
    ),
    "unknown effort": (chat(reasoning_effort="hihg"), "'reasoning_effort' is 'hihg'; no_think, low, high are possible"),
    "effort a list": (chat(reasoning_effort=[]), r"'reasoning_effort' is \[\]; no_think"),
    "mistyped key": (
        chat(reasoning_efort="high"),
        "unknown key 'reasoning_efort'; 'reasoning_effort' is known: mend the name, or rename the key",
    ),
    "tools a dict": (
        chat(tools={"name": "f"}),
        r"'tools' is {'name': 'f'}; a list of {'type': 'function', 'function': {'name', ...}} is needed",
    ),
    "nameless call": (
        chat(USER, ASSISTANT | {"tool_calls": [{"function": {}}]}),
        r"message 2: 'tool_calls' is \[.*; a list of",
    ),
    "no target_lang": (
        translation(target_lang=...),
        r"'target_lang' is missing among \['source_lang', 'source', 'target'\]; a string is needed",
    ),
    "no source_lang": (translation(source_lang=...), "'source_lang' is missing"),
    "no target": (translation(target=...), "'target' is missing among"),
    "empty source": (
        translation(source=" "),
        "'source' is empty; there is nothing to learn from such a row: leave it out",
    ),
    "target a list": (translation(target=["Hallo"]), r"'target' is \['Hallo'\]; a string is needed"),
    "unknown code": (
        translation(target_lang="sv"),
        "'target_lang': 'sv' is not among the language codes zh, en, fr.*; give the language's name",
    ),
    "two lines": (
        translation(target_lang="German\nplease"),
        "'target_lang' is .*; the name or code of a language is needed",
    ),
    "unknown kind": (
        translation(prompt="styl"),
        f"'prompt' is 'styl'; kinds of prompt are {KINDS} \\(--translation-prompts adds others\\)",
    ),
    "kind a list": (translation(prompt=["style"]), r"'prompt' is \['style'\]; kinds of prompt are"),
    "unknown prompt_lang": (
        translation(prompt_lang="de"),
        "'prompt_lang' is 'de'; the 'default' prompt exists in zh, en",
    ),
    "no style": (translation(prompt="style"), r"'target_style' is missing among \[.*; a string is needed"),
    "style without its prompt": (
        translation(target_style="dry"),
        "'target_style' has no place in the 'default' prompt; set 'prompt' to 'style', or leave it out",
    ),
    "terms a string": (
        translation(prompt="terminology", terminology="a=b"),
        r"'terminology' is 'a=b'; \[\[source term, target term\], ...\] or {source term",
    ),
    "no terms": (translation(prompt="terminology", terminology=[]), r"'terminology' is \[\]; \[\[source term"),
    "a lone term": (
        translation(prompt="terminology", terminology=[["a"]]),
        r"'terminology' is \[\['a'\]\]; \[\[source",
    ),
    "a term of two letters": (
        translation(prompt="terminology", terminology=["ab"]),
        r"'terminology' is \['ab'\]; \[\[source",
    ),
    "no preferences": (
        translation(prompt="personalization"),
        r"'user_preferences' is missing among .*; a list of strings is needed",
    ),
    "a preference": (
        translation(prompt="personalization", user_preferences="short"),
        "'user_preferences' is 'short'; a list of strings is needed",
    ),
    "mistyped translation key": (
        translation(backgroundtext="x"),
        "unknown key 'backgroundtext'; 'background_text' is known",
    ),
}


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_wrong_row_is_named(reader, row, message):
    with pytest.raises(UserError, match=f"^data/a.jsonl: line 12: {message}") as caught:
        parse(reader, row)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
