"""Which token comes next: what of the logits counts, and the number that decides.

Every answer draws from a generator of its own, in fp64 and in the order of the vocabulary. So a text depends on seed
and number of its prompt, and neither on the layout nor on what else is in the batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The filters are those of transformers, in its order: penalty, temperature, top-k, top-p.

    Args:
        max_new_tokens: after which an answer is cut off.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: the likeliest tokens that together reach this probability; 1 takes all.
        top_k: that many of the likeliest tokens; 0 takes all.
        repetition_penalty: divides positive logits, multiplies negative ones, of the tokens in prompt and answer; 1
            leaves them.
        seed: of the random numbers.
        stop_ids: the tokens that end an answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, good, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; {allowed} is needed")

    def random_numbers(self, number: int) -> np.random.Generator:
        """Those of the answer to prompt `number`."""
        return np.random.default_rng([self.seed, number])


def choose(
    logits: torch.Tensor, sampling: Sampling, seen: Sequence[Sequence[int]], generators: Sequence[np.random.Generator]
) -> list[int]:
    """A token for each row.

    Args:
        logits: `[n, vocab]`.
        sampling: how.
        seen: for each row the tokens of prompt and answer so far.
        generators: for each row; one number is drawn, unless the likeliest token is taken.
    """
    if sampling.repetition_penalty != 1:
        logits = _penalized(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    cumulative = torch.softmax(_filtered(logits.double() / sampling.temperature, sampling), dim=-1).cumsum(dim=-1)
    drawn = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    return torch.searchsorted(cumulative, drawn.to(logits.device) * cumulative[:, -1:], right=True)[:, 0].tolist()


def _penalized(logits: torch.Tensor, penalty: float, seen: Sequence[Sequence[int]]) -> torch.Tensor:
    """The repetition penalty of Keskar et al. 2019 (CTRL), of prompt and answer."""
    logits = logits.clone()
    for row, tokens in zip(logits, seen, strict=True):
        tokens = torch.tensor(sorted(set(tokens)), device=logits.device)
        row[tokens] = torch.where(row[tokens] < 0, row[tokens] * penalty, row[tokens] / penalty)
    return logits


def _filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`logits` `[n, vocab]` with -inf where top-k and top-p leave nothing."""
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, order, ordered.masked_fill(above >= sampling.top_p, -torch.inf)
        )
    return logits
