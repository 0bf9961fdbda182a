"""Checkpoints of random weights in Hy's own form, of any shape: for tests, for trying a cluster out, for timing a
conversion.

Values depend on the seed and on the tensor's name in the hub layout, never on layout, dtype or shard size: a bf16
checkpoint is the fp32 one rounded, and the fused layout holds the numbers of the hub layout.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hymeg.errors import UserError
from hymeg.hf import tokenizer as tok
from hymeg.hf.config import HyConfig
from hymeg.hf.files import write_whole
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, TensorSpec, write_checkpoint

LAYOUTS = ("hub", "fused")
DTYPES = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}  # ours -> safetensors', config.json's

# Hy-MT2-30B-A3B in small. With a standard deviation of 0.006 a hidden size of 64 would give every expert the same
# score.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["HYV3ForCausalLM"],
    "model_type": "hy_v3",
    "vocab_size": 1024,
    "head_dim": 16,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "qk_norm": True,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "router_scaling_factor": 2.826,
    "route_norm": True,
    "moe_router_use_sigmoid": True,
    "moe_router_enable_expert_bias": True,
    "enable_lm_head_fp32": True,
    "enable_attention_fp32_softmax": False,
    "enable_moe_fp32_combine": False,
    "use_cache": True,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "expert_hidden_dim": 32,
    "rope_theta": 11158840.0,
    "rope_scaling": None,
}

# Above this many elements a tensor repeats itself, shifted: at hundreds of MB/s there is no time for more random
# numbers.
_BLOCK = 2**18

_FUSED_NAMES = (
    ("mlp.router.gate.", "mlp.gate."),
    ("mlp.expert_bias", "mlp.e_score_correction_bias"),
    ("mlp.shared_mlp.", "mlp.shared_experts."),
)


class _Part(NamedTuple):
    """A tensor of the hub layout."""

    name: str
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """A tensor of the checkpoint: its parts' numbers, one part after the other."""

    spec: TensorSpec
    parts: tuple[_Part, ...]


def write_tiny_checkpoint(
    directory: str | os.PathLike,
    config: HyConfig | None = None,
    *,
    layout: str = "hub",
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    seed: int = 1234,
    num_mtp_layers: int | None = None,
) -> HyConfig:
    """Write a checkpoint of random weights: config.json, generation_config.json, a tokenizer with its chat template,
    safetensors files.

    Matrices have the standard deviation `initializer_range`; norms are 1 + 0.1 x normal and the fp32 expert bias is
    0.05 x normal, so that a tensor which is lost or swapped changes the logits. Takes some 20 MB of memory whatever the
    size.

    Args:
        directory: where to; made if absent, and must be empty.
        config: the shape; `TINY_CONFIG` by default.
        layout: "hub", the published names, or "fused", transformers' names in memory (stacked experts).
        dtype: "bf16" or "fp32", for all but the expert bias.
        max_shard_bytes: for each safetensors file.
        seed: of the random numbers.
        num_mtp_layers: replaces the config's `num_nextn_predict_layers`.

    Returns:
        The config as written: `config` with the dtype, the number of MTP layers and the token ids of the tiny
            tokenizer.

    Raises:
        UserError: `directory` is not empty or cannot be written, or the vocabulary is too small for a tokenizer.
    """
    assert layout in LAYOUTS and dtype in DTYPES
    directory = Path(directory)
    config = config or HyConfig.from_dict(TINY_CONFIG, source="the built-in tiny config")
    tokenizer = _tiny_tokenizer(config.vocab_size)
    stored_dtype, config_dtype = DTYPES[dtype]
    written = _with_tokens(config, tokenizer.get_vocab(), config_dtype, num_mtp_layers)
    stored = {tensor.spec.name: tensor for tensor in _stored_tensors(written, layout, stored_dtype)}

    _make_folder(directory)
    tokenizer.save_pretrained(directory)
    written.save(directory)
    write_whole(directory / "generation_config.json", _generation_config(written).encode())

    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        for part in stored[spec.name].parts:
            yield from _random_numbers(part, spec.dtype, config.initializer_range, seed)

    write_checkpoint(directory, [tensor.spec for tensor in stored.values()], read, max_shard_bytes)
    return written


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"{directory}: not empty; give a folder that is empty or does not exist yet")
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror or error}") from error


@functools.lru_cache(maxsize=8)
def _tiny_tokenizer(vocab_size: int) -> "tok.PreTrainedTokenizerFast":
    """Trained on the example data of the repository, or, where that is not there, on the package's own sources."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(path for path in (root / "examples" / "data").rglob("*") if path.suffix in (".txt", ".jsonl"))
    files = files or sorted((root / "hymeg").rglob("*.py"))
    return tok.train_tiny_tokenizer(
        (path.read_text(encoding="utf-8", errors="replace")[:200_000] for path in files), vocab_size
    )


def _with_tokens(config: HyConfig, vocab: dict[str, int], dtype: str, num_mtp_layers: int | None) -> HyConfig:
    raw = config.to_dict()
    raw.pop("torch_dtype", None)
    raw |= {
        "dtype": dtype,
        "bos_token_id": vocab[tok.BOS],
        "eos_token_id": vocab[tok.EOS],
        "pad_token_id": vocab[tok.PAD],
    }
    raw |= {
        key: vocab[token]
        for key, token in (("eod_token_id", tok.END_OF_DOCUMENT), ("sep_token_id", tok.ASSISTANT))
        if key in raw
    }
    if num_mtp_layers is not None:
        raw["num_nextn_predict_layers"] = num_mtp_layers
    return HyConfig.from_dict(raw)


def _generation_config(config: HyConfig) -> str:
    token_ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return json.dumps({**token_ids, "do_sample": True, "temperature": 0.7, "top_p": 1.0}, indent=2) + "\n"


def _stored_tensors(config: HyConfig, layout: str, dtype: str) -> Iterator[_Stored]:
    """Every tensor of the checkpoint, in the model's order; but stacked experts come last, since nothing may count on a
    layer lying in one file.
    """
    experts: dict[str, list[_Part]] = {}
    for part in _hub_tensors(config):
        prefix, is_expert, projection = part.name.partition(".mlp.experts.")
        if layout == "hub":
            yield _Stored(
                TensorSpec(part.name, "F32" if part.name.endswith("expert_bias") else dtype, part.shape), (part,)
            )
        elif is_expert:
            experts.setdefault(
                f"{prefix}.mlp.experts.{'down_proj' if 'down_proj' in projection else 'gate_up_proj'}", []
            ).append(part)
        else:
            name = functools.reduce(lambda text, rename: text.replace(*rename), _FUSED_NAMES, part.name)
            yield _Stored(TensorSpec(name, "F32" if part.name.endswith("expert_bias") else dtype, part.shape), (part,))
    for name, parts in experts.items():
        rows, columns = parts[0].shape
        rows_of_expert = rows * len(parts) // config.num_experts  # [2I, H] of gate and up, [H, I] of down
        yield _Stored(TensorSpec(name, dtype, (config.num_experts, rows_of_expert, columns)), tuple(parts))


def _hub_tensors(config: HyConfig) -> Iterator[_Part]:
    hidden = config.hidden_size
    yield _Part("model.embed_tokens.weight", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        for name, shape in _layer_tensors(config, layer):
            yield _Part(f"model.layers.{layer}.{name}", shape)
    yield _Part("model.norm.weight", (hidden,))
    yield _Part("lm_head.weight", (config.vocab_size, hidden))


def _layer_tensors(config: HyConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, query, key_value = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    if layer in config.mtp_layer_indices:
        yield from {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
        }.items()
    yield "input_layernorm.weight", (hidden,)
    yield from (
        (f"self_attn.{name}_proj.weight", (size, hidden))
        for name, size in (("q", query), ("k", key_value), ("v", key_value))
    )
    yield "self_attn.o_proj.weight", (hidden, query)
    yield from ((f"self_attn.{name}_norm.weight", (config.head_dim,)) for name in "qk")
    yield "post_attention_layernorm.weight", (hidden,)
    if config.is_moe_layer(layer):
        yield "mlp.router.gate.weight", (config.num_experts, hidden)
        if config.moe_router_enable_expert_bias:
            yield "mlp.expert_bias", (config.num_experts,)
        for expert in range(config.num_experts):
            yield from _mlp_tensors(f"mlp.experts.{expert}.", hidden, config.moe_intermediate_size)
        yield from _mlp_tensors("mlp.shared_mlp.", hidden, config.shared_expert_intermediate_size)
    else:
        yield from _mlp_tensors("mlp.", hidden, config.intermediate_size)
    if layer in config.mtp_layer_indices:
        yield "final_layernorm.weight", (hidden,)


def _mlp_tensors(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (
        ("gate", (intermediate, hidden)),
        ("up", (intermediate, hidden)),
        ("down", (hidden, intermediate)),
    ):
        yield f"{prefix}{name}_proj.weight", shape


def _random_numbers(part: _Part, dtype: str, initializer_range: float, seed: int) -> Iterator[np.ndarray]:
    """The numbers of one hub tensor, a block at a time, as the bytes of `dtype` ("BF16" or "F32")."""
    if part.name.endswith("norm.weight"):
        mean, std = 1.0, 0.1
    elif part.name.endswith("expert_bias"):
        mean, std = 0.0, 0.05
    else:
        mean, std = 0.0, initializer_range
    digest = hashlib.blake2b(f"{seed} {part.name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    remaining = math.prod(part.shape)
    block = generator.standard_normal(min(remaining, _BLOCK), dtype=np.float32) * np.float32(std) + np.float32(mean)
    block = block.astype("<f4") if dtype == "F32" else _to_bf16(block)
    yield block
    doubled = np.concatenate((block, block))
    while (remaining := remaining - _BLOCK) > 0:
        shift = int(generator.integers(_BLOCK // 2)) * 2 + 1  # odd, so that rows of an even length do not recur
        yield doubled[shift : shift + min(remaining, _BLOCK)]


def _to_bf16(numbers: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, rounded to the nearest, ties to even."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
