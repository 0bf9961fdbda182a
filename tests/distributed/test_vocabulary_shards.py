"""Losses without logits over a sharded vocabulary are those of the whole: against torch's cross entropy in fp64, shards
that only pad included.
"""

import pytest
import torch
import torch.nn.functional as F
from worlds import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return {
        size: launch(size, {"shards": []}, folder / str(size), {"shards": "vocabulary_shards"})["shards"]
        for size in (1, 2)
    }


@pytest.fixture(scope="module")
def expected():
    """As vocabulary_shards of checks.py, from whole logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).double().requires_grad_() for n in (29, 1024))
    figures = {}
    for vocab_size in (1024, 1000, 400):
        labels = torch.randint(0, vocab_size, (29,), generator=generator)
        logits = hidden @ weight[:vocab_size].T
        losses = F.cross_entropy(logits, labels, reduction="none")
        gradients = torch.autograd.grad((losses * torch.arange(29)).sum(), [hidden, weight])
        figures[vocab_size] = dict(
            zip(
                ("losses", "hits", "hidden gradient", "weight gradient"),
                [losses, logits.argmax(-1) == labels, *gradients],
                strict=True,
            )
        )
    return figures


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("vocab_size", [1024, 1000, 400])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_equal_to_the_whole_vocabulary(found, expected, num_processes, vocab_size, recompute):
    """400 tokens leave the second of two shards without a row of its own."""
    figures = found[num_processes][f"{vocab_size} recompute={recompute}"]
    for name, exact in expected[vocab_size].items():
        tensor = torch.tensor(figures[name], dtype=exact.dtype)
        if name == "hits":
            assert torch.equal(tensor, exact)
        else:
            assert (tensor - exact).norm() <= (1e-6 if name == "losses" else 1e-5) * exact.norm(), name
