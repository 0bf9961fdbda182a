#!/usr/bin/env python3
"""Tokenize text for pre-training into Megatron's indexed dataset (.bin, .idx).

    tools/preprocess_data.py --input corpus.jsonl --output data/corpus --tokenizer Hy-MT2-30B-A3B --append-eod

writes data/corpus_text_document.bin and .idx, and prints the prefix to give to --data-path.
"""

import argparse
import sys
import time

from tqdm import tqdm

from hymeg.data.corpus import Progress, preprocess
from hymeg.errors import exit_on_user_error

SECONDS_BETWEEN_LINES = 10


class Reporter:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self):
        self.start = self.last_line = None
        self.bar = None

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start = self.last_line = now
            if sys.stderr.isatty():
                self.bar = tqdm(total=progress.total_bytes, unit="B", unit_scale=True)
        if self.bar:
            self.bar.set_postfix_str(self.counts(progress), refresh=False)
            self.bar.update(progress.num_bytes_read - self.bar.n)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(
                f"{progress.num_bytes_read / progress.total_bytes:.1%} read: {self.counts(progress)}",
                file=sys.stderr,
                flush=True,
            )

    def counts(self, progress: Progress) -> str:
        seconds = max(time.monotonic() - self.start, 1e-3)
        return f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens, {progress.num_tokens / seconds:,.0f} tokens/s"

    def close(self) -> None:
        if self.bar:
            self.bar.close()


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
        action="store_true",
        help="end each document with the tokenizer's EOS token; pre-training wants it",
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
    reporter = Reporter()
    try:
        summary = preprocess(
            args.input,
            args.output,
            args.tokenizer,
            json_keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            num_workers=args.workers,
            skip_bad_rows=args.skip_bad_rows,
            overwrite=args.overwrite,
            report=reporter,
        )
    finally:
        reporter.close()
    print(reporter.counts(summary))
    if summary.num_empty:
        print(f"left out {summary.num_empty:,} texts without a token")
    if summary.num_bad_rows:
        print(f"left out {summary.num_bad_rows:,} bad rows, the first: {summary.first_bad_row}")
    print("--data-path " + " ".join(summary.prefixes))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
