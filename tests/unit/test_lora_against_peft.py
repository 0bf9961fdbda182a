"""Adapters beside our layers compute what peft's compute beside those of transformers: logits, and gradients of every A
and B, in fp32."""

import peft
import pytest
import torch
import torch.nn.functional as F
from single_process import build, positions
from transformers import AutoModelForCausalLM

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.hf.config import HyConfig
from hymeg.models.lora import add_adapters

RANK, ALPHA = 4, 6.0
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETS = {  # what has adapters: in peft's words, in ours
    "all": (list(LINEAR), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], list(LINEAR)),
    "some parts of a weight": (["q_proj", "up_proj"], [], ["q_proj", "mlp.up_proj", "shared_mlp.up_proj"]),
    "v, gate and experts": (
        ["v_proj", "gate_proj"],
        ["mlp.experts.gate_up_proj"],
        ["v_proj", "gate_proj", "experts.up_proj"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(folder, dtype="fp32", seed=5)
    return folder


@pytest.mark.parametrize(
    ("what", "scaling"), [("all", "rslora"), ("some parts of a weight", "lora"), ("v, gate and experts", "lora")]
)
def test_logits_and_gradients_equal(folder, what, scaling):
    modules, parameters, targets = SETS[what]
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"),
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            use_rslora=scaling == "rslora",
            target_modules=modules,
            target_parameters=parameters or None,
        ),
    )
    ours, config = build(folder), HyConfig.from_dir(folder)
    add_adapters(ours, config, AdapterSettings(RANK, ALPHA, scaling, 0.0, tuple(targets)), seed=1)
    generator = torch.Generator().manual_seed(0)
    adapters = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    pairs = {part.path: (a, b) for adapter in ours.adapters.values() for part, a, b in adapter.pairs()}
    mine = {}  # peft's name -> the parameters of ours that it stands for, and how they make its shape
    for name in adapters:
        mine[name] = _of_ours(name, pairs, config.num_experts)
    assert sum(len(of) for of, _ in mine.values()) == 2 * len(pairs)
    with torch.no_grad():
        for name, (of_ours, _) in mine.items():
            for parameter, value in zip(of_ours, _parts(adapters[name], name, len(of_ours), config), strict=True):
                parameter.copy_(value)
    tokens = torch.randint(0, config.pad_token_id, (2, 33), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(inputs).logits
    with torch.no_grad():
        found, base = ours(inputs, positions(inputs), None), build(folder)(inputs, positions(inputs), None)
    assert (base - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-5
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    ours(inputs, positions(inputs), None, labels=labels).mean().backward()
    for name, (of_ours, joined) in mine.items():
        found, expected = joined([parameter.grad for parameter in of_ours]), adapters[name].grad
        error = (found - expected).norm() / expected.norm()
        assert expected.norm() > 0 and error <= 1e-5, f"{name}: {error:.1e}"
    assert all(p.grad is None for name, p in ours.named_parameters() if not name.startswith("adapters."))


RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.mark.parametrize(("flags", "goes_on"), [("", False), (RECOMPUTED, True)])
def test_the_backward_pass_ends_where_nothing_below_is_trained(folder, flags, goes_on):
    """But for layers that are recomputed, which pass nothing on unless they are asked to."""
    model, config = build(folder, *flags.split()), HyConfig.from_dir(folder)
    add_adapters(model, config, AdapterSettings(RANK, ALPHA, "lora", 0.0, LINEAR), seed=1)
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    tokens = torch.arange(16).view(1, 16)
    model(tokens, positions(tokens), None, labels=tokens).mean().backward()
    assert [output.requires_grad for output in embedded] == [goes_on]
    first = [part for adapter in model.adapters.values() for part in adapter.pairs() if ".layers.0." in part[0].path]
    assert len(first) == 7 and all(b.grad is not None and b.grad.abs().sum() > 0 for _, _, b in first)


def _of_ours(name: str, pairs: dict, num_experts: int):
    """Our parameters that one of peft's stands for, and how they, or their gradients, make it. Of the experts peft has
    one A for gate and up, so that its gradient is the sum of both."""
    path, _, letter = (
        name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
    )
    index = "AB".index(letter[0])
    path = path.replace("shared_experts", "shared_mlp")
    if ".mlp.experts" not in path:
        return [pairs[path][index]], lambda of: of[0]
    # gate_up_proj is the inner of peft's two wrappers
    inner = path.endswith(".base_layer") or f"{path}.down_proj" not in pairs
    above = path.removesuffix(".base_layer")
    of = [pairs[f"{above}.{part}"][index] for part in (("gate_proj", "up_proj") if inner else ("down_proj",))]
    if index == 0:
        return of, lambda of: sum(of).flatten(0, 1)
    return of, lambda of: torch.cat(of, dim=1).permute(1, 2, 0).flatten(1)  # [E, out, r] to [out, r * E]


def _parts(value: torch.Tensor, name: str, count: int, config) -> list[torch.Tensor]:
    if ".mlp.experts" not in name:
        return [value]
    if "lora_A" in name:
        return [value.view(config.num_experts, RANK, -1)] * count
    return list(value.view(len(value), RANK, config.num_experts).permute(2, 0, 1).chunk(count, dim=1))
