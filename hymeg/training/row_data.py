"""`--sft`: from the flags to the samples of conversations and translations."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from hymeg.data.conversations import ConversationDataset, Sequences, Shape
from hymeg.data.index_building import RowEncoder, build_missing, told_bad_rows
from hymeg.data.row_index import RowIndex, index_folder, is_built
from hymeg.data.text_files import check_given_once, check_row_file
from hymeg.errors import UserError, about
from hymeg.hf.config import HyConfig
from hymeg.progress import Say
from hymeg.training.data_paths import Blend, check_cache, check_split, choose_split, parse_blend, turn_evaluation_off
from hymeg.training.flag_names import flag
from hymeg.training.once import once_per_node

_SPLITS = ("training", "validation", "test")
_DEFAULT_SPLITS = ("97, 3, 0", "90, 10, 0", "100, 0, 0")


def settle_rows(args: argparse.Namespace) -> None:
    """Check the flags of `--sft` and that its files are there; put `--data-path` and `--split` in Megatron's terms.

    Raises:
        UserError: a flag that contradicts it or would be ignored, no data, a file that is missing, empty, unreadable or
            of an unknown kind, a cache that cannot be written.
    """
    for dest in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, dest)
        if args.packed and size not in (1, None):
            raise UserError(
                f"{flag(dest)} {size}: packed conversations need 1; for more tokens at once raise --seq-length, or "
                "give --no-sft-packing"
            )
    if args.data_path and args.train_data_path:
        raise UserError("--data-path and --train-data-path are both given; keep one")
    if args.split is not None and (args.valid_data_path or args.test_data_path):
        raise UserError(f"--split {args.split} cannot be combined with files for validation or test; leave it out")
    # In Megatron's terms, who gives files for validation gives them for each split; where nothing is said it would
    # choose a split, with a warning.
    if args.valid_data_path or args.test_data_path:
        args.data_path, args.train_data_path = None, args.train_data_path or args.data_path
    else:
        args.split = _DEFAULT_SPLITS[0] if args.split is None else args.split
        check_split(args.split)
    blends = row_blends(args)
    if blends[0] is None:
        raise UserError("no data: give --data-path FILE.jsonl with conversations or translations, one a line")
    if args.train_epochs is not None and blends[0].weights is not None:
        raise UserError(
            f"--train-epochs {args.train_epochs}: {flag(_flags(args)[0])} gives weights, under which each file has "
            "epochs of its own; leave the weights out, or give --train-iters"
        )
    for label, blend in zip(map(flag, _flags(args)), blends, strict=True):
        paths = blend.paths if blend else []
        for path in paths:
            with about(f"{label} "):
                check_row_file(path)
            check_cache(args, label, f"{path}.cache")
        check_given_once(label, paths)


class RowData:
    """The sequences of a run: rows tokenised, cut and packed. Every rank makes one, each node its files once.

    Args:
        args: checked. How evaluation goes over the data is set here where the command line left it open.
        say: told what became of the rows.

    Raises:
        UserError: a file or a row is wrong, a conversation is too long, a split is empty.
    """

    def __init__(self, args: argparse.Namespace, config: HyConfig, say: Say):
        alignment = 2 * args.context_parallel_size if args.packed and args.context_parallel_size > 1 else 1
        self.shape = Shape(args.seq_length, alignment, args.packed, args.sft_truncation, config.pad_token_id or 0)
        blends = row_blends(args)
        indices = _indices(args, config, dict.fromkeys(path for blend in blends if blend for path in blend.paths))
        for path, index in indices.items():
            for line in told_bad_rows(index.bad_rows, len(index)):
                say(f"{path}: {line}")
            if index.num_without_weight:
                say(f"{path}: {index.num_without_weight:,} rows are left out, whose weight is 0 in every turn")
        # Iterations of --train-epochs are counted in it.
        self.batches = {} if args.train_epochs is None else {"global_batch_size": args.global_batch_size}
        self.weights = [(blend or blends[0]).weights for blend in blends]
        split = _split(args, {path: len(index) for path, index in indices.items()}, blends, say)

        def sequences(index: RowIndex, part: tuple[float, float]) -> Sequences:
            first, end = (round(bound * len(index)) for bound in part)
            return Sequences(index, (first, end), self.shape, args.seed)

        self.sources = [
            [sequences(indices[path], part) for path in (blend or blends[0]).paths] if part else []
            for blend, part in zip(blends, split, strict=True)
        ]
        everything = [source for sources in self.sources for source in sources]
        once_per_node(
            "sequences",
            lambda: all(source.is_made for source in everything),
            lambda: [source.packs for source in everything],
        )
        for name, sources in zip(_SPLITS, self.sources, strict=True):
            for source in sources:
                say(f"{name} data {described(source)}")
        trained = {source.index.digest for source in self.sources[0]}
        for label, sources in (("--valid-data-path", self.sources[1]), ("--test-data-path", self.sources[2])):
            for source in sources if any(blends[1:]) else ():
                if source.index.digest in trained:
                    say(f"{label} {source.index.path} is trained on too: its loss says nothing about new data")
        set_evaluation(args, self.sources[1], say)
        if self.sources[2] and not self.sources[1]:
            say("the test data are not used, since there are no data for validation: give some of these too")

    @property
    def num_training_sequences(self) -> int:
        """Of an epoch, where no weights are given."""
        return sum(map(len, self.sources[0]))

    def record(self) -> dict[str, list]:
        """What decides the order of the samples (hymeg.training.data_record)."""
        train = self.sources[0]
        return self.batches | {
            "sft": True,
            "train_data": [
                [os.path.basename(source.index.path), source.index.digest, int(source.index.starts[-1]), *source.rows]
                for source in train
            ],
            "weights": self.weights[0],
            "sft_samples": [*self.shape, train[0].seed],
        }

    def datasets(self, args: argparse.Namespace, num_samples: tuple[int, int | None, int]) -> tuple:
        """What Megatron's loop is given for training, validation (a list of several) and test; None without rows. Where
        the command line does not say how much to evaluate on, `args.test_iters` become those of all test data.
        """
        from megatron.core.datasets.utils import Split

        train, valid, test = self.sources
        if args.eval_iters == 0 and not args.full_validation:  # of no samples Megatron makes no loader: it asserts
            valid = test = []
        batch, is_asked = args.eval_global_batch_size, "eval_iters" in args.explicit
        if args.full_validation:
            validation = [ConversationDataset([source], None, Split.valid, multiple_of=batch) for source in valid]
        else:
            weights = self.weights[1] if is_asked else None
            validation = valid and ConversationDataset(valid, num_samples[1], Split.valid, None, weights, batch)
        tested = None
        if test:
            weights, size = (self.weights[2], num_samples[2]) if is_asked else (None, None)
            tested = ConversationDataset(test, size, Split.test, None, weights, batch)
            args.test_iters = len(tested) // batch
        return (
            ConversationDataset(train, num_samples[0], Split.train, args.seed, self.weights[0]),
            validation or None,
            tested,
        )


def described(sequences: Sequences) -> str:
    """What became of the good rows of a file, on one line."""
    counts, num_positions = sequences.counts, len(sequences.packs) * sequences.shape.seq_length
    lost = f", {counts.truncated:,} truncated" if counts.truncated else ""
    lost += f", {counts.dropped:,} dropped" if counts.dropped else ""
    return (
        f"{sequences.index.path}: {counts.rows:,} rows{lost}, {counts.tokens:,} tokens in {len(sequences.packs):,} "
        f"sequences of {sequences.shape.seq_length:,}, {counts.tokens / num_positions:.1%} full"
    )


def set_evaluation(args: argparse.Namespace, sources: list[Sequences], say: Say) -> None:
    """Where the command line does not say how much to evaluate on: on everything, each data set with its loss."""
    if not sources:
        turn_evaluation_off(args)
        return
    if "eval_iters" in args.explicit:
        return
    if len(sources) == 1 or args.virtual_pipeline_model_parallel_size is not None:
        args.eval_iters = -(-sum(len(source.packs) for source in sources) // args.eval_global_batch_size)
        say(
            f"--eval-iters {args.eval_iters} set: all validation data, every --eval-interval {args.eval_interval} "
            "iterations"
        )
        return
    # Megatron's own way to several losses. It draws one sample after the other, in micro-batches of one.
    args.full_validation = args.multiple_validation_sets = True
    args.eval_micro_batch_size, args.eval_global_batch_size = 1, args.data_parallel_size
    args.validation_set_names = [f"{number}-{Path(source.index.path).stem}" for number, source in enumerate(sources)]


def row_blends(args: argparse.Namespace) -> list[Blend | None]:
    """The files of training, validation and test; None where the first one's are split, or there is none."""
    per_split = [args.train_data_path or args.data_path, args.valid_data_path, args.test_data_path]
    labels = map(flag, _flags(args))
    return [parse_blend(label, words) if words else None for label, words in zip(labels, per_split, strict=True)]


def _flags(args: argparse.Namespace) -> tuple[str, ...]:
    return "train_data_path" if "train_data_path" in args.explicit else "data_path", "valid_data_path", "test_data_path"


def _indices(args: argparse.Namespace, config: HyConfig, paths: Iterable[str]) -> dict[str, RowIndex]:
    settings = (args.hf_model, config.vocab_size, args.sft_bad_rows == "skip")
    fingerprint = RowEncoder(*settings).fingerprint
    folders = {path: index_folder(path, args.data_cache_path, fingerprint) for path in paths}
    once_per_node(
        "indices of the rows",
        lambda: all(is_built(folder, path) for path, folder in folders.items()),
        lambda: build_missing(folders, settings, sys.stdout),
    )
    indices = {path: RowIndex(folder, path) for path, folder in folders.items()}
    if args.sft_bad_rows == "stop":  # the index of a run that skips them, or of tools/inspect_data.py
        for index in indices.values():
            for bad_rows in index.bad_rows[:1]:
                raise UserError(f"{bad_rows.first} (--sft-bad-rows skip leaves such rows out)")
    return indices


def _split(args: argparse.Namespace, num_rows: dict[str, int], blends: list[Blend | None], say: Say) -> list:
    """Which part of its rows each of training, validation and test takes, as Megatron cuts documents: contiguous."""
    if any(blends[1:]):
        return [(0.0, 1.0) if blend else None for blend in blends]
    if "split" not in args.explicit:
        args.split = None
    return choose_split(args, {path: num_rows[path] for path in blends[0].paths}, _DEFAULT_SPLITS, "rows", say)
