#!/usr/bin/env python3
"""A page of one training or of several: losses, speed, load of the experts, translations over the steps."""

import argparse
import json
from pathlib import Path

from hymeg.errors import exit_on_user_error
from hymeg.files import write_whole
from hymeg.reporting.page import page
from hymeg.reporting.reading import read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save (or --tensorboard-dir) of a training")
    parser.add_argument("--out", metavar="FILE.html", help="the page (default: report.html in the first RUN)")
    parser.add_argument("--json", metavar="FILE.json", help="the same numbers")
    args = parser.parse_args()
    with exit_on_user_error():
        runs = [read_run(folder, name) for folder, name in zip(args.runs, _names(args.runs), strict=True)]
        out = Path(args.out or Path(args.runs[0], "report.html"))
        write_whole(out, page(runs).encode())
        print(out)
        if args.json:
            write_whole(args.json, json.dumps([run.numbers() for run in runs]).encode())
            print(args.json)


def _names(folders: list[str]) -> list[str]:
    """The last parts of their paths by which they differ."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


if __name__ == "__main__":
    main()
