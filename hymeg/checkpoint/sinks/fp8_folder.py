"""A Hugging Face folder in FP8 as a sink, in Tencent's form (`hymeg.hf.fp8`): each Linear divided by one scale of its
own, which is found while it is written; the scales of activations come from a folder for which they were measured.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hymeg.checkpoint.mapping import Entry, Range, hf_entries
from hymeg.checkpoint.row_functions import Fp8Codes, Fp8Scale
from hymeg.checkpoint.row_tensors import RowTensor
from hymeg.checkpoint.sinks.hf_folder import files_of_shards, hf_specs, with_dtype
from hymeg.checkpoint.sinks.transfer import FilesToWrite
from hymeg.checkpoint.sources.hf_folder import as_stored
from hymeg.errors import UserError, located
from hymeg.hf.config import HyConfig
from hymeg.hf.fp8 import (
    DYNAMIC,
    E4M3,
    KV_SCALES_FILE,
    PER_TENSOR,
    QUANTISED,
    Measured,
    input_scale_of,
    listed,
    measured,
)
from hymeg.hf.safetensors_files import Shard, TensorSpec, into_shards


def files_of_fp8(
    config: HyConfig,
    tensors: Mapping[str, RowTensor],
    sharding: int | Mapping[str, str],
    dtype: str | None,
    scales_from: Path | None,
    workers: int,
) -> tuple[FilesToWrite, HyConfig, list[str]]:
    """A folder that holds `tensors` under the hub's names, those of Linears in FP8; its config, and what to say.

    Args:
        dtype: of what is not quantised; None: its own. The expert bias is always F32.
        scales_from: whose scales of inputs and of the KV cache go along; None: none, and engines are told so.

    Raises:
        UserError: it lacks one of those, or is another model's.
    """
    entries = {entry.hf_name: entry for entry in hf_entries(config, "hub")}
    quantised, given, kv = {name for name in entries if QUANTISED.fullmatch(name)}, None, []
    if scales_from:
        given = measured(scales_from)
        with located(f"--scales-from {scales_from}"):
            quantised = _checked(given, entries, quantised)
        layers = {_layer(name) for name in entries}
        kv = [as_stored(name, given.stored[name]) for name in given.kv if _layer(name) in layers]
    dtypes = {key: tensor.dtype_kept for key, tensor in tensors.items()}
    kept = {spec.name: spec for spec in hf_specs(entries.values(), dtypes, dtype) if spec.name not in quantised}
    specs: list[TensorSpec] = []
    made_of: dict[str, tuple[RowTensor, Sequence[Range]]] = {}  # a weight's scale comes after it: it is then found once
    for name, entry in entries.items():
        source = tensors[entry.dist_key]
        if name in kept:
            specs.append(kept[name])
            made_of[name] = source, entry.rows
            continue
        scale = Fp8Scale(name, source, entry.rows)
        made = [RowTensor(name, E4M3, entry.hf_shape, (), Fp8Codes(scale, _kind(name)))]
        made.append(RowTensor(name + PER_TENSOR, "F32", (1,), (), scale))
        if given:
            made.append(as_stored(input_scale_of(name), given.stored[input_scale_of(name)]))
        specs += map(_spec, made)
        made_of |= {tensor.key: (tensor, tensor.all_rows) for tensor in made}
    if not isinstance(sharding, int):
        of_weights = {name: sharding[name] for name in quantised & sharding.keys()}
        beside = {scale: file for n, file in of_weights.items() for scale in (n + PER_TENSOR, input_scale_of(n))}
        sharding = {**sharding, **beside}
    shards = into_shards(specs, sharding)
    if kv:
        made_of |= {tensor.key: (tensor, tensor.all_rows) for tensor in kv}
        shards.append(Shard(KV_SCALES_FILE, tuple(map(_spec, kv))))
    told = given.config if given else {"quantization_config": DYNAMIC}
    written = HyConfig.from_dict(with_dtype(config, list(kept.values())).raw | told)
    return files_of_shards(shards, made_of, workers), written, _notes(quantised, given, len(kv))


def _spec(tensor: RowTensor) -> TensorSpec:
    return TensorSpec(tensor.key, tensor.dtype, tensor.shape)


def fp8_errors(sums: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The relative RMS error of FP8 by kind of weight: the root of the squares of the differences, added up over all
    weights of the kind, by those of the weights. `sums` are what `Fp8Codes` added up, in several processes.
    """
    total: dict[str, np.ndarray] = {}
    for of_worker in sums:
        for kind, squares in of_worker.items():
            total[kind] = total.get(kind, 0) + squares
    return {kind: float(np.sqrt(error / max(of_all, 1e-300))) for kind, (error, of_all) in sorted(total.items())}


def _checked(given: Measured, entries: Mapping[str, Entry], by_rule: set[str]) -> set[str]:
    """The weights that are in FP8 there, if all that is needed of them is."""
    quantised = given.quantised & entries.keys()
    for name in sorted(by_rule | quantised):
        found, needed, scale = given.stored.get(name), entries[name].hf_shape, input_scale_of(name)
        if found is None or found.shape != needed:
            what = f"is {list(found.shape)} there" if found else "is not there"
            raise UserError(
                f"{name} of shape {list(needed)} {what}; give the FP8 folder of the same model, --drop-mtp where only "
                "MTP layers are missing, or leave it out"
            )
        if name in quantised and scale not in given.stored:
            raise UserError(
                f"no {scale} in it, without which engines cannot load a static scheme; fetch the folder again, or "
                "leave it out"
            )
    return quantised


def _kind(name: str) -> str:
    """The weight's name without its numbers: `mlp.experts.gate_proj`."""
    return re.sub(r"^model\.layers\.\d+\.|\.\d+(?=\.)|\.weight$", "", name)


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:3])


def _notes(quantised: set[str], given: Measured | None, num_kv: int) -> list[str]:
    notes = [f"FP8: {listed(sorted(quantised))}, each with a new scale, its largest magnitude / 448"]
    if given is None:
        return [*notes, "FP8: no scales of inputs are written (activation_scheme dynamic); --scales-from gives them"]
    return [
        *notes,
        f"FP8: scales of inputs and {num_kv} of the KV cache are {given.folder}'s, measured on other weights: "
        "if training moved activations far they clip; evaluate what is served",
    ]
