"""The mapping applied to tensors in memory: Hugging Face state dicts to and from distributed ones.

Checkpoint files are not touched here. Names and places come from `hymeg.checkpoint.mapping`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from hymeg.checkpoint.mapping import (
    VOCABULARY_KEYS,
    Entry,
    by_key,
    check_distributed_tensors,
    distributed_shapes,
    fits,
    hf_entries,
    match_hf_tensors,
    scope_of,
    with_first_rows,
)
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

StateDict = Mapping[str, torch.Tensor]
_NOTHING = r"(?!)"  # the pattern that matches nothing


class HyStateDictAdapter:
    """Converts the state dicts of one model, or of a pipeline stage of it, with the interface of NeMo Automodel's state
    dict adapters (nemo_automodel/components/checkpoint/state_dict_adapter.py, 0.7.0).

    The native keys are those of distributed checkpoints, and global: `mlp.experts.experts.linear_fc1.weight` holds all
    experts, [num_experts, 2 * moe_intermediate_size, hidden_size]. A tensor that both sides hold in the same form is
    passed on, not copied. What further arguments Automodel gives concern its own modules and are not looked at.

    Args:
        config: a HyConfig, or the configuration that transformers holds (anything with `to_dict()`).
        moe_config, backend: Automodel's own, kept as attributes: the config says all that is needed.
        dtype: of what `from_hf` gives; None: as it comes. The expert bias is always fp32.
    """

    def __init__(self, config: Any, moe_config: Any = None, backend: Any = None, dtype: torch.dtype | None = None):
        self.config = config if isinstance(config, HyConfig) else HyConfig.from_dict(config.to_dict())
        self.moe_config, self.backend, self.dtype = moe_config, backend, dtype

    def from_hf(
        self,
        hf_state_dict: StateDict,
        device_mesh: Any = None,
        *,
        padded_vocab_size: int | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The distributed state dict of a Hugging Face one, whose layout is told by its names.

        Args:
            hf_state_dict: the tensors of the model, or of some of its layers. Copies of the trunk's tensors in MTP
                layers are left out, as the mapping says.
            device_mesh: of one rank, if any: what several ranks hold is filled by `hymeg.checkpoint.live`.
            padded_vocab_size: rows of embedding and output layer; those beyond the vocabulary are zero. None: no
                padding.

        Raises:
            UserError: a tensor of a layer is missing, unexpected or of a wrong shape; tensors that become one differ in
                dtype; padded_vocab_size is too small; device_mesh has several ranks.
        """
        _check_one_rank(device_mesh)
        rows = self.config.vocab_size if padded_vocab_size is None else padded_vocab_size
        if rows < self.config.vocab_size:
            raise UserError(
                f"padded_vocab_size is {rows}; at least vocab_size ({self.config.vocab_size} in config.json) is needed"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in hf_state_dict.items()}
        match = match_hf_tensors(self.config, shapes, is_part=True)
        made = {}
        for key, entries in by_key(match.entries).items():
            tensor = _assembled(entries, hf_state_dict, rows)
            made[key] = tensor if self.dtype is None or entries[0].is_fp32_buffer else tensor.to(self.dtype)
        return made

    def to_hf(
        self,
        state_dict: StateDict,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        *,
        device_mesh: Any = None,
        layout: str = "hub",
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The Hugging Face state dict of a distributed one. Padding rows of the vocabulary are cut off; no two results
        share memory.

        Args:
            state_dict: the tensors of the model, or of some of its layers, each whole.
            exclude_key_regex: names of either side that it matches (from their beginning, as `re.match`) are left out,
                such as Transformer Engine's `_extra_state`, which no Hugging Face checkpoint holds.
            quantization: not here; `tools/convert_checkpoint.py` writes and reads FP8.
            layout: "hub" or "fused".

        Raises:
            UserError: a tensor of a layer is missing, unexpected or of a wrong shape; quantization is asked for;
                device_mesh has several ranks.
        """
        _check_one_rank(device_mesh)
        if quantization:
            raise UserError("quantization=True: hymeg's state dict adapter does not quantize; leave it False")
        excluded = re.compile(exclude_key_regex or _NOTHING)
        taken = {key: tensor for key, tensor in state_dict.items() if not excluded.match(key)}
        held = {scope_of(key) for key in taken}
        required = [key for key in distributed_shapes(self.config) if scope_of(key) in held]
        check_distributed_tensors(self.config, {key: tuple(tensor.shape) for key, tensor in taken.items()}, required)
        return {
            entry.hf_name: _taken(entry, taken[entry.dist_key])
            for entry in hf_entries(self.config, layout)
            if entry.dist_key in taken and not excluded.match(entry.hf_name)
        }

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: torch.Tensor,
        *,
        exclude_key_regex: str | None = None,
        layout: str = "hub",
        **kwargs: Any,
    ) -> list[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors, (name, tensor), that the one distributed tensor of key `fqn` holds; none where
        `exclude_key_regex` matches.

        Raises:
            UserError: the model has no such tensor, or one of another shape.
        """
        excluded = re.compile(exclude_key_regex or _NOTHING)
        if excluded.match(fqn):
            return []
        entries = _entries(self.config, layout).get(fqn)
        if entries is None or not fits(fqn, tensor.shape, entries[0].dist_shape):
            check_distributed_tensors(self.config, {fqn: tuple(tensor.shape)}, required=())  # says what is wrong
        return [(entry.hf_name, _taken(entry, tensor)) for entry in entries if not excluded.match(entry.hf_name)]

    def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
        """The names that `to_hf` would give, without its tensors."""
        on_meta = {key: torch.empty(tensor.shape, device="meta") for key, tensor in state_dict.items()}
        return list(self.to_hf(on_meta, exclude_key_regex=r".*_extra_state.*"))


class HYV3StateDictAdapter(HyStateDictAdapter):
    """Hy3's."""


class HyMT2StateDictAdapter(HyStateDictAdapter):
    """Hy-MT2-30B-A3B's: the same architecture."""


def _check_one_rank(device_mesh: Any) -> None:
    if device_mesh is not None and device_mesh.size() > 1:
        raise UserError(
            f"device_mesh has {device_mesh.size()} ranks: the adapter converts whole tensors; for a model over several "
            "ranks use hymeg.checkpoint.live (export_weights, load_weights)"
        )


@functools.lru_cache(maxsize=4)
def _entries(config: HyConfig, layout: str) -> dict[str, list[Entry]]:
    return by_key(hf_entries(config, layout))


def _assembled(entries: list[Entry], state_dict: StateDict, vocab_rows: int) -> torch.Tensor:
    """The distributed tensor that `entries` fill; a vocabulary's has `vocab_rows` rows, those beyond its own zero."""
    first = entries[0]
    pieces = [state_dict[entry.hf_name].detach() for entry in entries]
    for entry, piece in zip(entries, pieces, strict=True):
        if piece.dtype != pieces[0].dtype:
            both = f"{first.hf_name} is {pieces[0].dtype} and {entry.hf_name} is {piece.dtype}"
            raise UserError(f"{both}, but both are parts of {first.dist_key}; convert them to one dtype")
    if len(entries) > 1:
        tensor = pieces[0].new_empty(first.dist_shape)
        rows = tensor.view(-1, first.dist_shape[-1])
        for entry, piece in zip(entries, pieces, strict=True):
            for start, stop, row in with_first_rows(entry.rows):
                rows[start:stop] = piece.reshape(-1, rows.shape[1])[row : row + stop - start]
        return tensor
    tensor = pieces[0].float() if first.is_fp32_buffer else pieces[0]
    if first.dist_key in VOCABULARY_KEYS and vocab_rows > tensor.shape[0]:
        return torch.cat([tensor, tensor.new_zeros(vocab_rows - tensor.shape[0], *tensor.shape[1:])])
    return tensor


def _taken(entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
    """The Hugging Face tensor at its place in a distributed one: the same where that is all of it, otherwise a copy."""
    tensor = tensor.detach()
    if tuple(tensor.shape) == entry.hf_shape:
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return torch.cat([rows[start:stop] for start, stop in entry.rows]).view(entry.hf_shape)
