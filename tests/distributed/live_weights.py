"""What a model gives of itself while it is trained, in one number for all its tensors."""

import hashlib
from collections.abc import Iterable

import torch

from hymeg.checkpoint.live import export_weights
from hymeg.checkpoint.sources import live_model
from hymeg.hf.config import HyConfig
from hymeg.platform.patches import patched

LIVE_WEIGHTS = "live weights"
"""The check of a training (worker.py) that also notes them."""


def live_digests(model_chunks: list, config: HyConfig) -> dict[str, str]:
    """By Hugging Face layout, of what this rank is given: all at once, and a few rows at a time."""
    found = {"hub": digest(export_weights(model_chunks, config))}
    with patched(live_model, "BATCH_BYTES", 50_000, "an embedding is then several batches, a stack of experts too"):
        return found | {"fused": digest(export_weights(model_chunks, config, layout="fused"))}


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes, in whatever order they come."""
    of_tensors = []
    for name, tensor in tensors:
        content = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        of_tensors.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {content}")
    return hashlib.sha256("\n".join(sorted(of_tensors)).encode()).hexdigest()
