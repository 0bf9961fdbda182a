"""What the GPU benchmark is made of: slices of real width, and a profile that knows what the backward pass works for.
That its models can be built is tests/layer_specs/test_gpu_construction.py's."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))

from gpu import CANDIDATES, FP8, PARTS, WIDTHS, jobs, write_slice
from gpu_profile import _class_of_event, _classes_of_sequences, mark

JOBS = {
    f"{one['model']} {one['micro_batch_size']} x {one['seq_length']} {one['flags']}": one
    for one in jobs(list(PARTS), tiny=False)
}


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    for model, widths in WIDTHS.items():
        write_slice(folder / model, widths, 2)
    return folder


def test_slices_are_of_real_width(slices):
    """As published, but for the layers."""
    from hymeg.hf.config import HyConfig

    for model, (hidden, experts, width) in {"Hy-MT2": (2048, 128, 768), "Hy3": (4096, 192, 1536)}.items():
        config = HyConfig.from_dir(str(slices / model))
        assert (config.hidden_size, config.num_experts, config.moe_intermediate_size) == (hidden, experts, width)
        assert (config.vocab_size, config.num_experts_per_tok, config.num_hidden_layers) == (120832, 8, 2)
        assert [config.is_moe_layer(layer) for layer in range(2)] == [False, True]


def test_all_candidates_are_among_the_jobs():
    for flags in (*CANDIDATES, *FP8):
        assert any(flags in one["flags"] for one in JOBS.values())


def test_products_of_the_backward_pass_are_of_their_forward_modules_class():
    """Two linear layers, three products each."""
    model = torch.nn.ModuleDict(
        {
            "layer_self_attention": torch.nn.Linear(8, 12),
            "mlp": torch.nn.ModuleDict({"experts": torch.nn.Linear(12, 16)}),
        }
    )
    mark(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        hidden = torch.randn(4, 8, requires_grad=True)
        model["mlp"]["experts"](model["layer_self_attention"](hidden)).sum().backward()
    events = list(profiler.events())
    of_sequence = _classes_of_sequences(events)
    products = [_class_of_event(event, of_sequence) for event in events if event.name in ("aten::mm", "aten::addmm")]
    assert sorted(products) == ["attention"] * 3 + ["grouped GEMM"] * 3
