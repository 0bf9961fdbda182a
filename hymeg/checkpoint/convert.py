"""Hugging Face checkpoints to distributed ones and back: streaming, in several processes, without a model, a GPU or a
process group.

A source is opened and checked (`reading`, `sources`), the table says which rows of it go where (`mapping`), a sink
plans its files to the byte (`sinks`), workers move the rows (`sinks.transfer`), and the folder appears
(`sinks.new_folder`). Each command is one way of reading and one of writing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from hymeg.checkpoint.conversion import Conversion, Say, Summary, as_path, carry_out, check_apart
from hymeg.checkpoint.dist_files import RELEASE, TRACKER
from hymeg.checkpoint.reading import Completion, Read, read_dist, read_hf, read_mean
from hymeg.checkpoint.sinks.dist_folder import files_of_dist
from hymeg.checkpoint.sinks.fp8_folder import files_of_fp8
from hymeg.checkpoint.sinks.hf_folder import files_of_hf
from hymeg.checkpoint.workers import check_num_workers
from hymeg.errors import UserError
from hymeg.hf.dtypes import ROUNDED_TO
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, files_by_tensor

__all__ = ["ROUNDED_TO", "Summary", "average", "dist_to_dist", "dist_to_hf", "hf_to_dist", "hf_to_hf"]


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
    how = Completion(as_path(base_hf), drop_mtp, ROUNDED_TO[dtype])
    write = _to_dist("hf-to-dist", Path(dist), dtype, workers)
    return _carry_out(lambda: read_hf(Path(hf), how), write, Path(dist), workers, overwrite, verify, say)


def dist_to_hf(
    dist: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    shards_like: str | Path | None = None,
    quantize: str | None = None,
    scales_from: str | Path | None = None,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    drop_mtp: bool = False,
    cut_vocabulary: bool = False,
    keep_vocabulary: bool = False,
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
        shards_like: a Hugging Face folder; every tensor goes into the file that it has there, whatever the size.
        quantize: "fp8": Linears in FP8, in Tencent's form, with new scales; in the layout "hub" only. `dtype` is then
            of the rest.
        scales_from: for "fp8", the published FP8 folder whose scales of inputs and of the KV cache go along, and which
            says which weights are in FP8. None: config.json tells engines to scale inputs as they come.
        cut_vocabulary: rows of embedding and output layer beyond the config's vocabulary may hold numbers, which are
            lost. (Zeros are padding, and always cut.)
        keep_vocabulary: they are kept instead, padding included, and counted in config.json.
        dtype, drop_mtp, workers, overwrite, verify, say: as for `hf_to_dist`.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of the config.json; `hf` cannot be written, or
            holds what no conversion wrote. Nothing is left behind.
    """
    how = Completion(as_path(base_hf), drop_mtp, ROUNDED_TO[dtype], cut_vocabulary, keep_vocabulary)
    sharding = _sharding(max_shard_bytes, shards_like)
    write = _to_hf("dist-to-hf", Path(hf), layout, sharding, dtype, workers, quantize, as_path(scales_from))
    return _carry_out(lambda: read_dist(Path(dist), iteration, how), write, Path(hf), workers, overwrite, verify, say)


def hf_to_hf(
    source: str | Path,
    hf: str | Path,
    *,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    shards_like: str | Path | None = None,
    quantize: str | None = None,
    scales_from: str | Path | None = None,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    drop_mtp: bool = False,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Write the Hugging Face checkpoint in folder `source` anew to `hf`: in another layout, dtype or size of files, out
    of FP8, with MTP layers or without. The arguments as for `hf_to_dist` and `dist_to_hf`, which say what is raised.
    """
    how = Completion(as_path(base_hf), drop_mtp, ROUNDED_TO[dtype])
    sharding = _sharding(max_shard_bytes, shards_like)
    write = _to_hf("hf-to-hf", Path(hf), layout, sharding, dtype, workers, quantize, as_path(scales_from))
    return _carry_out(lambda: read_hf(Path(source), how), write, Path(hf), workers, overwrite, verify, say)


def dist_to_dist(
    source: str | Path,
    dist: str | Path,
    *,
    iteration: int | None = None,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    drop_mtp: bool = False,
    cut_vocabulary: bool = False,
    keep_vocabulary: bool = False,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Write the weights of the distributed checkpoint in folder `source` to `dist`, without optimizer state, to begin a
    run with. The arguments as for `hf_to_dist` and `dist_to_hf`, which say what is raised.
    """
    how = Completion(as_path(base_hf), drop_mtp, ROUNDED_TO[dtype], cut_vocabulary, keep_vocabulary)
    write = _to_dist("dist-to-dist", Path(dist), dtype, workers)
    return _carry_out(
        lambda: read_dist(Path(source), iteration, how), write, Path(dist), workers, overwrite, verify, say
    )


def average(
    folders: Sequence[str | Path],
    *,
    hf: str | Path | None = None,
    dist: str | Path | None = None,
    iterations: Sequence[int] | None = None,
    layout: str = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str = "keep",
    base_hf: str | Path | None = None,
    drop_mtp: bool = False,
    workers: int = 2,
    overwrite: bool = False,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Summary:
    """Write the mean of several checkpoints of one model, in fp32 and rounded once, to the Hugging Face folder `hf` or
    the distributed one `dist`.

    Args:
        folders: Hugging Face or distributed ones.
        iterations: of the one distributed folder that is then given.
        layout, max_shard_bytes, dtype, base_hf, drop_mtp, workers, overwrite, verify, say: as for `dist_to_hf`.

    Raises:
        UserError: as `dist_to_hf`; they are fewer than two, or of several models.
    """
    if (hf is None) == (dist is None):
        raise UserError("a mean goes to --hf FOLDER or to --dist FOLDER; give one of them")
    if iterations is not None and len(folders) != 1:
        raise UserError(f"--iterations are those of one folder; {len(folders)} are given")
    given = [(Path(folders[0]), number) for number in iterations] if iterations else [(Path(f), None) for f in folders]
    how = Completion(as_path(base_hf), drop_mtp, ROUNDED_TO[dtype])
    target = Path(hf if dist is None else dist)
    if dist is None:
        write = _to_hf("average", target, layout, max_shard_bytes, dtype, workers)
    else:
        write = _to_dist("average", target, dtype, workers)
    return _carry_out(lambda: read_mean(given, how), write, target, workers, overwrite, verify, say)


Write = Callable[[Read], Conversion]


def _to_dist(command: str, dist: Path, dtype: str, workers: int) -> Write:
    def write(read: Read) -> Conversion:
        return Conversion(
            files=files_of_dist(read.config, read.source.tensors, ROUNDED_TO[dtype], workers),
            subfolder=RELEASE,
            num_tensors=len(read.source.tensors),
            config=read.config,
            carried=read.carried,
            tracker={TRACKER: RELEASE.encode()},
            record={"command": command, **read.record, "dtype": dtype},
            notes=list(read.source.notes),
        )

    return write


def _to_hf(
    command: str,
    hf: Path,
    layout: str,
    sharding: int | dict[str, str],
    dtype: str,
    workers: int,
    quantize: str | None = None,
    scales_from: Path | None = None,
) -> Write:
    assert quantize in (None, "fp8")
    if scales_from and not quantize:
        raise UserError(f"--scales-from {scales_from}: scales are those of FP8; give --quantize fp8 as well")
    if quantize and layout != "hub":
        raise UserError(f"--quantize {quantize} --layout {layout}: no engine reads it; --layout hub is needed")

    def write(read: Read) -> Conversion:
        record = {"command": command, **read.record, "dtype": dtype, "layout": layout}
        tensors, notes, rounded_to = read.source.tensors, list(read.source.notes), ROUNDED_TO[dtype]
        if quantize:
            check_apart(hf, [scales_from])
            files, config, more = files_of_fp8(read.config, tensors, sharding, rounded_to, scales_from, workers)
            record |= {"quantize": quantize, "scales_from": scales_from and str(scales_from.resolve())}
            notes += more
        else:
            files, config = files_of_hf(read.config, tensors, layout, sharding, rounded_to, workers)
        return Conversion(
            files=files,
            subfolder="",
            num_tensors=files.num_tasks,
            config=config,
            carried=read.carried,
            tracker={},
            record=record,
            notes=notes,
        )

    return write


def _sharding(max_shard_bytes: int, shards_like: str | Path | None) -> int | dict[str, str]:
    return files_by_tensor(shards_like) if shards_like is not None else max_shard_bytes


def _carry_out(
    read: Callable[[], Read], write: Write, target: Path, workers: int, overwrite: bool, verify: bool, say: Say
) -> Summary:
    check_num_workers(workers)

    def planned() -> Conversion:
        found = read()
        check_apart(target, found.folders, found.beside)
        return write(found)

    return carry_out(planned, target, "converting", workers, overwrite, verify, say)
