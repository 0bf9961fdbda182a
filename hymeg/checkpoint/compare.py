"""Two checkpoints compared, tensor by tensor and bit by bit, streaming, in several processes; Hugging Face or
distributed on either side.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hymeg.checkpoint.dist_files import open_dist_checkpoint
from hymeg.checkpoint.mapping import fits, match_hf_tensors, num_parameters, plan
from hymeg.checkpoint.rows import (
    Range,
    RowReader,
    RowTensor,
    block_height,
    converted,
    row_ranges,
    rows_of_dist,
    rows_of_hf,
)
from hymeg.checkpoint.transfer import shares
from hymeg.checkpoint.workers import Outcome, Progress, run
from hymeg.errors import UserError
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.hf.safetensors_files import ITEM_SIZES, open_checkpoint


class Pair(NamedTuple):
    """The same rows in two checkpoints; `a` is converted to `dtype` before it is compared with `b`, which has it."""

    name: str
    a: RowTensor
    b: RowTensor
    ranges: list[Range]
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges) * self.a.row_bytes


class Difference(NamedTuple):
    name: str
    what: str  # in words


def compare_rows(shares: Sequence[Iterable[Pair]], progress: Progress, tolerance: float = 0.0) -> Outcome:
    """Every pair whose bits differ (with a `tolerance`: whose numbers differ by more), share by share, each compared in
    a process of its own.

    Raises:
        UserError: a file cannot be read.
    """

    def work(share: Iterable[Pair], report: Callable[[int], None]) -> list[Difference]:
        with RowReader() as reader_a, RowReader() as reader_b:
            return [found for pair in share if (found := _difference(pair, reader_a, reader_b, tolerance, report))]

    return run(work, shares, progress)


def _difference(
    pair: Pair, reader_a: RowReader, reader_b: RowReader, tolerance: float, report: Callable[[int], None]
) -> Difference | None:
    height = min(block_height(pair.a), block_height(pair.b))
    count = position = 0
    first, largest = "", 0.0
    for raw, b in zip(
        reader_a.blocks(pair.a, pair.ranges, height), reader_b.blocks(pair.b, pair.ranges, height), strict=True
    ):
        report(len(raw))
        a = converted(raw, pair.a.dtype, pair.dtype)
        if a != b:
            numbers_a, numbers_b = _numbers(a, pair.dtype), _numbers(b, pair.dtype)
            unsigned = f"<u{ITEM_SIZES[pair.dtype]}"
            with np.errstate(invalid="ignore"):
                distance = np.abs(numbers_a - numbers_b)
            differ = np.frombuffer(a, unsigned) != np.frombuffer(b, unsigned)
            if tolerance > 0:
                differ &= ~(distance <= tolerance)
            if differ.any():
                at = int(np.argmax(differ))
                first = first or f"first at element {position + at}: {numbers_a[at]:.8g} and {numbers_b[at]:.8g}"
                count += int(np.count_nonzero(differ))
                largest = float(np.fmax(largest, np.nanmax(np.where(differ, distance, 0.0))))
        position += len(b) // ITEM_SIZES[pair.dtype]
    return (
        Difference(pair.name, f"{count} of {position} elements, {first}, by {largest:.3g} at most") if count else None
    )


def _numbers(data: memoryview, dtype: str) -> np.ndarray:
    return np.frombuffer(converted(data, dtype, "F32"), "<f4").astype(np.float64)


class Checkpoint(NamedTuple):
    """What a folder holds, seen as distributed tensors."""

    kind: str  # in words
    config: HyConfig | None  # None: a distributed checkpoint without config.json
    tensors: dict[str, RowTensor]
    iteration: int | None
    has_optimizer: bool


def open_any(folder: str | Path, iteration: int | None = None) -> Checkpoint:
    """The Hugging Face or distributed checkpoint in `folder`.

    Raises:
        UserError: it holds neither, or one that is incomplete or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face or a distributed checkpoint")
    if any(folder.glob("*.safetensors")):
        if iteration is not None:
            raise UserError(
                f"--iteration {iteration}: {folder} is a Hugging Face folder, which has no iterations; leave it out"
            )
        config, stored = HyConfig.from_dir(folder), open_checkpoint(folder)
        try:
            match = match_hf_tensors(config, {name: entry.shape for name, entry in stored.items()})
            return Checkpoint(
                f"Hugging Face, {match.layout} layout", config, rows_of_hf(match.entries, stored), None, False
            )
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    found = open_dist_checkpoint(folder, iteration)
    config_folder = next(
        (place for place in (folder, found.folder, found.folder.parent) if (place / CONFIG_FILE).is_file()), None
    )
    config = HyConfig.from_dir(config_folder) if config_folder else None
    return Checkpoint("distributed (torch_dist)", config, rows_of_dist(found), found.iteration, found.has_optimizer)


def compare_checkpoints(a: str | Path, b: str | Path, tolerance: float = 0.0, workers: int = 2) -> list[Difference]:
    """All that differs between two checkpoints: tensors that one of them lacks, shapes, dtypes, elements. Names are
    those of the hub layout.

    Padding rows of a vocabulary are left out. With a `tolerance` dtypes may differ and are compared as fp32.

    Raises:
        UserError: one of them cannot be read, or neither has a config.json.
    """
    left, right = open_any(a), open_any(b)
    config = left.config or right.config
    if config is None:
        raise UserError(f"neither {a} nor {b} has a {CONFIG_FILE}; copy the model's into one of them")
    differences, pairs, known = [], [], set()
    if left.config and right.config and left.config != right.config:
        fields = [
            name
            for name in vars(left.config)
            if name not in ("raw", "dtype") and getattr(left.config, name) != getattr(right.config, name)
        ]
        differences += [
            Difference(CONFIG_FILE, f"{name}: {getattr(left.config, name)} and {getattr(right.config, name)}")
            for name in fields
        ]
    for entry in plan(config, "hub"):
        known.add(entry.dist_key)
        of_a, of_b = left.tensors.get(entry.dist_key), right.tensors.get(entry.dist_key)
        if of_a is None or of_b is None:
            if of_a is not of_b:
                differences.append(Difference(entry.hf_name, f"only in {a if of_b is None else b}"))
            continue
        if not all(fits(entry.dist_key, tensor.shape, entry.dist_shape) for tensor in (of_a, of_b)):
            differences.append(
                Difference(entry.hf_name, f"shapes: {list(of_a.shape)} and {list(of_b.shape)} as {entry.dist_key}")
            )
        elif of_a.dtype != of_b.dtype and tolerance == 0:
            differences.append(Difference(entry.hf_name, f"dtypes: {of_a.dtype} and {of_b.dtype}"))
        else:
            pairs.append(Pair(entry.hf_name, of_a, of_b, row_ranges(entry), of_b.dtype))
    for folder, tensors in ((a, left.tensors), (b, right.tensors)):
        differences += [
            Difference(key, f"only in {folder}, and unknown to config.json") for key in tensors if key not in known
        ]
    outcome = compare_rows(shares(pairs, workers), Progress("comparing", sum(pair.nbytes for pair in pairs)), tolerance)
    return [*differences, *itertools.chain(*outcome.results)]


def describe(folder: str | Path, iteration: int | None = None) -> list[str]:
    """What a folder holds, in lines of "name: value"."""
    found = open_any(folder, iteration)
    elements = {key: int(np.prod(tensor.shape, dtype=object)) for key, tensor in found.tensors.items()}
    dtypes: dict[str, int] = {}
    for key, tensor in found.tensors.items():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + elements[key]
    config = found.config
    lines = {"format": found.kind}
    if found.kind.startswith("distributed"):
        lines["iteration"] = "release (no training)" if found.iteration is None else str(found.iteration)
        lines["optimizer state"] = "yes" if found.has_optimizer else "no"
    if config is not None:
        num_moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        lines["model"] = f"{', '.join(config.raw.get('architectures') or ['?'])} ({config.raw.get('model_type')})"
        lines["layers"] = f"{config.num_hidden_layers} ({config.num_hidden_layers - num_moe} dense, {num_moe} MoE)"
        lines["MTP layers"] = (
            f"{config.num_nextn_predict_layers}, "
            f"{'held' if any(key.startswith('mtp.') for key in found.tensors) else 'not held'}"
        )
        lines["experts"] = (
            f"{config.num_experts}, {config.num_experts_per_tok} of them and {config.num_shared_experts} shared for "
            "each token"
        )
        lines["parameters"] = f"{num_parameters(config):,} by config.json"
    lines["tensors"] = f"{len(found.tensors):,} distributed tensors, {sum(elements.values()):,} elements"
    lines["bytes"] = f"{sum(count * ITEM_SIZES[dtype] for dtype, count in dtypes.items()):,}"
    lines["dtypes"] = ", ".join(f"{dtype}: {count:,}" for dtype, count in sorted(dtypes.items()))
    return [f"{name}: {value}" for name, value in lines.items()]
