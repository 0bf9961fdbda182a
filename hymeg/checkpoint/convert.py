"""Hugging Face checkpoints to distributed ones and back: streaming, in several processes, without a model, a GPU or a
process group.

A source is opened and checked (`sources`), the table says which rows of it go where (`mapping`), a sink plans its files
to the byte (`sinks`), workers move the rows (`sinks.transfer`), and the folder appears (`sinks.new_folder`).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hymeg.checkpoint.companions import carried_files, carry, companions, config_folder, has_tokenizer
from hymeg.checkpoint.compare import Pair, compare_pairs
from hymeg.checkpoint.dist_files import ADAPTER_KEYS, MODEL_KEYS, RELEASE, TRACKER
from hymeg.checkpoint.mapping import VOCABULARY_KEYS, check_distributed_tensors, is_mtp
from hymeg.checkpoint.rounding import converted
from hymeg.checkpoint.row_tensors import RowTensor, Source, TensorReader
from hymeg.checkpoint.sinks.dist_folder import files_of_dist
from hymeg.checkpoint.sinks.hf_folder import files_of_hf
from hymeg.checkpoint.sinks.new_folder import new_folder
from hymeg.checkpoint.sinks.transfer import FilesToWrite, unpacked, write
from hymeg.checkpoint.sources import open_dist, open_hf
from hymeg.checkpoint.sources.hf_folder import settle_mtp
from hymeg.checkpoint.workers import Progress, aside, check_num_workers
from hymeg.errors import UserError
from hymeg.files import drop_from_cache, write_whole
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.hf.dtypes import ROUNDED_TO
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES

__all__ = ["ROUNDED_TO", "Summary", "dist_to_hf", "hf_to_dist"]

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


def hf_to_dist(
    hf: str | Path,
    dist: str | Path,
    *,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    drop_mtp: bool = False,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Convert the Hugging Face checkpoint in folder `hf` to a distributed one in `dist`, with all that training needs
    beside the weights.

    Args:
        dtype: "bf16", "fp32" or "keep". The expert bias is always fp32.
        base_hf: a Hugging Face folder from which MTP layers come that `hf` does not hold.
        drop_mtp: leave the MTP layers out.
        workers: number of processes.
        overwrite: replace what an earlier conversion wrote to `dist`.
        verify: read everything back from the disk and compare it, before `dist` appears.
        say: is given lines for the user.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of its config.json; `dist` cannot be written, or
            holds what no conversion wrote. Nothing is left behind.
    """
    hf, dist, base = Path(hf), Path(dist), as_path(base_hf)
    check_num_workers(workers)

    def planned() -> Conversion:
        source = open_hf(hf, base_hf=base, drop_mtp=drop_mtp, dtype=ROUNDED_TO[dtype])
        check_apart(dist, [hf, base])
        uses_base = any(base in _folders_of(tensor) for tensor in source.tensors.values())
        read = {"from": str(hf.resolve()), "base_hf": base_hf and str(base)}
        return Conversion(
            files=files_of_dist(source.config, source.tensors, ROUNDED_TO[dtype], workers),
            subfolder=RELEASE,
            num_tensors=len(source.tensors),
            config=source.config,
            carried=carried_files(hf),
            tracker={TRACKER: RELEASE.encode()},
            record={"command": "hf-to-dist", **read, "dtype": dtype},
            notes=[*source.notes, *_unused(base, uses_base)],
        )

    return carry_out(planned, dist, "to distributed", workers, overwrite, verify, say)


def dist_to_hf(
    dist: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    drop_mtp: bool = False,
    cut_vocabulary: bool = False,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Convert the distributed checkpoint in folder `dist` to a Hugging Face one in `hf`. Optimizer state beside the
    weights is passed over.

    Args:
        iteration: which one; None: the one that the tracker names.
        layout: "hub", the published names, or "fused", transformers' names in memory.
        max_shard_bytes: for each safetensors file.
        base_hf: the Hugging Face folder that training began with. From it come MTP layers that training did not hold,
            and, where `dist` has none, config.json and the tokenizer.
        cut_vocabulary: rows of embedding and output layer beyond the config's vocabulary may hold numbers, which are
            lost. (Zeros are padding, and always cut.)
        dtype, drop_mtp, workers, overwrite, verify, say: as for `hf_to_dist`.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of the config.json; `hf` cannot be written, or
            holds what no conversion wrote. Nothing is left behind.
    """
    dist, hf, base = Path(dist), Path(hf), as_path(base_hf)
    check_num_workers(workers)

    def planned() -> Conversion:
        source = _completed(open_dist(dist, iteration), dist, base, drop_mtp)
        beside = [dist, source.folder, source.folder.parent]
        check_apart(hf, [source.folder, base], [dist, source.folder.parent])
        carried = companions(dict.fromkeys([*beside, *([base] if base else [])]))
        of_base = [name for name, path in carried.items() if base in path.parents]
        uses_base = of_base or not config_folder(*beside)
        uses_base = uses_base or any(base in _folders_of(tensor) for tensor in source.tensors.values())
        notes = [*source.notes, *_surplus_rows(source, cut_vocabulary)]
        if of_base:
            notes.append(f"taken from {base}: {', '.join(of_base)}")
        if not has_tokenizer(carried):
            notes.append(f"no tokenizer in {dist}{f' nor in {base}' if base else ': --base-hf says where one is'}")
        files, config = files_of_hf(source.config, source.tensors, layout, max_shard_bytes, ROUNDED_TO[dtype], workers)
        read = {"from": str(source.folder.resolve()), "iteration": source.iteration, "base_hf": base_hf and str(base)}
        return Conversion(
            files=files,
            subfolder="",
            num_tensors=files.num_tasks,
            config=config,
            carried=carried,
            tracker={},
            record={"command": "dist-to-hf", **read, "dtype": dtype, "layout": layout},
            notes=[*notes, *_unused(base, uses_base)],
        )

    return carry_out(planned, hf, "to Hugging Face", workers, overwrite, verify, say)


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
        peak = write(folder, made.files, workers, Progress(what, made.files.num_bytes)).peak_bytes
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


def _completed(source: Source, dist: Path, base: Path | None, drop_mtp: bool) -> Source:
    """With a config, and with the MTP layers that training did not hold; all tensors accounted for."""
    if source.config is None and base is None:
        raise UserError(
            f"{dist}: no {CONFIG_FILE} in it; give --base-hf, the Hugging Face folder that training began with"
        )
    config = source.config or HyConfig.from_dir(base)
    if any(key.startswith(ADAPTER_KEYS) for key in source.tensors):
        raise UserError(f"{source.folder}: an adapter, no model; export it with adapter-to-peft, or merge it")
    if source.unknown:
        names = f"{', '.join(source.unknown[:3])}{', ...' if len(source.unknown) > 3 else ''}"
        raise UserError(
            f"{source.folder}: {len(source.unknown)} tensors that hymeg does not know ({names}); the names of a "
            f"GPTModel are needed, which begin with {', '.join(MODEL_KEYS)}"
        )
    held = [key for key in source.tensors if is_mtp(config, key)]
    mtp = settle_mtp(source.folder, config, held, base, drop_mtp)
    tensors = {key: tensor for key, tensor in source.tensors.items() if not (drop_mtp and key in held)} | mtp.of_base
    try:
        check_distributed_tensors(mtp.written, {key: tensor.shape for key, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from None
    return source._replace(config=mtp.written, tensors=tensors, notes=(*source.notes, *mtp.notes))


def _surplus_rows(source: Source, may_be_cut: bool) -> list[str]:
    """What to say of rows that stand for no token of the config's vocabulary.

    Raises:
        UserError: they hold numbers other than zero, which Megatron's padding does when a run begins from scratch, and
            a vocabulary that was extended.
    """
    notes = []
    for tensor in (source.tensors[key] for key in VOCABULARY_KEYS):
        first, num = source.config.vocab_size, tensor.shape[0]
        with TensorReader() as reader:
            blocks = reader.blocks(tensor, [(first, num)]) if num > first else []
            has_numbers = any(np.frombuffer(converted(b, tensor.dtype, "F32"), "<f4").any() for b in blocks)
        if has_numbers and not may_be_cut:
            raise UserError(
                f"{source.folder}: {tensor.key} has {num} rows, {CONFIG_FILE} a vocabulary of {first}, and the surplus "
                "is not zero: if the vocabulary was extended, export with its own config.json; if the run began from "
                "scratch, whose padding is random, with --cut-vocabulary"
            )
        if num > first:
            notes.append(f"cut off: {num - first} rows of {tensor.key} beyond the vocabulary of {first}")
    return notes


def check_apart(target: Path, sources: Iterable[Path | None], beside: Iterable[Path] = ()) -> None:
    """`target` may lie in folders of which only small files are read (`beside`), but not be or hold one."""
    place = target.resolve()
    inside = [folder.resolve() for folder in sources if folder]
    for folder in [*inside, *(folder.resolve() for folder in beside)]:
        if folder == place or place in folder.parents or (folder in inside and folder in place.parents):
            raise UserError(f"{target}: is, holds or lies in {folder}, which is read; give a folder elsewhere")


def _folders_of(tensor: RowTensor) -> set[Path]:
    return {Path(file).parent for file in tensor.files()}


def _unused(base: Path | None, is_used: Any) -> list[str]:
    return [f"--base-hf {base}: nothing was taken from it, all is there already"] if base and not is_used else []


def as_path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)
