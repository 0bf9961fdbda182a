"""From the command line to Megatron's args: one schema of settings, every source of a value known.

A value comes from, weakest first: Megatron's default, hymeg's default, the YAML recipe, the command line. What
config.json (`--hf-model`) and the platform fix may be repeated but not contradicted.
"""

import argparse
import contextlib
import functools
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron.training import arguments

from hymeg import platform
from hymeg.errors import UserError, about
from hymeg.flag_table import ALWAYS, ON_CPU, TABLE, WITH_FROZEN, WITH_LORA, WITH_SFT, WITHOUT, cpu_values
from hymeg.hf.config import HyConfig
from hymeg.hf.hub import is_hub_id, local_folder
from hymeg.models.flags import architecture_flags, default_flags
from hymeg.platform import device
from hymeg.platform.patches import patched
from hymeg.training.flag_names import flag, hint, opposite
from hymeg.training.own_flags import DEFAULTS, add_hymeg_arguments
from hymeg.training.refusals import Sources, named, refuse, shown_flag, shown_value
from hymeg.training.yaml_file import read_settings


def parse(argv: Sequence[str], is_whole: bool = True) -> tuple[argparse.Namespace, HyConfig]:
    """Parse `argv` (without the program's name) into Megatron's args, not validated yet, and the model's configuration.

    The args have further attributes: `explicit`, what recipe and command line have set (`Sources`); `said`, its values
    by the option as it was typed, without dashes, True for every switch; `sft_rows`, whether `--sft` was given;
    `packed`, whether samples are packed conversations.

    Args:
        is_whole: a flag that has no effect without another is refused; a plan's command line is completed later.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, one that contradicts config.json or cannot work.
    """
    parser = _parser()
    defaults = {action.dest: action.default for action in parser._actions if action.default is not argparse.SUPPRESS}
    said, sources, words = _read(parser, list(argv))
    defaults |= DEFAULTS
    on_cpu = platform.judged_for_cpu()
    cases = {
        ALWAYS: True,
        ON_CPU: on_cpu,
        WITH_SFT: said.get("sft"),
        WITH_LORA: said.get("lora_rank") is not None,
        WITH_FROZEN: said.keys() & {"freeze", "train_only"},
    }
    with naming_lines(sources):
        refuse(parser, said, sources, defaults, {}, [row for row in TABLE if cases.get(row.when)])
        with (
            patched(sys, "argv", [sys.argv[0], *words], "training/arguments.py: what parse_args reads"),
            patched(arguments, "add_megatron_arguments", lambda new: parser, "training/arguments.py:121: made already"),
        ):
            try:
                args = arguments.parse_args()
            except RuntimeError as error:
                raise UserError(str(error)) from error
        for dest, value in vars(args).items():
            if isinstance(value, list):  # maybe the parser's own default, which the next one is given too
                setattr(args, dest, value.copy())
        if args.hf_model is None:
            raise UserError(
                "--hf-model is missing: give the folder with config.json, which sets the architecture, and tokenizer"
            )
        for dest, weights in (("hf_model", False), ("load", True), ("pretrained_checkpoint", True)):
            given = getattr(args, dest)
            if given is not None and given != args.save and is_hub_id(given):
                setattr(args, dest, str(local_folder(given, weights, flag(dest))))
        with about("--hf-model "):
            config = HyConfig.from_dir(args.hf_model)
        tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": args.hf_model}
        _fix(args, said, sources, architecture_flags(config) | tokenizer)
        _default(args, said, DEFAULTS | default_flags(config))
        if not on_cpu and not device.has_block_scaled_fp8():
            _default(args, said, {"fp8_recipe": "tensorwise"})
        if is_whole:
            refuse(parser, said, sources, defaults, vars(args), [row for row in TABLE if row.when == WITHOUT])
        if on_cpu:
            _default(args, said, cpu_values())
    args.explicit = sources
    args.said = {sources[dest][0].lstrip("-"): isinstance(value, bool) or value for dest, value in said.items()}
    # What Megatron does with --sft is not wanted: its evaluation averages the means of micro-batches.
    args.sft_rows, args.sft = args.sft, False
    args.packed = args.sft_rows and args.sft_packing
    return args, config


@contextlib.contextmanager
def naming_lines(sources: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """Where a message is about a flag that the recipe has set, say in which line."""
    try:
        yield
    except UserError as error:
        lines = {option: where for option, where in sources.values() if where}
        words = dict.fromkeys(word for word in re.findall(r"(?<!\S)--\w[\w-]*", str(error)) if word in lines)
        if not words:
            raise
        raise UserError(f"{error} ({'; '.join(f'{word}: {lines[word]}' for word in words)})") from error


def _parser() -> argparse.ArgumentParser:
    return _parser_of(os.environ.get("LOCAL_RANK"), os.environ.get("WORLD_SIZE"))


@functools.cache
def _parser_of(local_rank: str | None, world_size: str | None) -> argparse.ArgumentParser:
    """It takes a tenth of a second to make. Megatron reads defaults of its flags from these two of the environment."""
    parser = argparse.ArgumentParser(prog="pretrain_hy.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_hymeg_arguments(arguments.add_megatron_arguments(parser))
    for action in parser._actions:  # argparse formats help with %, and Megatron's has a plain one
        action.help = action.help and re.sub(r"(?<!%)%(?![(%])", "%%", action.help)
    parser.error = _error
    get_value = parser._get_value

    def get_value_or_say(action: argparse.Action, text: str) -> Any:
        try:
            return get_value(action, text)
        except Exception as error:  # whatever a flag's own type makes of a wrong text
            raise UserError(f"{action.option_strings[-1]} {text}: {_expected(action)} is needed") from error

    parser._get_value = get_value_or_say
    return parser


def _error(message: str) -> NoReturn:
    message = message.removeprefix("argument ")
    option = message.partition(":")[0].split("/")[0]
    if value := re.search(r"ignored explicit argument '(.*)'", message):
        raise UserError(_takes_no_value(option, value[1]))
    if "expected" in message:
        raise UserError(f"{option} needs a value, found none; write it after {option}")
    raise UserError(message)


def _expected(action: argparse.Action) -> str:
    if action.choices:
        names = [str(named(choice)) for choice in action.choices]
        return f"one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    needed = {int: "a whole number such as 8", float: "a number such as 1e-5"}
    return needed.get(action.type, "another form (see --help)")


class _Said(argparse.Namespace):
    """What is said and nothing else: argparse gives its default to what a namespace does not have."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _read(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[dict[str, Any], Sources, list[str]]:
    """What was said by destination, where, and as a command line: the recipe's words first, since the last wins."""
    finder = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    finder.error = _error
    finder.add_argument("--config", action="append", default=[])
    recipes = finder.parse_known_args(argv)[0].config
    if len(recipes) > 1:
        raise UserError(f"{' and '.join(f'--config {path}' for path in recipes)} are given, of which one would be read")
    said, sources, words = {}, {}, []
    for where, line in [*(setting for path in recipes for setting in read_settings(path, parser)), ("", argv)]:
        with about(f"{where}: " if where else ""):
            values, unknown = parser.parse_known_args(line, _Said())
            if unknown:
                raise UserError(_unknown(parser, line, unknown[0]))
        said |= vars(values)
        for word in line:
            option = word.partition("=")[0]
            if option in parser._option_string_actions:
                sources[parser._option_string_actions[option].dest] = option, where
        words += line
    return said, sources, words


def _unknown(parser: argparse.ArgumentParser, words: list[str], wrong: str) -> str:
    if re.match(r"-\D", wrong):
        name = wrong.partition("=")[0]
        return f"unknown argument {name}{hint(name, parser._option_string_actions)} (--help lists all flags)"
    for before, after in itertools.pairwise(words):
        action = parser._option_string_actions.get(before)
        if after == wrong and action is not None and action.nargs == 0:
            return _takes_no_value(before, wrong)
    return (
        f"{wrong!r} belongs to no flag; a flag takes one value unless --help says otherwise, and a recipe is given "
        "with --config FILE.yaml"
    )


def _takes_no_value(option: str, found: str) -> str:
    undo = f"{opposite(option)} to undo it"
    return f"{option} is a switch and takes no value, found {found!r}; write {option} alone, or {undo}"


def _fix(args: argparse.Namespace, said: dict[str, Any], sources: Sources, architecture: dict[str, Any]) -> None:
    for dest, value in architecture.items():
        if dest in said and not _same(dest, said[dest], value):
            option = sources[dest][0]
            says = "the opposite" if isinstance(value, bool) else "none" if value is None else shown_value(value)
            raise UserError(
                f"{shown_flag(option, said[dest])} contradicts --hf-model {args.hf_model}, which says {says}; leave "
                f"{option} out"
            )
        setattr(args, dest, value)


def _same(dest: str, found: Any, fixed: Any) -> bool:
    if dest == "moe_layer_freq" and isinstance(found, int):
        found = [int(i % found == 0) for i in range(len(fixed))]
    elif dest == "tokenizer_model":
        found, fixed = os.path.realpath(found), os.path.realpath(fixed)
    elif dest == "mtp_num_layers":
        found = found or None
    return found == fixed


def _default(args: argparse.Namespace, said: dict[str, Any], defaults: dict[str, Any]) -> None:
    for dest in defaults.keys() - said.keys():
        setattr(args, dest, defaults[dest])
