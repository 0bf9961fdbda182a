"""Rows of all forms become conversations; a wrong row is named by file, line and key, with what was found and what to
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
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
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
    prompt = (
        "Translate the following text into German. Note that you should only output the translated result without any "
        "additional explanation:"
    )
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


def test_keys_without_a_meaning_are_left_alone_and_counted():
    reader = RowReader()
    assert parse(reader, chat(source="wmt", lang="de", meta={"a": [1]}, id=None)).messages == [USER, ASSISTANT]
    parse(reader, translation(lang="de", id=3))
    assert reader.ignored == {"source": 1, "lang": 2, "meta": 1, "id": 1}


# The forms of other trainers

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sun"}
SYSTEM = {"role": "system", "content": "Be brief."}


def shares(*turns):
    return [{"from": role, "value": text} for role, text in turns]


TAKEN = {
    "ShareGPT": (
        {"conversations": shares(("system", "Be brief."), ("human", "hi"), ("gpt", "hello"))},
        [SYSTEM, USER, ASSISTANT],
    ),
    "ShareGPT with OpenAI's keys": ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "OpenAI with ShareGPT's keys": (chat(*shares(("user", "hi"), ("assistant", "hello"))), [USER, ASSISTANT]),
    "ShareGPT with calls": (
        {
            "conversations": shares(
                ("human", "hi"),
                ("function_call", '{"name": "weather", "arguments": {"city": "Bern"}}'),
                ("observation", "sun"),
                ("gpt", "hello"),
            )
        },
        [USER, CALLING, RESULT, ASSISTANT],
    ),
    "a thought and two calls in a turn of their own": (
        {
            "conversations": shares(
                ("human", "hi"),
                (
                    "function_call",
                    '<think>\nhm\n</think>\n\n[{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "f"}]',
                ),
            )
        },
        [
            USER,
            CALLING
            | {
                "reasoning_content": "hm",
                "tool_calls": [CALL, {"type": "function", "function": {"name": "f", "arguments": {}}}],
            },
        ],
    ),
    "words and calls in turns one after another": (
        chat(
            USER,
            ASSISTANT,
            {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"role": "tool_call", "content": '{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}'},
            {"role": "tool_response", "content": "sun"},
        ),
        [USER, ASSISTANT | {"tool_calls": [CALL, CALL]}, RESULT],
    ),
    "Alpaca": ({"instruction": "hi", "output": "hello"}, [USER, ASSISTANT]),
    "Alpaca with empty fields": (
        {"instruction": "hi", "input": "", "output": "hello", "history": [], "system": ""},
        [USER, ASSISTANT],
    ),
    "Alpaca with all": (
        {
            "system": "Be brief.",
            "history": [["hi", "hello"]],
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "text": "as Alpaca's prompt has it",
        },
        [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "Alpaca with an input only": ({"instruction": "", "input": "hi", "output": "hello"}, [USER, ASSISTANT]),
    "a system message beside the messages": (chat(system="Be brief."), [SYSTEM, USER, ASSISTANT]),
    "under another name": (chat(system_prompt="Be brief."), [SYSTEM, USER, ASSISTANT]),
    "twice the same": (
        chat(SYSTEM, USER, ASSISTANT, system="Be brief.", system_message="Be brief."),
        [SYSTEM, USER, ASSISTANT],
    ),
    "none": (chat(system=""), [USER, ASSISTANT]),
    "a developer's message": (chat(SYSTEM | {"role": "developer"}, USER, ASSISTANT), [SYSTEM, USER, ASSISTANT]),
    "parts": (
        chat(
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "index": None}]},
            ASSISTANT,
        ),
        [USER, ASSISTANT],
    ),
    "arguments as OpenAI gives them": (
        chat(
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        ),
        [USER, CALLING | {"tool_calls": [CALL | {"id": "c1"}]}, RESULT | {"tool_call_id": "c1"}],
    ),
    "a call without arguments": (
        chat(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": ""}}, {"name": "f"}]}),
        [USER, CALLING | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}] * 2}],
    ),
    "calls without the outer object": (
        chat(USER, CALLING | {"tool_calls": [{"id": "c1", "name": "weather", "arguments": {"city": "Bern"}}]}),
        [USER, CALLING | {"tool_calls": [CALL | {"id": "c1"}]}],
    ),
    "calls as a string": (
        chat(USER, CALLING | {"tool_calls": '[{"name": "weather", "arguments": {"city": "Bern"}}]'}),
        [USER, CALLING],
    ),
    "OpenAI's first calls": (
        chat(
            USER,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Bern"}'},
            },
            {"role": "function", "name": "weather", "content": "sun"},
        ),
        [USER, CALLING, RESULT | {"name": "weather"}],
    ),
    "no calls": (chat(USER, ASSISTANT | {"tool_calls": []}), [USER, ASSISTANT]),
    "other names of reasoning": (
        chat(USER, ASSISTANT | {"reasoning": "hm"}, USER, ASSISTANT | {"thinking": "so"}),
        [USER, ASSISTANT | {"reasoning_content": "hm"}, USER, ASSISTANT | {"reasoning_content": "so"}],
    ),
    "reasoning in tags": (
        chat(USER, {"role": "assistant", "content": "<think>\nhm\n\nso\n</think>\n\nhello"}),
        [USER, ASSISTANT | {"reasoning_content": "hm\n\nso"}],
    ),
    "empty tags": (chat(USER, {"role": "assistant", "content": "<think>\n\n</think>\n\nhello"}), [USER, ASSISTANT]),
    "tags beside reasoning, or within the text, or of others": (
        chat(
            {"role": "user", "content": "<think>a</think>b"},
            {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": ""},
            USER,
            {"role": "assistant", "content": "b<think>a</think>"},
        ),
        [
            {"role": "user", "content": "<think>a</think>b"},
            {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": ""},
            USER,
            {"role": "assistant", "content": "b<think>a</think>"},
        ],
    ),
    "weights that change nothing": (
        chat(
            USER | {"weight": 0, "train": False},
            ASSISTANT | {"weight": 1, "loss": True, "train": True},
            weight=1.0,
            loss=True,
            images=[],
            kto_tag=True,
            label="polite",
            rejected="",
        ),
        [USER, ASSISTANT],
    ),
}


@pytest.mark.parametrize(("row", "messages"), TAKEN.values(), ids=TAKEN)
def test_rows_in_the_forms_of_other_trainers_are_read(reader, row, messages):
    assert parse(reader, row).messages == messages


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
        {"tools": [{"function": TOOL["function"]}]},
        {"tools": [{"type": "function", **TOOL["function"]}]},
        {"tools": [{"name": "weather", "parameters": '{"type": "object"}'}]},
        {"tools": [TOOL], "functions": [TOOL]},
    ],
)
@pytest.mark.parametrize("row", [chat(), TRANSLATION, {"instruction": "hi", "output": "hello"}])
def test_tools_are_read_in_all_forms_of_rows(reader, given, row):
    [tool] = parse(reader, row | given).tools
    assert json.dumps(tool) == json.dumps(TOOL)  # the template writes it down: the order of keys counts


@pytest.mark.parametrize("none", [{"tools": []}, {"tools": ""}, {"functions": []}, {"tools": "[]"}, {}])
def test_empty_tools_are_none(reader, none):
    assert parse(reader, chat(**none)).tools is None


@pytest.mark.parametrize(
    ("given", "effort"),
    [
        ({"reasoning_effort": "high"}, "high"),
        ({"thinking": "low"}, "low"),
        ({"thinking": False}, "no_think"),
        ({"enable_thinking": False}, "no_think"),
        ({"enable_thinking": True, "reasoning_effort": "low"}, "low"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, "high"),
        ({"chat_template_kwargs": {"reasoning_effort": "high", "enable_thinking": True, "thinking": None}}, "high"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "no_think"}, "no_think"),
        ({"chat_template_kwargs": {}}, None),
        ({"thinking": None}, None),
    ],
)
@pytest.mark.parametrize("row", [chat(), TRANSLATION, {"instruction": "hi", "output": "hello"}])
def test_the_effort_is_read_under_its_other_names(reader, given, effort, row):
    assert parse(reader, row | given).reasoning_effort == effort


def test_a_translation_may_have_a_system_message(reader):
    conversation = parse(reader, translation(system="Be brief."))
    assert conversation.messages == [SYSTEM, *parse(reader, TRANSLATION).messages]


# Wrong rows

KINDS = "default, terminology, style, personalization, delimiters, structured, background"
WRONG_ROWS = {
    "not JSON": (b'{"messages": [', "not JSON: Expecting value.*; an object a line is needed"),
    "not UTF-8": (b'{"messages": "\xff"}', r"not UTF-8: byte b'\\xff'; convert the file with iconv"),
    "not an object": (b'"a"', r"holds 'a'; an object is needed, such as {'messages': \[...\]}$"),
    "a list of rows": (b'["a"]', r"holds \['a'\]; an object is needed.* \(jq -c '.\[\]' makes lines of a list\)"),
    "a zero byte": (b'{"messages": "a\0b"}', "not JSON: Invalid control character"),
    "half a surrogate pair in UTF-8": (b'{"messages": "\xed\xa0\x80"}', r"not UTF-8: byte b'\\xed'"),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        "holds .*, half of a surrogate pair, which is no text",
    ),
    "brackets without end": (b"[" * 200000, "not JSON"),
    "a number of thousands of digits": (b'{"id": ' + b"1" * 10000 + b"}", "not JSON: Exceeds the limit"),
    "another form": (
        {"question": "", "answer": ""},
        r"has the keys \['question', 'answer'\]; needed are 'messages' or 'conversations' for a conversation, "
        "'instruction' and 'output' for an instruction, 'source_lang', 'target_lang'",
    ),
    "two forms": (
        chat(**TRANSLATION),
        "has 'messages' and also 'source' and 'target', which are two forms of row; keep",
    ),
    "two other forms": (
        {"conversations": [USER], "instruction": "a", "output": "b"},
        "has 'conversations' and also 'instruction' and 'output'",
    ),
    "one form under two names": (chat(conversations=[USER]), "has 'messages' and also 'conversations'"),
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
    "a part that is no text": (
        chat(USER | {"content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {}}]}, ASSISTANT),
        r"message 1: part 2 is {.*; {'type': 'text', 'text'} is needed: these models read text only",
    ),
    "a part with more": (
        chat(USER | {"content": [{"type": "text", "text": "hi", "weight": 0}]}, ASSISTANT),
        "message 1: part 1 is ",
    ),
    "no parts": (chat(USER | {"content": []}), r"message 1: 'content' is \[\]; a string is needed"),
    "empty content": (
        chat(USER, ASSISTANT | {"content": " \n"}),
        "message 2: 'content' is empty; an empty assistant turn teaches nothing: leave the row",
    ),
    "content a number": (chat(USER, ASSISTANT | {"content": 42}), "message 2: 'content' is 42; a string is needed"),
    "content lists in a list": (
        chat(USER, ASSISTANT | {"content": [["a"], ["b"]]}),
        r"message 2: part 1 is \['a'\]; {'type': 'text', 'text'}",
    ),
    "messages in a list of their own": (chat([USER, ASSISTANT]), r"message 1 is \[{.*; {'role', 'content'} is needed"),
    "content null": (chat(USER | {"content": None}), "message 1: 'content' is null"),
    "reasoning a number": (
        chat(USER, ASSISTANT | {"reasoning_content": 1}),
        "message 2: 'reasoning_content' is 1; a string is needed",
    ),
    "a user's reasoning": (
        chat(USER | {"reasoning_content": "x"}),
        "message 1: 'reasoning_content' has no place in a message of role user, whose keys",
    ),
    "a key of another role": (
        chat(USER, ASSISTANT | {"tool_call_id": "1"}),
        "message 2: 'tool_call_id' has no place in a message of role assistant, whose keys are role, content, name, r",
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
    "a target_lang only": ({"target_lang": "de"}, r"'source_lang' is missing among \['target_lang'\]"),
    "a source_lang only": ({"source_lang": "de"}, "'target_lang' is missing among"),
    "a source only": ({"source": "de"}, "'source_lang' is missing among"),
    "a target only": ({"target": "de"}, "'source_lang' is missing among"),
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
        f"'prompt' is 'styl'; kinds of prompt are {KINDS}; for a prompt of your own write 'messages'",
    ),
    "kind a list": (translation(prompt=["style"]), r"'prompt' is \['style'\]; kinds of prompt are"),
    "unknown prompt_lang": (
        translation(prompt_lang="de"),
        "'prompt_lang' is 'de'; zh, en are possible",
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
    "a negative weight": (chat(weight=-1), "'weight' is -1; 0 or a number from 1e-06 to 1e\\+06 is needed"),
    "a weight that fp32 does not hold": (chat(weight=1e-7), "'weight' is 1e-07; 0 or a number from"),
    "a huge weight": (chat(weight=2e6), "'weight' is 2000000.0; 0 or a number from"),
    "a weight that is no number": (chat(USER, ASSISTANT | {"weight": "1"}), "message 2: 'weight' is '1'; 0 or a num"),
    "a weight that is none": (chat(weight=float("nan")), "'weight' is nan; 0 or a number from"),
    "a loss that was measured": (chat(loss=2.31), r"'loss' is 2.31; true or false is needed \(a weight goes under"),
    "two weights": (chat(weight=0.5, sample_weight=2), "has 'weight' and also 'sample_weight', which mean the same"),
    "a weight and a switch": (
        chat(USER, ASSISTANT | {"weight": 0.5, "train": True}),
        "message 2: has 'weight' and also 'train', which mean the same; keep one",
    ),
    "a mistyped weight": (chat(weights=[1]), "unknown key 'weights'; 'weight' is known"),
    "a bad answer": (chat(label=False), "'label' is false, which hymeg does not do; rows are answers to be learned"),
    "a worse answer": (chat(rejected_response="no"), "'rejected_response' is 'no', which hymeg does not do"),
    "a picture": (chat(images=["a.png"]), r"'images' is \['a.png'\], .*; these models read text only: leave the row"),
    "a user's turn to train": (
        chat(USER | {"train": True}, ASSISTANT),
        "message 1: 'train' is true in a message of role user; only the assistant's turns are trained: leave it out",
    ),
    "two system messages": (chat(SYSTEM, USER, ASSISTANT, system="x"), "has 'system' and also another system message"),
    "two others": (chat(system="x", system_prompt="y"), "has 'system' and also 'system_prompt', which mean the same"),
    "system a list": (chat(system=["x"]), r"'system' is \['x'\]; a string is needed"),
    "other functions than tools": (chat(tools=[TOOL], functions=[]), "has 'tools' and also 'functions', which mean"),
    "thinking, but how much": (
        chat(enable_thinking=True),
        "{'enable_thinking': True} leaves open how much; give 'reasoning_effort' alone: no_think, low, high",
    ),
    "two efforts": (
        chat(reasoning_effort="low", chat_template_kwargs={"thinking": False}),
        "{'chat_template_kwargs: thinking': False, 'reasoning_effort': 'low'} contradicts itself; give 'reasoning_effo",
    ),
    "an effort of others": (chat(thinking="medium"), "'thinking' is 'medium'; no_think, low, high are possible"),
    "an effort that is a truth": (chat(reasoning_effort=True), "'reasoning_effort' is true; no_think"),
    "other arguments": (
        chat(chat_template_kwargs={"date": "today"}),
        "'chat_template_kwargs' is {'date': 'today'}; of what a template is given, rows may say 'reasoning_effort'",
    ),
    "arguments a list": (chat(chat_template_kwargs=[]), r"'chat_template_kwargs' is \[\]; of what"),
    "unknown speaker": (
        {"conversations": shares(("human", "hi"), ("bard", "hello"))},
        "message 2: 'from' is 'bard'; developer, human, gpt, function, observation, .* are possible",
    ),
    "empty value": ({"conversations": shares(("human", " "), ("gpt", "a"))}, "message 1: 'value' is empty; an empty u"),
    "value a number": ({"conversations": shares(("human", 7), ("gpt", "a"))}, "message 1: 'value' is 7; a string is"),
    "role twice": (chat(USER | {"from": "human"}), "message 1: has 'role' and also 'from', which mean the same; keep"),
    "reasoning twice": (
        chat(USER, ASSISTANT | {"reasoning": "a", "reasoning_content": "b"}),
        "message 2: has 'reasoning_content' and also 'reasoning'",
    ),
    "calls twice": (
        chat(USER, CALLING | {"function_call": CALL["function"]}),
        "message 2: has 'tool_calls' and also 'function_call'",
    ),
    "a call that is no JSON": (
        {"conversations": shares(("human", "hi"), ("function_call", "weather('Bern')"))},
        "message 2: the function call: not JSON: Expecting value.*; JSON is needed in this string$",
    ),
    "a call of nothing": ({"conversations": shares(("human", "hi"), ("function_call", "[]"))}, "message 2: holds no f"),
    "a turn of two weights": (
        {
            "conversations": [
                *shares(("human", "hi"), ("gpt", "a")),
                {"from": "function_call", "value": '{"name": "f"}', "weight": 0},
            ]
        },
        "message 3: has another weight than the message before, which is of the same turn; give both the same",
    ),
    "arguments that are no JSON": (
        chat(USER, CALLING | {"tool_calls": [{"function": {"name": "weather", "arguments": "Bern"}}]}),
        "message 2: the arguments of 'weather': not JSON: .*; JSON is needed in this string$",
    ),
    "arguments that are no object": (
        chat(USER, CALLING | {"tool_calls": [{"function": {"name": "weather", "arguments": '["Bern"]'}}]}),
        r"message 2: the arguments of 'weather' are \['Bern'\]; an object is needed, which may be a string of JSON",
    ),
    "an argument twice": (
        chat(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]}),
        "message 2: the arguments of 'f': the key 'a' stands twice",
    ),
    "half a surrogate pair in a string of JSON": (
        chat(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]}),
        "message 2: the arguments of 'f': holds .*, half of a surrogate pair",
    ),
    "tools that are no JSON": (chat(tools="weather"), "'tools': not JSON: .*; JSON is needed in this string$"),
    "tools a string of an object": (chat(tools='{"name": "f"}'), "'tools' is {'name': 'f'}; a list of"),
    "a nameless tool": (chat(functions=[{"name": ""}]), r"'functions' is \[{'name': ''}\]; a list of"),
    "no output": ({"instruction": "hi"}, r"'output' is missing among \['instruction'\]; a string is needed"),
    "empty output": ({"instruction": "hi", "output": ""}, "'output' is empty; there is nothing to learn"),
    "no question": ({"instruction": "", "input": "", "output": "a"}, "'instruction' is empty; there is nothing to"),
    "input a list": ({"instruction": "hi", "input": [], "output": "a"}, r"'input' is \[\]; a string is needed"),
    "a history of rows": (
        {"instruction": "hi", "output": "a", "history": [{"q": "a"}]},
        r"'history' is \[{'q': 'a'}\]; \[\[question, answer\], ...\] is needed",
    ),
    "an empty answer in the history": (
        {"instruction": "hi", "output": "a", "history": [["b", ""]]},
        "message 2: 'content' is empty; an empty assistant turn",
    ),
    "mistyped instruction key": (
        {"instruction": "hi", "output": "a", "inputs": "b"},
        "unknown key 'inputs'; 'input' is known: mend the name",
    ),
    "mistyped translation key": (
        translation(backgroundtext="x"),
        "unknown key 'backgroundtext'; 'background_text' is known",
    ),
}


WEIGHTS = ("weight", "loss_weight", "loss_scale")
SWITCHES = ("loss", "train", "training", "trainable")


@pytest.mark.parametrize("row", [chat(), TRANSLATION, {"instruction": "hi", "output": "hello"}])
def test_what_other_trainers_read_in_a_row_is_not_passed_over(reader, row):
    foreign = dict.fromkeys(("label", "kto_tag"), False)
    foreign |= {key: [USER] for key in ("chosen", "rejected", "rejected_response", "rejected_messages")}
    foreign |= {"reasoning": "on", "reasoning_content": "first"}
    foreign |= {key: ["a"] for key in ("image", "images", "video", "videos", "audio", "audios")}
    for key, value in foreign.items():
        with pytest.raises(UserError, match=f"^data/a.jsonl: line 12: '{key}' is .*, which hymeg does not do"):
            parse(reader, row | {key: value})


@pytest.mark.parametrize("row", [chat(), TRANSLATION, {"instruction": "hi", "output": "hello"}])
def test_a_row_has_a_weight_under_any_of_its_names(reader, row):
    for key in (*WEIGHTS, "sample_weight"):
        assert parse(reader, row | {key: 0.25}).weights == (0.25,)
    for key in SWITCHES:
        assert parse(reader, row | {key: False}).weights == (0.0,)
    for given in ({}, {"weight": 1}, {"loss": True, "weight": 1.0}, {"train": None}):
        assert parse(reader, row | given).weights == ()


@pytest.mark.parametrize("key", [*WEIGHTS, *SWITCHES])
def test_a_turn_has_a_weight_which_its_row_multiplies(reader, key):
    messages = [USER | {key: 0}, ASSISTANT | {key: 0}, USER, ASSISTANT, USER | {key: False}, ASSISTANT | {key: True}]
    read = parse(reader, chat(*messages, weight=3))
    assert read.weights == (0.0, 3.0, 3.0)
    assert read.messages == [USER, ASSISTANT] * 3
    assert parse(reader, chat(*messages[2:])).weights == ()


def test_a_turn_in_two_messages_has_one_weight(reader):
    turn = [{"from": "gpt", "value": "a", "weight": 0.5}, {"from": "function_call", "value": '{"name": "f"}'}]
    row = {"conversations": [*shares(("human", "hi")), turn[0], turn[1] | {"weight": 0.5}, *shares(("gpt", "b"))]}
    assert parse(reader, row).weights == (0.5, 1.0)


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_wrong_row_is_named(reader, row, message):
    with pytest.raises(UserError, match=f"^data/a.jsonl: line 12: {message}") as caught:
        parse(reader, row)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
