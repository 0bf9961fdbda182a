"""Losses without logits over a sharded vocabulary are those of the whole: against torch's cross entropy in fp64, shards
that only pad included.
"""

import pytest
import torch
import torch.nn.functional as F


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
def test_equal_to_the_whole_vocabulary(worlds, expected, vocab_size, recompute):
    """400 tokens leave the second of two shards without a row of its own."""
    figures = worlds.run(2, [], "vocabulary_shards")[f"{vocab_size} recompute={recompute}"]
    for name, exact in expected[vocab_size].items():
        tensor = torch.tensor(figures[name], dtype=exact.dtype)
        if name == "hits":
            assert torch.equal(tensor, exact)
        else:
            assert (tensor - exact).norm() <= (1e-6 if name == "losses" else 1e-5) * exact.norm(), name
