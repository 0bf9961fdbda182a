"""Training of a part of the model (`--freeze`, `--train-only`): which parameters, by their Hugging Face names."""

import argparse
import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Iterable

from hymeg.checkpoint.adapter_table import adapter_modules
from hymeg.checkpoint.mapping import VOCABULARY_KEYS, Entry, hf_entries, is_mtp
from hymeg.errors import UserError
from hymeg.files import shown
from hymeg.hf.config import HyConfig
from hymeg.progress import Say
from hymeg.training.flag_names import flag


def check_freezing(args: argparse.Namespace, config: HyConfig, say: Say) -> None:
    """Say what is trained, where that is not everything. Raises UserError: as `trained_keys`; that is nothing."""
    if args.freeze is None and args.train_only is None:
        return
    trained = trained_keys(args, config)
    sizes = {entry.dist_key: math.prod(entry.dist_shape) for entry in _parameters(config)}
    of_trained, total = sum(sizes[key] for key in trained), sum(sizes.values())
    if not trained:
        patterns = args.train_only or args.freeze
        option = flag("train_only" if args.train_only else "freeze")
        frozen = "; --mtp-loss-scaling-factor 0 freezes the MTP layers" if args.mtp_loss_scaling_factor == 0 else ""
        raise UserError(f"{option} {' '.join(patterns)}: nothing is left to train{frozen}; give other patterns")
    say(f"training {of_trained:,} of {total:,} parameters ({of_trained / total:.2%}); the others are frozen")


def trained_keys(args: argparse.Namespace, config: HyConfig) -> set[str]:
    """The distributed tensors that `--freeze`, `--train-only` and `--mtp-loss-scaling-factor` leave to be trained.

    Raises:
        UserError: both flags are given; a pattern means no parameter, or only one of several that are one tensor.
    """
    if args.freeze is not None and args.train_only is not None:
        raise UserError("--freeze and --train-only are both given; keep one")
    keys = {entry.dist_key for entry in _parameters(config)}
    if args.freeze is not None:
        keys -= _meant(config, "--freeze", args.freeze)
    elif args.train_only is not None:
        keys = _meant(config, "--train-only", args.train_only)
    return {key for key in keys if args.mtp_loss_scaling_factor != 0 or not is_mtp(config, key)}


def trained_in_full(args: argparse.Namespace, config: HyConfig) -> dict[str, str]:
    """`--train-also`: published name of each parameter that is trained beside the adapters, by distributed tensor.

    Raises:
        UserError: a pattern as for `trained_keys`; what has an adapter, or shares a tensor with others, or a
            vocabulary that is padded in training.
    """
    if args.train_also is None:
        return {}
    found, modules = {}, {module.path for module in adapter_modules(config, args.lora_targets)}
    meant, option = _meant(config, "--train-also", args.train_also), f"--train-also {' '.join(args.train_also)}"
    for entry in _parameters(config):
        name, key = entry.hf_name, entry.dist_key
        if key not in meant or (args.mtp_loss_scaling_factor == 0 and is_mtp(config, key)):
            continue
        if entry.hf_shape != entry.dist_shape:
            raise UserError(f"{option}: {name} is a part of a tensor in training; give it an adapter (--lora-targets)")
        if name.removesuffix(".weight") in modules:
            raise UserError(f"{option}: {name} has an adapter already; name it here or in --lora-targets")
        unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        if key in VOCABULARY_KEYS and config.vocab_size % unit:
            raise UserError(
                f"{option}: {name} would be padded, and saved so, from {config.vocab_size} rows to a multiple of "
                f"{unit}; lower --make-vocab-size-divisible-by"
            )
        found[key] = name
    return found


def _parameters(config: HyConfig) -> list[Entry]:
    return [entry for entry in hf_entries(config, "hub") if not entry.is_fp32_buffer]


def _meant(config: HyConfig, option: str, patterns: Collection[str]) -> set[str]:
    names: dict[str, list[str]] = {}
    for entry in _parameters(config):
        names.setdefault(entry.dist_key, []).append(entry.hf_name)
    meant = set().union(*(_names_meant(config, option, pattern) for pattern in patterns))
    for of_key in names.values():
        inside = [name for name in of_key if name in meant]
        if inside and len(inside) < len(of_key):
            outside = next(name for name in of_key if name not in meant)
            raise UserError(
                f"{option} {' '.join(patterns)}: means {inside[0]} and not {outside}, which are one tensor in "
                "training; name both or neither"
            )
    return {key for key, of_key in names.items() if of_key[0] in meant}


def _names_meant(config: HyConfig, option: str, pattern: str) -> list[str]:
    entries = hf_entries(config, "hub")
    found = [entry for entry in entries if fnmatch.fnmatchcase(entry.hf_name, pattern)]
    if meant := [entry.hf_name for entry in found if not entry.is_fp32_buffer]:
        return meant
    if found:
        raise UserError(
            f"{option} {pattern}: means {found[0].hf_name}, which is no parameter: --moe-router-bias-update-rate 0 "
            "(the default) keeps it as it is"
        )
    near = _near(pattern, [entry.hf_name for entry in entries if not entry.is_fp32_buffer])
    raise UserError(
        f"{option} {shown(pattern)}: means no parameter; patterns are of whole published names, * and ? as in a shell, "
        f"such as {' or '.join(map(repr, near))}"
    )


def _near(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three patterns that do mean something: layers and experts as *."""
    general = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    wanted = re.sub(r"\.\d+\.", ".*.", pattern)
    holding = [name for name in general if wanted.strip("*.^$") and wanted.strip("*.^$") in name]
    return (holding or difflib.get_close_matches(wanted, general, 3, 0.3) or general)[:3]
