"""What describes a distributed checkpoint: `.metadata` and the object beside the tensors. `dist_files` says what they
hold.
"""

import argparse
import functools
import itertools
from collections.abc import Mapping

from hymeg.checkpoint.dist_files import StoredTensor
from hymeg.checkpoint.mapping import Shape
from hymeg.checkpoint.pickles import called, plain
from hymeg.checkpoint.stored_tensor import stored_object
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS

_TORCH = "torch.distributed.checkpoint.metadata"


def common_state(config: HyConfig) -> bytes:
    """The object of key `dist_files.COMMON_STATE_KEY`. Megatron compares these flags with its own, and wants a version
    under virtual pipelines.
    """
    flags = argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    return stored_object([{"args": flags, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}])


def metadata(tensors: Mapping[str, StoredTensor], objects: Mapping[str, tuple[str, int, int]]) -> bytes:
    """`.metadata` for these tensors and objects (key -> file, position, length)."""
    described = [plain(key) + _instance(_TORCH, "BytesStorageMetadata") for key in objects]
    located = [_location(key, None, *place) for key, place in objects.items()]
    layout = called("torch.serialization._get_layout", plain("torch.strided"))
    contiguous = called(f"{_TORCH}._MEM_FORMAT_ENCODING", plain(0))
    for key, tensor in tensors.items():
        chunks = [
            _instance(_TORCH, "ChunkStorageMetadata", offsets=_size(chunk.offset), sizes=_size(chunk.shape))
            for chunk in tensor.chunks
        ]
        dtype = f"ctorch\n{WEIGHTS[tensor.dtype].torch}\n".encode()
        state = [b"(", dtype, layout, plain(False), contiguous, plain(False), b"t"]
        attributes = {
            "properties": _instance(_TORCH, "TensorProperties") + b"".join(state) + b"b",
            "size": _size(tensor.shape),
            "chunks": b"](" + b"".join(chunks) + b"e",
        }
        described.append(plain(key) + _instance(_TORCH, "TensorStorageMetadata", **attributes))
        located += [_location(key, chunk.offset, chunk.file, chunk.position, chunk.length) for chunk in tensor.chunks]
    meta = {name: plain(None) for name in ("checkpoint_id", "save_id", "load_id")}
    # Joined once: the two long lists are most of the file.
    attributes = {
        "state_dict_metadata": [b"}(", *described, b"u"],
        "planner_data": [plain(None)],
        "storage_data": [b"}(", *located, b"u"],
        "storage_meta": [_instance(_TORCH, "StorageMeta", **meta, modules=b"]")],
        "version": [plain("1.0.0")],
    }
    named = itertools.chain.from_iterable([plain(name), *pieces] for name, pieces in attributes.items())
    return b"".join([b"\x80\x02", _instance(_TORCH, "Metadata"), b"}(", *named, b"ub."])


def _instance(module: str, name: str, **state: bytes) -> bytes:
    """The pickle of an object with these attributes, themselves pickled."""
    made = f"c{module}\n{name}\n".encode() + b")\x81"
    return b"".join([made, b"}(", *(_text(key) + value for key, value in state.items()), b"ub"]) if state else made


@functools.cache
def _text(text: str | None) -> bytes:
    return plain(text)


@functools.cache
def _size(shape: Shape) -> bytes:
    return called("torch.Size", plain(shape))


def _location(key: str, offset: Shape | None, file: str, position: int, length: int) -> bytes:
    """An item of storage_data: where the chunk at `offset` (None: the object) of this key lies."""
    of_chunk = {"offset": _size(offset)} if offset is not None else {}
    index = _instance(_TORCH, "MetadataIndex", fqn=_text(key), index=_text(None), **of_chunk)
    info = {"relative_path": _text(file), "offset": plain(position), "length": plain(length)}
    return index + _instance("torch.distributed.checkpoint.filesystem", "_StorageInfo", **info)
