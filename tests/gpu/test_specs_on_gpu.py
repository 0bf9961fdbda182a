"""What one layer spec computes, the other does: experts grouped or one by one, packed samples, the fp32 head,
multi-token prediction.

The local spec in fp32 is the reference: the unit tests hold it against transformers. On CPU it is held against itself
on another path (recomputed).
"""

import pytest
import torch
from comparison import (
    BATCH,
    LOCAL,
    TE,
    TE_SEQUENTIAL,
    all_gradients,
    errors,
    ours,
    packed_losses,
    padded_losses,
    relative,
    tokens_of,
)
from megatron.core.utils import unwrap_model
from single_process import build, positions

RECOMPUTED = f"{LOCAL} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SPECS = [
    pytest.param(RECOMPUTED, id="local"),
    pytest.param(TE, id="te-grouped", marks=pytest.mark.gpu),
    pytest.param(TE_SEQUENTIAL, id="te-sequential", marks=pytest.mark.gpu),
]
LENGTHS = [5, 1, 17, 9]
MTP = {"num_nextn_predict_layers": 1}


def tolerance(flags: str) -> float:
    """Relative, in fp32: the local spec's products are fp32, Transformer Engine's TF32."""
    return 1e-5 if flags.startswith(LOCAL) else 1e-2


@pytest.mark.parametrize("flags", SPECS)
def test_multi_token_prediction(checkpoints, flags):
    """The trunk's losses, and every gradient, into which the loss of the MTP layer goes through all of the model."""
    folder = checkpoints("tiny", **MTP)
    tokens = tokens_of(folder, BATCH["tiny"])
    expected = ours(folder, LOCAL, tokens)
    assert any(
        name.startswith("model.layers.4.eh_proj") and gradient.any() for name, gradient in expected.gradients.items()
    )
    for name, error in errors(ours(folder, flags, tokens), expected).items():
        assert error <= 10 * tolerance(flags), f"{name}: {error:.1e}"


def test_multi_token_prediction_counts(checkpoints):
    """Were its loss without effect, the test above could not fail on it."""
    folder = checkpoints("tiny", **MTP)
    tokens = tokens_of(folder, BATCH["tiny"])
    plain, stronger = (ours(folder, f"{LOCAL} --mtp-loss-scaling-factor {factor}", tokens) for factor in (0.1, 0.3))
    assert relative(all_gradients(stronger), all_gradients(plain)) > 0.05


@pytest.mark.parametrize("precision", ["", "--bf16"])
@pytest.mark.parametrize("flags", SPECS)
def test_packed_equals_padded(checkpoints, flags, precision):
    """One sample of four sequences against the four in rows of their own."""
    if "recompute" in flags:
        flags = LOCAL
    folder = checkpoints("tiny")
    tokens = tokens_of(folder, (1, sum(LENGTHS)))
    packed, padded = (
        compute(folder, f"{flags} {precision}", LENGTHS, tokens) for compute in (packed_losses, padded_losses)
    )
    assert relative(packed, padded) <= (1e-2 if precision else tolerance(flags))
    assert relative(packed_losses(folder, f"{flags} {precision}", [sum(LENGTHS)], tokens), padded) > 1e-2, (
        "the boundaries must matter"
    )


@pytest.mark.parametrize("flags", SPECS)
def test_fp32_logits_from_bf16_weights(checkpoints, flags):
    """config.json's enable_lm_head_fp32: the head's product is exact to fp32, which bf16 logits are not."""
    folder = checkpoints("tiny")
    tokens = tokens_of(folder, BATCH["tiny"])[:, :-1]
    wrapped, states = build(folder, *f"{flags} --bf16".split()).eval(), []
    model = unwrap_model(wrapped)
    model.output_layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        found = model(tokens, positions(tokens), None).transpose(0, 1)
        exact = states[0].double() @ model.output_layer.weight.double().T
    assert states[0].dtype == torch.bfloat16 and found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 < (exact.bfloat16() - exact).abs().max()


@pytest.mark.parametrize("extra", ["--recompute-logits", "--cross-entropy-loss-fusion"])
def test_losses_without_logits_equal_the_others(checkpoints, extra):
    """Kept exponentials against recomputed ones, and against Megatron's fused cross entropy on whole logits, in bf16:
    what one rounding more in the head grows to in the gradients of all the model, whose error against fp32 is 8e-2."""
    folder = checkpoints("tiny", **MTP)
    tokens = tokens_of(folder, BATCH["tiny"])
    expected, found = (ours(folder, f"{LOCAL} --bf16 {flags}", tokens) for flags in ("", extra))
    assert relative(found.losses, expected.losses) <= 1e-6
    assert relative(all_gradients(found), all_gradients(expected)) <= 2e-2
