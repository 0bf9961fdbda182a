"""A distributed checkpoint as a source of rows, read without torch, a process group or a model.

`.metadata` is not trusted: every number in it is checked before anything is read through it.
"""

import io
import itertools
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hymeg.checkpoint.companions import config_folder
from hymeg.checkpoint.dist_files import (
    COMMON_STATE_KEY,
    FORMAT,
    FORMAT_FILE,
    METADATA,
    StoredChunk,
    iteration_folder,
)
from hymeg.checkpoint.mapping import Range, Shape, row_ranges, with_first_rows
from hymeg.checkpoint.metadata_file import damage_told, flags_of, is_a, read_metadata
from hymeg.checkpoint.row_tensors import Band, Piece, RowTensor, Source
from hymeg.checkpoint.sources.foreign_keys import is_of_model, under_our_keys
from hymeg.checkpoint.verification import verification_notes
from hymeg.checksums import Damaged, open_verified
from hymeg.errors import UserError, located
from hymeg.files import are_sizes, is_file_name, read_json, shown
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS

_MAX_FLAGS_BYTES = 64 << 20
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\..*")
_OTHER_FORMS = {  # Megatron's flags under which the same bytes mean something else
    "moe_mlp_glu_interleave_size": (
        "--moe-mlp-glu-interleave-size",
        "gate and up projections of the experts are interleaved",
    ),
    "moe_shared_expert_glu_interleave_size": (
        "--moe-shared-expert-glu-interleave-size",
        "gate and up projections of the shared experts are interleaved",
    ),
    "layernorm_zero_centered_gamma": ("--apply-layernorm-1p", "the weights of norms are stored less 1"),
    "rotary_interleaved": ("--rotary-interleaved", "rows of q and k are in another order"),
}
_STATE = re.compile(rf"{_OPTIMIZER.pattern}|(rng_state|rerun_state_machine_state|common_state)\b.*")


def open_dist(directory: str | os.PathLike, iteration: int | None = None) -> Source:
    """Where every tensor of the model, or of an adapter, lies. Optimizer state and objects (`_extra_state`, random
    states) are left out.

    Raises:
        UserError: as `iteration_folder`; the metadata are broken, hostile or of another format; a file is missing or
            too short; a tensor's chunks leave a gap or overlap; a dtype is none of BF16, F16, F32; under the flags of
            the run, weights mean something else.
    """
    folder, iteration = iteration_folder(directory, iteration)
    found = read_json(folder / FORMAT_FILE, open_verified)
    if type(found) is not dict or found.get("sharded_backend") != FORMAT["sharded_backend"]:
        raise UserError(
            f"{folder / FORMAT_FILE}: holds {shown(found)}; sharded_backend torch_dist is needed (--ckpt-format "
            "torch_dist)"
        )
    path = folder / METADATA
    metadata = read_metadata(path)
    with damage_told(path), located(path):
        entries = metadata.get("state_dict_metadata")
        stored = {key: entry.state for key, entry in entries.items() if is_a(entry, "TensorStorageMetadata")}
        locations = _locations(folder, metadata.get("storage_data"))
        tensors = {key: _row_tensor(folder, key, state, locations) for key, state in stored.items() if is_of_model(key)}
        others = [key for key in stored if key not in tensors]
        tensors, foreign = under_our_keys(tensors)
    _check_flags(folder, locations.get((COMMON_STATE_KEY, None)))
    unknown = tuple(key for key in others if not _STATE.fullmatch(key))
    has_optimizer = any(_OPTIMIZER.fullmatch(key) for key in entries)
    of_config = config_folder(Path(directory), folder)
    config = HyConfig.from_dir(of_config) if of_config else None
    what = "distributed (torch_dist)"
    notes = list(verification_notes(folder, Path(directory)))
    if foreign:
        notes.append(f"read under another trainer's names: {len(foreign):,} tensors, such as {foreign[0]}")
    objects = [key for key in entries if not (key in stored or _STATE.fullmatch(key))]
    objects = [key for key in objects if not (is_of_model(key) and "_extra_state" in key)]  # Transformer Engine's
    if objects:
        names = ", ".join(objects[:3]) + ", ..." * (len(objects) > 3)
        notes.append(f"not taken along, objects of unknown names: {names}")
    return Source(what, folder, config, tensors, tuple(notes), iteration, has_optimizer, unknown)


def _check_flags(folder: Path, location: tuple[str, int, int] | None) -> None:
    """Megatron's flags of the run, where they can be read: is there one under which the same bytes mean something
    else?
    """
    try:
        file, position, length = location
        with open_verified(folder / file) as stored:
            stored.seek(position)
            archive = zipfile.ZipFile(io.BytesIO(stored.read(min(length, _MAX_FLAGS_BYTES))))
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as pickled:
            flags = flags_of(pickled.read(_MAX_FLAGS_BYTES))
        given = {name: flags.get(name) for name in _OTHER_FORMS}
    except Damaged:
        raise
    except Exception:  # whatever a broken, foreign or missing object raises: it is not needed for anything else
        return
    for name, value in given.items():
        if value:
            flag, what = _OTHER_FORMS[name]
            raise UserError(
                f"{folder / METADATA}: trained with {flag} ({shown(value)}): {what}, which cannot be exported; save "
                "it without"
            )


Locations = dict[tuple[str, Shape | None], tuple[str, int, int]]


def _locations(folder: Path, storage_data: Any) -> Locations:
    """(key, offset of the chunk; None for an object) -> file, position, length, each inside its file; the model's and
    the flags' only.
    """
    sizes: dict[str, int] = {}
    locations = {}
    for index, info in storage_data.items():
        key, offset = index.get("fqn"), index.get("offset")
        if type(key) is not str or not (key == COMMON_STATE_KEY or (offset is not None and is_of_model(key))):
            continue
        file, position, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not is_file_name(file):
            raise UserError(f"{shown(key)} lies in file {shown(file)}; the name of a file in this folder is needed")
        if info.get("transform_descriptors"):
            how = shown(info.get("transform_descriptors"))
            raise UserError(f"{shown(key)} is stored transformed ({how}); only plain storage can be read")
        if file not in sizes:
            if not (folder / file).is_file():
                raise UserError(f"file {file} is missing in {folder}; copy the checkpoint again")
            sizes[file] = os.path.getsize(folder / file)
        if not (are_sizes((position, length)) and position + length <= sizes[file]):
            raise UserError(
                f"{shown(key)} lies at {shown(position)} for {shown(length)} bytes in {file}, which has {sizes[file]}: "
                "truncated; copy it again"
            )
        locations[key, None if offset is None else tuple(offset)] = (file, position, length)
    return locations


def _row_tensor(folder: Path, key: str, entry: Mapping[str, Any], locations: Locations) -> RowTensor:
    shape, torch_dtype = tuple(entry["size"]), entry["properties"].state[0]
    dtype = next((dtype for dtype, names in WEIGHTS.items() if names.torch == torch_dtype), None)
    if dtype is None:
        allowed = ", ".join(names.torch for names in WEIGHTS.values())
        raise UserError(f"{key} is {shown(torch_dtype)}; one of {allowed} is needed")
    chunks = []
    for chunk in entry["chunks"]:
        offset, size = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if (key, offset) not in locations:
            raise UserError(
                f"{key}: no file is given for its chunk at {list(offset)}; the checkpoint was not saved to the end, "
                "copy it again"
            )
        chunks.append(StoredChunk(*locations[key, offset], offset, size))
    if not are_sizes(shape) or not all(
        are_sizes(c.offset) and are_sizes(c.shape) and len(c.offset) == len(c.shape) == len(shape) for c in chunks
    ):
        raise UserError(f"{key}: its shape {shown(shape)} and those of its chunks are not sizes of one number of axes")
    if not 1 <= len(shape) <= 3:
        raise UserError(f"{key} has shape {list(shape)}; one to three axes are needed")
    if not _fill(shape, chunks):
        raise UserError(
            f"{key}: its {len(chunks)} chunks do not fill {list(shape)} exactly once; parts of the checkpoint are "
            "missing"
        )
    bands: dict[Range, list[Piece]] = {}
    for chunk in chunks:
        file, columns = os.path.join(folder, chunk.file), (chunk.offset[-1], chunk.shape[-1])
        for *rows, first in with_first_rows(row_ranges(shape, chunk.offset, chunk.shape)):
            piece = Piece(file, chunk.position, chunk.length, chunk.shape, first, *columns, dtype)
            bands.setdefault(tuple(rows), []).append(piece)
    ordered = (Band(*rows, tuple(sorted(bands[rows], key=lambda piece: piece.first_column))) for rows in sorted(bands))
    return RowTensor(key, dtype, shape, tuple(ordered))


def _fill(shape: Shape, chunks: list[StoredChunk]) -> bool:
    """Whether the chunks are the cells of a grid over `shape`: cut along each axis wherever any chunk begins."""
    num_cells, ends = 1, []
    for axis, length in enumerate(shape):
        cuts = sorted({chunk.offset[axis] for chunk in chunks})
        if cuts[:1] != [0]:
            return False
        num_cells *= len(cuts)
        ends.append(dict(itertools.pairwise([*cuts, length])))
    in_cells = all(
        c.offset[axis] + c.shape[axis] == ends[axis][c.offset[axis]] for c in chunks for axis in range(len(shape))
    )
    return in_cells and num_cells == len({chunk.offset for chunk in chunks}) == len(chunks)
