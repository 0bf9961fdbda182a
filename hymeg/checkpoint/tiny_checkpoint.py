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
from typing import Any

import numpy as np

from hymeg.checkpoint.mapping import HF_LAYOUTS, Entry, by_key, hf_entries
from hymeg.checkpoint.rounding import converted
from hymeg.errors import UserError
from hymeg.files import write_whole
from hymeg.hf import tokenizer as tok
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ROUNDED_TO, WEIGHTS
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, TensorSpec, write_checkpoint

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

_TOKENS = {"bos": tok.BOS, "eos": tok.EOS, "pad": tok.PAD}

# Above this many elements a tensor repeats itself, shifted: at hundreds of MB/s there is no time for more random
# numbers.
_BLOCK = 2**18


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
    assert layout in HF_LAYOUTS and ROUNDED_TO[dtype]
    directory = Path(directory)
    config = config or HyConfig.from_dict(TINY_CONFIG, source="the built-in tiny config")
    tokenizer = _tiny_tokenizer(config.vocab_size)
    written = _with_tokens(config, tokenizer.get_vocab(), WEIGHTS[ROUNDED_TO[dtype]].torch, num_mtp_layers)
    hub = by_key(hf_entries(written, "hub"))
    parts = {}  # of every tensor: those of the hub layout that it is made of, one after the other
    for entry in hf_entries(written, layout):
        same = [part for part in hub[entry.dist_key] if part.rows == entry.rows]
        parts[entry] = same or sorted(hub[entry.dist_key], key=lambda part: part.rows)
    of_spec = {}
    for entry in sorted(parts, key=lambda entry: len(parts[entry]) > 1):  # nothing may count on a layer in one file
        spec = TensorSpec(entry.hf_name, "F32" if entry.is_fp32_buffer else ROUNDED_TO[dtype], entry.hf_shape)
        of_spec[spec] = parts[entry]

    _make_folder(directory)
    tokenizer.save_pretrained(directory)
    written.save(directory)
    token_ids = {f"{name}_token_id": getattr(written, f"{name}_token_id") for name in _TOKENS}
    generation = json.dumps({**token_ids, "do_sample": True, "temperature": 0.7, "top_p": 1.0}, indent=2) + "\n"
    write_whole(directory / "generation_config.json", generation.encode())

    def read(spec: TensorSpec) -> Iterator[memoryview]:
        for part in of_spec[spec]:
            for numbers in _random_numbers(part, config.initializer_range, seed):
                yield converted(memoryview(numbers).cast("B"), "F32", spec.dtype)

    write_checkpoint(directory, of_spec, read, max_shard_bytes)
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
    """Trained on the example data of the repository."""
    examples = Path(__file__).resolve().parents[2] / "examples" / "data"
    files = sorted(path for path in examples.rglob("*") if path.suffix in (".txt", ".jsonl"))
    if not files:
        raise UserError(f"{examples}: no texts there to train a tiny tokenizer on; run hymeg from its repository")
    return tok.train_tiny_tokenizer(
        (path.read_text(encoding="utf-8", errors="replace")[:200_000] for path in files), vocab_size
    )


def _with_tokens(config: HyConfig, vocab: dict[str, int], dtype: str, num_mtp_layers: int | None) -> HyConfig:
    raw = config.to_dict()
    raw.pop("torch_dtype", None)
    raw |= {"dtype": dtype, **{f"{name}_token_id": vocab[token] for name, token in _TOKENS.items()}}
    optional = {"eod_token_id": tok.END_OF_DOCUMENT, "sep_token_id": tok.ASSISTANT}
    raw |= {key: vocab[token] for key, token in optional.items() if key in raw}
    if num_mtp_layers is not None:
        raw["num_nextn_predict_layers"] = num_mtp_layers
    return HyConfig.from_dict(raw)


def _random_numbers(part: Entry, initializer_range: float, seed: int) -> Iterator[np.ndarray]:
    """The numbers of one hub tensor in fp32, a block at a time."""
    if part.hf_name.endswith("norm.weight"):
        mean, std = 1.0, 0.1
    elif part.is_fp32_buffer:
        mean, std = 0.0, 0.05
    else:
        mean, std = 0.0, initializer_range
    digest = hashlib.blake2b(f"{seed} {part.hf_name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    remaining = math.prod(part.hf_shape)
    block = generator.standard_normal(min(remaining, _BLOCK), dtype=np.float32) * np.float32(std) + np.float32(mean)
    yield block
    doubled = np.concatenate((block, block))
    while (remaining := remaining - _BLOCK) > 0:
        shift = int(generator.integers(_BLOCK // 2)) * 2 + 1  # odd, so that rows of an even length do not recur
        yield doubled[shift : shift + min(remaining, _BLOCK)]
