"""Checks the data before anything heavy: the blend, its files, their format, the folder for the cache."""

import argparse
import glob
import json
import math
import os
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from megatron.core.datasets import blended_megatron_dataset_config as splits
from megatron.core.datasets.indexed_dataset import DType

from hymeg.errors import UserError, about
from hymeg.hf.config import HyConfig
from hymeg.progress import Say
from hymeg.training.flag_names import flag

_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
_DEFAULT_SPLITS = ("969, 30, 1", "90, 10, 0", "100, 0, 0")  # Megatron's; less demanding ones for few documents
_MAGIC = b"MMIDIDX\x00\x00"
_NUM_TOKENS_LOOKED_AT = 1 << 20


class Blend(NamedTuple):
    """Data sets to draw from; without weights each row or document once an epoch."""

    paths: list[str]
    weights: list[float] | None


def settle_data(args: argparse.Namespace, config: HyConfig, say: Say) -> None:
    """Check the data of `args`, choose `--split` where it is not given, and turn evaluation off where there is nothing
    to evaluate on. The data sets become `args.text_prefixes`.

    Raises:
        UserError: no source of data or several, a blend that is none, a file that is missing, unreadable, truncated or
            of another vocabulary, a split that leaves some part without a document, a folder that cannot be written.
    """
    if args.full_validation != args.multiple_validation_sets:
        one, other = "--full-validation", "--multiple-validation-sets"
        if args.multiple_validation_sets:
            one, other = other, one
        raise UserError(f"{one} fails in Megatron 0.19 without {other}; add that, or leave {one} out")
    given: dict[str, str] = {}  # source -> the first flag that gives it
    for dest in ("mock_data", "data_path", "data_args_path", *_PER_SPLIT, "per_split_data_args_path"):
        if getattr(args, dest):
            given.setdefault("train_data_path" if dest in _PER_SPLIT else dest, flag(dest))
    if not given:
        raise UserError(
            "no data: give --data-path PREFIX (of tools/preprocess_data.py), or --mock-data to make some up"
        )
    if len(given) > 1:
        raise UserError(f"{' and '.join(given.values())} are given; keep one source of data")
    if args.mock_data:
        return
    [source] = given
    for dest in ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"):
        if getattr(args, dest) and args.data_cache_path is None:
            raise UserError(
                f"{flag(dest)} needs --data-cache-path, a cache that is there; add it, or leave {flag(dest)} out"
            )
    if args.dataloader_fast_cache_load and source in ("data_path", "data_args_path"):
        raise UserError(
            f"--dataloader-fast-cache-load does not go with {flag(source)}; give data by split (--train-data-path)"
        )
    blends = _blends(args, source)
    num_documents = {}
    for label, words in blends.items():
        for prefix in parse_blend(label, words).paths:
            if "://" not in prefix:
                num_documents[prefix] = _check_prefix(f"{label} {prefix}", prefix, config, args.rank)
                check_cache(args, label, os.path.join(prefix, "cache"))
    args.text_prefixes = sorted(num_documents)
    if source in ("train_data_path", "per_split_data_args_path"):
        if args.split is not None:
            raise UserError(f"--split {args.split} cannot be combined with data given for each split; leave it out")
        train, validation = (
            any(words for label, words in blends.items() if label.endswith((f"--{name}-data-path", f", {name}")))
            for name in ("train", "valid")
        )
        if not train:
            raise UserError("--train-data-path is missing: data for validation or test is given, but none to train on")
    else:
        choose_split(args, num_documents, _DEFAULT_SPLITS, "documents", say)
        validation = _split_matrix(args.split)[1] is not None
    if not validation and args.eval_iters > 0:
        say(f"--eval-iters 0 set: {turn_evaluation_off(args)}")


def settle_full_validation(args: argparse.Namespace) -> None:
    """Of text. Megatron draws all validation data in micro-batches of one, and as many batches as a rank has samples:
    other ranks of a tensor or pipeline group would wait for `--micro-batch-size`, and each sample come many times.

    Args:
        args: validated by Megatron.

    Raises:
        UserError: virtual pipeline stages; what Megatron made of --eval-iters for one fails at the next.
    """
    if not args.full_validation:
        return
    if args.virtual_pipeline_model_parallel_size is not None:
        raise UserError(
            "--full-validation fails in Megatron 0.19 with virtual pipeline stages; leave it and "
            "--multiple-validation-sets out, or --num-layers-per-virtual-pipeline-stage (or what else makes them)"
        )
    args.eval_iters *= args.eval_global_batch_size // args.data_parallel_size  # of test data
    args.eval_micro_batch_size, args.eval_global_batch_size = 1, args.data_parallel_size


def turn_evaluation_off(args: argparse.Namespace) -> str:
    """Of no data for validation; why. Raises UserError where the command line asks for it."""
    why = "there is no data for validation"
    if args.split is not None:
        why = f"--split {args.split} leaves no data for validation"
    if "eval_iters" in args.explicit and args.eval_iters > 0:
        raise UserError(f"--eval-iters {args.eval_iters}: {why}; give some, or --eval-iters 0")
    args.eval_iters = 0
    return why


def choose_split(
    args: argparse.Namespace, num_items: dict[str, int], defaults: Sequence[str], what: str, say: Say
) -> list[tuple[float, float] | None]:
    """Set `--split` where it is not given. Returns the part of each data set for training, validation, test, or None.

    Args:
        num_items: of each data set.
        defaults: the split to choose, and what to fall back to where there are too few items.
        what: items are called.

    Raises:
        UserError: a split that is none, or leaves some part without an item: Megatron builds a dataset for every split
            with a weight, and does not return where that holds no document.
    """
    if args.split is None:
        args.split = next(split for split in defaults if _split_without_items(split, num_items) is None)
        if args.split != defaults[0]:
            say(f"--split {args.split} set: too few {what} for {defaults[0]}")
        return _split_matrix(args.split)
    check_split(args.split)
    if (empty := _split_without_items(args.split, num_items)) is not None:
        name, path = empty
        raise UserError(
            f"--split {args.split} leaves none of the {num_items[path]} {what} of {path} for {name}; give that a "
            "larger weight or 0, or leave --split out"
        )
    return _split_matrix(args.split)


def check_split(split: str) -> None:
    """Raises UserError where it is none; Megatron takes the numbers that it finds in it, whatever stands between."""
    words = re.split(r"[,/\s]+", split.strip())
    if len(words) > 3 or not all(re.fullmatch(r"\d+\.?\d*|\.\d+", word) for word in words) or float(words[0]) <= 0:
        raise UserError(
            f"--split {split or repr(split)}: weights for training, validation and test are needed, the first above 0, "
            "such as 969,30,1 or 100,0,0"
        )


def _split_without_items(split: str, num_items: dict[str, int]) -> tuple[str, str] | None:
    """(the split, the data set) that Megatron would give nothing."""
    for prefix, number in num_items.items():
        for name, bounds in zip(("training", "validation", "test"), _split_matrix(split), strict=True):
            if bounds is not None and round(bounds[0] * number) >= round(bounds[1] * number):
                return name, prefix
    return None


def _split_matrix(split: str) -> list[tuple[float, float] | None]:
    return splits.convert_split_vector_to_split_matrix(splits.parse_and_normalize_split(split))


def _blends(args: argparse.Namespace, source: str) -> dict[str, list[str]]:
    """What a blend is called in a message -> its words."""
    if source == "data_args_path":
        return {f"--data-args-path {args.data_args_path}": _read_text(flag(source), args.data_args_path).split()}
    if source == "per_split_data_args_path":
        path = args.per_split_data_args_path
        said, needed = f"{flag(source)} {path}", "an object with the keys train, valid and test is needed"
        try:
            blends = json.loads(_read_text(flag(source), path))
        except ValueError as error:
            raise UserError(f"{said}: not JSON ({error}); {needed}") from None
        if not isinstance(blends, dict) or not {"train", "valid", "test"} <= blends.keys():
            raise UserError(f"{said}: {needed}")
        return {
            f"{said}, {key}": value.split() if isinstance(value, str) else [str(word) for word in value or []]
            for key, value in blends.items()
        }
    dests = ("data_path",) if source == "data_path" else _PER_SPLIT
    return {flag(dest): getattr(args, dest) for dest in dests if getattr(args, dest)}


def _read_text(label: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", "not UTF-8 text")
        raise UserError(f"{label} {path}: {what}; give a readable file") from None


def parse_blend(label: str, words: list[str]) -> Blend:
    """Of 'NAME NAME ...' or 'weight NAME weight NAME ...'. Raises UserError for anything else."""
    weights = [_number(word) for word in words[0::2]]
    if words and len(words) % 2 == 0 and all(weight is not None for weight in weights):
        if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
            raise UserError(
                f"{label}: found the weights {' '.join(words[0::2])}; they must not be negative, nor all zero, and "
                "their sum must be finite"
            )
        return Blend(words[1::2], weights)
    number = next((word for word in words if _number(word) is not None), None)
    if number is not None:
        raise UserError(
            f"{label}: found the weight {number}, but not before each name; write WEIGHT NAME WEIGHT NAME ..., or names"
        )
    return Blend(words, None)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check_prefix(said: str, prefix: str, config: HyConfig, rank: int) -> int:
    """Returns the number of documents."""
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx") and os.path.isfile(prefix):
        raise UserError(f"{said}: give the prefix without {suffix}: {stem}")
    for path in (f"{prefix}.idx", f"{prefix}.bin"):
        if not os.path.isfile(path):
            raise UserError(f"{said}: no file {path}; {_instead(prefix)}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{said}: {path} is not readable by this user; change its permissions (chmod a+r)")
    return _check_files(said, f"{prefix}.idx", f"{prefix}.bin", config, rank)


def _instead(prefix: str) -> str:
    is_folder = os.path.isdir(prefix)
    found = sorted(glob.glob(glob.escape(prefix) + ("/*.idx" if is_folder else "*.idx")))
    if not found:
        return "make it with tools/preprocess_data.py"
    what = f"{prefix} is a folder, and the prefix of two files is needed" if is_folder else "a prefix is needed"
    return f"{what}: {', '.join(path.removesuffix('.idx') for path in found[:3])}?"


def _check_files(said: str, index: str, tokens: str, config: HyConfig, rank: int) -> int:
    """The index against the tokens' file: 9 bytes of magic, version, dtype, numbers of sequences and documents; then
    all lengths (int32), all offsets (int64). Source: megatron/core/datasets/indexed_dataset.py."""
    with open(index, "rb") as file:
        header = file.read(34)
    if len(header) < 34 or not header.startswith(_MAGIC) or header[17] not in {code.value for code in DType}:
        raise UserError(f"{said}: {index} is not an index of Megatron's; make it with tools/preprocess_data.py")
    num_sequences, num_documents = struct.unpack_from("<QQ", header, 18)
    if num_sequences == 0:
        raise UserError(f"{said}: {index} lists no documents; give data with some")
    if rank > 0:
        return num_sequences
    size, needed = os.path.getsize(index), 34 + 12 * num_sequences + 8 * num_documents
    if size < needed:
        raise UserError(f"{said}: {index} is truncated: {size} bytes of at least {needed}; copy or make it again")
    length = int(np.fromfile(index, "<i4", 1, offset=34 + 4 * (num_sequences - 1))[0])
    offset = int(np.fromfile(index, "<i8", 1, offset=34 + 12 * num_sequences - 8)[0])
    dtype = np.dtype(DType.dtype_from_code(header[17]))
    size, needed = os.path.getsize(tokens), offset + length * dtype.itemsize
    if size < needed:
        raise UserError(
            f"{said}: {tokens} is truncated: {size} bytes of the {needed} in the index; copy or make it again"
        )
    largest = np.fromfile(tokens, dtype, _NUM_TOKENS_LOOKED_AT).max(initial=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"{said}: {tokens} holds token {largest}, outside the model's vocabulary of {config.vocab_size}; tokenize "
            "it again with this model's tokenizer (tools/preprocess_data.py)"
        )
    return num_sequences


def check_cache(args: argparse.Namespace, label: str, beside: str) -> None:
    """Raise a UserError unless the folder for what is made of the data can be written: `--data-cache-path`, or else
    one `beside` them, for Megatron's indices of text a folder in one named like the prefix.
    """
    if args.data_cache_path is not None:
        check_writable("--data-cache-path", args.data_cache_path)
        return
    with about("", "; or give --data-cache-path, a folder that all nodes share, for the index of the data"):
        check_writable(label, beside)


def check_writable(label: str, folder: str) -> str:
    """What is there of `folder`. Raises UserError unless it is, or can be made, one that this user may write to."""
    parent = os.path.abspath(folder)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    said = f"{label} {folder}: {parent} is"
    if not os.path.isdir(parent):
        raise UserError(f"{said} a file; give a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{said} not writable by this user; give another folder, or change its permissions")
    return parent
