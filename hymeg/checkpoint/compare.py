"""Two checkpoints compared, tensor by tensor and bit by bit, streaming, in several processes; Hugging Face or
distributed on either side.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hymeg.checkpoint.mapping import Entry, Range, fits, hf_entries
from hymeg.checkpoint.rounding import as_fp32, converted
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader, block_height
from hymeg.checkpoint.sinks.transfer import shares
from hymeg.checkpoint.sources import is_adapter, is_peft, open_adapter, open_any
from hymeg.checkpoint.workers import Outcome, check_num_workers, run
from hymeg.errors import UserError
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.hf.dtypes import ITEM_SIZES
from hymeg.progress import Progress


class Pair(NamedTuple):
    """The same rows in two checkpoints, both converted to `dtype` before they are compared."""

    name: str
    a: RowTensor
    b: RowTensor
    rows: Sequence[Range]
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.rows) * self.a.row_bytes


class Difference(NamedTuple):
    name: str
    what: str  # in words


def compare_pairs(shares: Sequence[Iterable[Pair]], progress: Progress, tolerance: float = 0.0) -> Outcome:
    """Every pair whose bits differ (with a `tolerance`: whose numbers differ by more), share by share, each compared in
    a process of its own: the results are all `Difference`s.

    Raises:
        UserError: a file cannot be read.
    """

    def work(share: Iterable[Pair], report: Callable[[int], None]) -> list[Difference]:
        with TensorReader() as reader_a, TensorReader() as reader_b:
            return [found for pair in share if (found := _difference(pair, reader_a, reader_b, tolerance, report))]

    outcome = run(work, shares, progress)
    return outcome._replace(results=[found for of_worker in outcome.results for found in of_worker])


def _difference(
    pair: Pair, reader_a: TensorReader, reader_b: TensorReader, tolerance: float, report: Callable[[int], None]
) -> Difference | None:
    height = min(block_height(pair.a), block_height(pair.b))
    count = position = 0
    first, largest = "", 0.0
    blocks_a, blocks_b = reader_a.blocks(pair.a, pair.rows, height), reader_b.blocks(pair.b, pair.rows, height)
    for raw_a, raw_b in zip(blocks_a, blocks_b, strict=True):
        report(len(raw_a))
        a, b = converted(raw_a, pair.a.dtype, pair.dtype), converted(raw_b, pair.b.dtype, pair.dtype)
        if a != b:
            numbers_a, numbers_b = (as_fp32(data, pair.dtype).astype(np.float64) for data in (a, b))
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
    what = f"{count} of {position} elements, {first}, by {largest:.3g} at most"
    return Difference(pair.name, what) if count else None


def compare_checkpoints(
    a: str | Path, b: str | Path, tolerance: float = 0.0, workers: int = 2, base_hf: str | Path | None = None
) -> list[Difference]:
    """All that differs between two checkpoints: tensors that one of them lacks, shapes, dtypes, elements, under the
    names of the hub layout. Or between two adapters, each distributed or of peft in either layout: settings, and
    tensors by their distributed keys.

    Padding rows of a vocabulary are left out. With a `tolerance` dtypes may differ and are compared as fp32. What is
    set aside of Hugging Face folders (scales of inputs, of the KV cache) is compared where both may have some.

    Args:
        base_hf: folder of the base of two adapters, where neither says of which model it is.

    Raises:
        UserError: one of them cannot be read, neither has a config.json, or one alone is an adapter.
    """
    check_num_workers(workers)
    opened = _adapters(a, b, base_hf) if is_adapter(a) or is_adapter(b) else _models(a, b)
    differences, tensors_a, tensors_b, entries = opened
    pairs = []
    for name, key, _, _, shape, rows in entries:
        of_a, of_b = tensors_a.get(key), tensors_b.get(key)
        if of_a is None or of_b is None:
            if of_a is not of_b:
                differences.append(Difference(name, f"only in {a if of_b is None else b}"))
        elif not (fits(key, of_a.shape, shape) and fits(key, of_b.shape, shape)):
            differences.append(Difference(name, f"shapes: {list(of_a.shape)} and {list(of_b.shape)} as {key}"))
        elif tolerance == 0 and of_a.dtype_kept != of_b.dtype_kept:
            differences.append(Difference(name, f"dtypes: {of_a.dtype_kept} and {of_b.dtype_kept}"))
        else:
            pairs.append(Pair(name, of_a, of_b, rows, of_a.dtype_kept if tolerance == 0 else "F32"))
    progress = Progress("comparing", sum(pair.nbytes for pair in pairs))
    return differences + compare_pairs(shares(pairs, workers), progress, tolerance).results


# What differs beside the tensors, the tensors of both by distributed key, and which rows of them are to be compared.
_Opened = tuple[list[Difference], dict[str, RowTensor], dict[str, RowTensor], list[Entry]]


def _models(a: str | Path, b: str | Path) -> _Opened:
    left, right = open_any(a), open_any(b)
    config = left.config or right.config
    if config is None:
        raise UserError(f"neither {a} nor {b} has a {CONFIG_FILE}; copy the model's into one of them")
    differences = []
    if left.config and right.config:
        for name, (of_a, of_b) in config_differences(left.config, right.config).items():
            differences.append(Difference(CONFIG_FILE, f"{name}: {of_a} and {of_b}"))
    entries = hf_entries(config, "hub")
    known = {entry.dist_key for entry in entries}
    for folder, side in ((a, left), (b, right)):
        unknown = [key for key in (*side.tensors, *side.unknown) if key not in known]
        differences += [Difference(key, f"only in {folder}, and unknown to config.json") for key in unknown]
    if left.aside is None or right.aside is None:
        return differences, left.tensors, right.tensors, entries
    # Such as scales of inputs, which mean nothing to weights and much to what serves them.
    entries += _entries_of(left.aside | right.aside)
    return differences, left.tensors | left.aside, right.tensors | right.aside, entries


def _entries_of(tensors: dict[str, RowTensor]) -> list[Entry]:
    """Each as it is."""
    return [Entry(key, key, False, t.shape, t.shape, tuple(t.all_rows)) for key, t in tensors.items()]


def config_differences(a: HyConfig, b: HyConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that say something else of the model, and what."""
    pairs = {name: (value, getattr(b, name)) for name, value in vars(a).items() if name not in ("raw", "dtype")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _adapters(a: str | Path, b: str | Path, base_hf: str | Path | None) -> _Opened:
    config = HyConfig.from_dir(base_hf) if base_hf else None
    for folder in (a, b):
        if not is_adapter(folder):
            raise UserError(f"{folder}: no adapter, to which one could be compared; merge it first")
        if config is None and not is_peft(folder):
            config = open_adapter(folder).config
    left, right = open_adapter(a, config), open_adapter(b, config)
    differences = []
    for name in ("rank", "scale"):
        of_a, of_b = getattr(left.settings, name), getattr(right.settings, name)
        if of_a != of_b:
            differences.append(Difference(name, f"{of_a:g} and {of_b:g}"))
    if left.modules != right.modules:
        differences.append(Difference("targets", "not the same modules"))
    return differences, left.tensors, right.tensors, _entries_of(left.tensors | right.tensors)
