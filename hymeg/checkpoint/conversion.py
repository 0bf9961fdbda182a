"""What every conversion is: planned in a process of its own, moved by workers, read back if asked, and there at once or
not at all.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.companions import carry
from hymeg.checkpoint.compare import Pair, compare_pairs
from hymeg.checkpoint.sinks.fp8_folder import fp8_errors
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

Say = Callable[[str], None]


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
    subfolder: str  # of the target, for the files
    num_tensors: int
    config: HyConfig | None  # None: the folder holds none
    carried: dict[str, Path]
    tracker: dict[str, bytes]
    record: dict[str, Any]
    notes: list[str]  # for the user


def carry_out(
    planned: Callable[[], Conversion],
    target: Path,
    what: str,
    workers: int,
    overwrite: bool,
    verify: bool,
    say: Say,
) -> Summary:
    started = time.monotonic()
    made, planning_bytes = aside(planned)
    for note in made.notes:
        say(note)
    small = sum(len(data) for data in (*made.files.beside.values(), *made.files.last.values()))
    small += sum(path.stat().st_size for path in made.carried.values()) + _SPARE_BYTES
    with new_folder(target, sum(made.files.sizes.values()) + small, overwrite, made.record, say) as partial:
        folder = partial / made.subfolder
        folder.mkdir(exist_ok=True)
        outcome = write(folder, made.files, workers, Progress(what, made.files.num_bytes))
        peak = outcome.peak_bytes
        if errors := fp8_errors(outcome.results):
            made.record["relative_rms_error"] = errors
            say(f"FP8: relative RMS error: {', '.join(f'{kind} {error:.3%}' for kind, error in errors.items())}")
        if verify:
            peak = max(peak, _verify(made, folder, workers))
        carry(made.carried, partial)
        if made.config is not None:
            made.config.save(partial)
        for name, data in made.tracker.items():
            write_whole(partial / name, data)
    seconds = time.monotonic() - started
    return Summary(made.num_tensors, made.files.num_bytes, seconds, peak, planning_bytes)


def _verify(made: Conversion, folder: Path, workers: int) -> int:
    """Read all back from the disk, through the files' own headers, and compare; the peak memory."""
    written = (open_dist(folder) if made.tracker else open_hf(folder, made.config)).tensors
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
    differences = [difference for of_worker in outcome.results for difference in of_worker]
    if differences:
        first = differences[0]
        raise UserError(
            f"{len(differences)} of {made.files.num_tasks} pieces were not written as they were read, the first "
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


def as_path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)
