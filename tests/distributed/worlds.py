"""Trainings in gloo worlds of 1, 2, 4 and 8 processes, each run when its result is first asked for."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

FORKS = Path(__file__).parent / "forks.py"


class Worlds:
    """The process from which all worlds are forked. The same case is run once.

    Args:
        script: forks.py, or one that calls its `main`.
        python_path: folders to import from first.
    """

    def __init__(self, folder: Path, script: Path = FORKS, *python_path: Path):
        folder.mkdir()
        self.said = folder / "said"
        self.process = subprocess.Popen(
            [sys.executable, script, folder],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, [*python_path, *filter(None, [os.environ.get("PYTHONPATH")])]))}
            | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said.open("w"),
            text=True,
        )
        self.results = {}

    def run(self, size: int, argv: list[str], check: str | None = None, seconds: float = 300) -> dict:
        """What worker.py recorded of a training by this command line of pretrain_hy.py; or, with `check`, what that
        function of checks.py returned.

        Raises:
            AssertionError: with every failed rank's traceback, or where a rank stands that has not answered in
                `seconds`.
        """
        case = (size, *argv, check)
        if case not in self.results:
            request = {"size": size, "argv": argv, "check": check, "seconds": seconds}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or "null")
            if answer is None:
                raise AssertionError(f"forks.py has ended:\n{self.said.read_text()}")
            if "error" in answer:
                raise AssertionError(f"{check or 'training'} in a world of {size}: {answer['error']}")
            self.results[case] = answer["result"]
        return self.results[case]

    def cases(self, size: int, cases: dict[str, list[str]], checks: dict[str, str] | None = None) -> Mapping[str, dict]:
        """`cases` (name -> command line) by their results."""
        return _Cases(self, size, cases, checks or {})

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class _Cases(Mapping):
    def __init__(self, worlds: Worlds, size: int, cases: dict[str, list[str]], checks: dict[str, str]):
        self.worlds, self.size, self.cases, self.checks = worlds, size, cases, checks

    def __getitem__(self, name: str) -> dict:
        return self.worlds.run(self.size, self.cases[name], self.checks.get(name))

    def __iter__(self):
        return iter(self.cases)

    def __len__(self):
        return len(self.cases)


def largest_difference(found: list[dict], expected: list[dict], figure: str) -> float:
    """The largest relative difference of `figure` over all steps."""
    assert len(found) == len(expected) > 0
    return max(abs(a[figure] - b[figure]) / abs(b[figure]) for a, b in zip(found, expected, strict=True))


def assert_same_training(found: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    for figure in ("loss", "grad_norm"):
        difference = largest_difference(found, expected, figure)
        pairs = [(a[figure], b[figure]) for a, b in zip(found, expected, strict=True)]
        assert difference <= tolerance, f"{figure} differs by {difference:.1e}: {pairs}"
