"""tools/benchmarks/gpu.py from end to end, on CPU with tiny widths: what it will say on a GPU machine, it can say."""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from hymeg import platform

platform.install()

TOOLS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture(scope="module")
def tool():
    """The module; it starts a process for each configuration. Of the flags to try, the first will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import gpu

        patch.setattr(gpu, "TINY_CANDIDATES", gpu.TINY_CANDIDATES[:1])
        yield gpu


def run(tool, target: Path, parts: str, *words: str) -> str:
    words = (*f"--json {target} --tiny --models Hy-MT2 --mt2-layers 3 --steps 5 --parts {parts}".split(), *words)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["gpu.py", *words])
        tool.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def made(tool, tmp_path_factory):
    """The JSON's path, and what was printed."""
    target = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return target, run(tool, target, "ceilings,profile,flags")


def results(target: Path, part: str) -> list[dict]:
    return [result for result in json.loads(target.read_text())["results"] if result["job"]["part"] == part]


def test_every_configuration_has_a_result(made):
    target, printed = made
    (ceilings,) = results(target, "ceilings")
    assert ceilings["matmul_tflops"] > 0 and ceilings["copy_gb_per_s"] > 0
    (result,) = results(target, "flags")
    assert "error" not in result
    assert result["tokens_per_s"] == pytest.approx(2 * 64 / result["seconds"]) and result["peak_bytes"] > 0
    assert result["predicted"]["peak_bytes"] > 0 and result["predicted"]["seconds"] > 0
    assert f"hymeg {result['job']['flags']} | {result['tokens_per_s']:,.0f} |" in printed


def test_a_profile_divides_the_step_among_all_classes(made):
    for result in results(made[0], "profile"):
        classes = result["classes_ms"]
        work = {
            "attention",
            "grouped GEMM",
            "permute and routing",
            "norm",
            "projections and shared expert",
            "head and loss",
            "optimizer",
        }
        assert work <= classes.keys() and min(classes[name] for name in work) > 0, result["job"]["engine"]
        assert abs(classes["gaps"]) < 0.1 * sum(classes.values())
    assert [result["job"]["engine"] for result in results(made[0], "profile")] == ["hymeg", "transformers"]


def worker_here(command: list[str], **_) -> subprocess.CompletedProcess:
    """The worker in this process; what it would say on its way out."""
    import gpu_worker

    try:
        gpu_worker.main(*command[2:])
    except Exception:
        return subprocess.CompletedProcess(command, 1, traceback.format_exc())
    return subprocess.CompletedProcess(command, 0, "")


def test_what_is_there_is_not_measured_again_and_an_error_is_a_result(tool, made, monkeypatch):
    target = made[0]
    before = json.loads(target.read_text())["results"]
    monkeypatch.setattr(tool.subprocess, "run", worker_here)
    with monkeypatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.setenv(name, os.environ.get(name, "0"))  # which the worker sets: put back at the end
            environment.delenv(name)
        printed = run(tool, target, "ceilings,flags", "--extra=--no-such-flag")
    after = json.loads(target.read_text())["results"]
    assert after[: len(before)] == before and len(after) == len(before) + 1
    assert "--no-such-flag" in after[-1]["error"]
    assert "unknown argument --no-such-flag" in printed
