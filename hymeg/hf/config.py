"""config.json of a Hy checkpoint, read once into a checked, typed `HyConfig`: the one source for the shape of the
model.

Both spellings of every field are read; a value that hymeg cannot honour is refused by name rather than ignored. How the
fields become Megatron's flags is `hymeg.models`' business. No torch here.
"""

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.errors import UserError, located
from hymeg.files import read_json, shown, write_whole

ARCHITECTURES = ("HYV3ForCausalLM", "HyMT2ForCausalLM")
CONFIG_FILE = "config.json"


class _Kind(NamedTuple):
    needed: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def _is_int(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value < 2**31


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


SIZE = _Kind("a positive integer", lambda value: _is_int(value, 1))
COUNT = _Kind("zero or a positive integer", lambda value: _is_int(value, 0))
BOOL = _Kind("true or false", lambda value: type(value) is bool)
POSITIVE = _Kind("a positive number", lambda value: _is_number(value) and value > 0, float)
PROBABILITY = _Kind(
    "a number from 0 up to, not including, 1", lambda value: _is_number(value) and 0 <= value < 1, float
)
TOKEN_ID = _Kind("a token id (an integer from 0)", lambda value: _is_int(value, 0))
TOKEN_IDS = _Kind(
    "a token id (an integer from 0) or a list of them",
    lambda value: value != [] and all(_is_int(token, 0) for token in (value if type(value) is list else [value])),
    lambda value: tuple(value) if type(value) is list else value,
)
DTYPE = _Kind('"bfloat16", "float16" or "float32"', lambda value: value in ("bfloat16", "float16", "float32"))
LAYER_TYPES = _Kind(
    'a list of "dense" and "sparse"',
    lambda value: type(value) is list and all(entry in ("dense", "sparse") for entry in value),
    tuple,
)

_CHECKED = {  # and not kept
    "architectures": _Kind(
        f"a list with {' or '.join(ARCHITECTURES)}",
        lambda value: type(value) is list and any(name in value for name in ARCHITECTURES),
    ),
    "quantization_config.weight_block_size": _Kind(
        "a list of two positive integers, rows and columns that share a scale,",
        lambda value: type(value) is list and len(value) == 2 and all(_is_int(size, 1) for size in value),
    ),
}

_REQUIRED = object()


class _Reading(NamedTuple):
    """How a field is read from config.json."""

    kind: _Kind
    spellings: tuple[str, ...]  # beside its name; "a.b" is key b of the object under a
    default: Any  # what an absent field means


def _of(kind: _Kind, *spellings: str, default: Any = _REQUIRED) -> Any:
    return field(metadata={"reading": _Reading(kind, spellings, default)})


QUANTIZATION = ("quantization_config", "attn_quant_config")
_FP8_BLOCK = (128, 128)  # where config.json has none; all published checkpoints with scales by block have it

_ROPE_SCALING, _PARTIAL_ROPE = "RoPE scaling is not supported", "RoPE over a part of head_dim is not supported"
_GROUPS = "group-limited routing is not supported"
_FIXED = {  # the one value that hymeg can honour (None: the field must be absent or null); why
    "model_type": ("hy_v3", "only Hy-MT2 and Hy3 checkpoints can be trained"),
    "quantization_config.quant_method": ("fp8", "only FP8 is read; dequantise the checkpoint to bfloat16 first"),
    "rope_scaling": (None, _ROPE_SCALING),
    "rope_parameters.rope_type": ("default", _ROPE_SCALING),
    "rope_parameters.type": ("default", _ROPE_SCALING),
    "partial_rotary_factor": (1, _PARTIAL_ROPE),
    "rope_parameters.partial_rotary_factor": (1, _PARTIAL_ROPE),
    "sliding_window": (None, "sliding-window attention is not supported"),
    "attention_bias": (False, "biases in attention are not supported"),
    "mlp_bias": (False, "biases in the MLP are not supported"),
    "hidden_act": ("silu", "other activations are not supported"),
    "qk_norm": (True, "attention without q/k norm is not supported"),
    "route_norm": (True, "unnormalised routing weights are not supported"),
    "moe_router_use_sigmoid": (True, "softmax routing is not supported"),
    "n_group": (1, _GROUPS),
    "topk_group": (1, _GROUPS),
    "tie_word_embeddings": (False, "tied embeddings are not supported"),
}


@dataclass(frozen=True)
class HyConfig:
    """The shape and the numerics of a Hy model. Build it with `from_dir`, `from_file` or `from_dict`; all three check
    every value. It hashes: functions may key a cache by it.
    """

    vocab_size: int = _of(SIZE)
    hidden_size: int = _of(SIZE)
    intermediate_size: int = _of(SIZE)  # of a dense layer's MLP
    num_hidden_layers: int = _of(SIZE)  # without the MTP layers
    num_attention_heads: int = _of(SIZE)
    num_key_value_heads: int = _of(SIZE)
    head_dim: int = _of(SIZE)
    num_experts: int = _of(SIZE, "num_local_experts")
    num_experts_per_tok: int = _of(SIZE)
    num_shared_experts: int = _of(SIZE)
    moe_intermediate_size: int = _of(SIZE, "expert_hidden_dim")  # of one expert
    mlp_layer_types: tuple[str, ...] = _of(LAYER_TYPES, default=None)  # "dense" or "sparse", one per trunk layer
    router_scaling_factor: float = _of(POSITIVE)
    rms_norm_eps: float = _of(POSITIVE)
    initializer_range: float = _of(POSITIVE)
    rope_theta: float = _of(POSITIVE, "rope_parameters.rope_theta")
    max_position_embeddings: int = _of(SIZE)
    enable_lm_head_fp32: bool = _of(BOOL, default=False)
    enable_attention_fp32_softmax: bool = _of(BOOL, default=False)
    enable_moe_fp32_combine: bool = _of(BOOL, default=True)  # transformers' class default
    moe_router_enable_expert_bias: bool = _of(BOOL, default=True)
    num_nextn_predict_layers: int = _of(COUNT, default=0)
    attention_dropout: float = _of(PROBABILITY, default=0.0)
    bos_token_id: int | None = _of(TOKEN_ID, default=None)
    eos_token_id: int | tuple[int, ...] | None = _of(TOKEN_IDS, default=None)
    pad_token_id: int | None = _of(TOKEN_ID, default=None)
    dtype: str | None = _of(DTYPE, "torch_dtype", default=None)  # "bfloat16", "float16" or "float32"
    raw: dict[str, Any] = field(repr=False, compare=False)  # config.json as it was read

    @classmethod
    def from_dict(cls, d: dict[str, Any], source: str = CONFIG_FILE) -> "HyConfig":
        """The config in a parsed config.json.

        Args:
            d: the JSON object; it is copied, not kept.
            source: the file's name, for messages.

        Raises:
            UserError: a field is missing, has a wrong type, contradicts another one or asks for what hymeg does not do.
        """
        with located(source):
            if type(d) is not dict:
                raise UserError(f"the file holds {shown(d)}; a JSON object (a model's config) is needed")
            for name in _FIXED:
                _check_fixed(d, name)
            for name, kind in _CHECKED.items():
                _read(d, name, _Reading(kind, (), None))
            found = d.get("quantization_config")
            if found and _lookup(d, "quantization_config.quant_method") is None:
                raise UserError(f"quantization_config is {shown(found)}; only quant_method fp8 is read")
            values = {row.name: _read(d, row.name, row.metadata["reading"]) for row in fields(cls) if row.metadata}
            values["mlp_layer_types"] = _layer_types(d, values)
            _check_together(values)
            try:
                return cls(**values, raw=copy.deepcopy(d))
            except RecursionError:
                raise UserError("the JSON is nested too deeply to be a model's config") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "HyConfig":
        """The config in the file `path`. Raises UserError as `from_dict` does, and where the file cannot be read or is
        not JSON.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dir(cls, directory: str | os.PathLike) -> "HyConfig":
        """The config of the checkpoint in the folder `directory`. Raises UserError as `from_file` does."""
        if Path(directory).is_file():
            raise UserError(f"{directory}: a file; give the folder that holds {CONFIG_FILE}")
        return cls.from_file(local_directory(directory) / CONFIG_FILE)

    def without_mtp(self) -> "HyConfig":
        """The same model without its multi-token-prediction layers; itself where it has none."""
        has_some = self.num_nextn_predict_layers > 0
        return self.from_dict(self.raw | {"num_nextn_predict_layers": 0}) if has_some else self

    def with_vocabulary(self, vocab_size: int) -> "HyConfig":
        """The same model with another size of vocabulary."""
        return self.from_dict(self.raw | {"vocab_size": vocab_size})

    def without_quantization(self) -> "HyConfig":
        """The same model in plain weights."""
        raw = {key: value for key, value in self.raw.items() if key not in QUANTIZATION}
        return self if len(raw) == len(self.raw) else self.from_dict(raw)

    @property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns that share a scale in an FP8 checkpoint with scales by block."""
        found = (self.raw.get("quantization_config") or {}).get("weight_block_size")
        return tuple(found) if found else _FP8_BLOCK

    def to_dict(self) -> dict[str, Any]:
        """config.json as it was read: the same keys, order and values."""
        return copy.deepcopy(self.raw)

    def save(self, directory: str | os.PathLike) -> None:
        """Write config.json as it was read into `directory` (which exists), whole or not at all. Raises UserError where
        it cannot be written.
        """
        write_whole(Path(directory) / CONFIG_FILE, (json.dumps(self.raw, indent=2) + "\n").encode())

    @property
    def shared_expert_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts of a layer."""
        return self.moe_intermediate_size * self.num_shared_experts

    @property
    def mtp_layer_indices(self) -> range:
        """Indices of the multi-token-prediction layers in tensor names: they follow the trunk's."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0 and through the MTP layers, is a mixture of experts. MTP layers are."""
        return layer in self.mtp_layer_indices or self.mlp_layer_types[layer] == "sparse"


def local_directory(directory: str | os.PathLike) -> Path:
    """That of a Hugging Face checkpoint. Raises UserError where there is none."""
    if not Path(directory).is_dir():
        raise UserError(
            f"{directory}: no such folder; give the local folder of a Hugging Face checkpoint (`hf download` fetches "
            "one)"
        )
    return Path(directory)


def _lookup(d: dict[str, Any], spelling: str) -> Any:
    """The value under `spelling`, None where it is absent or null."""
    parent, _, key = spelling.rpartition(".")
    if parent:
        d = d.get(parent) if d.get(parent) is not None else {}
        if type(d) is not dict:
            raise UserError(f"{parent} is {shown(d)}; an object is needed")
    return d.get(key)


def _read(d: dict[str, Any], name: str, how: _Reading) -> Any:
    spellings = (name, *how.spellings)
    found = {spelling: value for spelling in spellings if (value := _lookup(d, spelling)) is not None}
    for spelling, value in found.items():
        if not how.kind.accepts(value):
            raise UserError(f"{spelling} is {shown(value)}; {how.kind.needed} is needed")
        if value != next(iter(found.values())):
            both = " and ".join(f"{name} = {shown(v)}" for name, v in found.items())
            raise UserError(f"{both} contradict each other; they name the same thing, so make them equal or remove one")
    if found:
        return how.kind.convert(next(iter(found.values())))
    if how.default is _REQUIRED:
        names = " (or ".join(spellings) + ")" * len(how.spellings)
        raise UserError(f"{names} is missing; {how.kind.needed} is needed")
    return how.default


def _check_fixed(d: dict[str, Any], name: str) -> None:
    value, (needed, why) = _lookup(d, name), _FIXED[name]
    if value is None and name != "model_type":
        return
    same_type = type(value) is type(needed) or (type(value) is float and type(needed) is int)
    if not same_type or value != needed:
        allowed = "absent or null" if needed is None else json.dumps(needed)
        found = "missing" if value is None else shown(value)
        raise UserError(f"{name} is {found}, it must be {allowed}: {why}")


def _layer_types(d: dict[str, Any], values: dict[str, Any]) -> tuple[str, ...]:
    """mlp_layer_types from its own field or from first_k_dense_replace; with neither, the first layer is dense
    (transformers' class default).
    """
    num_layers, listed = values["num_hidden_layers"], values["mlp_layer_types"]
    counted = _read(d, "first_k_dense_replace", _Reading(COUNT, (), None))
    if counted is not None and counted > num_layers:
        raise UserError(f"first_k_dense_replace is {counted}; at most num_hidden_layers ({num_layers}) is possible")
    if listed is not None and len(listed) != num_layers:
        needed = f"one for each of the {num_layers} layers (num_hidden_layers)"
        raise UserError(f"mlp_layer_types has {len(listed)} entries; {needed} is needed")
    num_dense = 1 if counted is None else counted
    types = ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)
    if listed is not None and counted is not None and listed != types:
        both = f"mlp_layer_types and first_k_dense_replace = {counted}"
        raise UserError(f"{both} contradict each other; make them agree or remove one")
    return types if listed is None else listed


def _check_together(values: dict[str, Any]) -> None:
    """What one field alone cannot tell."""
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise UserError(f"num_attention_heads is {heads}; a multiple of num_key_value_heads ({kv_heads}) is needed")
    if values["head_dim"] % 2:
        raise UserError(f"head_dim is {values['head_dim']}; RoPE needs an even number")
    chosen, experts = values["num_experts_per_tok"], values["num_experts"]
    if chosen > experts:
        raise UserError(f"num_experts_per_tok is {chosen}; at most num_experts ({experts}) is possible")
    if chosen == 1:
        raise UserError("num_experts_per_tok is 1; at least 2 are needed: Megatron does not normalise a single weight")
    size = values["vocab_size"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in values[name] if isinstance(values[name], tuple) else [values[name]]:
            if token is not None and token >= size:
                raise UserError(f"{name} is {token}, outside the vocabulary; an id below vocab_size ({size}) is needed")
