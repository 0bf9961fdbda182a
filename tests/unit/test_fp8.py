"""FP8 folders in: every number is fp32(weight) * scale, rounded once, which torch computes here by hand (transformers
itself loads Tencent's form without the scales); every scale is used or named."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from fp8_folders import PROJECTION, quantised_folder, weights
from safetensors.torch import load_file, save_file

from hymeg.checkpoint import row_tensors
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.rounding import converted, dequantised, e4m3_numbers
from hymeg.checkpoint.sources import open_hf
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import open_checkpoint
from hymeg.training import hf_weights
from hymeg.training.run import _carry_companions


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("layout", "block"), [("hub", None), ("hub", (16, 48)), ("fused", (16, 48))])
def test_what_is_read_is_the_weight_times_its_scale_to_the_one_rounding(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(row_tensors, "BLOCK_BYTES", 3000)  # blocks of a few rows
    changes = {"hidden_size": 96, "num_hidden_layers": 2, "moe_intermediate_size": 40, "expert_hidden_dim": 40}
    write_tiny_checkpoint(
        tmp_path / "plain", HyConfig.from_dict(TINY_CONFIG | changes), layout=layout, num_mtp_layers=1
    )
    meant = quantised_folder(tmp_path / "plain", tmp_path / "fp8", block)
    said = []
    hf_to_dist(tmp_path / "fp8", tmp_path / "dist", say=said.append, verify=True, workers=1)
    dist_to_hf(tmp_path / "dist", tmp_path / "out", layout=layout, workers=1)
    assert_same(weights(tmp_path / "out"), meant)
    num = sum(bool(PROJECTION.fullmatch(name)) for name in meant)
    assert any(line.startswith(f"dequantised: {num} tensors") for line in said)
    if block is None:
        assert any(line.startswith("set aside, scales") and f": {num + 4} tensors" in line for line in said)
    for folder in ("dist", "out"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert "quantization_config" not in config and "attn_quant_config" not in config
    assert compare_checkpoints(tmp_path / "fp8", tmp_path / "dist") == []
    described = describe(tmp_path / "fp8")
    assert described["format"] == f"Hugging Face, {layout} layout, {num} weights in FP8"
    stored = open_checkpoint(tmp_path / "fp8").values()
    assert described["bytes"] == f"{sum(entry.nbytes for entry in stored):,}" and "F8_E4M3: " in described["dtypes"]
    hf_to_dist(tmp_path / "fp8", tmp_path / "fp32", dtype="fp32", workers=1)
    dist_to_hf(tmp_path / "fp32", tmp_path / "out-fp32", layout=layout, workers=1)
    found = weights(tmp_path / "out-fp32")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert_same(
        {name: tensor.bfloat16() for name, tensor in found.items()}, {n: t.bfloat16() for n, t in meant.items()}
    )
    name = next(name for name in found if "down_proj" in name)
    assert not torch.equal(found[name], meant[name].float())  # fp32 keeps what bf16 rounds off


def test_every_code_and_a_scale_that_needs_rounding():
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(e4m3_numbers().copy()).nan_to_num(9e9), numbers.nan_to_num(9e9))
    for scale in (torch.tensor([1.2345678e-3]), torch.tensor([3e38])):
        expected = (numbers * scale).bfloat16().view(torch.int16)
        one = np.ones((1, 1), np.float32) * scale.numpy()
        data = dequantised(memoryview(codes.numpy()).cast("B"), one, np.zeros(1), "BF16")
        found = torch.frombuffer(bytearray(data), dtype=torch.int16)
        finite = ~numbers.isnan()
        assert torch.equal(found[finite], expected[finite])
        assert found.view(torch.bfloat16)[~finite].isnan().all() and (~finite).sum() == 2
        odd = dequantised(memoryview(codes.numpy()[:7]).cast("B"), one, np.zeros(1), "F32")
        assert torch.equal(torch.frombuffer(bytearray(odd), dtype=torch.float32), (numbers * scale)[:7])


def test_every_code_by_each_of_many_scales():
    """A row of factors at a time, in more steps than one."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(300, 4)
    factors = torch.logspace(-30, 38, 3 * 1024, base=10).view(3, 1024)[:, torch.randperm(1024)]
    of_row = np.sort(np.random.default_rng(0).integers(0, 3, 300))
    product = codes.view(torch.float8_e4m3fn).float() * factors[of_row]
    for wanted, dtype in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        data = dequantised(memoryview(codes.numpy()).cast("B"), factors.numpy(), of_row, wanted)
        found = torch.frombuffer(bytearray(data), dtype=dtype).view(300, 1024)
        assert torch.equal(found.isnan(), product.isnan()) and found.isnan().sum() == 2400
        assert torch.equal(found.nan_to_num(7), product.to(dtype).nan_to_num(7))


def test_rounding_to_bf16_is_torchs_for_every_upper_half():
    bits = torch.arange(2**16, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = (bits | low).view(torch.float32)
        found = torch.frombuffer(
            bytearray(converted(memoryview(numbers.numpy()).cast("B"), "F32", "BF16")), dtype=torch.int16
        )
        is_nan = numbers.isnan()
        assert torch.equal(found[~is_nan], numbers.bfloat16().view(torch.int16)[~is_nan])
        assert found.view(torch.bfloat16)[is_nan].isnan().all()


@pytest.fixture(scope="module")
def fp8_folder(hf_checkpoint):
    folder = hf_checkpoint.parent / "fp8"
    quantised_folder(hf_checkpoint, folder)
    return folder


Q = "model.layers.1.self_attn.q_proj"
WRONG = {
    "no scale": (lambda t: t.pop(f"{Q}.weight_scale"), rf"1 tensors \({Q}\.weight\) in F8_E4M3 without a scale"),
    "a scale of no weight": (
        lambda t: t.update({f"{Q}s.weight_scale": torch.ones(1)}),
        r"q_projs.weight_scale\) without a weight",
    ),
    "a scale of a plain weight": (
        lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}),
        "lm_head.weight_scale.*without a w",
    ),
    "an input scale of no weight": (
        lambda t: t.update({f"{Q}s.input_scale": torch.ones(1)}),
        "q_projs.input_scale.*without a w",
    ),
    "two scales": (lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1)}), "has two scales"),
    "many numbers": (
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(2)}),
        r"has shape \[2\]; a weight of \[128, 64\] needs one n",
    ),
    "a scale that is none": (lambda t: t[f"{Q}.weight_scale"].fill_(torch.nan), r"scale of .*linear_qkv.weight is nan"),
    "a negative scale": (lambda t: t[f"{Q}.weight_scale"].neg_(), r"is -0\.0\d+; a finite number from 0"),
    "another FP8": (
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float().to(torch.float8_e5m2)}),
        "without a weight|F8_E5M2",
    ),
    "a scale in integers": (
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(1).int()}),
        "is I32; a scale in one of",
    ),
    "an unknown name": (lambda t: t.update({f"{Q}.output_scales": torch.ones(1)}), r"1 unexpected \(.*output_scales"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_whose_scales_are_wrong_is_refused(fp8_folder, tmp_path, case):
    spoil, message = WRONG[case]
    shutil.copytree(fp8_folder, tmp_path / "fp8")
    tensors = load_file(fp8_folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        hf_to_dist(tmp_path / "fp8", tmp_path / "dist")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


def test_a_block_size_that_is_not_the_scales_is_refused(hf_checkpoint, tmp_path):
    quantised_folder(hf_checkpoint, tmp_path / "fp8", (16, 16))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for block, message in (
        ([16, 32], r"has shape \[4, 8\]; a weight of .* needs \[4, 4\]"),
        ([16], "a list of two positive"),
    ):
        config["quantization_config"]["weight_block_size"] = block
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            hf_to_dist(tmp_path / "fp8", tmp_path / "dist")


@pytest.mark.parametrize("found", [{"quant_method": "gptq"}, {"bits": 4}, "fp8"])
def test_another_quantization_is_refused(found):
    with pytest.raises(UserError, match="quantization_config"):
        HyConfig.from_dict(TINY_CONFIG | {"quantization_config": found})


def test_a_run_may_load_it_and_name_it_as_its_model(fp8_folder, hf_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    quantised_folder(hf_checkpoint, tmp_path / "blocks", (16, 16))
    for folder in (fp8_folder, tmp_path / "blocks"):
        for config in (HyConfig.from_dir(folder), HyConfig.from_dir(hf_checkpoint)):
            open_hf(str(folder), config)
        made = hf_weights.converted(folder, tmp_path / "save", 0, 0, lambda line: None)
        assert compare_checkpoints(made, folder) == []
        _carry_companions(folder, tmp_path / "save", HyConfig.from_dir(folder))
        assert HyConfig.from_dir(tmp_path / "save").raw == HyConfig.from_dir(hf_checkpoint).raw


def test_scales_that_only_serving_needs_are_compared_too(fp8_folder, tmp_path):
    other, name = tmp_path / "other", "model.layers.0.self_attn.k_cache.scale"
    shutil.copytree(fp8_folder, other)
    scales = load_file(other / "kv_cache_scales.safetensors")
    save_file(scales | {name: scales[name] * 3}, other / "kv_cache_scales.safetensors")
    [found] = compare_checkpoints(fp8_folder, other)
    assert found.name == name and found.what.startswith("1 of 1 elements")
    (other / "kv_cache_scales.safetensors").unlink()
    found = compare_checkpoints(fp8_folder, other)
    assert {one.name for one in found} == set(scales)
    assert all(one.what == f"only in {fp8_folder}" for one in found)


def test_a_config_that_promises_fp8_and_has_none_is_told(hf_checkpoint, tmp_path):
    shutil.copytree(hf_checkpoint, tmp_path / "hf")
    config = HyConfig.from_dir(hf_checkpoint).to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    said = []
    hf_to_dist(tmp_path / "hf", tmp_path / "dist", say=said.append)
    assert any("speaks of FP8, but no tensor" in line for line in said)


def test_mtp_layers_come_from_an_fp8_folder_dequantised(fp8_folder, hf_checkpoint, tmp_path):
    write_tiny_checkpoint(tmp_path / "trunk", seed=5)
    shutil.copy(hf_checkpoint / "config.json", tmp_path / "trunk")
    hf_to_dist(tmp_path / "trunk", tmp_path / "dist", base_hf=fp8_folder)
    hf_to_dist(fp8_folder, tmp_path / "base-dist")
    dist_to_hf(tmp_path / "dist", tmp_path / "out")
    dist_to_hf(tmp_path / "base-dist", tmp_path / "base")
    trunk, base = weights(tmp_path / "trunk"), weights(tmp_path / "base")
    assert_same(weights(tmp_path / "out"), {name: trunk.get(name, base[name]) for name in base})
    assert any(re.match(r"model\.layers\.4\.", name) for name in base)
