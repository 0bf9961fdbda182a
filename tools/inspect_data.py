#!/usr/bin/env python3
"""Show fine-tuning files, or one row, as the model will see them; and make their indices before a job needs them.

    tools/inspect_data.py rows.jsonl --tokenizer Hy-MT2-30B-A3B --seq-length 4096
    tools/inspect_data.py rows.jsonl --tokenizer Hy-MT2-30B-A3B --row 7

The first counts rows, tokens, trained tokens and lengths, says what --seq-length would cut and how full packed
sequences are. It tokenizes on all cores and keeps the index where training on the file looks for it. The second prints
the row in line 7 token by token ("|" between tokens): what is trained is green on a terminal, elsewhere between ⟦ and
⟧.
"""

import argparse
import itertools
import os
import sys

import numpy as np

from hymeg.data.chat import ChatEncoder, Tokens
from hymeg.data.index_building import RowEncoder, build_missing, told_bad_rows
from hymeg.data.inspection import Fit, Summary, fit, histogram, read_row, summarize
from hymeg.data.row_index import RowIndex, index_folder
from hymeg.data.rows import RowReader
from hymeg.data.text_files import check_given_once, check_row_file
from hymeg.errors import UserError, exit_on_user_error
from hymeg.files import shown
from hymeg.hf.hub import local_folder

GREEN, PLAIN = "\033[32m", "\033[0m"
BAR_WIDTH = 40
MAX_SEQ_LENGTH = 1 << 24


def token_texts(encoder: ChatEncoder, token_ids: list[int]) -> list[str]:
    """The text of each token, but tokens that hold parts of one character together."""
    texts, pending = [], []
    for token_id in token_ids:
        pending.append(token_id)
        text = encoder.tokenizer.decode(pending)
        if not text.endswith("\ufffd"):
            texts.append(text)
            pending = []
    return texts + ([encoder.tokenizer.decode(pending)] if pending else [])


def print_row(encoder: ChatEncoder, tokens: Tokens, seq_length: int | None) -> None:
    num_trained = np.count_nonzero(tokens.trained)
    weights = (
        "" if tokens.weights is None else " and ".join(f"{w:g}" for w in np.unique(tokens.weights[tokens.trained]))
    )
    print(
        f"{len(tokens.trained):,} tokens, {num_trained:,} of them trained{weights and f', of weight {weights}'}",
    )
    if seq_length is not None and len(tokens.trained) > seq_length + 1:
        print(f"longer than --seq-length {seq_length:,} holds ({seq_length + 1:,} tokens)")
    before, after = (GREEN, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    line = []
    for trained, group in itertools.groupby(
        zip(tokens.token_ids.tolist(), tokens.trained.tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = "|".join(token_texts(encoder, [token_id for token_id, _ in group]))
        line.append(f"{before}{text}{after}" if trained else text)
    print("|".join(line))


def print_summary(summary: Summary, counts: dict[str, int]) -> None:
    lengths, num_rows, num_tokens = summary.lengths, len(summary.lengths), int(summary.lengths.sum())
    print(f"rows      {num_rows:,}")
    print(
        f"tokens    {num_tokens:,}; a row has {lengths.min():,} to {lengths.max():,}, {np.median(lengths):,.0f} in the "
        "middle"
    )
    print(f"trained   {summary.num_trained.sum():,} tokens, {summary.num_trained.sum() / num_tokens:.1%}")
    turns = ", ".join(f"{count:,} {what.removeprefix('turns').strip()}" for what, count in sorted(counts.items()))
    print(f"turns     {turns.replace(' ,', ',')}")
    classes = histogram(lengths)
    largest = max(count for _, _, count in classes)
    print("\n        tokens     rows")
    for shortest, longest, count in classes:
        print(f"{shortest:>6,} to {longest:>6,} {count:>8,} {'#' * round(BAR_WIDTH * count / largest)}".rstrip())


def print_fit(fitted: Fit, num_rows: int, seq_length: int) -> None:
    print(f"\n--seq-length {seq_length:,}, which holds {seq_length + 1:,} tokens of a row")
    if fitted.num_too_long:
        print(
            f"too long  {fitted.num_too_long:,} rows ({fitted.num_too_long / num_rows:.1%}), "
            f"{fitted.num_tokens_over:,} tokens over:"
        )
        print(
            "          --sft-truncation error (the default) refuses the file, drop leaves the rows out, left and right "
            "cut the tokens off;"
        )
        print(f"          cut on the right, {fitted.num_untrained:,} rows would have no trained token left")
    else:
        print("too long  none: nothing would be cut or dropped")
    print(f"packed    {fitted.num_sequences:,} sequences, {fitted.packed_share:.1%} real tokens (cut to fit)")
    print(f"unpacked  {num_rows:,} sequences, {fitted.padded_share:.1%} real tokens")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="conversations or translations, one a line (docs/data.md)"
    )
    parser.add_argument(
        "--tokenizer",
        "--hf-model",
        required=True,
        metavar="DIR",
        help="the checkpoint's folder, or another with its tokenizer files",
    )
    parser.add_argument("--row", type=int, metavar="N", help="show the row in line N")
    parser.add_argument("--seq-length", type=int, metavar="S", help="say what sequences of S tokens would hold")
    parser.add_argument(
        "--data-cache-path", metavar="DIR", help="where the indices are kept, as in training (else FILE.cache)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (all cores, where worth it)")
    return parser.parse_args()


def indices(args: argparse.Namespace, paths: list[str]) -> list[RowIndex]:
    """Of each file, made where there is none."""
    settings = (args.tokenizer, None, True)
    fingerprint = RowEncoder(*settings).fingerprint
    folders = {path: index_folder(path, args.data_cache_path, fingerprint) for path in paths}
    build_missing(folders, settings, sys.stderr, args.workers)
    return [RowIndex(folder, path) for path, folder in folders.items()]


def main() -> None:
    args = parse_args()
    args.tokenizer = str(local_folder(args.tokenizer, weights=False, flag="--tokenizer"))
    if args.row is not None and args.row < 1:
        raise UserError(f"--row is {args.row}; at least 1 is needed")
    if args.seq_length is not None and not 1 <= args.seq_length <= MAX_SEQ_LENGTH:
        raise UserError(f"--seq-length is {args.seq_length}; from 1 to {MAX_SEQ_LENGTH} is possible")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}; at least 1 is needed")
    if args.row is not None and len(args.files) > 1:
        raise UserError(f"--row {args.row}: needs one file, found {len(args.files)}")
    paths = [check_row_file(path) for path in args.files]
    check_given_once("FILE", paths)
    if args.row is not None:
        encoder = ChatEncoder(args.tokenizer)
        print_row(encoder, read_row(paths[0], args.row, RowReader(), encoder), args.seq_length)
        return
    found = indices(args, paths)
    for index in found:
        print(f"{index.path}\nindex     {index.folder}")
        summary = summarize(index)
        print_summary(summary, index.counts)
        if index.num_without_weight:
            print(f"left out  {index.num_without_weight:,} rows, whose weight is 0 in every turn")
        if index.ignored:
            print(
                "\nleft alone: " + ", ".join(f"{shown(key)} in {count:,} rows" for key, count in index.ignored.items())
            )
        if args.seq_length is not None:
            print_fit(fit(summary, args.seq_length), len(index), args.seq_length)
        print(*told_bad_rows(index.bad_rows, len(index)), sep="\n")
    for first in (index.bad_rows[0].first for index in found if index.bad_rows):
        raise UserError(f"{first} (training stops at it, unless with --sft-bad-rows skip)")


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough (head, less)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
