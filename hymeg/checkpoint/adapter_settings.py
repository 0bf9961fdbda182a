"""adapter.json, which lies beside the tensors of an adapter: what their names and shapes do not say."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from hymeg import __version__
from hymeg.checksums import open_verified
from hymeg.errors import UserError
from hymeg.files import read_json, shown, write_whole

ADAPTER_FILE = "adapter.json"
SCALINGS = ("lora", "rslora")


class AdapterSettings(NamedTuple):
    """Of one adapter. The delta of a weight is scale * B @ A."""

    rank: int
    alpha: float
    scaling: str  # "lora": alpha / rank; "rslora": alpha / sqrt(rank) (Kalajdzievski 2023)
    dropout: float
    targets: tuple[str, ...]  # as in `adapter_table`
    base: dict[str, Any] | None = None  # {"source", "iteration", "fingerprint"}: which weights it belongs to

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def to_bytes(self) -> bytes:
        """As adapter.json holds it."""
        written = {**self._asdict(), "hymeg_version": __version__}
        return (json.dumps(written, indent=1) + "\n").encode()

    def save(self, folder: str | Path) -> None:
        """Write adapter.json into `folder`, whole or not at all. Raises UserError where it cannot be written."""
        write_whole(Path(folder) / ADAPTER_FILE, self.to_bytes())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "AdapterSettings":
        """What the adapter.json in `folder` says. Raises UserError where it is missing, damaged or not right."""
        path = Path(folder) / ADAPTER_FILE
        if not path.is_file():
            raise UserError(f"{folder}: no {ADAPTER_FILE} beside the adapter's tensors; copy the checkpoint again")
        found = read_json(path, open_verified)
        if type(found) is not dict:
            raise UserError(f"{path}: holds {shown(found)}; an object is needed")
        for name, (needed, is_right) in _FIELDS.items():
            if not is_right(found.get(name)):
                raise UserError(f"{path}: {name} is {shown(found.get(name))}; {needed} is needed")
        values = {name: found[name] for name in _FIELDS} | {"targets": tuple(found["targets"])}
        return cls(**values, base=found.get("base"))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_FIELDS = {
    "rank": ("a positive integer", lambda value: type(value) is int and value > 0),
    "alpha": ("a positive number", lambda value: _is_number(value) and value > 0),
    "scaling": (" or ".join(SCALINGS), lambda value: value in SCALINGS),
    "dropout": ("a number from 0 up to, not including, 1", lambda value: _is_number(value) and 0 <= value < 1),
    "targets": (
        "a list of targets such as q_proj",
        lambda value: type(value) is list and len(value) > 0 and all(type(target) is str for target in value),
    ),
}
