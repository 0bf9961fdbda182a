"""Where rows come from: a `Source` each, opened and checked, nothing of its bytes read yet."""

from pathlib import Path

from hymeg.checkpoint.adapter_settings import ADAPTER_FILE
from hymeg.checkpoint.dist_files import iteration_folder
from hymeg.checkpoint.peft_table import CONFIG_FILE
from hymeg.checkpoint.row_tensors import Source
from hymeg.checkpoint.sources.adapter_folder import Adapter, open_dist_adapter
from hymeg.checkpoint.sources.dist_folder import open_dist
from hymeg.checkpoint.sources.hf_folder import open_hf
from hymeg.checkpoint.sources.peft_folder import open_peft
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

__all__ = [
    "is_adapter",
    "is_hf",
    "is_peft",
    "open_adapter",
    "open_any",
    "open_dist",
    "open_dist_adapter",
    "open_hf",
    "open_peft",
]


def is_hf(folder: Path, iteration: int | None = None) -> bool:
    """Whether it is a Hugging Face folder, and no distributed one.

    Raises:
        UserError: there is no such folder, or it is one and an iteration is asked for.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face or a distributed checkpoint")
    if not any(folder.glob("*.safetensors")):
        return False
    if iteration is not None:
        raise UserError(f"--iteration {iteration}: {folder} is a Hugging Face folder, which has none; leave it out")
    return True


def open_any(folder: str | Path, iteration: int | None = None) -> Source:
    """The Hugging Face or distributed checkpoint in `folder`.

    Raises:
        UserError: it holds neither, or one that is incomplete or broken.
    """
    folder = Path(folder)
    return open_hf(folder) if is_hf(folder, iteration) else open_dist(folder, iteration)


def is_peft(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG_FILE).is_file()


def is_adapter(folder: str | Path, iteration: int | None = None) -> bool:
    """Whether `folder` holds an adapter, distributed or of peft. Raises UserError where it is no checkpoint."""
    folder = Path(folder)
    if is_peft(folder) or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return is_peft(folder)
    return (iteration_folder(folder, iteration)[0] / ADAPTER_FILE).is_file()


def open_adapter(folder: str | Path, config: HyConfig | None = None, iteration: int | None = None) -> Adapter:
    """The adapter in `folder`, distributed or of peft, of a model of this config (None: the one beside it).

    Raises:
        UserError: as `open_dist_adapter` and `open_peft`; a peft folder without a config.
    """
    if not is_peft(folder):
        return open_dist_adapter(folder, config, iteration)
    if iteration is not None:
        raise UserError(f"--iteration {iteration}: {folder} is a peft folder, which has none; leave it out")
    if config is None:
        raise UserError(
            f"{folder}: a peft folder, which does not say of which model; give --base-hf, its base's folder"
        )
    return open_peft(folder, config)
