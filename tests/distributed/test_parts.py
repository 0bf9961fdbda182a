"""Parts that no training shows alone: gloo's stand-ins, what a frozen part holds after training."""

import torch
from safetensors.torch import load_file

FROZEN = "--mtp-loss-scaling-factor 0 --weight-decay 0.5"


def test_gloo_gathers_scatters_and_exchanges_unequal_shards(worlds):
    first, second = worlds.run(2, [], "gloo_collectives")["ranks"]
    assert first["gathered"] == second["gathered"] == [[[0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]
    assert (first["scattered"], second["scattered"]) == ([1.0], [3.0, 3.0])
    assert (first["received"], second["received"]) == ([0.0, 100.0], [1.0, 2.0, 101.0, 102.0])


def test_frozen_multi_token_prediction_is_kept_to_the_bit(worlds, command, folder):
    """Under weight decay 0.5 and with its loss weighed 0, in a checkpoint that the trainer saved; what trains has
    moved.
    """
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    frozen, saved = worlds.run(1, command(FROZEN, f"--save {folder / 'frozen'}", checkpoint="mtp")), {}
    _load_state_dict(
        saved,
        storage_reader=FileSystemReader(folder / "frozen" / "iter_0000003"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    original = load_file(folder / "mtp" / "model.safetensors")
    names = {
        "mtp.layers.0.eh_proj.weight": "model.layers.4.eh_proj.weight",
        "mtp.layers.0.enorm.weight": "model.layers.4.enorm.weight",
        "mtp.layers.0.transformer_layer.mlp.router.weight": "model.layers.4.mlp.router.gate.weight",
        "mtp.layers.0.transformer_layer.mlp.router.expert_bias": "model.layers.4.mlp.expert_bias",
        "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight": "model.layers.4.self_attn.o_proj.weight",
    }
    for key, name in names.items():
        assert torch.equal(saved[key], original[name]), key
    experts = saved["mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight"]
    for expert in range(8):
        assert torch.equal(experts[expert], original[f"model.layers.4.mlp.experts.{expert}.down_proj.weight"])
    assert not torch.equal(saved["output_layer.weight"], original["lm_head.weight"])
    assert not torch.equal(
        saved["decoder.layers.3.mlp.router.weight"], original["model.layers.3.mlp.router.gate.weight"]
    )
    # and the trunk trains as if the layer were not there
    assert frozen["steps"] == worlds.run(1, command("--weight-decay 0.5"))["steps"]
