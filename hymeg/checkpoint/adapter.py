"""The mapping applied to tensors in memory: Hugging Face state dicts to and from distributed ones.

Checkpoint files are not touched here. Names and places come from `hymeg.checkpoint.mapping`.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from hymeg.checkpoint.mapping import (
    VOCABULARY_KEYS,
    Entry,
    check_distributed_tensors,
    fits,
    hf_entries,
    match_hf_tensors,
)
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

StateDict = Mapping[str, torch.Tensor]


class HyStateDictAdapter:
    """Converts the state dicts of one model, in the manner of NeMo Automodel's state dict adapters.

    Distributed keys are global: `mlp.experts.experts.linear_fc1.weight` holds all experts, [num_experts, 2 *
    moe_intermediate_size, hidden_size]. dtypes are kept, except that the expert bias becomes fp32. A tensor that both
    sides hold in the same form is passed on, not copied.
    """

    def __init__(self, config: HyConfig):
        self.config = config
        self._entries: dict[str, dict[str, list[Entry]]] = {}

    def from_hf(self, state_dict: StateDict, padded_vocab_size: int | None = None) -> dict[str, torch.Tensor]:
        """The distributed state dict of a Hugging Face one, whose layout is told by its names.

        Args:
            state_dict: every tensor of the model. Copies of the trunk's tensors in MTP layers are left out, as the
                mapping says.
            padded_vocab_size: rows of embedding and output layer; those beyond the vocabulary are zero. None: no
                padding.

        Raises:
            UserError: a tensor is missing, unexpected or of a wrong shape; tensors that become one differ in dtype;
                padded_vocab_size is too small.
        """
        rows = self.config.vocab_size if padded_vocab_size is None else padded_vocab_size
        if rows < self.config.vocab_size:
            raise UserError(
                f"padded_vocab_size is {rows}; at least vocab_size ({self.config.vocab_size} in config.json) is needed"
            )
        match = match_hf_tensors(self.config, {name: tuple(tensor.shape) for name, tensor in state_dict.items()})
        return {key: _assembled(entries, state_dict, rows) for key, entries in _by_key(match.entries).items()}

    def to_hf(
        self, state_dict: StateDict, exclude_key_regex: str | None = None, layout: str = "hub"
    ) -> dict[str, torch.Tensor]:
        """The Hugging Face state dict of a distributed one. Padding rows of the vocabulary are cut off; no two results
        share memory.

        Args:
            state_dict: every tensor of the model, whole.
            exclude_key_regex: Hugging Face names that it matches (from their beginning, as `re.match`) are left out.
            layout: "hub" or "fused".

        Raises:
            UserError: a tensor is missing, unexpected or of a wrong shape.
        """
        check_distributed_tensors(self.config, {key: tuple(tensor.shape) for key, tensor in state_dict.items()})
        excluded = re.compile(exclude_key_regex) if exclude_key_regex else None
        return {
            entry.hf_name: _taken(entry, state_dict[entry.dist_key])
            for entry in hf_entries(self.config, layout)
            if excluded is None or not excluded.match(entry.hf_name)
        }

    def convert_single_tensor_to_hf(
        self, name: str, tensor: torch.Tensor, layout: str = "hub"
    ) -> list[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors, (name, tensor), that the one distributed tensor of key `name` holds.

        Raises:
            UserError: the model has no such tensor, or one of another shape.
        """
        if layout not in self._entries:
            self._entries[layout] = _by_key(hf_entries(self.config, layout))
        entries = self._entries[layout].get(name)
        if entries is None or not fits(name, tuple(tensor.shape), entries[0].dist_shape):
            check_distributed_tensors(self.config, {name: tuple(tensor.shape)}, required=())  # says what is wrong
        return [(entry.hf_name, _taken(entry, tensor)) for entry in entries]


def _by_key(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    by_key: dict[str, list[Entry]] = {}
    for entry in entries:
        by_key.setdefault(entry.dist_key, []).append(entry)
    return by_key


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
            parts = piece.reshape(-1, rows.shape[1]).split([stop - start for start, stop in entry.rows])
            for (start, stop), part in zip(entry.rows, parts, strict=True):
                rows[start:stop] = part
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
