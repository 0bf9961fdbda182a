"""Hugging Face checkpoints to distributed ones and back: streaming, in several processes, without a model, a GPU or a
process group.

A source is opened and checked (`reading`, `sources`), the table says which rows of it go where (`mapping`), a sink
plans its files to the byte (`sinks`), workers move the rows (`sinks.transfer`), and the folder appears
(`sinks.new_folder`). Each command is one way of reading and one of writing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymeg.checkpoint.conversion import Summary, carry_out, to_dist, to_hf
from hymeg.checkpoint.options import ANEW, FROM_DIST, OF_MODEL, TO_HF, Options
from hymeg.checkpoint.reading import read_dist, read_hf, read_mean
from hymeg.errors import UserError


def hf_to_dist(hf: str | Path, dist: str | Path, **options: Any) -> Summary:
    """Convert the Hugging Face checkpoint in folder `hf` to a distributed one in `dist`, with all that training needs
    beside the weights.

    Args:
        options: `OF_MODEL`, as `options.Options` has them.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of its config.json; `dist` cannot be written, or
            holds what no conversion wrote. Nothing is left behind.
    """
    how, hf, dist = Options.taken(OF_MODEL, options), Path(hf), Path(dist)
    return carry_out(lambda: to_dist("hf-to-dist", read_hf(hf, how), dist, how), dist, "converting", how)


def dist_to_hf(dist: str | Path, hf: str | Path, **options: Any) -> Summary:
    """Convert the distributed checkpoint in folder `dist` to a Hugging Face one in `hf`. Optimizer state beside the
    weights is passed over.

    Args:
        options: `OF_MODEL`, `FROM_DIST`, `ANEW`, as `options.Options` has them.

    Raises:
        UserError: the checkpoint is broken, incomplete or not that of the config.json; `hf` cannot be written, or
            holds what no conversion wrote. Nothing is left behind.
    """
    how, dist, hf = Options.taken((*OF_MODEL, *FROM_DIST, *ANEW), options), Path(dist), Path(hf)
    return carry_out(lambda: to_hf("dist-to-hf", read_dist(dist, how), hf, how), hf, "converting", how)


def hf_to_hf(source: str | Path, hf: str | Path, **options: Any) -> Summary:
    """Write the Hugging Face checkpoint in folder `source` anew to `hf`: in another layout, dtype or size of files, out
    of FP8 or into it, with MTP layers or without.

    Args:
        options: `OF_MODEL`, `ANEW`, as `options.Options` has them.

    Raises:
        UserError: as `hf_to_dist` and `dist_to_hf`.
    """
    how, source, hf = Options.taken((*OF_MODEL, *ANEW), options), Path(source), Path(hf)
    return carry_out(lambda: to_hf("hf-to-hf", read_hf(source, how), hf, how), hf, "converting", how)


def dist_to_dist(source: str | Path, dist: str | Path, **options: Any) -> Summary:
    """Write the weights of the distributed checkpoint in folder `source` to `dist`, without optimizer state, to begin a
    run with.

    Args:
        options: `OF_MODEL`, `FROM_DIST`, as `options.Options` has them.

    Raises:
        UserError: as `dist_to_hf`.
    """
    how, source, dist = Options.taken((*OF_MODEL, *FROM_DIST), options), Path(source), Path(dist)
    return carry_out(lambda: to_dist("dist-to-dist", read_dist(source, how), dist, how), dist, "converting", how)


def average(
    folders: Sequence[str | Path],
    *,
    hf: str | Path | None = None,
    dist: str | Path | None = None,
    iterations: Sequence[int] | None = None,
    **options: Any,
) -> Summary:
    """Write the mean of several checkpoints of one model, in fp32 and rounded once, to the Hugging Face folder `hf` or
    the distributed one `dist`.

    Args:
        folders: Hugging Face or distributed ones.
        iterations: of the one distributed folder that is then given.
        options: `OF_MODEL`, `TO_HF`, as `options.Options` has them.

    Raises:
        UserError: as `dist_to_hf`; they are fewer than two, or of several models.
    """
    if (hf is None) == (dist is None):
        raise UserError("a mean goes to --hf FOLDER or to --dist FOLDER; give one of them")
    if iterations is not None and len(folders) != 1:
        raise UserError(f"--iterations are those of one folder; {len(folders)} are given")
    given = [(Path(folders[0]), number) for number in iterations] if iterations else [(Path(f), None) for f in folders]
    how, target, to_target = Options.taken((*OF_MODEL, *TO_HF), options), Path(hf or dist), to_hf if hf else to_dist
    if dist is not None and (how.layout, how.max_shard_bytes) != (Options.layout, Options.max_shard_bytes):
        raise UserError(
            "--layout and --shard-size are of Hugging Face folders; leave them out, or give --hf for --dist"
        )
    return carry_out(lambda: to_target("average", read_mean(given, how), target, how), target, "converting", how)
