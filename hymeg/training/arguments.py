"""From the command line to Megatron's args: one schema of settings, every source of a value known.

A value comes from, weakest first: Megatron's default, hymeg's default, the YAML recipe, the command line. What
config.json (`--hf-model`) and the platform fix may be repeated but not contradicted.
"""

import argparse
import contextlib
import enum
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron.training.arguments import add_megatron_arguments, parse_args

from hymeg.checkpoint.adapter_settings import SCALINGS
from hymeg.data.packing import TRUNCATIONS
from hymeg.errors import UserError
from hymeg.flag_table import ALWAYS, ON_CPU, TABLE, WITH_FROZEN, WITH_LORA, WITH_SFT, WITHOUT, Row, cpu_values
from hymeg.hf.config import HyConfig
from hymeg.hf.hub import is_hub_id, local_folder
from hymeg.models.flags import architecture_flags, default_flags
from hymeg.platform import device
from hymeg.platform import flags as platform_flags
from hymeg.training.flag_names import add_opposites, hint, opposite
from hymeg.training.yaml_file import read_settings

_DEFAULTS = {
    "micro_batch_size": 1,
    "log_throughput": True,
    # Megatron's INFO lists every parameter of every gradient bucket.
    "logging_level": logging.WARNING,
    "enable_one_logger": False,
    "eval_interval": 1000,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    # Attention kernels know the causal mask; a dense one costs seq_length^2 bytes a sample.
    "create_attention_mask_in_dataloader": False,
    # A mean over micro-batches or ranks, each with its own number of trained tokens, would make the loss depend on the
    # layout.
    "calculate_per_token_loss": True,
    # The optimizer's state can then be resumed in any layout. By default every rank would gather, over NCCL and in its
    # GPU's memory, the state of all ranks that hold the same parameters; so only the first of them does, over gloo.
    "dist_ckpt_optim_fully_reshardable": True,
    "distrib_optim_fully_reshardable_mem_efficient": True,
    # Transformer Engine refuses to load the state of Megatron's default, delayed.
    "fp8_recipe": "blockwise",
}
"""Where hymeg's default differs from Megatron's."""

LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("shared_mlp.gate_proj", "shared_mlp.up_proj", "shared_mlp.down_proj"),
)
"""What every token goes through. The routed experts, an adapter each, are many parameters."""

Sources = dict[str, tuple[str, str]]
"""Destination -> the option as it was typed, and "FILE, line N" or, for the command line, ""."""


def add_hymeg_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("hymeg")
    group.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="recipe: these flags as keys of a flat YAML file; the command line wins, and undoes a switch with "
        "--no-SWITCH",
    )
    group.add_argument(
        "--hf-model",
        metavar="DIR",
        help="folder with config.json and tokenizer: sets the architecture and the tokenizer",
    )
    group.add_argument(
        "--init-from-scratch", action="store_true", help="start from random weights where --load holds no checkpoint"
    )
    group.add_argument(
        "--save-hf",
        metavar="DIR",
        help="write the model as a Hugging Face folder, DIR/iter_0000100, after the last iteration, from rank 0",
    )
    group.add_argument("--save-hf-interval", type=int, metavar="N", help="--save-hf: and after every N iterations")
    group.add_argument(
        "--fall-back-to-older-checkpoint",
        action="store_true",
        help="verify what --load names before it is loaded, and where it is damaged or not complete take the newest "
        "older iteration that is neither",
    )
    group.add_argument(
        "--valid-translations",
        metavar="FILE.jsonl",
        help="held-out rows that the model answers at every evaluation; its texts are judged (chrF, BLEU, alarms)",
    )
    group.add_argument(
        "--valid-generate",
        type=int,
        default=64,
        metavar="N",
        help="--valid-translations: how many of its rows, spread evenly over it (default: 64)",
    )
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="K",
        help="--save: remove older checkpoints once a newer one is complete, but for the newest K, every multiple of "
        "--save-retain-interval, and the one that was loaded",
    )
    group.add_argument(
        "--recompute-logits",
        dest="hy_recompute_logits",
        action="store_true",
        help="compute the logits a second time in the backward pass: saves 2 bytes a token and vocabulary entry, costs "
        "a third more time in the head",
    )
    group.add_argument(
        "--train-epochs",
        type=int,
        metavar="N",
        help="--sft: in place of --train-iters, as many as N passes over the training data take",
    )
    group.add_argument(
        "--no-sft-packing", dest="sft_packing", action="store_false", help="--sft: one conversation a sequence, padded"
    )
    group.add_argument(
        "--sft-truncation",
        choices=TRUNCATIONS,
        default="error",
        help="--sft: what to do with conversations longer than --seq-length: stop, cut their beginning or their end, "
        "leave them out",
    )
    group.add_argument(
        "--sft-bad-rows",
        choices=("stop", "skip"),
        default="stop",
        help="--sft: what to do with rows that cannot be trained on: stop at the first, or count and leave them out",
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        metavar="PATTERN",
        help="keep the parameters of these published names as they are, * and ? as in a shell: '*.experts.*' "
        "'model.layers.0.*'",
    )
    group.add_argument("--train-only", nargs="+", metavar="PATTERN", help="keep all the others as they are")
    group.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="train adapters (LoRA) of this rank beside the frozen weights; a save then holds these only",
    )
    group.add_argument(
        "--lora-alpha", type=float, metavar="A", help="their weight: A / R (twice the rank where nothing is said)"
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        default=list(LORA_TARGETS),
        help="what has an adapter, by Hugging Face names: q_proj, mlp.gate_proj (dense layers), shared_mlp.gate_proj, "
        "experts.gate_proj, gate_proj for all three, mtp.q_proj; by default all that every token goes through, that "
        "is all but the routed experts",
    )
    group.add_argument(
        "--train-also",
        nargs="+",
        metavar="PATTERN",
        help="--lora-rank: train these parameters in full beside the adapters, by patterns as of --train-only: norms, "
        "routers, lm_head.weight (peft's modules_to_save)",
    )
    group.add_argument(
        "--lora-dropout", type=float, default=0.0, metavar="P", help="dropout of what goes into the adapters"
    )
    group.add_argument(
        "--lora-scaling",
        choices=SCALINGS,
        default="lora",
        help="lora: alpha / rank; rslora: alpha / sqrt(rank), for high ranks",
    )
    add_opposites(parser)
    return parser


def _fetch(args: argparse.Namespace) -> None:
    """Put the cache's folders in place of ids of the Hugging Face hub."""
    for dest, weights in (("hf_model", False), ("load", True), ("pretrained_checkpoint", True)):
        given = getattr(args, dest)
        if given is not None and given != args.save:
            flag = f"--{dest.replace('_', '-')}"
            setattr(args, dest, str(local_folder(given, weights, flag)) if is_hub_id(given) else given)


def parse(argv: Sequence[str], is_whole: bool = True) -> tuple[argparse.Namespace, HyConfig]:
    """Parse `argv` (without the program's name) into Megatron's args, not validated yet, and the model's configuration.

    The args have further attributes: `explicit`, what recipe and command line have set (`Sources`); `said`, its values
    by the option as it was typed, without dashes, True for every switch; `sft_rows`, whether `--sft` was given;
    `packed`, whether samples are packed conversations.

    Args:
        is_whole: a flag that has no effect without another is refused; a plan's command line is completed later.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, a flag that contradicts config.json, or one that
            cannot work here.
    """
    parser = _parser()
    defaults = {action.dest: action.default for action in parser._actions if action.default is not argparse.SUPPRESS}
    for action in parser._actions:
        # What parsing finds is then what was said, and nothing else.
        action.default = argparse.SUPPRESS
    said, sources, words = _read(parser, list(argv))
    defaults |= _DEFAULTS
    cases = {ALWAYS}
    if platform_flags.judged_for_cpu():
        cases.add(ON_CPU)
    if said.get("sft"):
        cases.add(WITH_SFT)
    if said.get("lora_rank") is not None:
        cases.add(WITH_LORA)
    if said.keys() & {"freeze", "train_only"}:
        cases.add(WITH_FROZEN)
    with naming_lines(sources):
        _refuse(parser, said, sources, defaults, {}, [row for row in TABLE if row.when in cases])
        with _program_arguments(words):
            try:
                args = parse_args(add_hymeg_arguments)
            except RuntimeError as error:
                raise UserError(str(error)) from error
        if args.hf_model is None:
            raise UserError(
                "--hf-model is missing: give the folder that holds config.json and the tokenizer; it sets the "
                "architecture"
            )
        _fetch(args)
        try:
            config = HyConfig.from_dir(args.hf_model)
        except UserError as error:
            raise UserError(f"--hf-model {error}") from error
        architecture = architecture_flags(config) | {
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": args.hf_model,
        }
        _fix(args, said, sources, architecture)
        _default(args, said, _DEFAULTS | default_flags(config))
        if not platform_flags.judged_for_cpu() and not device.has_block_scaled_fp8():
            _default(args, said, {"fp8_recipe": "tensorwise"})
        if is_whole:
            _refuse(parser, said, sources, defaults, vars(args), [row for row in TABLE if row.when == WITHOUT])
        if platform_flags.judged_for_cpu():
            _default(args, said, cpu_values())
    args.explicit = sources
    args.said = {
        sources[dest][0].lstrip("-"): True if isinstance(value, bool) else value for dest, value in said.items()
    }
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
        flags = dict.fromkeys(flag for flag in re.findall(r"(?<!\S)--\w[\w-]*", str(error)) if flag in lines)
        if not flags:
            raise
        raise UserError(f"{error} ({'; '.join(f'{flag}: {lines[flag]}' for flag in flags)})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain_hy.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_hymeg_arguments(add_megatron_arguments(parser))
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
    flag = message.partition(":")[0].split("/")[0]
    if value := re.search(r"ignored explicit argument '(.*)'", message):
        raise UserError(_takes_no_value(flag, value[1]))
    if "expected" in message:
        raise UserError(f"{flag} needs a value, found none; write it after {flag}")
    raise UserError(message)


def _expected(action: argparse.Action) -> str:
    if action.choices:
        names = [choice.name if isinstance(choice, enum.Enum) else str(choice) for choice in action.choices]
        return f"one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    return {int: "a whole number such as 8", float: "a number such as 1e-5"}.get(
        action.type, "another form (see --help)"
    )


def _read(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[dict[str, Any], Sources, list[str]]:
    """What was said by destination, where, and all of it in the words of a command line: the recipe's first, since the
    last one wins.
    """
    finder = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    finder.error = _error
    finder.add_argument("--config")
    recipe = finder.parse_known_args(argv)[0].config
    said, sources, words = {}, {}, []
    for where, line in [*(read_settings(recipe, parser) if recipe is not None else []), ("", argv)]:
        try:
            values, unknown = parser.parse_known_args(line)
            if unknown:
                raise UserError(_unknown(parser, line, unknown[0]))
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
        said |= vars(values)
        typed = [word.partition("=")[0] for word in line]
        sources |= {
            parser._option_string_actions[word].dest: (word, where)
            for word in typed
            if word in parser._option_string_actions
        }
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
    return (
        f"{option} is a switch and takes no value, found {found!r}; write {option} alone, or {opposite(option)} to "
        "undo it"
    )


@contextlib.contextmanager
def _program_arguments(words: list[str]) -> Iterator[None]:
    """Megatron's parse_args reads sys.argv."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def _refuse(
    parser: argparse.ArgumentParser,
    said: dict[str, Any],
    sources: Sources,
    defaults: Mapping[str, Any],
    args: Mapping[str, Any],
    rows: Iterable[Row],
) -> None:
    """Refuse what was said where one of `rows` does. `args` are what all flags have become, for rows that ask for
    another flag.
    """
    for dest, value in said.items():
        option = sources[dest][0]
        for row in rows:
            if not row.names(dest) or (refused := row.refused(_names(value), _names(defaults.get(dest)))) is None:
                continue
            instead = row.instead or f"leave {option} out"
            if row.when == WITHOUT:
                if any(_is_set(args, need) for need in row.needs.split()):
                    continue
                reason, instead = f"{WITHOUT} {_needed(parser, row.needs)}", f"add that, or {instead}"
            elif row.when == ON_CPU:
                where = (
                    "HYMEG_PLATFORM=cpu chose it" if os.environ.get("HYMEG_PLATFORM") == "cpu" else "torch sees no GPU"
                )
                reason = f"{ON_CPU} ({where}): {row.why}"
            else:
                reason = f"{row.when}: {row.why}"
            raise UserError(f"{_shown(option, refused)} {reason}; {instead}")


def _is_set(args: Mapping[str, Any], need: str) -> bool:
    """Whether `args` are such that one word of `Row.needs` holds."""
    dest, sign, wanted = re.fullmatch(r"(\w+)([=>]?)(.*)", need).groups()
    found = _names(args[dest])
    if sign == ">":
        return found > int(wanted)
    if sign == "=":
        return not set(found if isinstance(found, list) else [found]).isdisjoint(wanted.split(","))
    return bool(found)


def _needed(parser: argparse.ArgumentParser, needs: str) -> str:
    """The flags of `Row.needs`, for a message."""
    flags = []
    for need in needs.split():
        dest, sign, wanted = re.fullmatch(r"(\w+)([=>]?)(.*)", need).groups()
        option = next(action.option_strings[-1] for action in parser._actions if action.dest == dest)
        above = {"": "", "=": f" {wanted.split(',')[0]}", ">": f" above {wanted}"}[sign]
        flags.append(f"{option}{above}")
    return " or ".join(flags)


def _fix(args: argparse.Namespace, said: dict[str, Any], sources: Sources, architecture: dict[str, Any]) -> None:
    for dest, value in architecture.items():
        if dest in said and not _same(dest, said[dest], value):
            option = sources[dest][0]
            says = "the opposite" if isinstance(value, bool) else "none" if value is None else shown_value(value)
            raise UserError(
                f"{_shown(option, said[dest])} contradicts --hf-model {args.hf_model}, which says {says}; leave "
                f"{option} out"
            )
        setattr(args, dest, value)


def _same(dest: str, found: Any, fixed: Any) -> bool:
    if dest == "moe_layer_freq" and isinstance(found, int):
        found = [int(i % found == 0) for i in range(len(fixed))]
    if dest == "tokenizer_model":
        return os.path.realpath(found) == os.path.realpath(fixed)
    if dest == "mtp_num_layers":
        return (found or None) == fixed
    return found == fixed


def _default(args: argparse.Namespace, said: dict[str, Any], defaults: dict[str, Any]) -> None:
    for dest, value in defaults.items():
        if dest not in said and getattr(args, dest) != value:
            setattr(args, dest, value)


def _names(value: Any) -> Any:
    """`value`, an enum's members by their names."""
    if isinstance(value, list | tuple):
        return [_names(item) for item in value]
    return value.name if isinstance(value, enum.Enum) else value


def _shown(option: str, value: Any) -> str:
    """The flag as the user gave it."""
    if isinstance(value, bool):
        return option
    return f"{option} {shown_value(value)}"


def shown_value(value: Any) -> str:
    """A flag's value as a user would type it, cut where it is long."""
    names = _names(value)
    text = " ".join(map(str, names)) if isinstance(names, list) else str(names)
    return text if len(text) <= 40 else text[:37] + "..."
