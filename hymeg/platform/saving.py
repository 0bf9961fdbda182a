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
from hymeg.platform.patches import patch, patched
from hymeg.platform.write_results import LastOfFile

_MARKER = "metadata.json"
_UNWRITABLE = "cannot be written: "
_KEPT = "the checkpoint before it is kept: make room or mend the folder, and start the same command again"
before_save: list[Callable[[], None]] = []
"""Called on every rank before it writes: may raise a UserError."""
once_saved: list[Callable[[], None]] = []
"""Called on rank 0 when a checkpoint is complete."""
_sums: dict[str, dict[str, FileSum]] = {}  # on rank 0: of a checkpoint's folder that is not marked as one yet


def install() -> None:
    """Have Megatron's torch_dist checkpoints written with a manifest, and compared with it when they are read."""
    modules = torch_strategy.get_async_strategy

    def with_sums(async_strategy="nvrx", module=None):
        strategy, found = modules(async_strategy, module)
        if isinstance(found, dict) and found.get("FileSystemWriterAsync") is filesystem_async.FileSystemWriterAsync:
            found = found | {"FileSystemWriterAsync": SummingWriter}
        return strategy, found

    patch(torch_strategy, "get_async_strategy", with_sums, "strategies/torch.py:766: the writer's class")
    reader_of = torch_strategy._get_filesystem_reader

    def verifying_reader(*args, **kwargs):
        reader = reader_of(*args, **kwargs)
        reader.fs = _VerifyingFiles()
        return reader

    for module in (torch_strategy, serialization):
        patch(module, "_get_filesystem_reader", verifying_reader, "strategies/torch.py:903: it reads no checksums")
    load = torch_strategy.TorchDistLoadShardedStrategy.load

    @functools.wraps(load)
    def loaded(*args, **kwargs):
        return _loaded_by_all(load, *args, **kwargs)

    save = torch_strategy.TorchDistSaveShardedStrategy.save

    @functools.wraps(save)
    def saved_here(*args, **kwargs):
        with patched(filesystem_async, "get_write_results_queue", queue.SimpleQueue, "filesystem_async.py:200"):
            return save(*args, **kwargs)

    where = "strategies/torch.py:725: every rank starts a process that imports all again, to hold a queue"
    patch(torch_strategy.TorchDistSaveShardedStrategy, "save", saved_here, where)
    patch(torch_strategy.TorchDistLoadShardedStrategy, "load", loaded, "strategies/torch.py:943: one rank fails alone")
    patch(serialization, "save_config", _mark, "serialization.py:447: not flushed to disk, and may appear before data")


class SummingWriter(filesystem_async.FileSystemWriterAsync):
    """Megatron's writer, which also takes checksums. Its background process finds it by this name."""

    def get_save_function_and_args(self):
        save, preload, args = super().get_save_function_and_args()
        return save and _SummedSave(save), preload, args

    def prepare_local_plan(self, plan):
        for call in before_save:
            call()
        plan = super().prepare_local_plan(plan)
        if not os.environ.get("RANK", "0").strip("0"):
            # An earlier life's, in the same folder: what is half written over is no checkpoint.
            for name in (_MARKER, MANIFEST):
                Path(self.checkpoint_dir, name).unlink(missing_ok=True)
        return plan

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        self.fs = files = _SummingFiles()
        super().finish(metadata, results)
        of_files = {
            r.storage_data.relative_path: r.file_sum for rank in results for r in rank if hasattr(r, "file_sum")
        }
        of_metadata = {path.name.removesuffix(".tmp"): summer.result() for path, summer in files.summers.items()}
        _sums[os.fspath(self.checkpoint_dir)] = of_files | of_metadata


class _SummedSave:
    """`save(rank, buckets, results)`, which Megatron calls on the rank or in a process that it started, with checksums
    of the files among the results.
    """

    def __init__(self, save):
        self.save = save

    def __call__(self, rank, write_buckets, results_queue):
        summers = {storage_key: Summer() for _, storage_key, _ in write_buckets}
        write_item = filesystem_async._write_item

        failures: list[str] = []

        @functools.wraps(write_item)  # whose signature is looked at
        def summed(transforms, stream, data, item, storage_key, **kwargs):
            summing = SummingStream(stream, summers[storage_key])
            try:
                return write_item(transforms, summing, data, item, storage_key, **kwargs)
            except OSError as error:
                failures.append(f"{storage_key}: {error.strerror or error}")
                raise

        with patched(filesystem_async, "_write_item", summed, "filesystem_async.py:386"):
            self.save(rank, write_buckets, _QueueWithSums(results_queue, summers, failures))


class _QueueWithSums:
    def __init__(self, results, summers: dict[str, Summer], failures: list[str]):
        self.results, self.summers, self.failures = results, summers, failures

    def put(self, results) -> None:
        if self.failures:  # Megatron tells the error's class alone
            results = OSError(f"{_UNWRITABLE}{self.failures[0]}")
        if isinstance(results, dict):
            for of_file in results.values():
                if of_file:
                    summer = self.summers[of_file[-1].storage_data.relative_path]
                    of_file[-1] = LastOfFile(of_file[-1], summer.result())
        self.results.put(results)


class _SummingFiles(FileSystem):
    def __init__(self) -> None:
        self.summers: dict[Path, Summer] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            self.summers[Path(path)] = Summer()
            yield SummingStream(stream, self.summers[Path(path)])


class _VerifyingFiles(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with open_verified(path) if mode == "rb" else super().create_stream(path, mode) as stream:
            yield stream


def _loaded_by_all(load, *args, **kwargs):
    """`load`, which all ranks call, and where it is a user's error on any, it is one on all: else rank 0 would wait for
    the one that is gone, and end with a traceback of its own.
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


def _mark(config: Any, checkpoint_dir: str) -> None:
    """In the place of Megatron's `save_config`: what makes the folder a checkpoint, after its manifest."""
    folder, data = Path(checkpoint_dir), json.dumps(dataclasses.asdict(config)).encode()
    sums = _sums.pop(os.fspath(checkpoint_dir), None)
    if sums is not None:
        write_manifest(folder / MANIFEST, _sums_beside(folder, set(sums)) | sums | {_MARKER: sum_of(data)})
    write_whole(folder / _MARKER, data)
    for call in once_saved:
        call()


def _sums_beside(folder: Path, known: set[str]) -> dict[str, FileSum]:
    """Of the small files that lie beside the data, an adapter's settings say. A `.distcp` that no rank of this save
    wrote is an earlier life's, and nobody reads it.
    """
    return {
        path.name: sum_of_file(path)
        for path in folder.iterdir()
        if path.is_file() and path.name not in known and path.suffix not in (".distcp", ".tmp")
    }


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
    except UserError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(f"{error.filename or 'a file'} {_UNWRITABLE}{error.strerror}; {_KEPT}") from error
