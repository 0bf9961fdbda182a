"""Adapters' files: what we write peft loads and computes with as we do, merged weights are W + scale * B @ A, and
nothing is lost on the way there and back.
"""

import functools
import importlib.util
import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapter_files import EVERY_KIND, random_adapter, save_adapter
from fp8_folders import quantised_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import adapter_modules
from hymeg.checkpoint.adapters import adapter_to_peft, merge, peft_to_adapter
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist, hf_to_hf
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.mapping import num_rows
from hymeg.checkpoint.row_tensors import TensorReader
from hymeg.checkpoint.sources import open_adapter
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.checksums import MANIFEST
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

ROOT = Path(__file__).parents[2]
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
    for name, command in (("peft", "adapter-to-peft"), ("back", "peft-to-adapter")):
        assert json.loads((tmp_path / name / "conversion.json").read_text())["command"] == command


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
    torch.manual_seed(1)
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
    wanted = logits_of(model.eval())
    assert (logits_of(model_of(tmp_path / "merged")) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (logits_of(peft_model(base, tmp_path / "ours")) - wanted).abs().max() <= 1e-6


def test_a_served_folder_merges_as_the_distributed_one(tmp_path, base):
    settings = settings_of()
    save_adapter(tmp_path / "dist", None, settings, random_adapter(CONFIG, settings))
    adapter_to_peft(tmp_path / "dist", tmp_path / "served", layout="served", base_hf=base)
    names = set(load_file(tmp_path / "served" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.2.mlp.experts.7.gate_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.2.mlp.shared_mlp.gate_proj.lora_B.weight" in names
    for place in ("dist", "served"):
        merge(base, tmp_path / place, tmp_path / f"of_{place}", say=(said := []).append)
        assert any("is not checked" in line for line in said)  # no training made it
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
    assert "left out: what was trained of MTP layers, 1 in all," in said(
        adapter_to_peft, tmp_path / "dist", tmp_path / "peft", base_hf=base
    )


def test_a_base_in_fp8_is_merged_in_fp32_and_rounded_once(tmp_path):
    settings = settings_of()
    write_tiny_checkpoint(tmp_path / "plain", CONFIG)
    quantised_folder(tmp_path / "plain", tmp_path / "fp8")
    hf_to_hf(tmp_path / "fp8", tmp_path / "wide", dtype="fp32")
    save_adapter(tmp_path / "dist", None, settings, random_adapter(CONFIG, settings))
    for base in ("fp8", "wide"):
        merge(tmp_path / base, tmp_path / "dist", tmp_path / f"of_{base}")
    found, wide = (load_file(tmp_path / f"of_{base}" / "model.safetensors") for base in ("fp8", "wide"))
    assert found.keys() == wide.keys()
    for name, tensor in wide.items():
        assert torch.equal(found[name], tensor if "expert_bias" in name else tensor.bfloat16()), name


def said(convert, *folders, **options) -> str:
    lines = []
    convert(*folders, **options, say=lines.append)
    return "\n".join(lines)


# ---- looked at, and refused


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base) -> Path:
    """An adapter in all three formats."""
    place, settings = tmp_path_factory.mktemp("adapters"), settings_of(rank=2)
    save_adapter(place / "dist", CONFIG, settings, random_adapter(CONFIG, settings))
    for layout in ("peft", "served"):
        adapter_to_peft(place / "dist", place / layout, layout=layout, workers=1)
    return place


def changed(folders: Path, tmp_path: Path, layout: str, config=None, tensors=None) -> Path:
    """A copy of the peft folder, with other settings or tensors."""
    copy = tmp_path / "changed"
    shutil.copytree(folders / layout, copy)
    (copy / MANIFEST).unlink()  # of checksums, which would say it first
    found = json.loads((copy / "adapter_config.json").read_bytes())
    (copy / "adapter_config.json").write_text(json.dumps(found | (config or {})))
    if tensors:
        stored = load_file(copy / "adapter_model.safetensors")
        tensors(stored)
        save_file(stored, copy / "adapter_model.safetensors")
    return copy


def test_a_base_in_fp8_leaves_no_promise_of_it_in_the_adapter_s_config(folders, base, tmp_path):
    quantised_folder(base, tmp_path / "fp8")
    peft_to_adapter(folders / "peft", tmp_path / "out", base_hf=tmp_path / "fp8", verify=True, workers=1)
    assert HyConfig.from_dir(tmp_path / "out").raw == HyConfig.from_dir(base).raw


def test_comparison_sees_one_bit_and_one_setting(folders, tmp_path, base):
    assert compare_checkpoints(folders / "dist", folders / "peft") == []
    assert compare_checkpoints(folders / "served", folders / "peft", base_hf=base) == []
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"

    def flip(tensors):
        tensors[name][32 + 5, 2 * 8 + 3] += 1  # up's row 5, its rank 0, expert 3

    [found] = compare_checkpoints(folders / "dist", changed(folders, tmp_path, "peft", tensors=flip))
    assert found.name == "adapter.model.layers.1.mlp.experts.up_proj.lora_B"
    assert f"first at element {(3 * 32 + 5) * 2}" in found.what and found.what.startswith("1 of 512 elements")
    shutil.rmtree(tmp_path / "changed")
    [found] = compare_checkpoints(folders / "dist", changed(folders, tmp_path, "served", {"lora_alpha": 9}))
    assert found == ("scale", "4 and 4.5")
    other = settings_of("attention", rank=4)
    save_adapter(tmp_path / "other", CONFIG, other, random_adapter(CONFIG, other))
    names = {found.name: found.what for found in compare_checkpoints(folders / "dist", tmp_path / "other")}
    key = "adapter.model.layers.1.self_attn.q_proj.lora_A"
    assert names["rank"] == "2 and 4" and names["targets"] == "not the same modules"
    assert names[key] == f"shapes: [2, 64] and [4, 64] as {key}"
    assert names["adapter.model.layers.1.mlp.experts.up_proj.lora_B"] == f"only in {folders / 'dist'}"
    with pytest.raises(UserError, match="no adapter, to which one could be compared"):
        compare_checkpoints(folders / "dist", base)


def test_inspection_says_what_an_adapter_is(folders, tmp_path):
    said = {name: [f"{a}: {b}" for a, b in describe(folders / name).items()] for name in ("dist", "peft", "served")}
    assert {"format: adapter, distributed (torch_dist)", "iteration: 5", "optimizer state: yes"} <= set(said["dist"])
    assert any(line.startswith("targets: ") and "mlp.experts.gate_up_proj" in line for line in said["peft"])
    regex = changed(folders, tmp_path, "peft", {"target_modules": r".*\.q_proj"}, None)
    assert describe(regex)["targets"] == r".*\.q_proj, mlp.experts.down_proj, mlp.experts.gate_up_proj"
    for lines in said.values():
        assert {"rank: 2", "scaling: lora"} <= set(lines) and any(line.startswith("alpha: 8") for line in lines)
    count = sum(t.numel() for t in load_file(folders / "served" / "adapter_model.safetensors").values())
    assert f"{count:,} elements" in "\n".join(said["dist"]) and f"{count:,} elements" in "\n".join(said["served"])


A_OF_Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
GATE_UP = r"mlp\.experts\.gate_up_proj"


@pytest.mark.parametrize(
    ("layout", "config", "tensors", "said"),
    [
        ("peft", {"use_dora": True}, None, "use_dora is true, which hymeg does not honour"),
        ("peft", {"peft_type": "LOHA"}, None, "peft_type is 'LOHA'; LORA is needed"),
        ("peft", {"bias": "lora_only"}, None, "bias is 'lora_only'"),
        (
            "peft",
            {"init_lora_weights": "pissa_niter_4"},
            None,
            "'pissa_niter_4', .* of other weights",
        ),
        ("served", {"init_lora_weights": "olora"}, None, "init_lora_weights is 'olora'"),
        ("peft", {"r": 0}, None, "r is 0; a positive number"),
        ("peft", {"r": 3}, None, r"6 rows are needed|3 rows are needed"),
        ("peft", {"rank_pattern": {}}, None, r"16 rows are needed for rank 2"),
        ("peft", {"alpha_pattern": {}}, None, "alpha_pattern: .* differ; hymeg's adapters have one scale"),
        ("peft", {"alpha_pattern": {GATE_UP: 16, "q_proj": 4}}, None, "alpha_pattern: .*q_proj.* differ"),
        ("peft", {"target_parameters": ["experts.router"]}, None, "target_parameters: 'experts.router'"),
        ("served", {}, lambda t: t.update(stray=torch.zeros(1)), "1 tensors that have no place .*stray"),
        ("served", {}, lambda t: t.pop(A_OF_Q), "q_proj.lora_B.weight is there, lora_A is missing"),
        (
            "served",
            {},
            lambda t: [t.pop(name) for name in list(t) if ".layers.2.mlp.experts.5.up_proj" in name],
            r"experts.up_proj: experts: 1 missing \(5\)",
        ),
        (
            "served",
            {},
            lambda t: [t.pop(name) for name in list(t) if "layers.2.self_attn.q_proj" in name],
            "1 modules have no adapter, such as model.layers.2.self_attn.q_proj",
        ),
        ("served", {}, lambda t: t.update({A_OF_Q: torch.zeros(2, 63)}), r"is \[2, 63\], \[2, 64\] is needed"),
        (
            "peft",
            {},
            lambda t: [v.add_(1) for name, v in t.items() if name.endswith("base_layer.lora_B.weight")],
            "is not block-diagonal",
        ),
        ("peft", {}, lambda t: t.update({A_OF_Q: t[A_OF_Q].int()}), "is I32; one of BF16, F16, F32"),
        (
            "peft",
            {"rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 4}},
            lambda t: t.update(
                {
                    name: (v[:16] if "lora_A" in name else v[:, :16]).contiguous()
                    for name, v in t.items()
                    if "base_layer" in name and ".layers.1." not in name
                }
            ),
            "gate_up_proj has rank 4, the others 2;",
        ),
    ],
)
def test_what_has_no_place_in_an_adapter_is_refused_by_name(folders, base, tmp_path, layout, config, tensors, said):
    folder = changed(folders, tmp_path, layout, config, tensors)
    with pytest.raises(UserError, match=said):
        open_adapter(folder, CONFIG)


def test_what_does_not_belong_together_is_refused(folders, base, tmp_path):
    with pytest.raises(UserError, match="an adapter, no model; export it with adapter-to-peft, or merge it"):
        dist_to_hf(folders / "dist", tmp_path / "hf")
    with pytest.raises(UserError, match="holds no adapter"):
        hf_to_dist(base, tmp_path / "whole", workers=1)
        adapter_to_peft(tmp_path / "whole", tmp_path / "peft")
    with pytest.raises(UserError, match="does not say of which model"):
        open_adapter(folders / "peft")
    with pytest.raises(UserError, match=r"--iteration 7: .* is a peft folder"):
        merge(base, folders / "peft", tmp_path / "merged", iteration=7)
    other = HyConfig.from_dict(CONFIG.raw | {"hidden_size": 32})
    write_tiny_checkpoint(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"misshapen \(.*, \[2, 32\] is needed"):
        merge(tmp_path / "other", folders / "dist", tmp_path / "merged")
    settings = AdapterSettings(2, 4.0, "lora", 0.0, ("mtp.q_proj",))
    config = HyConfig.from_dict(CONFIG.raw | {"num_nextn_predict_layers": 1})
    save_adapter(tmp_path / "mtp", config, settings, random_adapter(config, settings))
    with pytest.raises(UserError, match="all of it is in MTP layers"):
        adapter_to_peft(tmp_path / "mtp", tmp_path / "peft")
    full = ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight")
    settings = settings_of("attention")
    save_adapter(tmp_path / "full", CONFIG, settings, random_adapter(CONFIG, settings, full))
    with pytest.raises(UserError, match=r"norm.weight was trained in full .* vLLM and SGLang cannot load"):
        adapter_to_peft(tmp_path / "full", tmp_path / "peft", layout="served")
    with pytest.raises(UserError, match=r"q_proj.weight was trained in full and has an adapter"):
        merge(base, tmp_path / "full", tmp_path / "merged")
    assert not (tmp_path / "peft").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": "2"}, "rank is '2'; a positive integer is needed"),
        ({"scaling": "other"}, "scaling is 'other'; lora or rslora"),
        ({"targets": []}, r"targets is \[\]; a list"),
        ({"dropout": 1}, "dropout is 1"),
        ({"alpha": 0}, "alpha is 0"),
        ({"targets": ["q_proj"]}, "unexpected"),
        ({"rank": 3}, "misshapen"),
    ],
)
def test_adapter_json_is_not_believed(folders, tmp_path, change, said):
    shutil.copytree(folders / "dist", tmp_path / "dist")
    path = tmp_path / "dist" / "iter_0000005" / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(UserError, match=said):
        open_adapter(tmp_path / "dist")


def test_the_commands_convert(folders, base, tmp_path, monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
        tool.main()
        return capsys.readouterr().out

    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert_checkpoint.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    one = ("--workers", 1)
    run("adapter-to-peft", "--adapter", folders / "dist", "--peft", tmp_path / "p", "--layout", "served", *one)
    run("peft-to-adapter", "--peft", tmp_path / "p", "--dist", tmp_path / "d", "--base-hf", base, "--verify", *one)
    out = run("merge", "--base-hf", base, "--adapter", tmp_path / "d", "--hf", tmp_path / "m", "--dtype", "bf16", *one)
    assert "adapters of 37 modules, scale 4" in out and f"{tmp_path / 'm'}: " in out
    assert "format: adapter, peft folder" in run("inspect", tmp_path / "p")
    assert {t.dtype for n, t in load_file(tmp_path / "m" / "model.safetensors").items() if "bias" not in n} == {
        torch.bfloat16
    }
