"""An adapter as a source of rows: a distributed checkpoint's, or a peft folder's (`peft_folder`), under the keys of
`adapter_table` either way.
"""

from pathlib import Path
from typing import NamedTuple

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import FULL, PREFIX, Module, adapter_modules, check_adapter_tensors
from hymeg.checkpoint.row_tensors import RowTensor
from hymeg.checkpoint.sources.dist_folder import open_dist
from hymeg.errors import UserError, located
from hymeg.hf.config import CONFIG_FILE, HyConfig


class Adapter(NamedTuple):
    """An adapter opened for reading, all of its tensors accounted for."""

    what: str  # in words
    folder: Path  # in which the tensors' files are
    config: HyConfig  # of the model that it belongs to
    settings: AdapterSettings
    tensors: dict[str, RowTensor]  # by distributed key
    iteration: int | None = None  # None: no training of ours made it
    has_optimizer: bool = False

    @property
    def modules(self) -> list[Module]:
        """That have an adapter."""
        return adapter_modules(self.config, self.settings.targets)

    @property
    def full(self) -> list[str]:
        """Hub names of the parameters trained in full beside the adapters."""
        return full_names(self.tensors)


def full_names(keys) -> list[str]:
    return [key.removeprefix(PREFIX).removesuffix(FULL) for key in keys if key.endswith(FULL)]


def open_dist_adapter(folder: str | Path, config: HyConfig | None = None, iteration: int | None = None) -> Adapter:
    """The adapter in the distributed checkpoint `folder`.

    Args:
        config: of its base model; None: that beside it.

    Raises:
        UserError: as `open_dist`; there is no adapter in it, or one whose tensors are not those of its targets, rank
            and model.
    """
    source = open_dist(folder, iteration)
    tensors = {key: tensor for key, tensor in source.tensors.items() if key.startswith(PREFIX)}
    if not tensors:
        raise UserError(f"{source.folder}: holds no adapter; its tensors begin with {PREFIX}")
    if source.unknown or len(tensors) < len(source.tensors):
        others = [*source.unknown, *(key for key in source.tensors if key not in tensors)]
        raise UserError(f"{source.folder}: {len(others)} tensors beside the adapter's, such as {others[0]}")
    config = config or source.config
    if config is None:
        raise UserError(f"{folder}: no {CONFIG_FILE} in it; give --base-hf, the Hugging Face folder of its base model")
    settings = AdapterSettings.from_folder(source.folder)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    with located(source.folder):
        check_adapter_tensors(config, settings.rank, settings.targets, shapes, full_names(tensors))
    what = "adapter, distributed (torch_dist)"
    return Adapter(what, source.folder, config, settings, tensors, source.iteration, source.has_optimizer)
