"""FP8 checkpoints as Hugging Face folders hold them: which tensor is which weight's scale.

A weight X.weight of dtype F8_E4M3 stands for fp32(weight) * scale. Tencent's folders (Hy3-FP8, Hy-MT2-30B-A3B-FP8; the
writer is AngelSlim's tools/fp8_quant_with_vllm_activation.py) have one scale for the tensor, X.weight_scale of one
element. DeepSeek's form has one for each block of `weight_block_size` rows and columns, X.weight_scale_inv, which in
spite of its name is multiplied with, too. The scales of activations (X.input_scale) and of the KV cache, measured for
serving, are beside them and mean nothing to the weights.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.errors import UserError
from hymeg.hf.config import QUANTIZATION, HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.hf.safetensors_files import TensorEntry, open_checkpoint

E4M3 = "F8_E4M3"
PER_TENSOR, PER_BLOCK, OF_INPUT = "_scale", "_scale_inv", "input_scale"
_WEIGHT_SCALE = re.compile(rf"(.*)(?:{PER_TENSOR}|{PER_BLOCK})")
_INPUT_SCALE = re.compile(rf"(.*\.){OF_INPUT}")
_KV_SCALE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(attn\.)?"
    r"([qkv]_cache\.scale|[qkv]_scale|kv_scale|[kv]_proj\.([kv]_scale|output_scale))"
)


KV_SCALES_FILE = "kv_cache_scales.safetensors"
QUANTISED = re.compile(r"model\.layers\.\d+\.(.+\.)?(gate|up|down|q|k|v|o)_proj\.weight")
"""What Tencent's writer puts into FP8, of the hub layout: the Linears of attention and MLPs, each expert's too. Not the
router, embeddings, lm_head, norms and eh_proj."""
DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head", "model.embed_tokens"]}
"""config.json's `quantization_config` of such a folder without scales of inputs: engines scale them as they come."""


class WeightScale(NamedTuple):
    """Where a weight's scales lie: one for each block of so many rows and columns, row-major."""

    entry: TensorEntry
    block: tuple[int, int]


class Fp8(NamedTuple):
    """The tensors of a folder told apart. Without FP8 in it all are weights."""

    weights: dict[str, TensorEntry]
    scales: dict[str, WeightScale]  # by the name of their weight
    aside: list[str]  # scales of inputs and of the KV cache


def told_apart(stored: Mapping[str, TensorEntry], block: tuple[int, int]) -> Fp8:
    """The tensors of a Hugging Face folder, `block` being config.json's `weight_block_size`.

    Raises:
        UserError: an FP8 weight has no scale or two; a scale has no FP8 weight, a wrong shape or dtype; a weight is of
            another dtype than FP8 (E4M3) and those of `dtypes.WEIGHTS`.
    """
    quantised = {name for name, entry in stored.items() if entry.dtype == E4M3}
    weights, scales, aside, orphans = {}, {}, [], []
    for name, entry in stored.items():
        of_input, of_weight = _INPUT_SCALE.fullmatch(name), _WEIGHT_SCALE.fullmatch(name)
        if of_input or _KV_SCALE.fullmatch(name):
            if not quantised:
                weights[name] = entry
                continue
            aside.append(name)
            if of_input and f"{of_input[1]}weight" not in stored:
                orphans.append(name)
        elif not of_weight:
            weights[name] = entry
        elif (weight := of_weight[1]) not in quantised:
            orphans.append(name)
        elif weight in scales:
            raise UserError(f"{entry.file}: {weight} has two scales, {PER_TENSOR} and {PER_BLOCK}; keep one")
        else:
            scales[weight] = WeightScale(entry, _block_of(name, entry, stored[weight].shape, block))
    if without := sorted(quantised - scales.keys()):
        raise UserError(
            f"{stored[without[0]].file}: {listed(without)} in {E4M3} without a scale ({without[0]}{PER_TENSOR} or "
            f"{PER_BLOCK}), without which their numbers mean nothing; fetch the folder again"
        )
    if orphans:
        raise UserError(
            f"{stored[orphans[0]].file}: {listed(orphans)} without a weight in {E4M3} that they belong to; fetch the "
            "folder again"
        )
    for name, entry in weights.items():
        if entry.dtype not in WEIGHTS and name not in scales:
            allowed = ", ".join([*WEIGHTS, E4M3])
            raise UserError(f"{entry.file}: {name} is {entry.dtype}; allowed are {allowed}: dequantise it first")
    return Fp8(weights, scales, aside)


class Measured(NamedTuple):
    """What a published FP8 folder says of activations, and of which weights are in FP8."""

    folder: Path
    stored: dict[str, TensorEntry]
    quantised: set[str]  # names of weights
    kv: list[str]  # names of scales of the KV cache
    config: dict[str, Any]  # the keys of config.json that say so


def measured(folder: Path) -> Measured:
    """The static scales of a folder in Tencent's form.

    Raises:
        UserError: it is broken, or in another form.
    """
    config, stored = HyConfig.from_dir(folder), open_checkpoint(folder)
    found = told_apart(stored, config.fp8_block)
    scheme = (config.raw.get("quantization_config") or {}).get("activation_scheme")
    is_by_block = any(name + PER_BLOCK in stored for name in found.scales)
    if not found.scales or is_by_block or scheme != "static":
        what = f"{len(found.scales):,} weights in FP8{' by block' * is_by_block}, activation_scheme is {scheme}"
        raise UserError(
            f"--scales-from {folder}: {what}; a folder with static scales of its inputs is needed, such as Tencent "
            "publishes (Hy-MT2-30B-A3B-FP8), or leave it out: engines then scale inputs as they come"
        )
    kv = [name for name in found.aside if _KV_SCALE.fullmatch(name)]
    told = {key: config.raw[key] for key in QUANTIZATION if key in config.raw}
    return Measured(folder, stored, set(found.scales), kv, told)


def input_scale_of(weight: str) -> str:
    """The name of the scale of a weight's inputs."""
    return weight.removesuffix("weight") + OF_INPUT


def listed(names: Iterable[str]) -> str:
    """How many, and the first three."""
    names = list(names)
    return f"{len(names):,} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _block_of(name: str, entry: TensorEntry, weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns of a weight of this shape that one scale is for."""
    if entry.dtype not in WEIGHTS:
        raise UserError(f"{entry.file}: {name} is {entry.dtype}; a scale in one of {', '.join(WEIGHTS)} is needed")
    if name.endswith(PER_TENSOR):
        needed, block = "one number for a matrix", weight[-2:]
        fits = math.prod(entry.shape) == 1 and len(weight) == 2
    else:
        blocks = (*weight[:-2], *(math.ceil(length / size) for length, size in zip(weight[-2:], block, strict=True)))
        needed = f"{list(blocks)}, one number for each block of {block[0]} x {block[1]}"
        fits = entry.shape == blocks
    if not fits:
        raise UserError(
            f"{entry.file}: {name} has shape {list(entry.shape)}; a weight of {list(weight)} needs {needed}"
        )
    return block
