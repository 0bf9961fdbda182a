"""tools/benchmarks/gpu.py from end to end, on CPU with tiny widths: what it will say on a GPU machine, it can say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmarks" / "gpu.py"


def run(target: Path, parts: str, *words: str) -> str:
    command = [
        sys.executable,
        str(TOOL),
        "--json",
        str(target),
        *f"--tiny --models Hy-MT2 --mt2-layers 3 --steps 5 --parts {parts}".split(),
        *words,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The JSON's path, and what was printed."""
    target = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return target, run(target, "ceilings,profile,flags")


def results(target: Path, part: str) -> list[dict]:
    return [result for result in json.loads(target.read_text())["results"] if result["job"]["part"] == part]


def test_every_configuration_has_a_result(made):
    target, printed = made
    (ceilings,) = results(target, "ceilings")
    assert ceilings["matmul_tflops"] > 0 and ceilings["copy_gb_per_s"] > 0
    flags = results(target, "flags")
    assert len(flags) == 2 and not any("error" in result for result in flags)
    for result in flags:
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


def test_what_is_there_is_not_measured_again_and_an_error_is_a_result(made):
    target = made[0]
    before = json.loads(target.read_text())["results"]
    printed = run(target, "ceilings,flags", "--extra=--no-such-flag")
    after = json.loads(target.read_text())["results"]
    assert after[: len(before)] == before and len(after) == len(before) + 2
    assert all("--no-such-flag" in result["error"] for result in after[len(before) :])
    assert "unknown argument --no-such-flag" in printed
