"""Losses without logits are those of the logits: against torch's cross entropy on whole logits, and through the model
against Megatron's.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import multi_token_prediction
from megatron.core.utils import unwrap_model
from single_process import build, ensure_world, positions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.hf.config import HyConfig
from hymeg.models.linear_cross_entropy import VocabShard, linear_cross_entropy
from hymeg.platform import kernels

TOKENS, HIDDEN, VOCAB, PADDED = 37, 48, 1000, 1024
CONFIDENT = 7


def shard(**changes) -> VocabShard:
    """128 entries a slice, the last one cut: 8 slices of the 1000."""
    ensure_world()
    fields = {
        "start": 0,
        "num_rows": VOCAB,
        "fp32_logits": True,
        "recompute": False,
        "group": torch.distributed.group.WORLD,
        "slice_elements": 1,
    }
    return VocabShard(**fields | changes)


def operands(dtype=torch.float32, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn(PADDED, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    # The edges of slices and of the vocabulary, and weights of which some are zero, as a loss mask's.
    labels[:5] = torch.tensor([0, 127, 128, 896, VOCAB - 1])
    with torch.no_grad():  # one is predicted right: logit 14 against a spread of 2
        row = weight[labels[CONFIDENT]].float()
        hidden[CONFIDENT] = 14 * row / row.square().sum()
    return hidden, weight, labels, torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 3 > 0)


def computed(hidden, weight, labels, factors, **changes):
    losses, hits = linear_cross_entropy(hidden, weight, labels, shard(**changes))
    (losses * factors).sum().backward()
    return losses.detach(), hits, hidden.grad, weight.grad


def expected(hidden, weight, labels, factors):
    """In fp64, on whole logits without the padding."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight[:VOCAB].T
    losses = F.cross_entropy(logits, labels, reduction="none")
    (losses * factors.double()).sum().backward()
    return losses.detach(), logits.argmax(-1) == labels, hidden.grad, weight.grad


def relative(found, exact) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_fp32_equals_whole_logits(recompute, scale):
    """From near-uniform to near-certain predictions, logits up to a hundred."""
    inputs = operands(scale=scale)
    losses, hits, *gradients = computed(*inputs, recompute=recompute)
    exact_losses, exact_hits, *exact_gradients = expected(*inputs)
    assert torch.allclose(losses.double(), exact_losses, rtol=1e-6, atol=1e-6)
    assert torch.equal(hits, exact_hits) and hits.any() and not hits.all()
    for found, exact in zip(gradients, exact_gradients, strict=True):
        assert relative(found, exact) <= 1e-5
    assert gradients[1][VOCAB:].eq(0).all() and gradients[1][:VOCAB].any(dim=1).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_is_within_its_rounding(recompute):
    """Losses are exact to fp32; gradients to bf16's 8 bits, confident tokens included, whose gradient at the label is a
    small difference.
    """
    inputs = operands(torch.bfloat16, scale=0.3)
    losses, _, *gradients = computed(*inputs, recompute=recompute)
    exact_losses, _, *exact_gradients = expected(*inputs)
    assert losses.dtype == torch.float32 and 1e-3 < exact_losses[CONFIDENT] < 0.02
    assert torch.allclose(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    for found, exact in zip(gradients, exact_gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, exact) < 2**-8
    assert relative(gradients[0][CONFIDENT], exact_gradients[0][CONFIDENT]) < 2**-7


def test_logits_in_bf16_are_rounded():
    """Without enable_lm_head_fp32: the losses of rounded logits, not those of exact ones."""
    hidden, weight, labels, _ = operands(torch.bfloat16, scale=0.3)
    with torch.no_grad():
        losses, _ = linear_cross_entropy(hidden, weight, labels, shard(fp32_logits=False))
        rounded = F.cross_entropy((hidden @ weight[:VOCAB].T).float(), labels, reduction="none")
        exact, _ = linear_cross_entropy(hidden, weight, labels, shard())
    assert torch.allclose(losses, rounded, atol=1e-5) and not torch.allclose(losses, exact, atol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(recompute, frozen):
    inputs = operands()
    inputs[frozen].requires_grad_(False)
    gradients = computed(*inputs, recompute=recompute)[2:]
    assert gradients[frozen] is None
    assert relative(gradients[1 - frozen], expected(*inputs)[3 - frozen]) <= 1e-5


@pytest.mark.parametrize(("recompute", "bytes_an_entry"), [(False, 2), (True, 0)])
def test_what_is_kept_for_the_backward_pass(recompute, bytes_an_entry):
    """The exponentials in bf16 and each slice's maxima, or nothing that grows with tokens times vocabulary; and nothing
    at all without gradients.
    """
    hidden, weight, labels, _ = operands(torch.bfloat16)
    sizes = []

    def count(tensor):
        sizes.append(0 if tensor is weight or tensor is hidden else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels, shard(recompute=recompute))
        maxima = 0 if recompute else 4 * len(shard().slices(TOKENS))
        assert sum(sizes) == TOKENS * (bytes_an_entry * VOCAB + 16 + maxima)  # 16: labels, losses, sums
        sizes.clear()
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels, shard(recompute=recompute))
        assert sum(sizes) == 0


def test_a_second_backward_pass_is_refused():
    """It would read exponentials that the first one has overwritten."""
    hidden, weight, labels, _ = operands()
    losses, _ = linear_cross_entropy(hidden, weight, labels, shard())
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        losses.sum().backward()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(
        folder / "mtp", HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1000}), dtype="fp32", num_mtp_layers=2
    )
    return folder / "mtp"


class TestModel:
    @staticmethod
    def computed(model, monkeypatch, whole_logits: bool, **changes):
        """Losses, every gradient, and what multi-token prediction logs; with `whole_logits` as Megatron computes them,
        from logits.
        """
        model.zero_grad()
        tokens = torch.randint(0, 990, (2, 33), generator=torch.Generator().manual_seed(5))
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        logged = []
        with monkeypatch.context() as patches:
            patches.setattr(
                multi_token_prediction.MTPLossLoggingHelper,
                "save_metrics_to_tracker",
                lambda *args, **kwargs: logged.append(args[:3]),
            )
            if whole_logits:
                head = type(model)
                patches.setattr(head, "_postprocess", super(multi_head(head), model)._postprocess.__func__)
            losses = model(inputs, positions(inputs), None, labels=labels, loss_mask=(labels % 4 > 0).float())
        losses.mean().backward()
        return (
            losses.detach(),
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
            torch.tensor(logged),
        )

    @pytest.mark.parametrize("flags", [(), ("--recompute-logits",)], ids=["kept", "recomputed"])
    def test_losses_gradients_and_mtp_equal_megatrons(self, folder, monkeypatch, flags):
        model = build(folder, *flags).train()
        head = model.output_layer
        assert head.shard.recompute is bool(flags)
        head.shard = dataclasses.replace(head.shard, slice_elements=1)
        calls = []
        whole = tensor_parallel.vocab_parallel_cross_entropy
        monkeypatch.setattr(
            tensor_parallel,
            "vocab_parallel_cross_entropy",
            lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs),
        )
        losses, gradients, logged = self.computed(model, monkeypatch, whole_logits=False)
        assert not calls, "no logits, no loss from them"
        exact_losses, exact_gradients, exact_logged = self.computed(model, monkeypatch, whole_logits=True)
        assert len(calls) == 3, "the trunk's loss and those of two multi-token-prediction layers"
        assert torch.allclose(losses, exact_losses, rtol=1e-6)
        assert gradients.keys() == exact_gradients.keys()
        for name, exact in exact_gradients.items():
            assert exact.any() and relative(gradients[name], exact) <= 1e-5, name
        assert torch.allclose(logged, exact_logged, rtol=1e-6) and logged[:, 2].gt(0).all()

    def test_without_labels_there_are_logits(self, folder):
        model = unwrap_model(build(folder).eval())
        tokens = torch.arange(64)[None]
        with torch.no_grad():
            logits = model(tokens, positions(tokens), None)
            losses = model(tokens, positions(tokens), None, labels=tokens)
        assert torch.allclose(
            losses, F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none"), rtol=1e-6, atol=1e-6
        )

    def test_megatrons_fused_loss_has_its_logits(self, folder, monkeypatch):
        """--cross-entropy-loss-fusion chooses the engine's own."""
        from megatron.core.models.common.language_module import language_module

        model = build(folder, "--cross-entropy-loss-fusion").eval()
        plain = build(folder).eval()
        shapes, fused = [], language_module.fused_vocab_parallel_cross_entropy
        monkeypatch.setattr(
            language_module,
            "fused_vocab_parallel_cross_entropy",
            lambda logits, *rest: shapes.append(logits.shape) or fused(logits, *rest),
        )
        tokens = torch.arange(64)[None]
        with torch.no_grad():
            losses = [m(tokens, positions(tokens), None, labels=tokens) for m in (model, plain)]
        assert set(shapes) == {(64, 1, 1024)} and torch.allclose(*losses, rtol=1e-6)


def multi_head(model_class):
    """The class whose `_postprocess` is ours."""
    return next(base for base in model_class.__mro__ if "_postprocess" in vars(base))


class Launches(TorchDispatchMode):
    """Counts operators that work on elements: on a GPU each is a kernel at least."""

    NONE = "t slice select unsqueeze view expand detach alias as_strided empty empty_like lift_fresh prim::device"

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator._schema.name.removeprefix("aten::") not in self.NONE.split()
        return operator(*args, **(kwargs or {}))


def test_launches_of_a_micro_batch_on_a_gpu(monkeypatch):
    """8,192 tokens over 120,832 rows: 15 slices, forward and backward. Small slices would be bound by launches: 236 of
    the CPU's size took 9,223.
    """
    # One kernel, as cuBLAS with fp32 output.
    monkeypatch.setattr(VocabShard, "logits", lambda shard, hidden, weight: torch.zeros(len(hidden), len(weight)))
    with FakeTensorMode(), Launches() as launches:
        hidden, weight = (torch.empty(n, 2048, dtype=torch.bfloat16, requires_grad=True) for n in (8192, 120832))
        labels = torch.empty(8192, dtype=torch.int64)
        on_a_gpu = shard(num_rows=120832, slice_elements=kernels.SLICE_ELEMENTS["cuda"])
        losses, _ = linear_cross_entropy(hidden, weight, labels, on_a_gpu)
        losses.sum().backward()
    assert 15 * 10 < launches.count <= 15 * 14 + 50, launches.count


def test_the_benchmark_tells_slices_apart(monkeypatch):
    """On a CPU, tiny: the same losses and gradients, fewer operations in fewer slices, less memory in smaller ones."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools" / "benchmarks")
    import head as benchmark

    ensure_world()
    megatron, *others = benchmark.measure(64, 32, 2048, [8192, 131072], rounds=1)
    small, small_again, large, large_again = others[-4:]
    assert [found["name"] for found in (small, large_again)] == [
        "hymeg, kept, slices of 8,192",
        "hymeg, recomputed, slices of 131,072",
    ]
    assert small["operations"] - large["operations"] == 15 * 16  # 14 on a GPU, where the product copies no operand
    assert 2 * small_again["peak"] < min(large_again["peak"], megatron["peak"])
    assert all(error < 5e-3 for found in others for error in found["errors"]) and not any(megatron["errors"])
