#!/usr/bin/env python3
"""Show a fine-tuning file, or one row of it, as the model will see it.

    tools/inspect_data.py rows.jsonl --tokenizer Hy-MT2-30B-A3B --seq-length 4096
    tools/inspect_data.py rows.jsonl --tokenizer Hy-MT2-30B-A3B --row 7

The first counts rows, tokens, trained tokens and lengths, and says what --seq-length would cut and how full packed
sequences are. The second prints the row in line 7 token by token ("|" between tokens): what is trained is green on a
terminal, elsewhere between ⟦ and ⟧.
"""

import argparse
import itertools
import os
import sys

import numpy as np

from hymeg.data.chat import ChatEncoder, Tokens
from hymeg.data.inspection import Fit, Summary, fit, histogram, read_row, summarize
from hymeg.data.rows import RowReader
from hymeg.errors import UserError, exit_on_user_error

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
    print(f"{len(tokens.trained):,} tokens, {num_trained:,} of them trained")
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


def print_summary(summary: Summary) -> None:
    lengths, num_rows, num_tokens = summary.lengths, len(summary.lengths), int(summary.lengths.sum())
    print(f"rows      {num_rows:,}")
    print(
        f"tokens    {num_tokens:,}; a row has {lengths.min():,} to {lengths.max():,}, {np.median(lengths):,.0f} in the "
        "middle"
    )
    print(f"trained   {summary.num_trained.sum():,} tokens, {summary.num_trained.sum() / num_tokens:.1%}")
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
        "file", metavar="FILE", help="conversations or translations, one a line (hymeg/data/rows.py describes them)"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the checkpoint's folder, or another with its tokenizer files"
    )
    parser.add_argument("--row", type=int, metavar="N", help="show the row in line N")
    parser.add_argument("--seq-length", type=int, metavar="S", help="say what sequences of S tokens would hold")
    parser.add_argument(
        "--translation-prompts", metavar="FILE.json", help="further kinds of prompts for translation rows"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.row is not None and args.row < 1:
        raise UserError(f"--row is {args.row}; at least 1 is needed")
    if args.seq_length is not None and not 1 <= args.seq_length <= MAX_SEQ_LENGTH:
        raise UserError(f"--seq-length is {args.seq_length}; from 1 to {MAX_SEQ_LENGTH} is possible")
    reader, encoder = RowReader(args.translation_prompts), ChatEncoder(args.tokenizer)
    if args.row is not None:
        print_row(encoder, read_row(args.file, args.row, reader, encoder), args.seq_length)
        return
    summary = summarize(args.file, reader, encoder)
    if len(summary.lengths):
        print_summary(summary)
        if args.seq_length is not None:
            print_fit(fit(summary, args.seq_length), len(summary.lengths), args.seq_length)
    if summary.bad_rows:
        raise UserError(
            f"rows that cannot be trained on: {summary.bad_rows:,}; training stops at the first: "
            f"{summary.first_bad_row}"
        )


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough (head, less)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
