"""Both layer specs compute what transformers computes from the same files: fp32 to the precision of its products, bf16
as well as transformers does.

In bf16 tokens near a tie go to other experts than in fp32, in transformers as much as here: a whole tensor's error is
held against transformers' own, and the median token, which met no tie, against an absolute bound.
"""

import pytest
import torch
from comparison import BATCH, LOCAL, TE, TE_SEQUENTIAL, all_gradients, errors, ours, relative, theirs, tokens_of

# Transformer Engine multiplies fp32 in TF32, 10 bits (by reading: transformer_engine/common/gemm/cublaslt_gemm.cu).
FP32_TOLERANCE = {LOCAL: 1e-5, TE: 1e-2, TE_SEQUENTIAL: 1e-2}
CASES = [
    pytest.param("tiny", LOCAL, id="tiny-local"),
    *(
        pytest.param(shape, flags, id=f"{shape}-{name}", marks=pytest.mark.gpu)
        for shape, flags, name in (
            ("mid", LOCAL, "local"),
            *(
                (shape, flags, name)
                for shape in BATCH
                for flags, name in ((TE, "te-grouped"), (TE_SEQUENTIAL, "te-sequential"))
            ),
        )
    ),
]


@pytest.fixture(scope="module")
def reference(checkpoints):
    """transformers' outcome by shape and precision, computed once."""
    computed = {}

    def get(shape: str, dtype: torch.dtype):
        if (shape, dtype) not in computed:
            folder = checkpoints(shape)
            computed[shape, dtype] = theirs(folder, dtype, tokens_of(folder, BATCH[shape]))
        return computed[shape, dtype]

    return get


@pytest.mark.parametrize(("shape", "flags"), CASES)
def test_fp32(checkpoints, reference, shape, flags):
    folder = checkpoints(shape)
    found = errors(ours(folder, flags, tokens_of(folder, BATCH[shape])), reference(shape, torch.float32))
    for name, error in found.items():
        assert error <= FP32_TOLERANCE[flags] * (1 if name in ("logits", "losses") else 10), f"{name}: {error:.1e}"


@pytest.mark.parametrize(("shape", "flags"), CASES)
def test_bf16(checkpoints, reference, shape, flags):
    folder = checkpoints(shape)
    exact, rounded = reference(shape, torch.float32), reference(shape, torch.bfloat16)
    found = ours(folder, f"{flags} --bf16", tokens_of(folder, BATCH[shape]))
    assert 0 < relative(found.losses, exact.losses) <= 1e-2
    for figure in ("logits", "losses"):
        own, peers = (relative(getattr(outcome, figure), getattr(exact, figure)) for outcome in (found, rounded))
        assert own <= 1.5 * peers, f"{figure}: {own:.1e}, transformers {peers:.1e}"
    own, peers = (relative(all_gradients(outcome), all_gradients(exact)) for outcome in (found, rounded))
    assert own <= 1.5 * peers, f"gradients: {own:.1e}, transformers {peers:.1e}"
    own, peers = (token_errors(outcome, exact).median() for outcome in (found, rounded))
    assert own <= 2e-2 and own <= 1.5 * peers, f"median token: {own:.1e}, transformers {peers:.1e}"


def token_errors(found, exact) -> torch.Tensor:
    """Relative norm of the logits' error, token by token."""
    return (found.logits - exact.logits).norm(dim=-1) / exact.logits.norm(dim=-1)
