"""plan.py --measured: what runs say of the estimates."""

import pytest
from published_models import PUBLISHED

from hymeg.hf.config import HyConfig
from hymeg.hf.tiny_checkpoint import TINY_CONFIG
from hymeg.planning.layout import Layout
from hymeg.planning.measured import Calibration, Observation, fit
from hymeg.planning.memory import Device
from hymeg.planning.network import HARDWARE
from hymeg.planning.search import Machine, Planner
from hymeg.planning.settings import Settings

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
