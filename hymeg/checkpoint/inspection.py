"""What a checkpoint's folder holds, in words and numbers."""

import math
from pathlib import Path
from typing import Any

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.dist_files import complete_iterations
from hymeg.checkpoint.mapping import num_parameters
from hymeg.checkpoint.row_tensors import Source
from hymeg.checkpoint.sources import is_adapter, is_hf, is_peft, open_any, open_dist
from hymeg.checkpoint.sources.peft_folder import peft_contents
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ITEM_SIZES
from hymeg.hf.safetensors_files import open_checkpoint


def describe(folder: str | Path, iteration: int | None = None, tensors: bool = False) -> dict[str, Any]:
    """What a folder holds, by name, for people and for JSON.

    Args:
        iteration: of a distributed one; None: the one that the tracker names.
        tensors: name, dtype and shape of each, too, as they are stored: {name: [dtype, shape]}.

    Raises:
        UserError: it holds no checkpoint, or one that is incomplete or broken.
    """
    folder = Path(folder)
    if is_adapter(folder, iteration):
        return _describe_adapter(folder, iteration, tensors)
    found = open_any(folder, iteration)
    elements = sum(math.prod(tensor.shape) for tensor in found.tensors.values())
    stored = open_checkpoint(folder) if is_hf(folder) else found.tensors  # FP8 is read as other dtypes
    dtypes: dict[str, int] = {}
    for tensor in stored.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    lines: dict[str, Any] = {"format": found.what}
    if found.what.startswith("distributed"):
        lines["iteration"] = "release (no training)" if found.iteration is None else str(found.iteration)
        if names := complete_iterations(folder):
            lines["iterations"] = ", ".join(names)
        lines["optimizer state"] = "yes" if found.has_optimizer else "no"
    if found.config is not None:
        lines |= _model(found.config, found)
    lines["tensors"] = f"{len(found.tensors):,} distributed tensors, {elements:,} elements"
    if found.unknown:
        lines["not known"] = f"{len(found.unknown):,} tensors, such as {found.unknown[0]}"
    lines["bytes"] = f"{sum(count * ITEM_SIZES[dtype] for dtype, count in dtypes.items()):,}"
    lines["dtypes"] = ", ".join(f"{dtype}: {count:,}" for dtype, count in sorted(dtypes.items()))
    if tensors:
        lines["list of tensors"] = {name: [tensor.dtype, list(tensor.shape)] for name, tensor in stored.items()}
    return lines


def _model(config: HyConfig, found: Source) -> dict[str, str]:
    num_moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    held = "held" if any(key.startswith("mtp.") for key in found.tensors) else "not held"
    return {
        "model": f"{', '.join(config.raw.get('architectures') or ['?'])} ({config.raw.get('model_type')})",
        "layers": f"{config.num_hidden_layers} ({config.num_hidden_layers - num_moe} dense, {num_moe} MoE)",
        "MTP layers": f"{config.num_nextn_predict_layers}, {held}",
        "experts": (
            f"{config.num_experts}, {config.num_experts_per_tok} of them and {config.num_shared_experts} shared for "
            "each token"
        ),
        "parameters": f"{num_parameters(config):,} by config.json",
    }


def _describe_adapter(folder: Path, iteration: int | None, tensors: bool) -> dict[str, Any]:
    lines: dict[str, Any]
    if is_peft(folder):
        found, held = peft_contents(folder)
        lines = {"format": "adapter, peft folder", "rank": found["r"], "alpha": found["lora_alpha"]}
        lines["scaling"] = "rslora" if found.get("use_rslora") else "lora"
        modules = found.get("target_modules") or []  # a list, or one regular expression
        targets = [*([modules] if isinstance(modules, str) else modules), *(found.get("target_parameters") or [])]
        lines |= {"targets": ", ".join(sorted(targets)), "base": found.get("base_model_name_or_path")}
    else:
        source = open_dist(folder, iteration)
        settings, held = AdapterSettings.from_folder(source.folder), source.tensors
        lines = {
            "format": "adapter, distributed (torch_dist)",
            "iteration": "release (no training)" if source.iteration is None else source.iteration,
            "optimizer state": "yes" if source.has_optimizer else "no",
            "rank": settings.rank,
            "alpha": f"{settings.alpha:g}",
            "scaling": settings.scaling,
            "targets": ", ".join(settings.targets),
            "base": (settings.base or {}).get("source"),
        }
    counts = {name: math.prod(tensor.shape) for name, tensor in held.items()}
    lines["tensors"] = f"{len(held):,} tensors, {sum(counts.values()):,} elements"
    lines["bytes"] = f"{sum(count * ITEM_SIZES[held[name].dtype] for name, count in counts.items()):,}"
    lines["dtypes"] = ", ".join(sorted({tensor.dtype for tensor in held.values()}))
    if tensors:
        lines["list of tensors"] = {name: [tensor.dtype, list(tensor.shape)] for name, tensor in held.items()}
    return lines
