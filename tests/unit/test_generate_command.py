"""tools/generate.py: what is asked becomes the tokens that serving would make, and what cannot be is said at once."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.data import translation
from hymeg.data.translation import PROMPTS
from hymeg.errors import UserError
from hymeg.generation.prompts import chat_prompt, published_sampling, text_prompt, translation_request, unapplied
from hymeg.generation.sampling import Sampling
from hymeg.hf.tokenizer import load_tokenizer
from hymeg.platform import connections
from hymeg.training.loaded import load_model

GENERATE = Path(__file__).parents[2] / "tools" / "generate.py"
TOOL = runpy.run_path(str(GENERATE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(folder)
    return folder


def test_tensor_parallelism_has_the_connections_that_megatron_asserts_on_gpus(folder, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(connections, "were_set", False)
    with pytest.raises(UserError, match="--tensor-model-parallel-size 2"):
        load_model(folder, ["--tensor-model-parallel-size", "2"])
    assert os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def parsed(*argv: str):
    args, _ = TOOL["_parser"]().parse_known_args(["CHECKPOINT", *argv])
    TOOL["_check"](args)
    return args


def asked(tokenizer, *argv: str) -> list[tuple[str, list[int]]]:
    return TOOL["Asked"](parsed(*argv), tokenizer).prompts()


def templated(tokenizer, *messages: tuple[str, str], **given) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **given)


def test_prompts_go_through_the_chat_template(tokenizer):
    found = asked(tokenizer, "--prompt", "Who?", "--prompt", "And when?", "--system", "Be brief.", "--effort", "high")
    expected = [
        templated(tokenizer, ("system", "Be brief."), ("user", text), reasoning_effort="high")
        for text in ("Who?", "And when?")
    ]
    assert [tokens for _, tokens in found] == expected
    assert asked(tokenizer, "--prompt", "Who?", "--raw") == [("Who?", text_prompt(tokenizer, "Who?"))]
    assert tokenizer.decode(text_prompt(tokenizer, "Who?")) == tokenizer.bos_token + "Who?"


@pytest.mark.parametrize(
    ("text", "source", "language"),
    [("Good day", None, "en"), ("你好", None, "zh"), ("こんにちは世界", None, "en"), ("Hallo", "zh", "zh")],
)
def test_translations_are_asked_for_as_hy_mt2_was_trained(tokenizer, text, source, language):
    """In Chinese where the source is Chinese."""
    target = {"en": "German", "zh": "德语"}[language]
    expected = PROMPTS["default"][language].render({"target_lang": target, "source_text": text})
    assert translation_request(text, "de", source) == expected
    [(shown, tokens)] = asked(tokenizer, "--to", "German", "--text", text, *(["--from", source] if source else []))
    assert shown == text and tokens == templated(tokenizer, ("user", expected))


def test_rows_of_a_file(tokenizer, tmp_path):
    rows = [
        {"prompt": "Who?"},
        {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "the reference"}]},
        {"source": "Bye", "target_lang": "German", "target": "the reference"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = asked(tokenizer, "--file", str(tmp_path / "rows.jsonl"))
    expected = ["Who?", "1?", translation_request("Bye", "German")]
    assert found == [
        (shown, templated(tokenizer, ("user", text)))
        for shown, text in zip(("Who?", "1?", "Bye"), expected, strict=True)
    ]
    (tmp_path / "lines.txt").write_text("Who?\n\n1?\n")
    assert asked(tokenizer, "--file", str(tmp_path / "lines.txt")) == found[:2]


SAY, BRIEF = {"role": "user", "content": "Hi"}, ("system", "Brief.")
TERMS = {
    "source": "Hi",
    "source_lang": "en",
    "target_lang": "de",
    "prompt": "terminology",
    "terminology": {"Hi": "Hei"},
}


@pytest.mark.parametrize(
    ("row", "argv", "expected", "given"),
    [
        ({"prompt": "Hi", "reasoning_effort": "high"}, "", [("user", "Hi")], {"reasoning_effort": "high"}),
        ({"prompt": "Hi", "system": "Brief."}, "", [BRIEF, ("user", "Hi")], {}),
        ({"messages": [SAY], "system": "Brief."}, "", [BRIEF, ("user", "Hi")], {}),
        ({"messages": [SAY]}, "--system Brief.", [BRIEF, ("user", "Hi")], {}),
        ({"messages": [SAY], "system": "S"}, "--system Brief.", [("system", "S"), ("user", "Hi")], {}),
        (
            {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "the reference"}]},
            "",
            [("user", "Hi")],
            {},
        ),
        ({"messages": [SAY], "thinking": "low"}, "--effort high", [("user", "Hi")], {"reasoning_effort": "low"}),
        ({"messages": [SAY], "reasoning_effort": None}, "--effort low", [("user", "Hi")], {"reasoning_effort": "low"}),
        (TERMS, "", [("user", translation.request(TERMS))], {}),
        (TERMS | {"prompt_lang": "zh"}, "", [("user", translation.request(TERMS | {"prompt_lang": "zh"}))], {}),
        ({"prompt": "Hi"}, "--to de", [("user", translation_request("Hi", "de"))], {}),
    ],
)
def test_nothing_that_a_row_or_a_flag_says_is_lost(tokenizer, tmp_path, row, argv, expected, given):
    (tmp_path / "rows.jsonl").write_text("\ufeff" + json.dumps(row))
    assert asked(tokenizer, "--file", str(tmp_path / "rows.jsonl"), *argv.split()) == [
        ("Hi", templated(tokenizer, *expected, **given))
    ]


@pytest.mark.parametrize(
    ("row", "argv", "said"),
    [
        ({"messages": [SAY]}, ["--raw"], "line 1: --raw continues what is under 'prompt', and the row has .*messages"),
        ({"source": "Hi", "target_lang": "de"}, ["--raw"], "line 1: --raw continues what is under 'prompt'"),
        (
            {"messages": [SAY]},
            ["--to", "de"],
            "line 1: --to translates 'prompt' or 'source', and the row has 'messages'",
        ),
        ({"source": "Hi", "target_lang": "de", "terminology": {"a": "b"}}, [], "'terminology' has no place in"),
    ],
)
def test_rows_that_a_flag_does_not_go_with(tokenizer, tmp_path, row, argv, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=said):
        asked(tokenizer, "--file", str(tmp_path / "rows.jsonl"), *argv)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1]", "line 1: an object is needed"),
        ('{"prompt": "a\\ud800"}', "line 1: holds .*half of a surrogate pair"),
        ("{", "line 1"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "holds no question"),
        ('{"messages": [{"role": "nobody", "content": "a"}]}', "line 1: message 1: 'role' is 'nobody'"),
        ('{"source": "a"}', "'source' and 'target_lang' are needed"),
        ('{"prompt": " "}', "is empty"),
        ('{"prompt": "a<｜hy_User｜>b"}', "a message holds .*special token"),
        ('{"prompt": "a", "tools": [{"name": "f", "description": "<｜hy_User｜>"}]}', "'tools' holds .*special token"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
            '"reasoning_content": "<eos:6124c78e>"}, {"role": "user", "content": "a"}]}',
            "a message holds '<eos:6124c78e>', a special token",
        ),
        ('{"source": "a", "target_lang": "xx"}', "'xx' is not among the language codes"),
    ],
)
def test_rows_that_cannot_be_asked(tokenizer, tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(UserError, match=said):
        asked(tokenizer, "--file", str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--text a", "--to"),
        ("--to Germn --text a", r"--to Germn: .* did you mean German \(de\).*French"),
        ("--to xx --text a", "--to xx: .* those that it was trained on are .*German"),
        ("--to de --from Klingon --text a", "--from Klingon"),
        ("--from de --prompt a", "--to LANGUAGE is missing"),
        ("--to de --raw", "--raw"),
        ("--to de --prompt a", "--text"),
        ("--raw --system a", "--system"),
        ("--raw --effort low", "--effort"),
        ("--greedy --temperature 1", "--greedy"),
        ("--batch-size 0", "--batch-size 0"),
        ("--draft -1", "--draft -1"),
        ("--file a.csv", "a.csv"),
        ("--out /no/such/folder/a.jsonl", "--out"),
    ],
)
def test_command_lines_that_cannot_be(argv, said):
    with pytest.raises(UserError, match=said):
        parsed(*argv.split())


def test_the_publishers_sampling_holds_where_no_flag_says_otherwise(folder, tmp_path):
    from hymeg.hf.config import HyConfig

    config = HyConfig.from_file(folder / "config.json")

    def published(**given) -> Sampling:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
        return published_sampling(tmp_path, config)

    hy = published(do_sample=True, temperature=0.7, top_p=0.6, top_k=20, repetition_penalty=1.05, eos_token_id=[5, 6])
    assert hy == Sampling(temperature=0.7, top_p=0.6, top_k=20, repetition_penalty=1.05, stop_ids=(5, 6))
    assert published(do_sample=True).temperature == 1 and published(temperature=0.5).temperature == 0.5
    assert published(do_sample=False, temperature=0.7).temperature == 0 == published().temperature
    assert published().stop_ids == (config.eos_token_id,)
    no_tokens = ({"eos_token_id": wrong} for wrong in ("5", [5, 1.0], [], -1, config.vocab_size, True))
    for wrong in ({"top_p": "x"}, {"top_k": True}, {"top_p": 0}, *no_tokens):
        with pytest.raises(UserError, match=rf"generation_config.json: '?{next(iter(wrong))}"):
            published(**wrong)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config.json: holds \[\]; an object is needed"):
        published_sampling(tmp_path, config)
    chosen = TOOL["_sampling"](parsed("--greedy", "--top-k", "3", "--seed", "9"), hy)
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.seed) == (0, 3, 0.6, 9)
    for argv, said in (("--top-p 2", "--top-p is 2"), ("--seed -1", "--seed is -1; 0 or more is needed")):
        with pytest.raises(UserError, match=said):
            TOOL["_sampling"](parsed(*argv.split()), hy)
    with pytest.raises(UserError, match=r"--top-p 0.5: nothing is drawn, .*; give --temperature"):
        TOOL["_sampling"](parsed("--top-p", "0.5"), published())
    assert TOOL["_sampling"](parsed("--top-p", "0.5", "--temperature", "1"), published()).top_p == 0.5


def test_what_the_publisher_s_sampling_has_and_ours_has_not_is_told(tmp_path):
    assert list(unapplied(tmp_path)) == []
    neutral = {"num_beams": 1, "typical_p": 1.0, "min_p": None, "no_repeat_ngram_size": 0, "guidance_scale": 1.0}
    given = {"top_k": 20, "pad_token_id": 1, "transformers_version": "5.0", **neutral}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert list(unapplied(tmp_path)) == []
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"min_p": 0.05, "stop_strings": ["."]}))
    told = f"{tmp_path}/generation_config.json: %s is not applied: answers are drawn without it"
    assert list(unapplied(tmp_path)) == [told % "min_p 0.05", told % "stop_strings ['.']"]


def test_a_prompt_longer_than_the_context_is_refused(folder):
    from hymeg.hf.config import HyConfig

    config = HyConfig.from_file(folder / "config.json")
    TOOL["_check_lengths"]([("", [1] * 4000)], 96, config)
    with pytest.raises(UserError, match="prompt 1 has 4,001 tokens"):
        TOOL["_check_lengths"]([("", [1] * 4001)], 96, config)


def test_text_comes_character_by_character(tokenizer, capsys):
    """A character of several tokens once it is whole; a broken one at the end is not kept back."""
    tokens = tokenizer.encode("aé𝄞b", add_special_tokens=False)
    printed, said = TOOL["Printed"](tokenizer), []
    for i, token in enumerate([*tokens, tokenizer.encode("𝄞", add_special_tokens=False)[0]]):
        printed(0, [token], i == len(tokens))
        said.append(capsys.readouterr().out)
    assert "".join(said) == "aé𝄞b\ufffd\n" and all("\ufffd" not in text for text in said[:-1])


def test_chats_need_a_template(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="--raw"):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])


def run(folder, *argv, **options):
    command = [sys.executable, GENERATE, folder, "--raw", "--greedy", "--max-new-tokens", "2", *argv]
    env = os.environ | {"HYMEG_PLATFORM": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_of_prompts_that_are_typed_the_screen_has_the_answers_alone_and_all_are_kept(folder, tmp_path):
    """Megatron's log goes to standard output."""
    said = run(folder, "--out", tmp_path / "answers.jsonl", input="a\n\nb\n")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    answers = "".join(row["response"] for row in rows)
    assert "megatron" not in said and "".join(said.split()) == "".join(answers.split())
