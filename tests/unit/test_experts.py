"""The local spec's experts, multiplied in one call: to the bit what Megatron's own do one by one."""

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import unwrap_model
from single_process import build

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.models.experts import Experts
from hymeg.platform.kernels import grouped_linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "trunk"
    write_tiny_checkpoint(folder, dtype="fp32")
    return folder


def experts_of(folder, *flags: str) -> Experts:
    return unwrap_model(build(folder, *flags)).decoder.layers[1].mlp.experts


def computed(forward, experts: Experts, counts: list[int]) -> list[torch.Tensor]:
    """Output, and the gradients of tokens, the router's weights and every parameter."""
    random = torch.Generator().manual_seed(0)
    dtype = next(experts.parameters()).dtype
    tokens = torch.randn(sum(counts), 64, generator=random).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=random).requires_grad_()
    output, bias = forward(experts, tokens, torch.tensor(counts), probs)
    assert bias is None and output.dtype == dtype
    wanted = [tokens, probs, *(one for one in experts.parameters() if one.requires_grad)]
    return [output, *torch.autograd.grad(output, wanted, torch.randn(output.shape, generator=random).to(dtype))]


@pytest.mark.parametrize("flags", ["", "--no-bias-swiglu-fusion", "--bf16", "--bf16 --no-bias-swiglu-fusion"])
@pytest.mark.parametrize("counts", [[3, 0, 17, 1, 0, 9, 2, 8], [0, 0, 0, 5, 0, 0, 0, 0]])
def test_output_and_gradients_are_those_of_megatrons_experts(folder, flags, counts):
    experts = experts_of(folder, *flags.split())
    found, expected = (computed(one.forward, experts, counts) for one in (Experts, SequentialMLP))
    assert len(found) == 3 + 2 * 8
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(computed_output(experts, counts), found[0])


def computed_output(experts: Experts, counts: list[int]) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(counts), 64, generator=random).to(next(experts.parameters()).dtype)
    return experts(tokens, torch.tensor(counts), torch.rand(sum(counts), generator=random))[0]


def test_without_any_token(folder):
    found = experts_of(folder)(torch.ones(0, 64), torch.zeros(8, dtype=torch.int64), torch.ones(0))[0]
    assert found.shape == (0, 64)


def test_frozen_experts_pass_the_gradient_on_and_keep_no_tokens_for_theirs(folder):
    experts, kept = experts_of(folder), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        expected = computed(Experts.forward, experts, [4] * 8)[:3]
        assert (kept.count((32, 64)), kept.count((32, 32))) == (2, 1)  # of fc1 and SwiGLU, of fc2
        kept.clear()
        experts.requires_grad_(False)
        found = computed(Experts.forward, experts, [4] * 8)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (kept.count((32, 64)), kept.count((32, 32))) == (1, 0)


def test_weights_are_stored_once_and_waited_for_where_they_are_used(folder):
    """With --overlap-param-gather Megatron waits for the parameters of the module that is called."""
    experts = experts_of(folder)
    names = [f"local_experts.{e}.linear_fc{n}.weight" for e in range(8) for n in (1, 2)]
    assert [name for name, _ in experts.named_parameters(remove_duplicate=False)] == names
    assert [name for name in experts.state_dict() if "_extra_state" not in name] == names
    for name in ("linear_fc1", "linear_fc2"):
        own = [getattr(expert, name).weight for expert in experts.local_experts]
        assert list(map(id, getattr(experts, name).parameters(recurse=False))) == list(map(id, own))


def test_one_stacked_weight_is_as_many():
    x, stacked = torch.randn(9, 4), torch.randn(3, 5, 4)
    expected = torch.cat([rows @ weight.t() for rows, weight in zip(x.split([2, 0, 7]), stacked, strict=True)])
    assert torch.equal(grouped_linear(x, stacked, [2, 0, 7]), expected)
    assert torch.equal(grouped_linear(x, list(stacked), [2, 0, 7]), expected)
