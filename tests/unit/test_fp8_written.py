"""FP8 folders out, in Tencent's form: codes, scales and errors are what torch makes of the same weights with its own
FP8; what our FP8 import reads back is code times scale, and stands where it stood."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fp8_folders import PROJECTION, quantised_folder, weights
from safetensors.torch import load_file, save_file

from hymeg.checkpoint import row_tensors
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist, hf_to_hf
from hymeg.checkpoint.rounding import e4m3_codes, quantised
from hymeg.checkpoint.sinks import transfer
from hymeg.checkpoint.sinks.fp8_folder import files_of_fp8
from hymeg.checkpoint.sinks.transfer import unpacked
from hymeg.checkpoint.sources import open_hf
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import files_by_tensor

CONVERT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
SMALL = HyConfig.from_dict(
    TINY_CONFIG | {"num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 40, "expert_hidden_dim": 40}
)


def by_hand(plain: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What is to be stored, and the relative RMS error by kind."""
    stored, squares = {}, {}
    for name, weight in plain.items():
        stored[name] = weight
        if not PROJECTION.fullmatch(name):
            continue
        scale = weight.float().abs().max() / 448
        stored[f"{name}_scale"] = scale.view(1)
        stored[name] = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        lost = (stored[name].float() * scale - weight.float()).double().square().sum()
        kind = re.sub(r"model\.layers\.\d+\.|\.weight", "", re.sub(r"experts\.\d+", "experts", name))
        one, whole = squares.get(kind, (0, 0))
        squares[kind] = one + lost, whole + weight.double().square().sum()
    return stored, {kind: float((lost / whole).sqrt()) for kind, (lost, whole) in squares.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """In bf16 and fp32, distributed too; and Tencent's FP8 of another model of this shape."""
    folder = tmp_path_factory.mktemp("plain")
    for dtype in ("bf16", "fp32"):
        write_tiny_checkpoint(folder / dtype, SMALL, dtype=dtype, num_mtp_layers=1)
    hf_to_dist(folder / "bf16", folder / "dist")
    write_tiny_checkpoint(folder / "other", SMALL, seed=9, num_mtp_layers=1)
    quantised_folder(folder / "other", folder / "published")
    return folder


@pytest.mark.parametrize("source", ["dist", "fp32"])
def test_what_is_written_is_what_torch_makes_of_the_weights(plain, tmp_path, monkeypatch, source):
    monkeypatch.setattr(row_tensors, "BLOCK_BYTES", 6000)  # blocks of a few rows, of q less than a KV group
    said, room, reserve = [], {}, transfer.reserve
    monkeypatch.setattr(transfer, "reserve", lambda path, size: (room.update({path.name: size}), reserve(path, size)))
    convert = dist_to_hf if source == "dist" else hf_to_hf
    convert(
        plain / source,
        tmp_path / "fp8",
        quantize="fp8",
        workers=1,
        verify=True,
        max_shard_bytes=90_000,
        say=said.append,
    )
    expected, errors = by_hand(weights(plain / ("fp32" if source == "fp32" else "bf16")))
    assert_same(weights(tmp_path / "fp8"), expected)
    assert room == {path.name: path.stat().st_size for path in (tmp_path / "fp8").glob("*.safetensors")}
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head", "model.embed_tokens"],
    }
    assert config == json.loads((plain / ("fp32" if source == "fp32" else "bf16") / "config.json").read_text())
    assert any("no scales of inputs are written" in line for line in said)
    record = json.loads((tmp_path / "fp8" / "conversion.json").read_text())
    assert record["quantize"] == "fp8" and record["scales_from"] is None
    assert record["relative_rms_error"] == pytest.approx(errors, rel=1e-5)
    assert all(f"{kind} {error:.3%}" in said[-1] for kind, error in errors.items())
    assert all(0.01 < error < 0.05 for error in errors.values())


def test_read_back_it_has_the_stated_error_and_no_other(plain, tmp_path):
    hf_to_hf(plain / "bf16", tmp_path / "fp8", quantize="fp8", workers=1)
    hf_to_hf(tmp_path / "fp8", tmp_path / "back", dtype="fp32")
    stated = json.loads((tmp_path / "fp8" / "conversion.json").read_text())["relative_rms_error"]
    found, original = weights(tmp_path / "back"), weights(plain / "bf16")
    squares = dict.fromkeys(stated, torch.zeros(2, dtype=torch.float64))
    for name, weight in original.items():
        if not PROJECTION.fullmatch(name):
            assert torch.equal(found[name], weight.float()), name
            continue
        [kind] = [kind for kind in stated if re.fullmatch(kind.replace("experts", r"experts\.\d+"), name[15:-7])]
        parts = found[name].double() - weight.double(), weight.double()
        squares[kind] = squares[kind] + torch.stack([part.square().sum() for part in parts])
    assert stated == pytest.approx({k: math.sqrt(lost / whole) for k, (lost, whole) in squares.items()}, rel=1e-5)


def test_scales_of_activations_are_the_published_folders(plain, tmp_path):
    published = load_file(plain / "published" / "model.safetensors")
    kept = "model.layers.1.self_attn.o_proj"  # which that folder has not quantised
    other = weights(plain / "other")
    published[f"{kept}.weight"] = other[f"{kept}.weight"]
    for scale in ("weight_scale", "input_scale"):
        del published[f"{kept}.{scale}"]
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "kv_cache_scales.safetensors"):
        (folder / name).write_bytes((plain / "published" / name).read_bytes())
    for number, name in enumerate(name for name in published if name.endswith("input_scale")):
        published[name] = torch.tensor([number / 1000] if number % 2 else number / 1000)  # as writers like it
    save_file(published, folder / "model.safetensors")
    said = []
    dist_to_hf(
        plain / "dist", tmp_path / "out", quantize="fp8", workers=1, scales_from=folder, verify=True, say=said.append
    )
    found, (expected, _) = weights(tmp_path / "out"), by_hand(weights(plain / "bf16"))
    expected[f"{kept}.weight"] = weights(plain / "bf16")[f"{kept}.weight"]
    del expected[f"{kept}.weight_scale"]
    expected |= {name: t.view(1) for name, t in published.items() if name.endswith("input_scale")}
    expected |= load_file(folder / "kv_cache_scales.safetensors")
    assert_same(found, expected)
    config, theirs = (json.loads((at / "config.json").read_text()) for at in (tmp_path / "out", folder))
    assert all(config[key] == theirs[key] for key in ("quantization_config", "attn_quant_config"))
    assert files_by_tensor(tmp_path / "out")["model.layers.0.self_attn.k_cache.scale"] == "kv_cache_scales.safetensors"
    assert any("measured on other weights" in line for line in said)
    assert compare_checkpoints(tmp_path / "out", tmp_path / "out") == []
    words = f"hf-to-hf --hf {plain / 'bf16'} --to {tmp_path / 'like'} --quantize fp8 --scales-from {folder} --drop-mtp"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(CONVERT), *words.split(), "--shards-like", str(plain / "other")])
        runpy.run_path(str(CONVERT), run_name="__main__")
    by_tool = weights(tmp_path / "like")
    assert_same(by_tool, {name: t for name, t in expected.items() if not name.startswith("model.layers.2.")})
    assert set(files_by_tensor(tmp_path / "like").values()) == {"model.safetensors", "kv_cache_scales.safetensors"}


def spoilt(plain, tmp_path, spoil, **config):
    folder = tmp_path / "published"
    folder.mkdir()
    tensors = load_file(plain / "published" / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    found = json.loads((plain / "published" / "config.json").read_text())
    found["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(found))
    return folder


Q = "model.layers.1.self_attn.q_proj"
WRONG = {
    "no input scale": (lambda t: t.pop(f"{Q}.input_scale"), {}, rf"no {Q}\.input_scale in it"),
    "no MTP layer": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.2.")],
        {},
        r"layers\.2\.mlp\.experts.* is not there; .*--drop-mtp",
    ),
    "another shape": (
        lambda t: t.update({f"{Q}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}),
        {},
        r"q_proj.weight of shape \[128, 64\] is \[4, 4\] there",
    ),
    "dynamic": (lambda t: None, {"activation_scheme": "dynamic"}, "activation_scheme is dynamic; a folder with static"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_without_the_scales_that_are_needed_is_refused(plain, tmp_path, case):
    spoil, config, message = WRONG[case]
    folder = spoilt(plain, tmp_path, spoil, **config)
    with pytest.raises(UserError, match=message):
        dist_to_hf(plain / "dist", tmp_path / "out", quantize="fp8", workers=1, scales_from=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_what_cannot_be_meant_is_refused(plain, tmp_path):
    with pytest.raises(UserError, match="--quantize fp8 --layout fused: no engine reads it"):
        hf_to_hf(plain / "bf16", tmp_path / "out", layout="fused", quantize="fp8", workers=1)
    with pytest.raises(UserError, match="give --quantize fp8 as well"):
        hf_to_hf(plain / "bf16", tmp_path / "out", scales_from=plain / "published")
    with pytest.raises(UserError, match="0 weights in FP8, activation_scheme is None"):
        hf_to_hf(plain / "bf16", tmp_path / "out", quantize="fp8", workers=1, scales_from=plain / "bf16")
    with pytest.raises(UserError, match=r"is, holds or lies in .*published"):
        hf_to_hf(plain / "bf16", plain / "published" / "x", quantize="fp8", workers=1, scales_from=plain / "published")
    assert not list(tmp_path.iterdir())


def test_a_scale_is_written_after_its_weight_and_so_found_once(plain):
    source = open_hf(plain / "bf16")
    files, _, _ = files_of_fp8(source.config, source.tensors, 10**9, None, None, workers=1)
    names = [task.tensor.key for turn in files.turns for task in unpacked(turn)]
    scaled = [name for name in names if f"{name}_scale" in names]
    assert scaled and all(names[names.index(name) + 1] == f"{name}_scale" for name in scaled)


def test_numbers_without_a_scale_are_refused_and_zeros_are_not(plain, tmp_path):
    tensors = weights(plain / "bf16")
    tensors[f"{Q}.weight"][3, 5] = torch.inf
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((plain / "bf16" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=rf"{Q}\.weight: holds inf, which FP8 has no scale for"):
        hf_to_hf(tmp_path / "hf", tmp_path / "out", quantize="fp8", workers=1)
    tensors[f"{Q}.weight"].zero_()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    hf_to_hf(tmp_path / "hf", tmp_path / "out", quantize="fp8", workers=1, verify=True)
    found = weights(tmp_path / "out")
    assert not found[f"{Q}.weight"].float().any() and 0 < found[f"{Q}.weight_scale"] < 1e-30


def test_every_bf16_number_and_those_between_become_torchs_code():
    numbers = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    numbers = torch.cat([numbers, torch.nextafter(numbers, torch.tensor(torch.inf)), numbers * 1.0625])
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    found, is_nan = torch.from_numpy(e4m3_codes(numbers.numpy())), numbers.isnan()
    assert torch.equal(found[~is_nan], expected[~is_nan]) and (found[is_nan] == 0x7F).all()
    bf16 = numbers[: 2**16].bfloat16()
    for scale in (0.37, 1e-3):
        expected = (bf16.float() / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        data = memoryview(bf16.view(torch.int16).numpy()).cast("B")
        found = torch.from_numpy(quantised(data, "BF16", torch.tensor(scale).numpy()))
        assert torch.equal(found[~bf16.isnan()], expected[~bf16.isnan()])
