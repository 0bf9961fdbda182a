"""Adapters' files: what we write peft loads and computes with as we do, merged weights are W + scale * B @ A, and
nothing is lost on the way there and back.
"""

import functools
import json
import math
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapter_files import EVERY_KIND, random_adapter, save_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import adapter_modules
from hymeg.checkpoint.adapters import adapter_to_peft, merge, open_adapter, peft_to_adapter
from hymeg.checkpoint.mapping import num_rows
from hymeg.checkpoint.row_tensors import TensorReader
from hymeg.hf.config import HyConfig
from hymeg.hf.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint

# transformers ignores first_k_dense_replace: the layers must be named.
CONFIG = HyConfig.from_dict(TINY_CONFIG | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]})
TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "every": EVERY_KIND,
    "gate_up": ("experts.gate_proj", "experts.up_proj"),
    "down": ("experts.down_proj", "shared_mlp.gate_proj"),
    "gate": ("experts.gate_proj", "experts.down_proj", "mlp.up_proj"),
}


def settings_of(targets="every", rank=3, scaling="lora") -> AdapterSettings:
    return AdapterSettings(rank, 8.0, scaling, 0.0, TARGETS[targets])


@functools.cache
def tokens() -> torch.Tensor:
    return torch.randint(0, 900, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    write_tiny_checkpoint(folder, CONFIG, dtype="fp32")
    return folder


def model_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def merged_by_hand(weights: dict[str, torch.Tensor], adapter, settings, config) -> dict[str, torch.Tensor]:
    """W + scale * B @ A in fp64, module by module."""
    wanted = {name: tensor.double() for name, tensor in weights.items()}
    scale = settings.alpha / (settings.rank if settings.scaling == "lora" else math.sqrt(settings.rank))
    for module in adapter_modules(config, settings.targets):
        a, b = adapter[f"adapter.{module.path}.lora_A"].double(), adapter[f"adapter.{module.path}.lora_B"].double()
        delta = scale * b @ a
        above, _, name = module.path.rpartition(".")
        if module.num_experts is None:
            wanted[f"{module.path}.weight"] += delta
        for expert in range(module.num_experts or 0):
            wanted[f"{above}.{expert}.{name}.weight"] += delta[expert]
    return wanted


def peft_model(base: Path, folder: Path):
    """The base with the adapter; every key of its file consumed, none of the model's left as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(model_of(base), folder).eval()
    stored = load_file(folder / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name
    return model


@pytest.mark.parametrize(
    ("targets", "scaling"),
    [("attention", "rslora"), ("every", "rslora"), ("gate_up", "lora"), ("down", "lora"), ("gate", "lora")],
)
def test_peft_computes_with_what_we_write_what_the_merged_weights_do(tmp_path, base, targets, scaling):
    settings = settings_of(targets, scaling=scaling)
    adapter = random_adapter(CONFIG, settings)
    save_adapter(tmp_path / "dist", CONFIG, settings, adapter)
    adapter_to_peft(tmp_path / "dist", tmp_path / "peft")
    merge(base, tmp_path / "dist", tmp_path / "merged", verify=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    by_hand = merged_by_hand(load_file(base / "model.safetensors"), adapter, settings, CONFIG)
    assert merged.keys() == by_hand.keys()
    for name, tensor in by_hand.items():
        assert (merged[name].double() - tensor).abs().max() <= 1e-7 * max(1, tensor.abs().max()), name
    with_adapter = peft_model(base, tmp_path / "peft")
    ours = logits_of(model_of(tmp_path / "merged"))
    assert (ours - logits_of(model_of(base))).abs().max() > 0.1
    assert (logits_of(with_adapter) - ours).abs().max() <= 1e-5 * ours.abs().max()
    theirs = with_adapter.merge_and_unload().state_dict()
    for name, tensor in model_of(tmp_path / "merged").state_dict().items():
        assert (theirs[name] - tensor).abs().max() <= 2e-7, name


@pytest.mark.parametrize(("layout", "dtype"), [("peft", torch.float32), ("served", torch.bfloat16)])
def test_there_and_back_every_bit_is_the_same(tmp_path, base, layout, dtype):
    """Ours -> peft's -> ours -> peft's, gate and up with an A each."""
    settings = settings_of(rank=2)
    adapter = random_adapter(CONFIG, settings, ("model.norm.weight",) * (layout == "peft"), dtype)
    save_adapter(tmp_path / "dist", CONFIG, settings, adapter)
    adapter_to_peft(tmp_path / "dist", tmp_path / "peft", layout=layout)
    peft_to_adapter(tmp_path / "peft", tmp_path / "back", base_hf=base, verify=True)
    adapter_to_peft(tmp_path / "back", tmp_path / "again", layout=layout, workers=1)
    found = open_adapter(tmp_path / "back")
    assert found.settings._replace(base=None) == settings
    assert_holds(found, adapter)
    assert_same_folders(tmp_path / "again", tmp_path / "peft")
    assert {t.dtype for t in load_file(tmp_path / "peft" / "adapter_model.safetensors").values()} == {dtype}


def assert_holds(found, adapter: dict[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == adapter.keys()
    with TensorReader() as reader:
        for key, tensor in found.tensors.items():
            numbers = reader.numbers(tensor, [(0, num_rows(tensor.shape))])
            assert torch.equal(torch.from_numpy(numbers).reshape(tensor.shape), adapter[key].float()), key


def assert_same_folders(found: Path, wanted: Path) -> None:
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (found, wanted))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    configs = [json.loads((folder / "adapter_config.json").read_bytes()) for folder in (found, wanted)]
    for config in configs:
        del config["base_model_name_or_path"]
    assert configs[0] == configs[1]


def test_what_peft_trained_comes_back_as_it_was(tmp_path, base):
    """One A for gate and up; the shared expert and the dense layer under transformers' names."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "down_proj", "shared_experts.up_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["mlp.gate"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model_of(base), config)
    model.save_pretrained(tmp_path / "theirs")
    peft_to_adapter(tmp_path / "theirs", tmp_path / "dist", base_hf=base)
    settings = open_adapter(tmp_path / "dist").settings
    assert (settings.rank, settings.alpha) == (4, 16)
    routed = {"mlp.experts.gate_proj", "mlp.experts.up_proj"}
    assert set(settings.targets) == routed | {"q_proj", "mlp.shared_mlp.up_proj", "down_proj"}
    adapter_to_peft(tmp_path / "dist", tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    merge(base, tmp_path / "theirs", tmp_path / "merged", layout="fused")
    wanted = model.eval()
    assert (logits_of(model_of(tmp_path / "merged")) - logits_of(wanted)).abs().max() <= 1e-5
    assert (logits_of(peft_model(base, tmp_path / "ours")) - logits_of(wanted)).abs().max() <= 1e-6


def test_a_served_folder_merges_as_the_distributed_one(tmp_path, base):
    settings = settings_of()
    save_adapter(tmp_path / "dist", None, settings, random_adapter(CONFIG, settings))
    adapter_to_peft(tmp_path / "dist", tmp_path / "served", layout="served", base_hf=base)
    names = set(load_file(tmp_path / "served" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.2.mlp.experts.7.gate_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.2.mlp.shared_mlp.gate_proj.lora_B.weight" in names
    for place in ("dist", "served"):
        merge(base, tmp_path / place, tmp_path / f"of_{place}")
    ours, theirs = (load_file(tmp_path / f"of_{place}" / "model.safetensors") for place in ("dist", "served"))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_merging_rounds_once_and_keeps_what_has_no_adapter(tmp_path):
    base = tmp_path / "base"
    config = write_tiny_checkpoint(base, CONFIG, dtype="bf16", num_mtp_layers=1)
    targets = ("q_proj", "experts.up_proj", "mtp.experts.down_proj")
    settings, full = AdapterSettings(2, 4.0, "lora", 0.0, targets), ("model.norm.weight", "lm_head.weight")
    adapter = random_adapter(config, settings, full)
    save_adapter(tmp_path / "dist", None, settings, adapter)
    merge(base, tmp_path / "dist", tmp_path / "merged", verify=True)
    weights, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    by_hand = merged_by_hand(weights, adapter, settings, config)
    changed = 0
    for name, tensor in weights.items():
        if name in full:
            assert torch.equal(found[name], adapter[f"adapter.{name}.full"].to(torch.bfloat16))
        elif torch.equal(by_hand[name], tensor.double()):
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
        else:
            exact = by_hand[name]
            nearest = exact.float().to(torch.bfloat16)
            error, step = (found[name].double() - exact).abs(), (nearest.double() - exact).abs()
            assert (error <= step * 1.001 + 1e-7).all() and found[name].dtype == torch.bfloat16, name
            changed += 1
    assert changed == 4 + 3 * 8 + 8
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "left out: the adapters of MTP layers, 1," in said(
        adapter_to_peft, tmp_path / "dist", tmp_path / "peft", base_hf=base
    )


def said(convert, *folders, **options) -> str:
    lines = []
    convert(*folders, **options, say=lines.append)
    return "\n".join(lines)
