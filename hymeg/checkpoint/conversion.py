"""What every conversion is: planned in a process of its own, moved by workers, read back if asked, and there at once or
not at all.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.companions import carry
from hymeg.checkpoint.compare import Pair, compare_pairs
from hymeg.checkpoint.dist_files import RELEASE, TRACKER
from hymeg.checkpoint.options import Options
from hymeg.checkpoint.reading import Read
from hymeg.checkpoint.sinks.dist_folder import files_of_dist
from hymeg.checkpoint.sinks.fp8_folder import files_of_fp8, fp8_errors
from hymeg.checkpoint.sinks.hf_folder import files_of_hf
from hymeg.checkpoint.sinks.new_folder import new_folder
from hymeg.checkpoint.sinks.transfer import FilesToWrite, unpacked, write
from hymeg.checkpoint.sources import open_dist, open_hf
from hymeg.checkpoint.sources.hf_folder import as_stored
from hymeg.checkpoint.workers import aside
from hymeg.errors import UserError
from hymeg.files import drop_from_cache, write_whole
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import open_checkpoint
from hymeg.progress import Progress

_SPARE_BYTES = 16 << 20  # for small files


class Summary(NamedTuple):
    """What a conversion did."""

    num_tensors: int
    num_bytes: int
    seconds: float
    peak_bytes: int  # of resident memory, all processes together, what they share counted once; while rows are moved,
    planning_bytes: int  # and before that

    def __str__(self) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-6) / 1e9
        memory = f"{self.peak_bytes / 1e6:,.0f} MB of memory ({self.planning_bytes / 1e6:,.0f} MB to plan)"
        return (
            f"{self.num_tensors:,} tensors, {self.num_bytes:,} bytes, {self.seconds:.1f} s, {rate:.2f} GB/s, {memory}"
        )


class Conversion(NamedTuple):
    """All that is decided before anything is written, in a process of its own: of what it takes to decide only this
    stays in memory.
    """

    files: FilesToWrite
    num_tensors: int
    record: dict[str, Any]
    config: HyConfig | None  # None: the folder holds none
    carried: dict[str, Path]
    notes: Sequence[str]  # for the user
    is_dist: bool = False  # a distributed checkpoint, of no training


def to_dist(command: str, read: Read, target: Path, how: Options) -> Conversion:
    """What was read as a distributed checkpoint. Raises UserError where `target` is in the way."""
    check_apart(target, read.folders, read.beside)
    source = read.source
    files = files_of_dist(source.config, source.tensors, how.rounded_to, how.workers)
    record = {"command": command, **read.record, "dtype": how.dtype}
    return Conversion(files, len(source.tensors), record, source.config, read.carried, source.notes, is_dist=True)


def to_hf(command: str, read: Read, target: Path, how: Options, rounded_to: str | None = None) -> Conversion:
    """What was read as a Hugging Face folder. Raises UserError where `target` is in the way, or `how` cannot be done.

    Args:
        rounded_to: None: what `how` says.
    """
    check_apart(target, read.folders, read.beside)
    tensors, notes, rounded_to = read.source.tensors, read.source.notes, rounded_to or how.rounded_to
    record = {"command": command, **read.record, "dtype": how.dtype, "layout": how.layout}
    if how.quantize:
        scales = how.scales_from and Path(how.scales_from)
        check_apart(target, [scales])
        files, config, more = files_of_fp8(read.source.config, tensors, how.sharding, rounded_to, scales, how.workers)
        record |= {"quantize": how.quantize, "scales_from": scales and str(scales.resolve())}
        notes = (*notes, *more)
    else:
        files, config = files_of_hf(read.source.config, tensors, how.layout, how.sharding, rounded_to, how.workers)
    return Conversion(files, files.num_tasks, record, config, read.carried, notes)


def carry_out(planned: Callable[[], Conversion], target: Path, what: str, how: Options) -> Summary:
    """Do what `planned()` says; `what` begins the lines of progress."""
    started = time.monotonic()
    made, planning_bytes = aside(planned)
    for note in made.notes:
        how.say(note)
    num_bytes = sum(made.files.sizes.values()) + _SPARE_BYTES
    num_bytes += sum(len(data) for data in (*made.files.beside.values(), *made.files.last.values()))
    num_bytes += sum(path.stat().st_size for path in made.carried.values())
    with new_folder(target, num_bytes, how.overwrite, made.record, how.say) as partial:
        folder = partial / RELEASE if made.is_dist else partial
        folder.mkdir(exist_ok=True)
        outcome = write(folder, made.files, how.workers, Progress(what, made.files.num_bytes))
        peak = outcome.peak_bytes
        if errors := fp8_errors(outcome.results):
            made.record["relative_rms_error"] = errors
            how.say(f"FP8: relative RMS error: {', '.join(f'{kind} {error:.3%}' for kind, error in errors.items())}")
        if how.verify:
            peak = max(peak, _verify(made, folder, how.workers))
        carry(made.carried, partial)
        if made.config is not None:
            made.config.save(partial)
        if made.is_dist:
            write_whole(partial / TRACKER, RELEASE.encode())
    seconds = time.monotonic() - started
    return Summary(made.num_tensors, made.files.num_bytes, seconds, peak, planning_bytes)


def _verify(made: Conversion, folder: Path, workers: int) -> int:
    """Read all back from the disk, through the files' own headers, and compare; the peak memory."""
    written = (open_dist(folder) if made.is_dist else open_hf(folder, made.config)).tensors
    if made.config is not None and made.config is not made.config.without_quantization():
        written |= {name: as_stored(name, entry) for name, entry in open_checkpoint(folder).items()}
    for name in made.files.sizes:
        drop_from_cache(folder / name)
    packed = [some for turn in made.files.turns for some in turn]

    def pairs(some_at_a_time: Iterable[bytes]) -> Iterator[Pair]:
        for task in unpacked(some_at_a_time):
            b = written[task.tensor.key]
            yield Pair(f"{b.key}, rows from {task.rows[0][0]}", task.tensor, b, task.rows, b.dtype)

    progress = Progress("verifying", made.files.num_bytes)
    outcome = compare_pairs([pairs(packed[i::workers]) for i in range(workers)], progress)
    if outcome.results:
        first = outcome.results[0]
        raise UserError(
            f"{len(outcome.results)} of {made.files.num_tasks} pieces were not written as they were read, the first "
            f"{first.name} ({first.what}); disk or memory is faulty, or the source was changed: convert again"
        )
    return outcome.peak_bytes


def check_apart(target: Path, sources: Iterable[Path | None], beside: Iterable[Path] = ()) -> None:
    """`target` may lie in folders of which only small files are read (`beside`), but not be or hold one."""
    place = target.resolve()
    inside = [folder.resolve() for folder in sources if folder]
    for folder in [*inside, *(folder.resolve() for folder in beside)]:
        if folder == place or place in folder.parents or (folder in inside and folder in place.parents):
            raise UserError(f"{target}: is, holds or lies in {folder}, which is read; give a folder elsewhere")
