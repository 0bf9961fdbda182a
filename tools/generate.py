#!/usr/bin/env python
"""Let a checkpoint speak: a Hugging Face folder or a distributed checkpoint, with an adapter or without, in one process
or under torchrun.

    tools/generate.py Hy-MT2-30B-A3B --to German --text "How are you?"
    tools/generate.py Hy-MT2-30B-A3B --prompt "Who wrote Faust?" --prompt "And when?"
    torchrun --nproc-per-node 8 tools/generate.py CHECKPOINT --file rows.jsonl --out answers.jsonl \\
        --tensor-model-parallel-size 2 --expert-model-parallel-size 4

Prompts go through the chat template, or with --raw are continued as they are. Without any, lines are read from the
terminal. The publisher's sampling (generation_config.json) holds where no flag says otherwise. Flags that are not
listed here are those of pretrain_hy.py for layout and precision.
"""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hymeg import platform
from hymeg.data.fields import decoded
from hymeg.errors import UserError, exit_on_user_error, located
from hymeg.files import write_whole

EFFORTS = ("no_think", "low", "high")


def main() -> None:
    args, flags = _parser().parse_known_args()
    with exit_on_user_error():
        platform.install()
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        _check(args)
        _speak(args, flags)
    if dist.is_initialized():
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder or id, or a distributed checkpoint"
    )
    parser.add_argument("--hf-model", metavar="DIR", help="config.json and tokenizer, if not in CHECKPOINT")
    parser.add_argument("--adapter", metavar="DIR", help="of CHECKPOINT: a run's with --lora-rank, or a peft folder")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    asked.add_argument("--text", action="append", default=[], metavar="TEXT", help="to be translated; needs --to")
    asked.add_argument(
        "--file",
        metavar="FILE",
        help="prompts: a line each (.txt), or a row each (.jsonl): {'prompt': ...}, {'messages': [...]} or {'source', "
        "'target_lang', 'source_lang'?}, with further keys as for training (docs/data.md)",
    )
    asked.add_argument("--to", metavar="LANGUAGE", help="translate into it: a code or a name, such as de or German")
    asked.add_argument("--from", dest="source", metavar="LANGUAGE", help="of the text to be translated")
    asked.add_argument("--raw", action="store_true", help="continue prompts as they are, without the chat template")
    asked.add_argument("--system", metavar="TEXT", help="the system message of chats")
    asked.add_argument("--effort", choices=EFFORTS, help="of reasoning (default: the chat template's)")
    drawn = parser.add_argument_group("how answers are drawn (default: generation_config.json)")
    drawn.add_argument("--greedy", action="store_true", help="the likeliest token each time: --temperature 0")
    drawn.add_argument("--temperature", type=float, metavar="X")
    drawn.add_argument("--top-p", type=float, metavar="X")
    drawn.add_argument("--top-k", type=int, metavar="N")
    drawn.add_argument("--repetition-penalty", type=float, metavar="X")
    drawn.add_argument("--max-new-tokens", type=int, metavar="N")
    drawn.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--draft",
        type=int,
        default=0,
        metavar="N",
        help="tokens that multi-token-prediction layers draft at a time (default: 0); the text is the same, and how "
        "often they were right is said",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers at a time (default: 16)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="also write {'prompt', 'response', 'ended'} rows there")
    return parser


def _check(args: argparse.Namespace) -> None:
    """What can be seen to be wrong before the model is loaded."""
    if args.text and not args.to:
        raise UserError("--text is to be translated: say with --to into which language (or give it as --prompt)")
    if args.source and not args.to:
        raise UserError(f"--from {args.source} says what is translated; --to LANGUAGE is missing")
    if args.to and args.raw:
        raise UserError("--raw continues text as it is and --to asks for a translation; leave one out")
    if args.to and args.prompt:
        raise UserError("--to translates what --text gives; give the text as --text, or leave --to out")
    for flag, language in (("--to", args.to), ("--from", args.source)):
        _check_language(flag, language)
    for name in ("system", "effort"):
        if args.raw and getattr(args, name) is not None:
            raise UserError(f"--raw uses no chat template, which --{name} is for; leave one out")
    if args.greedy and args.temperature not in (None, 0):
        raise UserError(f"--greedy is --temperature 0, and --temperature {args.temperature} is given; leave one out")
    for name, least in (("batch_size", 1), ("draft", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {least} or more is needed")
    if args.file and Path(args.file).suffix not in (".txt", ".jsonl"):
        raise UserError(f"--file {args.file}: a name in .txt or .jsonl is needed")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: the folder does not exist; make it, or write elsewhere")


def _check_language(flag: str, language: str | None) -> None:
    from hymeg.data.translation import LANGUAGES, language_code

    if language is None or language_code(language):
        return
    names = {names[0].casefold(): f"{names[0]} ({code})" for code, names in LANGUAGES.items()}
    near = [names[name] for name in difflib.get_close_matches(language.casefold(), names, cutoff=0.6)]
    rest = [name for name in names.values() if name not in near]
    said = f"did you mean {' or '.join(near)}? Others are" if near else "those that it was trained on are"
    raise UserError(f"{flag} {language}: Hy-MT2 was not trained on such a language; {said} {', '.join(rest)}")


class Asked:
    """Turns what is asked into prompts."""

    def __init__(self, args: argparse.Namespace, tokenizer):
        self.args, self.tokenizer = args, tokenizer

    def prompts(self) -> list[tuple[str, list[int]]]:
        """What was asked, and its tokens."""
        asked = [(text, self.tokens(text)) for text in [*self.args.prompt, *self.args.text]]
        return [*asked, *self._of_file()] if self.args.file else asked

    def tokens(self, text: str) -> list[int]:
        from hymeg.generation.prompts import text_prompt

        if not text.strip():
            raise UserError("a prompt: is empty; give a text")
        return text_prompt(self.tokenizer, text) if self.args.raw else self._chat([self._question(text)])

    def _question(self, text: str) -> dict:
        from hymeg.generation.prompts import translation_request

        asked = translation_request(text, self.args.to, self.args.source) if self.args.to else text
        return {"role": "user", "content": asked}

    def _chat(self, messages: list[dict], tools: list[dict] | None = None, effort: str | None = None) -> list[int]:
        from hymeg.generation.prompts import chat_prompt

        if self.args.system is not None and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.args.system}, *messages]
        return chat_prompt(self.tokenizer, messages, tools, effort or self.args.effort)

    def _of_file(self) -> Iterator[tuple[str, list[int]]]:
        path = Path(self.args.file)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                with located(f"{path}: line {number}"):
                    asked = self._of_row(line) if path.suffix == ".jsonl" else (line, self.tokens(line))
                yield asked

    def _of_row(self, line: str) -> tuple[str, list[int]]:
        """A row as for training, whose answer may be missing; a prompt is a conversation of one message."""
        from hymeg.data.rows import RowReader
        from hymeg.generation.prompts import source_language

        row = decoded(line)
        if not isinstance(row, dict):
            raise UserError("an object is needed, such as {'prompt': ...}")
        row = {key: value for key, value in row.items() if value is not None}
        messages, source, target = row.get("messages"), row.get("source"), row.get("target_lang", self.args.to)
        if isinstance(prompt := row.get("prompt"), str) and not row.keys() & {"messages", "source"}:
            if self.args.raw or not prompt.strip():
                return prompt, self.tokens(prompt)
            asked, messages = prompt, [self._question(row.pop("prompt"))]
        elif self.args.raw:
            raise UserError(f"--raw continues what is under 'prompt', and the row has {list(row)}; leave --raw out")
        elif isinstance(messages, list) and messages:
            if self.args.to:
                raise UserError("--to translates 'prompt' or 'source', and the row has 'messages'; leave --to out")
            while messages and isinstance(last := messages[-1], dict) and _role(last) in ("assistant", "gpt"):
                messages = messages[:-1]
            if not messages:
                raise UserError("'messages' holds no question; a list of {'role', 'content'} is needed")
            asked = None
        elif isinstance(source, str) and isinstance(target, str):
            asked, language = source, row.get("source_lang", self.args.source) or source_language(source)
            row |= {"source_lang": language, "target_lang": target, "target": "?"}
        else:
            raise UserError(f"'messages', 'prompt', or 'source' and 'target_lang' are needed; it has {list(row)}")
        if messages:
            row["messages"] = [*messages, {"role": "assistant", "content": "?"}]
        conversation = RowReader().read(row)
        messages = conversation.messages[:-1]
        asked = messages[-1]["content"] if asked is None else asked
        return asked, self._chat(messages, conversation.tools, conversation.reasoning_effort)


def _role(message: dict) -> Any:
    return message.get("role", message.get("from"))


def _speak(args: argparse.Namespace, flags: list[str]) -> None:
    from hymeg.generation.prompts import published_sampling, unapplied
    from hymeg.hf.config import HyConfig
    from hymeg.hf.hub import local_folder
    from hymeg.hf.tokenizer import load_tokenizer
    from hymeg.platform import device
    from hymeg.training.loaded import load_model

    args.checkpoint = local_folder(args.checkpoint)
    if args.hf_model is not None:
        args.hf_model = local_folder(args.hf_model, weights=False, flag="--hf-model")
    folder = args.hf_model or args.checkpoint
    if (Path(folder) / "config.json").is_file():  # where not, load_model says what is missing
        config = HyConfig.from_file(Path(folder) / "config.json")
        tokenizer = load_tokenizer(folder, config)
        sampling = _sampling(args, published_sampling(folder, config))
        asked = Asked(args, tokenizer)
        prompts = asked.prompts()
        _check_lengths(prompts, sampling.max_new_tokens, config)
    if device.current().type == "cuda" and not {"--bf16", "--fp16"} & set(flags):
        flags = ["--bf16", *flags]
    model, config = load_model(args.checkpoint, flags, hf_model=args.hf_model, adapter=args.adapter)
    if dist.get_rank() == 0:
        for note in unapplied(folder):
            print(f"hymeg: {note}", file=sys.stderr)
    answered: list[dict] = []
    if prompts:
        _answer(args, model, sampling, tokenizer, prompts, answered)
    elif args.file:
        raise UserError(f"--file {args.file}: holds no prompt")
    else:
        for line in _lines():
            prompts = [(line, asked.tokens(line))]
            _check_lengths(prompts, sampling.max_new_tokens, config)
            _answer(args, model, sampling, tokenizer, prompts, answered)


def _sampling(args: argparse.Namespace, published):
    fields = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")
    given = {name: value for name in fields if (value := getattr(args, name)) is not None}
    if args.greedy:
        given["temperature"] = 0.0
    try:
        sampling = dataclasses.replace(published, **given)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None
    for name in ("top_p", "top_k"):
        if name in given and "temperature" not in given and sampling.temperature == 0:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]}: nothing is drawn, since generation_config.json is missing "
                "or gives no temperature; give --temperature, or leave it out"
            )
    return sampling


def _check_lengths(prompts: list[tuple[str, list[int]]], max_new_tokens: int, config) -> None:
    for number, (_, tokens) in enumerate(prompts, start=1):
        if len(tokens) + max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"prompt {number} has {len(tokens):,} tokens, with --max-new-tokens {max_new_tokens:,} more than the "
                f"model's context of {config.max_position_embeddings:,} (max_position_embeddings); shorten one of them"
            )


def _lines() -> Iterator[str]:
    """Of rank 0's terminal, on every rank."""
    while True:
        if dist.get_rank() == 0 and sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = [sys.stdin.readline() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(line, src=0)
        if not line[0]:
            return
        if line[0].strip():
            yield line[0].strip()


def _answer(
    args: argparse.Namespace, model, sampling, tokenizer, prompts: list[tuple[str, list[int]]], answered: list[dict]
) -> None:
    """Generate on all ranks, print on the first: one answer as it is made, several as they end. `answered` are the rows
    of --out, of earlier prompts too.
    """
    from hymeg.generation import Drafting, generate_dealt

    drafting = Drafting(args.draft) if args.draft else None
    speaks = dist.get_rank() == 0
    stream = Printed(tokenizer) if speaks and len(prompts) == 1 else None
    answers = generate_dealt(
        model,
        [tokens for _, tokens in prompts],
        sampling,
        batch_size=args.batch_size,
        drafting=drafting,
        stream=stream,
    )
    if not speaks:
        return
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    if stream is None:
        for number, ((asked, _), text) in enumerate(zip(prompts, texts, strict=True), start=1):
            print(f"[{number}] {asked}\n{text}\n", flush=True)
    for number, answer in enumerate(answers, start=1):
        if not answer.ended:
            print(f"hymeg: answer {number} was cut off after {len(answer.tokens):,} tokens", file=sys.stderr)
    if drafting:
        by_depth = ", ".join(f"{rate:.1%} at depth {depth}" for depth, rate in enumerate(drafting.rates, start=1))
        print(f"hymeg: {drafting.rate:.1%} of {sum(drafting.proposed):,} drafts accepted: {by_depth}", file=sys.stderr)
    if args.out:
        answered += [
            {"prompt": asked, "response": text, "ended": answer.ended}
            for (asked, _), text, answer in zip(prompts, texts, answers, strict=True)
        ]
        write_whole(Path(args.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered).encode())


class Printed:
    """Prints an answer as its tokens come; a character once all its tokens are there."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.num_printed = tokenizer, [], 0

    def __call__(self, place: int, tokens: list[int], is_last: bool) -> None:
        self.tokens += tokens
        text = self.tokenizer.decode(self.tokens)
        if is_last or not text.endswith("\ufffd"):
            print(text[self.num_printed :], end="\n" if is_last else "", flush=True)
            self.num_printed = len(text)


if __name__ == "__main__":
    main()
