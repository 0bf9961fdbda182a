"""Experts that get no tokens: how many to expect before a run, and which they are in it."""

import numpy as np

MANY = 0.1
"""A share of the experts without a token in a micro-batch, above which a run is warned."""
_STEPS, _TOKENS = 100, 100


def idle_share(num_tokens: float, top_k: int, num_experts: int) -> float:
    """The share of experts that none of `num_tokens` chooses, where each chooses `top_k` at random: (1 - k/E)^n."""
    return (1 - top_k / num_experts) ** num_tokens


class StarvedExperts:
    """Names experts that got no token for 100 steps in which an even share would have been 100 tokens or more."""

    def __init__(self):
        self.steps: np.ndarray | None = None
        self.shares: np.ndarray | None = None
        self.named: set[tuple[int, int]] = set()

    def after(self, counts: np.ndarray, num_steps: int) -> dict[int, list[int]]:
        """By layer the experts that have become starved.

        Args:
            counts: `[layers, experts]` of the last `num_steps` steps; zeros where a layer has no experts.
        """
        if self.steps is None:
            self.steps, self.shares = np.zeros(counts.shape), np.zeros(counts.shape)
        idle = counts == 0
        self.steps = np.where(idle, self.steps + num_steps, 0)
        self.shares = np.where(idle, self.shares + counts.mean(axis=1, keepdims=True), 0)
        starved = {
            (int(layer), int(expert))
            for layer, expert in zip(*np.nonzero((self.steps >= _STEPS) & (self.shares >= _TOKENS)), strict=True)
        }
        new = sorted(starved - self.named)
        self.named = starved
        return {layer: [expert for other, expert in new if other == layer] for layer in sorted({x for x, _ in new})}


def told(starved: dict[int, list[int]]) -> str:
    """The experts on one line."""
    return "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in starved.items())
