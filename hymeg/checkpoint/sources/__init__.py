"""Where rows come from: a `Source` each, opened and checked, nothing of its bytes read yet."""

from pathlib import Path

from hymeg.checkpoint.row_tensors import Source
from hymeg.checkpoint.sources.dist_folder import open_dist
from hymeg.checkpoint.sources.hf_folder import open_hf
from hymeg.errors import UserError

__all__ = ["open_any", "open_dist", "open_hf"]


def open_any(folder: str | Path, iteration: int | None = None) -> Source:
    """The Hugging Face or distributed checkpoint in `folder`.

    Raises:
        UserError: it holds neither, or one that is incomplete or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face or a distributed checkpoint")
    if not any(folder.glob("*.safetensors")):
        return open_dist(folder, iteration)
    if iteration is not None:
        raise UserError(f"--iteration {iteration}: {folder} is a Hugging Face folder, which has none; leave it out")
    return open_hf(folder)
