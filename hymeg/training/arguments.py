"""From the command line to Megatron's args: one schema of settings, every source of a value known.

A value comes from, weakest first: Megatron's default, hymeg's default, the YAML recipe, the command line. What config.json (`--hf-model`) and the
platform fix may be repeated but not contradicted.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron.training.arguments import add_megatron_arguments, parse_args

from hymeg import platform
from hymeg.errors import UserError, nearest
from hymeg.hf.config import HyConfig
from hymeg.models.flags import architecture_flags, default_flags
from hymeg.platform import flags as cpu_flags
from hymeg.training.yaml_file import read_as_flags

_DEFAULTS = {
    "micro_batch_size": 1,
    "log_throughput": True,
    # Megatron's INFO lists every parameter of every gradient bucket.
    "logging_level": logging.WARNING,
    "enable_one_logger": False,
    "eval_interval": 1000,
    "split": "969, 30, 1",
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    # Attention kernels know the causal mask; a dense one costs seq_length^2 bytes a sample.
    "create_attention_mask_in_dataloader": False,
    # The optimizer's state can then be resumed in any layout.
    "dist_ckpt_optim_fully_reshardable": True,
}
"""Where hymeg's default differs from Megatron's."""


def add_hymeg_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("hymeg")
    group.add_argument("--config", metavar="FILE.yaml", help="recipe: Megatron's flags as keys of a flat YAML file; the command line wins over it")
    group.add_argument("--hf-model", metavar="DIR", help="folder with config.json and tokenizer: sets the architecture and the tokenizer")
    group.add_argument("--init-from-scratch", action="store_true", help="start from random weights where --load holds no checkpoint")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, HyConfig]:
    """Parse `argv` (without the program's name) into Megatron's args, not validated yet, and the model's configuration.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, a flag that contradicts config.json, or one that the CPU cannot serve.
    """
    reference = _parser()
    argv = list(argv)
    recipe = _value_of(argv, "--config")
    words = (read_as_flags(recipe, reference) if recipe else []) + argv
    explicit = _explicit(reference, words)
    with _program_arguments(words):
        args = parse_args(_one_line_errors)
    if args.yaml_cfg is not None:
        raise UserError("--yaml-cfg is not supported; give a recipe with --config FILE.yaml, whose keys are the flags themselves")
    if args.hf_model is None:
        raise UserError("--hf-model is missing: give the folder that holds config.json and the tokenizer; it sets the architecture")
    config = HyConfig.from_dir(args.hf_model)
    names = {action.dest: action.option_strings[-1] for action in reference._actions if action.option_strings}

    fixed = architecture_flags(config) | {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": args.hf_model}
    _fix(args, explicit, fixed, names, lambda flag: f"config.json in --hf-model {args.hf_model} fixes it; leave {flag} out")
    _default(args, explicit, _DEFAULTS | default_flags(config))
    if platform.is_cpu():
        _fix(args, explicit, cpu_flags.REQUIRED, names, lambda flag: f"the CPU needs that; leave {flag} out or run on a GPU")
        _refuse_on_cpu(args, names)
    args.explicit = frozenset(explicit)
    return args, config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return _one_line_errors(add_megatron_arguments(parser))


def _one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add_hymeg_arguments(parser)

    def error(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = unknown.split()[0]
            hint = nearest(word.split("=")[0], parser._option_string_actions)
            raise UserError(f"unknown argument {word}{hint} --help lists all flags" if hint else f"unknown argument {word}; --help lists all flags")
        raise UserError(message.removeprefix("argument "))

    parser.error = error
    return parser


def _value_of(argv: list[str], flag: str) -> str | None:
    """The value of `flag` on the command line, before the whole is parsed."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)

    def error(message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    parser.error = error
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(argv)[0].value


def _explicit(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """What recipe and command line say, by destination: parsing with every default suppressed leaves nothing else."""
    defaults = {id(action): action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        return vars(parser.parse_args(words))
    finally:
        for action in parser._actions:
            action.default = defaults[id(action)]


@contextlib.contextmanager
def _program_arguments(words: list[str]):
    """Megatron's parse_args reads sys.argv."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def _fix(args, explicit, fixed, names, remedy) -> None:
    for dest, value in fixed.items():
        flag = names.get(dest, dest)
        if dest in explicit and not _same(dest, explicit[dest], value):
            raise UserError(f"{flag} {_shown(explicit[dest])} contradicts {_shown(value)}: {remedy(flag)}")
        setattr(args, dest, value)


def _same(dest: str, found: Any, fixed: Any) -> bool:
    if dest == "moe_layer_freq" and isinstance(found, int):
        found = [int(i % found == 0) for i in range(len(fixed))]
    if dest == "tokenizer_model":
        return os.path.realpath(found) == os.path.realpath(fixed)
    if dest == "mtp_num_layers":
        return (found or None) == fixed
    return found == fixed


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _default(args, explicit, defaults) -> None:
    for dest, value in defaults.items():
        if dest not in explicit:
            setattr(args, dest, value)


def _refuse_on_cpu(args, names) -> None:
    for dest, (allowed, why) in cpu_flags.REFUSED.items():
        if getattr(args, dest) != allowed:
            raise UserError(f"{names[dest]} cannot work on CPU: {why}; leave it out (HYMEG_PLATFORM or the lack of a GPU chose the CPU)")
    for (dest, value), why in cpu_flags.REFUSED_VALUES.items():
        found = getattr(args, dest)
        if getattr(found, "name", found) == value:
            raise UserError(f"{names[dest]} {value} cannot work on CPU: {why}")
