"""The planner's constants fitted to runs: how much longer than estimated computing and communicating took, how uneven
the experts' load was, what memory the estimate left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hymeg.planning.step_time import StepTime


class Observation(NamedTuple):
    """A run and what was estimated of it, with its own imbalance."""

    name: str
    seconds: float  # of a step
    estimate: StepTime
    imbalance: float | None
    """Tokens of the busiest expert-parallel rank over the mean; None: one rank holds all experts."""
    excess: int | None
    """Bytes by which the fullest stage's peak exceeded its estimate; None: not measured."""


class Calibration(NamedTuple):
    """Factors on estimated seconds, the mean imbalance, bytes beside the estimate; None: not measured."""

    compute: float = 1.0
    communication: float = 1.0
    imbalance: float | None = None
    excess: int | None = None

    def applied(self, time: StepTime) -> StepTime:
        """The estimate with the factors."""
        total = self.compute * time.computing + self.communication * (time.total - time.computing)
        share, faster = time.compute / (time.compute + time.communication), time.total / total
        return StepTime(
            total,
            compute=self.compute * time.compute,
            communication=self.communication * time.communication,
            bubble=time.bubble * (self.compute * share + self.communication * (1 - share)),
            gradients=self.communication * time.gradients,
            optimizer=self.compute * time.optimizer,
            tokens_per_gpu=time.tokens_per_gpu * faster,
            tflops_per_gpu=time.tflops_per_gpu * faster,
            mfu=time.mfu * faster,
        )


def fit(observations: Sequence[Observation]) -> Calibration:
    """The factors that come nearest to all runs, by relative error. One run gives one factor for both, and so do runs
    that communicate alike, or whose times ask for a negative one.
    """
    seconds = np.array([of.seconds for of in observations])
    computing, total = np.array([(of.estimate.computing, of.estimate.total) for of in observations]).T
    parts = np.stack([computing, total - computing], axis=1) / seconds[:, None]
    factors, _, rank, _ = np.linalg.lstsq(parts, np.ones(len(parts)), rcond=1e-3)
    if rank < 2 or min(factors) <= 0:
        whole = parts.sum(axis=1)
        factors = [whole.sum() / (whole**2).sum()] * 2
    imbalances = [of.imbalance for of in observations if of.imbalance is not None]
    excesses = [of.excess for of in observations if of.excess is not None]
    imbalance = float(np.mean(imbalances)) if imbalances else None
    return Calibration(*map(float, factors), imbalance, max(excesses, default=None))
