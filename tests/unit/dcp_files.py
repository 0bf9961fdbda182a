"""Distributed checkpoints as PyTorch's own classes write them."""

import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo


def save_in_chunks(folder: Path, tensors: dict[str, tuple[torch.Tensor, int]]) -> None:
    """What PyTorch's own classes write: each tensor as two halves of an axis (one, where it has length 1)."""
    folder.mkdir(parents=True)
    described, places = {}, {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for key, (tensor, axis) in tensors.items():
            chunks, start = [], 0
            for half in tensor.chunk(2, dim=axis):
                offset = [0] * tensor.dim()
                offset[axis] = start
                start += half.shape[axis]
                chunks.append(dcp.ChunkStorageMetadata(torch.Size(offset), half.shape))
                position = file.tell()
                torch.save(half.clone(memory_format=torch.contiguous_format), file)
                places[dcp.MetadataIndex(key, offset)] = _StorageInfo("__0_0.distcp", position, file.tell() - position)
            described[key] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(described, storage_data=places)))
