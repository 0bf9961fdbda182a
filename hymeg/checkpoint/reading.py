"""What a conversion reads: a folder, or several as one, opened as a `Source` that is whole, with the small files that
travel along.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.companions import (
    carried_files,
    companions,
    config_folder,
    has_tokenizer,
    notes_of_tokenizer,
)
from hymeg.checkpoint.compare import config_differences
from hymeg.checkpoint.dist_files import ADAPTER_KEYS, MODEL_KEYS
from hymeg.checkpoint.mapping import VOCABULARY_KEYS, check_distributed_tensors, is_mtp
from hymeg.checkpoint.options import Options
from hymeg.checkpoint.rounding import as_fp32
from hymeg.checkpoint.row_functions import Mean
from hymeg.checkpoint.row_tensors import RowTensor, Source, TensorReader
from hymeg.checkpoint.sources import is_hf, open_dist, open_hf
from hymeg.checkpoint.sources.hf_folder import settle_mtp, with_all_rows
from hymeg.errors import UserError
from hymeg.files import some
from hymeg.hf.config import CONFIG_FILE, HyConfig


class Read(NamedTuple):
    """A checkpoint to convert."""

    source: Source  # whole
    carried: dict[str, Path]
    folders: list[Path | None]  # that are read; the target may not be there,
    beside: list[Path]  # nor be one of these
    record: dict[str, Any]  # of where it came from


def read_hf(hf: Path, how: Options) -> Read:
    """A Hugging Face folder. Raises UserError as `open_hf` does."""
    source = open_hf(hf, base_hf=how.base, drop_mtp=how.drop_mtp, dtype=how.rounded_to)
    carried = carried_files(hf)
    notes = (*source.notes, *_unused(how.base, source), *notes_of_tokenizer(carried, hf))
    record = {"from": str(hf.resolve()), "base_hf": how.base and str(how.base)}
    return Read(source._replace(notes=notes), carried, [hf, how.base], [], record)


def read_dist(dist: Path, how: Options) -> Read:
    """A distributed checkpoint, with what its base has and it has not. Raises UserError as `open_dist` does, and where
    something is missing, unknown, or would be lost.
    """
    source = _completed(open_dist(dist, how.iteration), dist, how)
    beside = [dist, source.folder, source.folder.parent]
    carried = companions(dict.fromkeys(filter(None, [*beside, how.base])))
    notes = [*source.notes, *_surplus_rows(source, how.cut_vocabulary)]
    if of_base := [name for name, path in carried.items() if how.base in path.parents]:
        notes.append(f"taken from {how.base}: {', '.join(of_base)}")
    elif config_folder(*beside):
        notes += _unused(how.base, source)
    if not has_tokenizer(carried):
        notes.append(f"no tokenizer in {dist}{f' nor in {how.base}' if how.base else ': --base-hf says where one is'}")
    base = how.base and str(how.base)
    record = {"from": str(source.folder.resolve()), "iteration": source.iteration, "base_hf": base}
    source = source._replace(notes=tuple(notes))
    return Read(source, carried, [source.folder, how.base], beside, record)


def read_mean(folders: Sequence[tuple[Path, int | None]], how: Options) -> Read:
    """The mean of several checkpoints of one model, given as folders, of either format, and iterations. What travels
    along comes from the last.

    Raises:
        UserError: as `read_hf` and `read_dist`; there are fewer than two, or they are of several models.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} checkpoint: two or more are needed for a mean; give more, or --iterations A,B")
    reads = [
        read_hf(folder, how) if is_hf(folder, iteration) else read_dist(folder, replace(how, iteration=iteration))
        for folder, iteration in folders
    ]
    last = reads[-1]
    for read, (folder, _) in zip(reads, folders, strict=True):
        if differing := _differing(read.source, last.source):
            raise UserError(f"{folder}: another model than {folders[-1][0]}'s: {'; '.join(differing[:3])}")
    tensors = {
        key: RowTensor(key, "F32", tensor.shape, (), Mean(tuple(read.source.tensors[key] for read in reads)))
        for key, tensor in last.source.tensors.items()
    }
    notes = tuple(dict.fromkeys(note for read in reads for note in read.source.notes))
    return last._replace(
        source=last.source._replace(tensors=tensors, notes=notes),
        folders=list(dict.fromkeys(folder for read in reads for folder in read.folders)),
        beside=list(dict.fromkeys(folder for read in reads for folder in read.beside)),
        record={"from": [read.record["from"] for read in reads], "base_hf": last.record["base_hf"]},
    )


def _differing(one: Source, other: Source) -> list[str]:
    """In configs and shapes, but for padding rows of the vocabulary, of which each layout has its own."""
    found = config_differences(one.config, other.config)
    shapes, of_other = (
        {key: t.shape for key, t in source.tensors.items() if key not in VOCABULARY_KEYS} for source in (one, other)
    )
    found |= {
        key: (shapes.get(key), of_other.get(key)) for key in shapes | of_other if shapes.get(key) != of_other.get(key)
    }
    return [f"{name} is {ours} and {theirs}" for name, (ours, theirs) in found.items()]


def _completed(source: Source, dist: Path, how: Options) -> Source:
    """With a config, and with the MTP layers that training did not hold; all tensors accounted for."""
    if source.config is None and how.base is None:
        raise UserError(
            f"{dist}: no {CONFIG_FILE} in it; give --base-hf, the Hugging Face folder that training began with"
        )
    config = (source.config or HyConfig.from_dir(how.base)).without_quantization()
    if any(key.startswith(ADAPTER_KEYS) for key in source.tensors):
        raise UserError(f"{source.folder}: an adapter, no model; export it with adapter-to-peft, or merge it")
    if source.unknown:
        raise UserError(
            f"{source.folder}: {len(source.unknown)} tensors that hymeg does not know ({some(source.unknown, 3)}); the "
            f"names of a GPTModel are needed, which begin with {', '.join(MODEL_KEYS)}"
        )
    held = [key for key in source.tensors if is_mtp(config, key)]
    if how.keep_vocabulary:
        shapes = [source.tensors[key].shape for key in VOCABULARY_KEYS if key in source.tensors]
        config, notes = with_all_rows(config, shapes)
        source = source._replace(notes=(*source.notes, *notes))
    mtp = settle_mtp(source.folder, config, held, how.base, how.drop_mtp, how.rounded_to)
    tensors = {
        key: tensor for key, tensor in source.tensors.items() if not (how.drop_mtp and key in held)
    } | mtp.of_base
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
        if num == first:
            continue
        with TensorReader() as reader:
            has_numbers = any(as_fp32(block, tensor.dtype).any() for block in reader.blocks(tensor, [(first, num)]))
        if has_numbers and not may_be_cut:
            raise UserError(
                f"{source.folder}: {tensor.key} has {num} rows, {CONFIG_FILE} a vocabulary of {first}, and the surplus "
                "is not zero: if the vocabulary was extended, give --keep-vocabulary; if the run began from scratch, "
                "whose padding is random, --cut-vocabulary"
            )
        notes.append(f"cut off: {num - first} rows of {tensor.key} beyond the vocabulary of {first}")
    return notes


def _unused(base: Path | None, source: Source) -> list[str]:
    if base is None or any(Path(file).parent == base for tensor in source.tensors.values() for file in tensor.files()):
        return []
    return [f"--base-hf {base}: nothing was taken from it, all is there already"]
