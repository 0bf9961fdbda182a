"""Megatron's checkpoints with checksums: taken as its writer writes, on every rank, synchronously or in its background
process; compared as its reader reads.

The sums come to rank 0 with the writers' results and are written before `metadata.json`, which makes a folder a
checkpoint. Line numbers are megatron-core 0.19.2's.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult

from hymeg.checksums import MANIFEST, FileSum, Summer, SummingStream, open_verified, sum_of, sum_of_file, write_manifest
from hymeg.errors import UserError
from hymeg.files import write_whole
from hymeg.platform.patches import patched, replaced, replaces

_MARKER = "metadata.json"
_UNWRITABLE = "cannot be written: "
_KEPT = "the checkpoint before it is kept: make room or mend the folder, and start the same command again"
before_save: list[Callable[[], None]] = []
"""Called on every rank before it writes: may raise a UserError."""
once_saved: list[Callable[[Path], None]] = []
"""Called on rank 0 with the folder of a checkpoint that is complete."""
_sums: dict[str, dict[str, FileSum]] = {}  # on rank 0: of a checkpoint's folder that is not marked as one yet


@replaces(torch_strategy, "get_async_strategy", "strategies/torch.py:766: the writer's class")
def _with_summing_writer(get_async_strategy, async_strategy="nvrx", module=None):
    strategy, found = get_async_strategy(async_strategy, module)
    if isinstance(found, dict) and found.get("FileSystemWriterAsync") is filesystem_async.FileSystemWriterAsync:
        found = found | {"FileSystemWriterAsync": SummingWriter}
    return strategy, found


def _verifying_reader(get_filesystem_reader, *args, **kwargs):
    reader = get_filesystem_reader(*args, **kwargs)
    reader.fs = _CheckedFiles()
    return reader


for _module in (torch_strategy, serialization):
    replaces(_module, "_get_filesystem_reader", "strategies/torch.py:903: it reads no checksums")(_verifying_reader)


@replaces(torch_strategy.TorchDistSaveShardedStrategy, "save", "strategies/torch.py:725: a process to hold a queue")
def _saved_here(save, *args, **kwargs):
    """On every rank it would start a process that imports all again."""
    with patched(filesystem_async, "get_write_results_queue", queue.SimpleQueue, "filesystem_async.py:200"):
        return save(*args, **kwargs)


@replaces(torch_strategy.TorchDistLoadShardedStrategy, "load", "strategies/torch.py:943: one rank fails alone")
def _loaded_by_all(load, *args, **kwargs):
    """All ranks call it, and where it is a user's error on any, it is one on all: else rank 0 would wait for the one
    that is gone, and end with a traceback of its own.
    """
    result, error = None, None
    try:
        with user_errors():
            result = load(*args, **kwargs)
    except UserError as found:
        error = found
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[UserError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = error or next(filter(None, errors), None)
    if error:
        raise error
    return result


class SummingWriter(filesystem_async.FileSystemWriterAsync):
    """Megatron's writer, which also takes checksums. Its background process finds it by this name."""

    def get_save_function_and_args(self):
        save, preload, args = super().get_save_function_and_args()
        return save and functools.partial(save_with_sums, save), preload, args

    def prepare_local_plan(self, plan):
        for call in before_save:
            call()
        plan = super().prepare_local_plan(plan)
        if not os.environ.get("RANK", "0").strip("0"):
            # An earlier life's, in the same folder: what is half written over is no checkpoint.
            for name in (_MARKER, MANIFEST):
                Path(self.checkpoint_dir, name).unlink(missing_ok=True)
        return plan

    def finish(self, metadata: Any, results: list[list[WriteResult | tuple[str, FileSum]]]) -> None:
        self.fs = files = _CheckedFiles()
        super().finish(metadata, [[one for one in rank if isinstance(one, WriteResult)] for rank in results])
        of_files = dict(one for rank in results for one in rank if isinstance(one, tuple))
        of_metadata = {path.name.removesuffix(".tmp"): summer.result() for path, summer in files.summers.items()}
        _sums[os.fspath(self.checkpoint_dir)] = of_files | of_metadata


def save_with_sums(save, rank: int, write_buckets: list, results_queue) -> None:
    """`save(rank, buckets, results)`, which Megatron calls on the rank or in a process that it started, with each
    file's name and checksums among its results, and what could not be written in words.
    """
    summers = {storage_key: Summer() for _, storage_key, _ in write_buckets}
    failures: list[str] = []

    def summed(write_item, transforms, stream, data, item, storage_key, **kwargs):
        try:
            stream = SummingStream(stream, summers[storage_key])
            return write_item(transforms, stream, data, item, storage_key, **kwargs)
        except OSError as error:
            failures.append(f"{storage_key}: {error.strerror or error}")
            raise

    found = queue.SimpleQueue()
    with replaced(filesystem_async, "_write_item", summed, "filesystem_async.py:386"):
        save(rank, write_buckets, found)
    results = found.get()
    if failures:  # Megatron tells the error's class alone
        results = OSError(f"{_UNWRITABLE}{failures[0]}")
    elif isinstance(results, dict):
        for number, (_, storage_key, _) in enumerate(write_buckets):
            results[number].append((storage_key, summers[storage_key].result()))
    results_queue.put(results)


class _CheckedFiles(FileSystem):
    """Verified as they are read, summed as they are written."""

    def __init__(self) -> None:
        self.summers: dict[Path, Summer] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        if mode == "rb":
            with open_verified(path) as stream:
                yield stream
            return
        with super().create_stream(path, mode) as stream:
            self.summers[Path(path)] = Summer()
            yield SummingStream(stream, self.summers[Path(path)])


@replaces(serialization, "save_config", "serialization.py:447: not flushed to disk, and may appear before data")
def _mark(save_config, config: Any, checkpoint_dir: str) -> None:
    """What makes the folder a checkpoint, after its manifest."""
    folder, data = Path(checkpoint_dir), json.dumps(dataclasses.asdict(config)).encode()
    sums = _sums.pop(os.fspath(checkpoint_dir), None)
    if sums is not None:
        # Of the small files that lie beside the data, an adapter's settings say. A `.distcp` that no rank of this save
        # wrote is an earlier life's, and nobody reads it.
        beside = {
            path.name: sum_of_file(path)
            for path in folder.iterdir()
            if path.is_file() and path.name not in sums and path.suffix not in (".distcp", ".tmp")
        }
        write_manifest(folder / MANIFEST, beside | sums | {_MARKER: sum_of(data)})
    write_whole(folder / _MARKER, data)
    for call in once_saved:
        call(folder)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """PyTorch wraps what readers and writers raise: what is a user's error is raised as one."""
    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
            if _UNWRITABLE in str(failure):
                what = str(failure).partition(_UNWRITABLE)[2]
                raise UserError(f"a checkpoint {_UNWRITABLE}{what}; {_KEPT}") from None
        if not error.failures:  # of another rank, of which the first one knows
            raise UserError(f"a checkpoint {_UNWRITABLE}rank 0 says why; {_KEPT}") from None
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(f"{error.filename or 'a file'} {_UNWRITABLE}{error.strerror}; {_KEPT}") from error
