"""Starts a gloo world of N processes once and runs a list of trainings in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "worker.py"


def launch(
    num_processes: int, cases: dict[str, list[str]], folder: Path, checks: dict[str, str] | None = None
) -> dict[str, dict]:
    """Run every case (name -> command line of pretrain_hy.py) in one world of `num_processes`; name -> what worker.py
    recorded.

    Args:
        checks: for cases that are no training, the function of checks.py to call.
    """
    checks = checks or {}
    folder.mkdir(parents=True, exist_ok=True)
    wanted, results = folder / "cases.json", folder / "results.json"
    wanted.write_text(
        json.dumps([{"name": name, "argv": argv, "check": checks.get(name)} for name, argv in cases.items()])
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
        str(WORKER),
        str(wanted),
        str(results),
    ]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if " .... " not in line]
        raise AssertionError(
            f"a world of {num_processes} failed with exit code {done.returncode}:\n" + "\n".join(lines[-80:])
        )
    return json.loads(results.read_text())


def largest_difference(found: list[dict], expected: list[dict], figure: str) -> float:
    """The largest relative difference of `figure` over all steps."""
    assert len(found) == len(expected) > 0
    return max(abs(a[figure] - b[figure]) / abs(b[figure]) for a, b in zip(found, expected, strict=True))


def assert_same_training(found: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    for figure in ("loss", "grad_norm"):
        difference = largest_difference(found, expected, figure)
        pairs = [(a[figure], b[figure]) for a, b in zip(found, expected, strict=True)]
        assert difference <= tolerance, f"{figure} differs by {difference:.1e}: {pairs}"
