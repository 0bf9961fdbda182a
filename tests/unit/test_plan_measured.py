"""plan.py --measured: what runs say of the estimates."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from published_models import PUBLISHED

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout
from hymeg.planning.measured import Calibration, Observation, fit
from hymeg.planning.memory import GIB, Device, memory_by_stage
from hymeg.planning.network import HARDWARE
from hymeg.planning.search import Machine, Planner
from hymeg.planning.settings import Settings
from hymeg.reporting.record import RunRecord
from hymeg.training.observed import observe, told

SPEC = importlib.util.spec_from_file_location("plan_command", Path(__file__).parents[2] / "tools" / "plan.py")
plan_command = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan_command)
CONFIG = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy-MT2-30B-A3B"])
MACHINE = Machine(16, 8, Device(80), HARDWARE["H100"])


def layout(**sizes) -> Layout:
    return Layout(16, 4096, 256, **sizes)


LAYOUTS = (
    layout(expert_model_parallel_size=8, pipeline_model_parallel_size=2),
    layout(pipeline_model_parallel_size=16),
    layout(tensor_model_parallel_size=8, expert_model_parallel_size=2),
)


def observation(of: Layout, compute: float, communication: float, imbalance: float | None = None) -> Observation:
    """A run that computed and communicated so much slower than estimated."""
    estimate = Planner(CONFIG, MACHINE).plan(of, Settings()).time
    return Observation("run", Calibration(compute, communication).applied(estimate).total, estimate, imbalance, None)


def test_the_factors_of_runs_in_two_layouts_are_found():
    found = fit([observation(of, 1.3, 2.5, imbalance) for of, imbalance in zip(LAYOUTS, (1.1, None, 1.3), strict=True)])
    assert found.compute == pytest.approx(1.3) and found.communication == pytest.approx(2.5)
    assert found.imbalance == pytest.approx(1.2)


def test_the_largest_excess_counts():
    one = observation(LAYOUTS[0], 1.0, 1.0)
    assert fit([one, one._replace(excess=3), one._replace(excess=-5)]).excess == 3 and fit([one]).excess is None


def test_one_run_gives_one_factor():
    one = observation(LAYOUTS[0], 1.3, 2.5)
    found = fit([one])
    assert found.compute == found.communication == pytest.approx(one.seconds / one.estimate.total)
    assert found.imbalance is None


def test_times_that_ask_for_a_negative_factor_give_one_for_both():
    """The more it communicates, the faster: noise."""
    found = fit([observation(LAYOUTS[0], 2.0, 1.0), observation(LAYOUTS[2], 0.5, 0.05)])
    assert found.compute == found.communication > 0


def test_a_plan_is_scaled_and_still_adds_up():
    calibration = Calibration(1.3, 2.5)
    for of in LAYOUTS:
        plain = Planner(CONFIG, MACHINE).plan(of, Settings()).time
        scaled = Planner(CONFIG, MACHINE, calibration=calibration).plan(of, Settings()).time
        parts = scaled.compute + scaled.communication + scaled.bubble + scaled.gradients + scaled.optimizer
        assert scaled.total == pytest.approx(parts) and scaled.compute == pytest.approx(1.3 * plain.compute)
        assert scaled.communication == pytest.approx(2.5 * plain.communication)
        for figure in ("tokens_per_gpu", "tflops_per_gpu", "mfu"):
            assert getattr(scaled, figure) * scaled.total == pytest.approx(getattr(plain, figure) * plain.total)


def test_communication_that_costs_more_than_estimated_changes_the_order():
    def order(communication: float) -> list[float]:
        planner = Planner(CONFIG, MACHINE, calibration=Calibration(1.0, communication))
        return [planner.plan(of, Settings()).time.total for of in LAYOUTS]

    assert order(0.01).index(min(order(0.01))) != order(30.0).index(min(order(30.0)))


FLAGS = "--seq-length 4096 --global-batch-size 256 --bf16 --use-distributed-optimizer --overlap-grad-reduce"
SIZES = "--expert-model-parallel-size 8 --pipeline-model-parallel-size 2"


@pytest.fixture
def run(tmp_path):
    """A run of LAYOUTS[0] on 16 GPUs, as its record has it: twice as long as estimated, 5 GiB more."""
    (tmp_path / "model").mkdir()
    CONFIG.save(tmp_path / "model")
    of, settings = LAYOUTS[0], Settings(overlap_param_gather=False)
    planner = Planner(CONFIG, MACHINE, imbalance=1.5)
    seconds, memory = 2 * planner.plan(of, settings).time.total, memory_by_stage(CONFIG, of, settings, 1.5)
    facts = {
        "command": f"pretrain_hy.py --hf-model /gone --data-path text {FLAGS} {SIZES}",
        "device": "NVIDIA H100 80GB HBM3",
        "world_size": 16,
        "expert_counts": [1, 1],
    }
    record = RunRecord(tmp_path / "run" / "records", facts, print)
    for number in range(1, 8):
        figures = {"losses": {}, "seconds": seconds if number > 2 else 99.0, "expert_parallel_load": 1.5}
        peaks = [memory[0].total + 5 * GIB * (number == 6), memory[1].total - GIB]
        record.add_step(number, np.ones((1, 1)), **figures, peak_bytes=peaks)
    return tmp_path


def test_a_run_is_compared_with_the_estimate_of_its_own_layout(run):
    found = observe(run / "run", str(run / "model"), MACHINE, None)
    assert found.seconds == pytest.approx(2 * found.estimate.total)
    assert found.imbalance == 1.5 and found.excess == 5 * GIB
    [line, _] = told([found], fit([found]))
    assert line.startswith("Measured, run: ") and "1.50 x the mean" in line and "+5.0 GiB" in line


def test_of_a_run_that_went_on_in_another_layout_only_its_last_life_is_compared(run):
    first = json.loads((run / "run" / "records" / "run.jsonl").read_text().splitlines()[0])
    facts = {name: first[name] for name in ("device", "world_size", "expert_counts")}
    facts["command"] = first["command"].replace("--pipeline-model-parallel-size 2", "")
    record = RunRecord(run / "run" / "records", facts, print)
    memory = memory_by_stage(CONFIG, layout(expert_model_parallel_size=8), Settings(overlap_param_gather=False), 1.25)
    for number in range(8, 12):
        figures = {"losses": {}, "seconds": 7.0, "expert_parallel_load": 1.25, "peak_bytes": [memory[0].total + GIB]}
        record.add_step(number, np.ones((1, 1)), **figures)
    found = observe(run / "run", str(run / "model"), MACHINE, None)
    assert (found.seconds, found.imbalance, found.excess) == (7.0, 1.25, GIB)


def test_the_command_plans_with_what_was_measured(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    line = f"--hf {run / 'model'} --gpus 16 {FLAGS} {SIZES} --json"
    found = []
    for measured in ("", f" --measured {run / 'run'}"):
        plan_command.main((line + measured).split())
        found.append(json.loads(capsys.readouterr().out))
    plain, fitted = found
    assert fitted["measured"]["compute"] == fitted["measured"]["communication"] == pytest.approx(2)
    assert fitted["assumptions"]["imbalance"] == 1.5 and fitted["assumptions"]["margin_bytes"] == 5 * GIB
    assert plain["assumptions"] == fitted["assumptions"] | {"imbalance": 1.2, "margin_bytes": 0}
    assert fitted["plans"][0]["time"]["total"] > 1.9 * plain["plans"][0]["time"]["total"]


def test_what_is_no_measurement_is_said(run, tmp_path):
    with pytest.raises(UserError, match=r"--measured .*model: no record of a run"):
        observe(str(tmp_path / "model"), None, MACHINE, None)
    with pytest.raises(UserError, match=r"its command line: --hf-model /gone"):
        observe(run / "run", None, MACHINE, None)
    log = run / "run" / "records" / "run.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(UserError, match="fewer than 3 steps are logged"):
        observe(run / "run", str(run / "model"), MACHINE, None)
