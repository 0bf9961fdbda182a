"""A Hugging Face checkpoint as a source of rows: config.json, every tensor's name, shape and dtype accounted for."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hymeg.checkpoint.mapping import (
    TABLE,
    VOCABULARY_KEYS,
    Entry,
    Shape,
    distributed_shapes,
    is_mtp,
    match_hf_tensors,
    num_rows,
    with_first_rows,
)
from hymeg.checkpoint.row_tensors import Band, Piece, RowTensor, Scales, Source
from hymeg.checkpoint.verification import verification_notes
from hymeg.errors import UserError, located
from hymeg.files import some
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.hf.fp8 import WeightScale, listed, told_apart
from hymeg.hf.safetensors_files import INDEX_FILE, TensorEntry, open_checkpoint

DEQUANTISED = "BF16"  # what FP8 becomes unless asked
_VOCABULARY = [row.hf for row in TABLE["model"] if row.dist in VOCABULARY_KEYS]


def open_hf(
    folder: str | Path,
    config: HyConfig | None = None,
    *,
    base_hf: Path | None = None,
    drop_mtp: bool = False,
    dtype: str | None = None,
) -> Source:
    """The checkpoint in `folder`, in either layout.

    Args:
        config: None: that of the folder.
        base_hf: where MTP layers come from that the folder does not hold.
        drop_mtp: leave the MTP layers out, those of config.json too.
        dtype: to which all are going to be rounded; tensors that become one may then differ in dtype, and are read as
            F32, which holds them exactly. FP8 is read with its scales, as BF16 where `dtype` is None.

    Raises:
        UserError: the checkpoint is broken, incomplete, of another dtype or not that of the config.
    """
    folder = Path(folder)
    own = HyConfig.from_dir(folder) if config is None or (folder / CONFIG_FILE).is_file() else config
    config = config or own
    held = open_checkpoint(folder)
    stored, scales, aside = told_apart(held, own.fp8_block)
    is_promised = own is not own.without_quantization()
    notes = [f"{CONFIG_FILE} speaks of FP8, but no tensor in {folder} is"] if is_promised and not scales else []
    if unread := sorted({path.name for path in folder.glob("*.safetensors")} - {e.file.name for e in held.values()}):
        notes.append(f"not read, as {INDEX_FILE} in {folder} does not name them: {some(unread, 5)}")
    if own is config:
        config, more = with_all_rows(config, [stored[name].shape for name in _VOCABULARY if name in stored])
        notes += more
    config = config.without_quantization()
    of_mtp = {name for name in stored if is_mtp(config, name)}
    mtp = settle_mtp(folder, config, of_mtp, base_hf, drop_mtp, dtype)
    if drop_mtp:
        stored = {name: entry for name, entry in stored.items() if name not in of_mtp}
    with located(folder):
        match = match_hf_tensors(mtp.read, {name: entry.shape for name, entry in stored.items()})
        parts: dict[str, list[Entry]] = {}
        for entry in match.entries:
            parts.setdefault(entry.dist_key, []).append(entry)
        tensors = {key: _row_tensor(key, entries, stored, scales, dtype) for key, entries in parts.items()}
    notes += [*verification_notes(folder), *mtp.notes]
    if match.dropped:
        notes.append(f"left out, the trunk's own are used instead: {', '.join(match.dropped)}")
    what = f"Hugging Face, {match.layout} layout"
    if scales:
        what += f", {len(scales):,} weights in FP8"
        notes.append(f"dequantised: {listed(scales)}, fp32(weight) * scale rounded to {dtype or DEQUANTISED}")
    if aside:
        notes.append(f"set aside, scales of inputs and of the KV cache: {listed(aside)}")
    others = {name: as_stored(name, held[name]) for name in (*aside, *match.dropped)}
    of_aside = others if scales or others else None
    return Source(what, folder, mtp.written, tensors | mtp.of_base, tuple(notes), aside=of_aside)


def with_all_rows(config: HyConfig, shapes: Sequence[Shape]) -> tuple[HyConfig, list[str]]:
    """The config that counts as many tokens as embedding and output layer, of these shapes, have rows, where those are
    of one mind and more than it counts: of a vocabulary that was extended. And what to say of it.
    """
    rows = {shape[0] for shape in shapes if len(shape) == 2}
    if len(shapes) < len(_VOCABULARY) or len(rows) > 1 or max(rows, default=0) <= config.vocab_size:
        return config, []
    [num_rows] = rows
    note = f"the vocabulary was extended to {num_rows}: all rows are kept, and {CONFIG_FILE}, which says "
    return config.with_vocabulary(num_rows), [f"{note}{config.vocab_size}, is corrected"]


def as_stored(name: str, stored: TensorEntry) -> RowTensor:
    """One tensor of a folder under its own name: FP8 as its codes. A number without a dimension has one here."""
    shape = stored.shape or (1,)
    piece = Piece(str(stored.file), stored.offset, 0, shape, 0, 0, shape[-1], stored.dtype)
    return RowTensor(name, stored.dtype, shape, (Band(0, num_rows(shape), (piece,)),))


class Mtp(NamedTuple):
    """What becomes of a model's multi-token-prediction layers."""

    read: HyConfig  # of what the checkpoint gives
    written: HyConfig
    of_base: dict[str, RowTensor]
    notes: list[str]


def settle_mtp(
    folder: Path, config: HyConfig, held: Collection[str], base_hf: Path | None, drop: bool, dtype: str | None = None
) -> Mtp:
    """`held` are the names of the tensors of MTP layers in the checkpoint in `folder`. Where there are none, and the
    config counts some, they are those of `base_hf`.

    Raises:
        UserError: there is no base, or it is another model's: one with tensors of other shapes. (The vocabulary may
            differ.)
    """
    without = config.without_mtp()
    if drop:
        return Mtp(without, without, {}, [f"left out: the MTP layers, {len(held)} tensors"])
    if held or without is config:
        return Mtp(config, config, {}, [])
    if base_hf is None:
        raise UserError(
            f"{folder}: all tensors of MTP layers are missing, of which {CONFIG_FILE} counts some "
            f"(num_nextn_predict_layers = {config.num_nextn_predict_layers}); convert with --base-hf FOLDER, to take "
            "them from there, or with --drop-mtp"
        )
    base = open_hf(base_hf, dtype=dtype)
    ours, theirs = distributed_shapes(config), distributed_shapes(base.config)
    differing = [key for key in ours | theirs if key not in VOCABULARY_KEYS and theirs.get(key) != ours.get(key)]
    if differing:
        shapes = [f"{key} is {theirs.get(key)}, here {ours.get(key)}" for key in differing[:3]]
        raise UserError(f"--base-hf {base_hf}: another model than {folder}'s: {'; '.join(shapes)}; give its own")
    of_base = {key: tensor for key, tensor in base.tensors.items() if is_mtp(config, key)}
    note = f"taken from {base_hf}: the MTP layers, {len(of_base)} tensors, which {folder} does not hold"
    return Mtp(without, config, of_base, [note])


def _row_tensor(
    key: str,
    entries: Sequence[Entry],
    stored: Mapping[str, TensorEntry],
    scales: Mapping[str, WeightScale],
    wanted: str | None,
) -> RowTensor:
    """The distributed tensor that these Hugging Face tensors make up; dtypes may be mixed where one is `wanted`."""
    bands: list[Band] = []
    dtypes: dict[str, str] = {}  # and the first tensor of each
    for entry in entries:
        [piece] = as_stored(entry.hf_name, stored[entry.hf_name]).bands[0].pieces
        if scale := scales.get(entry.hf_name):
            place = str(scale.entry.file), scale.entry.offset, scale.entry.dtype
            factors = Scales(*place, *scale.block, entry.hf_shape[-2], wanted or DEQUANTISED)
            piece = piece._replace(scales=factors)
        dtypes.setdefault(piece.scales.wanted if piece.scales else piece.dtype, entry.hf_name)
        for start, stop, row in with_first_rows(entry.rows):
            bands.append(Band(start, stop, (piece._replace(row=row),)))
    if len(dtypes) > 1 and not wanted:
        both = " and ".join(f"{name} is {stored[name].dtype}" for name in list(dtypes.values())[:2])
        raise UserError(f"{both}, but both are parts of {key}; convert with --dtype bf16 or fp32")
    dtype = "F32" if len(dtypes) > 1 else next(iter(dtypes))
    return RowTensor(key, dtype, entries[0].dist_shape, tuple(sorted(bands, key=lambda band: band.start)))
