#!/usr/bin/env python3
"""Tokenize text for pre-training into Megatron's indexed dataset (.bin, .idx).

    tools/preprocess_data.py --input corpus.jsonl --output data/corpus --tokenizer Hy-MT2-30B-A3B

writes data/corpus_text_document.bin and .idx, and prints the prefix to give to --data-path.
"""

import argparse
import functools
import time

from hymeg.data.corpus import Counts, preprocess
from hymeg.errors import exit_on_user_error
from hymeg.hf.hub import local_folder
from hymeg.progress import Progress


def described(counts: Counts, seconds: float) -> str:
    return (
        f"{counts.num_documents:,} documents, {counts.num_tokens:,} tokens, "
        f"{counts.num_tokens / max(seconds, 1e-3):,.0f} tokens/s"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines (.jsonl, .json, .ndjson), text (.txt), both also as .gz or .zst, or .parquet",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="the files are PREFIX_KEY_document.bin and .idx"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the checkpoint's folder, or another with its tokenizer files"
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of a row to tokenize, a dataset each (default: text)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the model's end-of-document token: eod_token_id in config.json, else the "
        "tokenizer's EOS (on by default; pre-training wants it)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that tokenize (default: 1, with the tokenizer's own threads)",
    )
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="count bad rows and go on, instead of stopping at the first"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    progress = None

    def report(counts: Counts) -> None:
        nonlocal progress
        progress = progress or Progress("tokenizing", counts.total_bytes)
        progress.show(counts.num_bytes_read, counts=functools.partial(described, counts))

    try:
        summary = preprocess(
            args.input,
            args.output,
            str(local_folder(args.tokenizer, weights=False, flag="--tokenizer")),
            json_keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            num_workers=args.workers,
            skip_bad_rows=args.skip_bad_rows,
            overwrite=args.overwrite,
            report=report,
        )
        progress.show(summary.num_bytes_read, at_end=True, counts=functools.partial(described, summary))
    finally:
        if progress:
            progress.close()
    print(described(summary, time.monotonic() - progress.started))
    print(f"each ends with {summary.end}" if summary.end else "nothing marks their ends (--no-append-eod)")
    if summary.num_empty:
        print(f"left out {summary.num_empty:,} texts without a token")
    if summary.num_bad_rows:
        print(f"left out {summary.num_bad_rows:,} bad rows, the first: {summary.first_bad_row}")
    print("--data-path " + " ".join(summary.prefixes))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
