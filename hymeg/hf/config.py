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

from hymeg.errors import UserError
from hymeg.files import read_json, shown, write_whole

MODEL_TYPE = "hy_v3"
ARCHITECTURES = ("HYV3ForCausalLM", "HyMT2ForCausalLM")
CONFIG_FILE = "config.json"


class _Kind(NamedTuple):
    description: str
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
    lambda value: (
        _is_int(value, 0)
        or (type(value) is list and len(value) > 0 and all(_is_int(token_id, 0) for token_id in value))
    ),
    lambda value: tuple(value) if type(value) is list else value,
)
DTYPE = _Kind('"bfloat16", "float16" or "float32"', lambda value: value in ("bfloat16", "float16", "float32"))
LAYER_TYPES = _Kind(
    'a list of "dense" and "sparse"',
    lambda value: type(value) is list and all(entry in ("dense", "sparse") for entry in value),
    tuple,
)

_REQUIRED = object()


class _Field(NamedTuple):
    spellings: tuple[str, ...]  # the first is ours; "a.b" is key b of the object under a
    kind: _Kind
    default: Any = _REQUIRED  # what an absent field means


_FIELDS = {
    row.spellings[0]: row
    for row in (
        _Field(("vocab_size",), SIZE),
        _Field(("hidden_size",), SIZE),
        _Field(("intermediate_size",), SIZE),
        _Field(("num_hidden_layers",), SIZE),
        _Field(("num_attention_heads",), SIZE),
        _Field(("num_key_value_heads",), SIZE),
        _Field(("head_dim",), SIZE),
        _Field(("num_experts", "num_local_experts"), SIZE),
        _Field(("num_experts_per_tok",), SIZE),
        _Field(("num_shared_experts",), SIZE),
        _Field(("moe_intermediate_size", "expert_hidden_dim"), SIZE),
        _Field(("mlp_layer_types",), LAYER_TYPES, None),
        _Field(("router_scaling_factor",), POSITIVE),
        _Field(("rms_norm_eps",), POSITIVE),
        _Field(("initializer_range",), POSITIVE),
        _Field(("rope_theta", "rope_parameters.rope_theta"), POSITIVE),
        _Field(("max_position_embeddings",), SIZE),
        _Field(("enable_lm_head_fp32",), BOOL, False),
        _Field(("enable_attention_fp32_softmax",), BOOL, False),
        _Field(("enable_moe_fp32_combine",), BOOL, True),  # transformers' class default
        _Field(("moe_router_enable_expert_bias",), BOOL, True),
        _Field(("num_nextn_predict_layers",), COUNT, 0),
        _Field(("attention_dropout",), PROBABILITY, 0.0),
        _Field(("bos_token_id",), TOKEN_ID, None),
        _Field(("eos_token_id",), TOKEN_IDS, None),
        _Field(("pad_token_id",), TOKEN_ID, None),
        _Field(("dtype", "torch_dtype"), DTYPE, None),
    )
}
_FIRST_K_DENSE = _Field(("first_k_dense_replace",), COUNT, None)


QUANTIZATION = ("quantization_config", "attn_quant_config")
_FP8_BLOCK = (128, 128)  # where config.json has none; all published checkpoints with scales by block have it


class _Fixed(NamedTuple):
    """A field that has one value hymeg can honour (None: the field must be absent or null)."""

    name: str
    value: Any
    advice: str


_FIXED = (
    _Fixed("model_type", MODEL_TYPE, "only Hy-MT2 and Hy3 checkpoints can be trained"),
    _Fixed("quantization_config.quant_method", "fp8", "only FP8 is read; dequantise the checkpoint to bfloat16 first"),
    _Fixed("rope_scaling", None, "RoPE scaling is not supported"),
    _Fixed("rope_parameters.rope_type", "default", "RoPE scaling is not supported"),
    _Fixed("rope_parameters.type", "default", "RoPE scaling is not supported"),
    _Fixed("partial_rotary_factor", 1, "RoPE over a part of head_dim is not supported"),
    _Fixed("rope_parameters.partial_rotary_factor", 1, "RoPE over a part of head_dim is not supported"),
    _Fixed("sliding_window", None, "sliding-window attention is not supported"),
    _Fixed("attention_bias", False, "biases in attention are not supported"),
    _Fixed("mlp_bias", False, "biases in the MLP are not supported"),
    _Fixed("hidden_act", "silu", "other activations are not supported"),
    _Fixed("qk_norm", True, "attention without q/k norm is not supported"),
    _Fixed("route_norm", True, "unnormalised routing weights are not supported"),
    _Fixed("moe_router_use_sigmoid", True, "softmax routing is not supported"),
    _Fixed("n_group", 1, "group-limited routing is not supported"),
    _Fixed("topk_group", 1, "group-limited routing is not supported"),
    _Fixed("tie_word_embeddings", False, "tied embeddings are not supported"),
)


@dataclass(frozen=True)
class HyConfig:
    """The shape and the numerics of a Hy model. Build it with `from_dir`, `from_file` or `from_dict`; all three check
    every value. It hashes: functions may key a cache by it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense layer's MLP
    num_hidden_layers: int  # without the MTP layers
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int  # of one expert
    mlp_layer_types: tuple[str, ...]  # "dense" or "sparse", one per trunk layer
    router_scaling_factor: float
    rms_norm_eps: float
    initializer_range: float
    rope_theta: float
    max_position_embeddings: int
    enable_lm_head_fp32: bool
    enable_attention_fp32_softmax: bool
    enable_moe_fp32_combine: bool
    moe_router_enable_expert_bias: bool
    num_nextn_predict_layers: int
    attention_dropout: float
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    dtype: str | None  # "bfloat16", "float16" or "float32"
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
        if type(d) is not dict:
            raise UserError(f"{source}: the file holds {shown(d)}; a JSON object (a model's config) is needed")
        for row in _FIXED:
            _check_fixed(d, row, source)
        _check_architectures(d, source)
        _check_quantization(d, source)
        values = {name: _read(d, row, source) for name, row in _FIELDS.items()}
        values["mlp_layer_types"] = _layer_types(d, values, source)
        _check_together(values, source)
        try:
            return cls(**values, raw=copy.deepcopy(d))
        except RecursionError:
            raise UserError(f"{source}: the JSON is nested too deeply to be a model's config") from None

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
        if not Path(directory).is_dir():
            raise UserError(
                f"{directory}: no such folder; give the local folder of a Hugging Face checkpoint (`hf download` "
                "fetches one)"
            )
        return cls.from_file(Path(directory) / CONFIG_FILE)

    def without_mtp(self) -> "HyConfig":
        """The same model without its multi-token-prediction layers."""
        return self.from_dict(self.raw | {"num_nextn_predict_layers": 0})

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


assert set(_FIELDS) == {f.name for f in fields(HyConfig)} - {"raw"}


def _lookup(d: dict[str, Any], spelling: str, source: str) -> Any:
    """The value under `spelling`, None where it is absent or null."""
    parent, _, key = spelling.rpartition(".")
    if parent:
        d = d.get(parent) if d.get(parent) is not None else {}
        if type(d) is not dict:
            raise UserError(f"{source}: {parent} is {shown(d)}; an object is needed")
    return d.get(key)


def _read(d: dict[str, Any], row: _Field, source: str) -> Any:
    found = {spelling: value for spelling in row.spellings if (value := _lookup(d, spelling, source)) is not None}
    for spelling, value in found.items():
        if not row.kind.accepts(value):
            raise UserError(f"{source}: {spelling} is {shown(value)}; {row.kind.description} is needed")
        if value != next(iter(found.values())):
            both = " and ".join(f"{name} = {shown(v)}" for name, v in found.items())
            raise UserError(
                f"{source}: {both} contradict each other; they name the same thing, so make them equal or remove one"
            )
    if found:
        return row.kind.convert(next(iter(found.values())))
    if row.default is _REQUIRED:
        raise UserError(
            f"{source}: {' (or '.join(row.spellings)}{')' * (len(row.spellings) - 1)} is missing; "
            f"{row.kind.description} is needed"
        )
    return row.default


def _check_fixed(d: dict[str, Any], row: _Fixed, source: str) -> None:
    value = _lookup(d, row.name, source)
    if value is None and row.name != "model_type":
        return
    same_type = type(value) is type(row.value) or (type(value) is float and type(row.value) is int)
    if row.value is None or not same_type or value != row.value:
        allowed = "absent or null" if row.value is None else json.dumps(row.value)
        found = "missing" if value is None else shown(value)
        raise UserError(f"{source}: {row.name} is {found}, it must be {allowed}: {row.advice}")


def _check_architectures(d: dict[str, Any], source: str) -> None:
    architectures = d.get("architectures")
    if architectures is not None and not (
        type(architectures) is list and any(name in architectures for name in ARCHITECTURES)
    ):
        raise UserError(
            f"{source}: architectures is {shown(architectures)}; a list with {' or '.join(ARCHITECTURES)} is needed"
        )


def _check_quantization(d: dict[str, Any], source: str) -> None:
    block = _lookup(d, "quantization_config.weight_block_size", source)
    is_block = type(block) is list and len(block) == 2 and all(_is_int(size, 1) for size in block)
    if block is not None and not is_block:
        raise UserError(
            f"{source}: quantization_config.weight_block_size is {shown(block)}; a list of two positive integers is "
            "needed, rows and columns that share a scale"
        )
    found = d.get("quantization_config")
    if found and _lookup(d, "quantization_config.quant_method", source) is None:
        raise UserError(f"{source}: quantization_config is {shown(found)}; only quant_method fp8 is read")


def _layer_types(d: dict[str, Any], values: dict[str, Any], source: str) -> tuple[str, ...]:
    """mlp_layer_types from its own field or from first_k_dense_replace; with neither, the first layer is dense
    (transformers' class default).
    """
    num_layers = values["num_hidden_layers"]
    first_k_dense = _read(d, _FIRST_K_DENSE, source)
    listed = values["mlp_layer_types"]
    if first_k_dense is not None and first_k_dense > num_layers:
        raise UserError(
            f"{source}: first_k_dense_replace is {first_k_dense}; at most num_hidden_layers ({num_layers}) is possible"
        )
    if listed is not None and len(listed) != num_layers:
        raise UserError(
            f"{source}: mlp_layer_types has {len(listed)} entries; one for each of the {num_layers} layers "
            "(num_hidden_layers) is needed"
        )
    num_dense = 1 if first_k_dense is None else first_k_dense
    counted = ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)
    if listed is not None and first_k_dense is not None and listed != counted:
        raise UserError(
            f"{source}: mlp_layer_types and first_k_dense_replace = {first_k_dense} contradict each other; make them "
            "agree or remove one"
        )
    return counted if listed is None else listed


def _check_together(values: dict[str, Any], source: str) -> None:
    """What one field alone cannot tell."""
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise UserError(
            f"{source}: num_attention_heads is {heads}; a multiple of num_key_value_heads ({kv_heads}) is needed"
        )
    if values["head_dim"] % 2:
        raise UserError(f"{source}: head_dim is {values['head_dim']}; RoPE needs an even number")
    if values["num_experts_per_tok"] > values["num_experts"]:
        raise UserError(
            f"{source}: num_experts_per_tok is {values['num_experts_per_tok']}; at most num_experts "
            f"({values['num_experts']}) is possible"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_ids = values[name] if isinstance(values[name], tuple) else [values[name]]
        for token_id in token_ids:
            if token_id is not None and token_id >= values["vocab_size"]:
                raise UserError(
                    f"{source}: {name} is {token_id}, outside the vocabulary; an id below vocab_size "
                    f"({values['vocab_size']}) is needed"
                )
