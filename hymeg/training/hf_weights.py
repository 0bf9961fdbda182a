"""A Hugging Face folder given where training expects a checkpoint: converted to a distributed one first, once for all
processes of a job.

Rank 0 converts to `PLACE/hf_weights/NAME`, the others wait; a node that does not see the result has a disk of its own,
and its first rank converts to `NAME-HOST` there. What was converted is used again as long as its source is the same
file by file: `source.json` beside the tracker keeps account.
"""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hymeg import __version__
from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.dist_files import SOURCE_FILE, TRACKER
from hymeg.checkpoint.sinks.new_folder import partial_of
from hymeg.errors import UserError, about
from hymeg.hf.config import CONFIG_FILE
from hymeg.hf.safetensors_files import INDEX_FILE
from hymeg.progress import Say
from hymeg.training.once import once_per_node

FOLDER = "hf_weights"
_MAX_WORKERS = 8  # more than a disk needs
_SECONDS_BETWEEN_LINES = 10.0


def convert_hf_weights(args: argparse.Namespace) -> None:
    """Where the weights are a Hugging Face folder's, convert it, on one process for all that share its disk, and let
    `args.load` (of adapters `args.lora_base`) name the result.

    It goes into `--save`, else into `--data-cache-path`, else into the user's cache folder.
    """
    if args.hf_weights is None:
        return
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hymeg")
    place = args.save or args.data_cache_path or cache
    folder = converted(
        args.hf_weights, place, args.rank, args.local_rank, lambda line: print(f"hymeg: {line}", flush=True)
    )
    if args.lora_rank is None:
        args.load, args.exit_on_missing_checkpoint = str(folder), True
    else:
        args.lora_base = str(folder)


def converted(hf: str | Path, place: str | Path, rank: int, local_rank: int, say: Say) -> Path:
    """The distributed checkpoint made of the Hugging Face folder `hf`, in a folder inside `place`. All ranks call it.

    Args:
        place: a folder, made if absent. It may be one for all nodes or each node's own.
        rank, local_rank: of this process, in the job and on its node.
        say: is given lines for the user.

    Raises:
        UserError: the conversion failed, on this process or on another.
    """
    hf, source = Path(hf), fingerprint(Path(hf))
    name = f"{hf.resolve().name}-{hashlib.sha256(source['folder'].encode()).hexdigest()[:8]}"
    shared = Path(place) / FOLDER / name
    own = shared if rank == 0 else shared.with_name(f"{name}-{socket.gethostname()}")

    def found() -> Path | None:
        if rank == 0:
            return shared if _source_of(shared) == source else None
        # Rank 0 has seen to it that its own is no older than the source; a node with a copy of the source has other
        # times, and maybe another path.
        return next((target for target in (shared, own) if _content(_source_of(target)) == _content(source)), None)

    if rank == 0 and found():
        say(f"{hf} was converted before: {shared}")
    with _waiting(hf, shared, say) if rank > 0 and local_rank == 0 else contextlib.nullcontext():
        once_per_node(f"conversion to {shared}", lambda: found() is not None, lambda: _convert(hf, source, own, say))
    if (target := found()) is None:
        raise UserError(f"{hf}: was converted to {shared}, which is gone: removed, or the source changed? start again")
    return target


def fingerprint(hf: Path) -> dict[str, Any]:
    """What tells a checkpoint from a later one in the same folder: its path, the size and time of its weights, the text
    of its config.json. Raises UserError: it cannot be read.
    """
    try:
        weights = sorted(path for path in hf.iterdir() if path.suffix == ".safetensors" or path.name == INDEX_FILE)
        files = {path.name: [(found := path.stat()).st_size, found.st_mtime_ns] for path in weights}
        config = hashlib.sha256((hf / CONFIG_FILE).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{hf}: cannot be read: {error.strerror or error}") from error
    return {"hymeg": __version__, "folder": str(hf.resolve()), "files": files, "config": config}


def _source_of(target: Path) -> dict[str, Any] | None:
    """What `target` was converted from; None where it is not there or not complete."""
    try:
        return json.loads((target / SOURCE_FILE).read_bytes()) if (target / TRACKER).is_file() else None
    except (OSError, ValueError):
        return None


def _content(source: dict[str, Any] | None) -> Any:
    """Of a fingerprint what a copy of the source has as well."""
    return source and (source["hymeg"], source["config"], {name: size for name, (size, _) in source["files"].items()})


def _convert(hf: Path, source: dict[str, Any], target: Path, say: Say) -> None:
    say(f"{hf} is a Hugging Face folder: converting it, once, to {target}")
    with about(f"{hf} must be converted, which goes to --save, else to --data-cache-path, else to ~/.cache: "):
        workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        summary = hf_to_dist(hf, target, workers=workers, overwrite=True, say=say)
        (target / SOURCE_FILE).write_text(json.dumps(source, indent=1))
    say(f"converted: {summary.num_tensors:,} tensors, {summary.num_bytes / 1e9:,.2f} GB, {summary.seconds:.1f} s")


@contextlib.contextmanager
def _waiting(hf: Path, target: Path, say: Say) -> Iterator[None]:
    """Says every ten seconds that this node waits, and how far rank 0 is where its files can be seen."""
    done, started = threading.Event(), time.monotonic()
    num_bytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))

    def lines() -> None:
        while not done.wait(_SECONDS_BETWEEN_LINES):
            written = sum(path.stat().st_size for path in partial_of(target).glob("*/*.distcp"))
            how_far = f", {min(written / num_bytes, 1):.0%} is there" if written else ""
            say(f"{socket.gethostname()} waits for rank 0 to convert {hf}, {time.monotonic() - started:.0f} s{how_far}")

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
