"""Distributed adapter checkpoints as training leaves them, made with PyTorch's own writer."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import adapter_shapes
from hymeg.hf.config import HyConfig

EVERY_KIND = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(config: HyConfig, settings: AdapterSettings, full: tuple[str, ...] = (), dtype=torch.float32):
    """Every tensor of it by key, of a size that changes the logits."""
    generator = torch.Generator().manual_seed(7)
    shapes = adapter_shapes(config, settings.rank, settings.targets, full)
    return {key: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for key, shape in shapes.items()}


def save_adapter(
    folder: Path,
    config: HyConfig | None,
    settings: AdapterSettings,
    tensors: dict[str, torch.Tensor],
    iteration: int = 5,
) -> Path:
    """The checkpoint `folder` with this one iteration, an optimizer's state among the tensors."""
    place = folder / f"iter_{iteration:07d}"
    place.mkdir(parents=True)
    state = {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in tensors.items()}
    dcp.save(dict(tensors) | state, checkpoint_id=str(place), no_dist=True)
    settings.save(place)
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    if config is not None:
        config.save(folder)
    return folder
