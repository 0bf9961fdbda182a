"""Hugging Face folders in FP8, made of plain ones with torch alone."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECTION = re.compile(r".*\.(gate|up|down|q|k|v|o)_proj\.weight|.*\.experts\.(gate_up|down)_proj")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def quantised_folder(plain: Path, target: Path, block: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Write `target` as Tencent's writer would, or with scales for each block as DeepSeek's; what it must be read as.

    A Hugging Face folder in FP8 means fp32(weight) * scale, rounded once.
    """
    target.mkdir()
    stored, meant = {}, {}
    for name, weight in weights(plain).items():
        meant[name] = stored[name] = weight
        if not PROJECTION.fullmatch(name):
            continue
        if block is None:
            scale = (weight.abs().max() / 448).view(1)  # bf16
            whole = scale.float()
            stored |= {f"{name}_scale": scale, name.replace(".weight", ".input_scale"): torch.tensor([0.02])}
        else:
            scale, whole = scales_by_block(weight.float(), block)
            stored[f"{name}_scale_inv"] = scale
        stored[name] = (weight.float() / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
        meant[name] = (stored[name].float() * whole).bfloat16()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static"}
    if block:
        config["quantization_config"]["weight_block_size"] = list(block)
    else:
        layers = range(config["num_hidden_layers"])
        scales = {f"model.layers.{n}.self_attn.{kv}_cache.scale": torch.ones(1) for n in layers for kv in "kv"}
        save_file(scales, target / "kv_cache_scales.safetensors")
        config["quantization_config"]["kv_cache_scheme"] = "static"
        config["attn_quant_config"] = {"kv_cache_quant": {"dtype": "fp8_e4m3"}}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return meant


def scales_by_block(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each block in fp32, and of each number. Blocks at the end may be smaller."""
    *stack, rows, columns = weight.shape
    scale = torch.empty(*stack, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    whole = torch.empty_like(weight)
    for r in range(scale.shape[-2]):
        for c in range(scale.shape[-1]):
            cell = ..., slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            scale[..., r, c] = weight[cell].abs().amax((-2, -1)) / 448
            whole[cell] = scale[..., r, c][..., None, None]
    return scale, whole
