"""The mapping applied to tensors in memory: Hugging Face state dicts to and from distributed ones, and straight into
and out of a Megatron model.

Checkpoint files are not touched here, and Megatron is imported only where a model is given. Names and places come from
`hymeg.checkpoint.mapping`.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from hymeg.checkpoint.mapping import (
    VOCABULARY_KEYS,
    Entry,
    check_distributed_tensors,
    distributed_shapes,
    fits,
    match_hf_tensors,
    plan,
)
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

StateDict = Mapping[str, torch.Tensor]


class HyStateDictAdapter:
    """Converts the state dicts of one model, in the manner of NeMo Automodel's state dict adapters.

    Distributed keys are global: `mlp.experts.experts.linear_fc1.weight` holds all experts, [num_experts, 2 *
    moe_intermediate_size, hidden_size]. dtypes are kept, except that the expert bias becomes fp32. A tensor that both
    sides hold in the same form is passed on, not copied.
    """

    def __init__(self, config: HyConfig):
        self.config = config
        self._plans: dict[str, dict[str, list[Entry]]] = {}

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
        return {key: _assemble(entries, state_dict, rows) for key, entries in self._match(state_dict).items()}

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
            entry.hf_name: _take(entry, state_dict[entry.dist_key])
            for entry in plan(self.config, layout)
            if excluded is None or not excluded.match(entry.hf_name)
        }

    def convert_single_tensor_to_hf(
        self, name: str, tensor: torch.Tensor, layout: str = "hub"
    ) -> list[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors, (name, tensor), that the one distributed tensor of key `name` holds.

        Raises:
            UserError: the model has no such tensor, or one of another shape.
        """
        if layout not in self._plans:
            self._plans[layout] = _by_key(plan(self.config, layout))
        entries = self._plans[layout].get(name)
        if entries is None or not fits(name, tuple(tensor.shape), entries[0].dist_shape):
            check_distributed_tensors(
                self.config, {name: tuple(tensor.shape)}, required=()
            )  # raises, and says what is wrong
        return [(entry.hf_name, _take(entry, tensor)) for entry in entries]

    @torch.no_grad()
    def load_into(self, model_chunks: Sequence[torch.nn.Module], hf_state_dict: StateDict) -> None:
        """Fill this process's part of a Megatron model, whatever its layout, in place and in the model's dtype. Padding
        rows become zero.

        An optimizer that was built before keeps its own fp32 copy: call its `reload_model_params()`.

        Args:
            model_chunks: what `get_model` returns: one chunk, or several under virtual pipeline parallelism; wrappers
                (DDP, Float16Module) may be on.
            hf_state_dict: every tensor of the whole model, on every process.

        Raises:
            UserError: the model, config.json and the state dict do not agree on the tensors, their shapes or the number
                of layers.
        """
        shards_by_key = self._shards(model_chunks)
        for key, entries in self._match(hf_state_dict).items():
            shards = shards_by_key.get(key)  # None: on another pipeline stage
            if shards:
                tensor = _assemble(entries, hf_state_dict, shards[0].global_shape[0])
                for shard in shards:
                    shard.data.copy_(tensor[shard.global_slice()])

    @torch.no_grad()
    def gather_from(self, model_chunks: Sequence[torch.nn.Module], layout: str = "hub") -> dict[str, torch.Tensor]:
        """The Hugging Face state dict of a Megatron model all of whose shards are in this process; the inverse of
        `load_into`.

        Raises:
            UserError: as `load_into`, or a part of the model is in another process.
        """
        shards = self._shards(model_chunks)
        return self.to_hf(
            {key: _gather(key, shards.get(key, [])) for key in distributed_shapes(self.config)}, layout=layout
        )

    def _match(self, state_dict: StateDict) -> dict[str, list[Entry]]:
        """The entries of every distributed tensor, once the state dict is found to be complete."""
        return _by_key(
            match_hf_tensors(self.config, {name: tuple(tensor.shape) for name, tensor in state_dict.items()}).entries
        )

    def _shards(self, model_chunks: Sequence[torch.nn.Module]) -> dict[str, list["ShardedTensor"]]:
        """Every shard that the chunks hold, by key, once the model is found to be the one of config.json."""
        from megatron.core.utils import unwrap_model

        chunks = unwrap_model(list(model_chunks))
        for flag, field, of_model in (
            ("--num-layers", "num_hidden_layers", chunks[0].config.num_layers),
            ("--mtp-num-layers", "num_nextn_predict_layers", chunks[0].config.mtp_num_layers or 0),
        ):
            if of_model != getattr(self.config, field):
                raise UserError(
                    f"the model has {flag} {of_model}, config.json {field} = {getattr(self.config, field)}; make them "
                    "agree"
                )
        shards: dict[str, list[ShardedTensor]] = {}
        for shard in itertools.chain.from_iterable(
            _sharded_tensors(chunk.sharded_state_dict(metadata={})) for chunk in chunks
        ):
            shards.setdefault(shard.key, []).append(shard)
        held = {_layer(key) for key in shards}
        required = [key for key in distributed_shapes(self.config) if _layer(key) in held]
        check_distributed_tensors(
            self.config, {key: tuple(of_key[0].global_shape) for key, of_key in shards.items()}, required
        )
        return shards


def _by_key(entries: list[Entry]) -> dict[str, list[Entry]]:
    by_key: dict[str, list[Entry]] = {}
    for entry in entries:
        by_key.setdefault(entry.dist_key, []).append(entry)
    return by_key


def _layer(key: str) -> str:
    """What a pipeline stage holds whole or not at all: `decoder.layers.3` and the like; a tensor outside the layers is
    its own.
    """
    return ".".join(key.split(".")[:3])


def _sharded_tensors(state_dict) -> Iterator["ShardedTensor"]:
    """The tensors of a sharded state dict, a SwiGLU's fc1 as its two halves: views of the parameter. Objects
    (`_extra_state`) are passed over.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state_dict)
    remaining = [state_dict]
    while remaining:
        value = remaining.pop()
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict | list):
            remaining.extend(value.values() if isinstance(value, dict) else value)


def _assemble(entries: list[Entry], state_dict: StateDict, vocab_rows: int) -> torch.Tensor:
    """The distributed tensor that `entries` fill; a vocabulary's has `vocab_rows` rows, those beyond its own zero."""
    first = entries[0]
    pieces = [state_dict[entry.hf_name].detach() for entry in entries]
    for entry, piece in zip(entries, pieces, strict=True):
        if piece.dtype != pieces[0].dtype:
            both = f"{first.hf_name} is {pieces[0].dtype} and {entry.hf_name} is {piece.dtype}"
            raise UserError(f"{both}, but both are parts of {first.dist_key}; convert them to one dtype")
    if len(entries) > 1:
        tensor = pieces[0].new_empty(first.dist_shape)
        for entry, piece in zip(entries, pieces, strict=True):
            tensor.view(entry.view)[entry.slices] = piece.reshape(entry.extent)
        return tensor
    tensor = pieces[0].float() if first.is_fp32_buffer else pieces[0]
    if first.dist_key in VOCABULARY_KEYS and vocab_rows > tensor.shape[0]:
        return torch.cat([tensor, tensor.new_zeros(vocab_rows - tensor.shape[0], *tensor.shape[1:])])
    return tensor


def _take(entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
    """The Hugging Face tensor at its place in a distributed one: the same where that is all of it, otherwise a copy."""
    tensor = tensor.detach()
    if tuple(tensor.shape) == entry.hf_shape:
        return tensor
    unpadded = tensor[: entry.dist_shape[0]]
    return unpadded.reshape(entry.view)[entry.slices].clone(memory_format=torch.contiguous_format).view(entry.hf_shape)


def _gather(key: str, shards: list["ShardedTensor"]) -> torch.Tensor:
    """The global tensor of which `shards` are all parts; parts at the same offset are replicas."""
    distinct = {shard.global_offset: shard for shard in shards}.values()
    if not shards or sum(shard.data.numel() for shard in distinct) != math.prod(shards[0].global_shape):
        raise UserError(
            f"{key} is not whole in this process, gather_from needs the whole model in one; save a checkpoint and "
            "export that instead"
        )
    tensor = shards[0].data.new_empty(shards[0].global_shape)
    for shard in distinct:
        tensor[shard.global_slice()] = shard.data
    return tensor
