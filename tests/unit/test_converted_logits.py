"""What is converted computes the same. That transformers computes the same from an export, to the bit, is
test_convert's.
"""

import pytest
import torch
from megatron.core import dist_checkpointing
from single_process import build, positions
from transformers import AutoModelForCausalLM

from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.hf.config import HyConfig

# transformers ignores first_k_dense_replace: the layers must be named.
CONFIG = TINY_CONFIG | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts": 32}


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_our_model_of_the_distributed_checkpoint_against_transformers_on_the_original(tmp_path, layout):
    write_tiny_checkpoint(tmp_path / "original", HyConfig.from_dict(CONFIG), dtype="fp32", layout=layout)
    hf_to_dist(tmp_path / "original", tmp_path / "dist")
    tokens = torch.randint(0, 900, (2, 65), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = build(tmp_path / "dist", weights=False).eval()
    loaded = dist_checkpointing.load({"model": ours.sharded_state_dict()}, str(tmp_path / "dist" / "release"))
    ours.load_state_dict(loaded["model"])
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens, positions(tokens), None)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-5
