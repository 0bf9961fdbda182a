"""Our models compute what transformers computes from the same files: logits, loss, every gradient, the hidden states
and router logits between.
"""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_weights import gather_from
from single_process import build, positions
from transformers import AutoModelForCausalLM

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.hf.config import HyConfig
from hymeg.models.router import Router

# The published shapes with their proportions kept: query heads to key-value heads, experts to top-k, shared to routed
# width, first layer dense.
SHAPES = {
    "Hy-MT2": {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_experts": 32,
        "num_experts_per_tok": 2,
    },
    "Hy3": {
        "hidden_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 48,
        "num_experts_per_tok": 2,
        "intermediate_size": 312,
        "moe_intermediate_size": 40,
        "expert_hidden_dim": 40,
    },
}


@pytest.fixture(
    scope="module", params=[(shape, seed) for shape in SHAPES for seed in (0, 1)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def pair(request, tmp_path_factory):
    """Both models of one fp32 checkpoint, tokens `[2, 65]`, and what each computed."""
    shape, seed = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    # transformers ignores first_k_dense_replace: the layers must be named.
    types = ["dense"] + ["sparse"] * (SHAPES[shape]["num_hidden_layers"] - 1)
    config = HyConfig.from_dict(TINY_CONFIG | SHAPES[shape] | {"mlp_layer_types": types})
    config = write_tiny_checkpoint(folder, config, dtype="fp32", seed=seed)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    assert theirs.model.layers[1].mlp.e_score_correction_bias.abs().min() > 0
    ours = build(folder).train()
    # Without the padding token, whose embedding gets no gradient in transformers (padding_idx).
    tokens = torch.randint(0, config.pad_token_id, (2, 65), generator=torch.Generator().manual_seed(seed))
    return config, theirs, ours, tokens


def test_logits_equal(pair):
    _, theirs, ours, tokens = pair
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours(tokens, positions(tokens), None)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-5


def test_every_gradient_equal(pair):
    config, theirs, ours, tokens = pair
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    theirs.zero_grad()
    expected_loss = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), labels.flatten())
    expected_loss.backward()
    ours.zero_grad()
    losses = ours(inputs, positions(inputs), None, labels=labels)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(expected_loss.item(), rel=1e-6)

    # gather_from takes what lies in the parameters: for a moment the gradients do.
    weights = {name: parameter.data for name, parameter in ours.named_parameters()}
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    found = gather_from(config, [ours], layout="fused")
    for name, parameter in ours.named_parameters():
        parameter.data = weights[name]
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == {name for name in found if "e_score_correction_bias" not in name}
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0 and error <= 1e-4, f"{name}: {error:.1e}"


def test_hidden_states_and_router_logits_equal(pair):
    config, theirs, ours, tokens = pair
    states, router_logits, hooks = {}, {}, []
    for module in ours.modules():  # Megatron counts layers from 1
        if isinstance(module, TransformerLayer):
            keep = lambda layer, _, output: states.__setitem__(layer.layer_number - 1, output[0])  # noqa: E731
        elif isinstance(module, Router):
            keep = lambda r, inputs, _: router_logits.__setitem__(r.layer_number - 1, r.gating(inputs[0]))  # noqa: E731
        else:
            continue
        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        ours(tokens, positions(tokens), None)
        expected = theirs(tokens, output_hidden_states=True, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    assert list(router_logits) == moe_layers and list(states) == list(range(config.num_hidden_layers))
    for layer, logits in zip(moe_layers, expected.router_logits, strict=True):
        found = router_logits[layer].transpose(0, 1).reshape(logits.shape)
        assert (found - logits).abs().max() <= 1e-5
    # theirs[0] is the embedding, and the last one is after the final norm
    for layer in range(config.num_hidden_layers - 1):
        assert (states[layer].transpose(0, 1) - expected.hidden_states[layer + 1]).abs().max() <= 1e-5
