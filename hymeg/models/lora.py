"""Adapters (LoRA) beside the linear layers of a model, whose own weights are frozen.

Megatron's linear layers hold several projections in one weight: q, k and v; gate and up. Each projection that is a
target has an A and a B of its own, as elsewhere in the world; for the products they are put together, so that a layer
costs two more. A hook on the layer adds scale * B A x to what it returns, in the parallel state of that:

    column-parallel   A on every rank, for this rank's tokens; the rank's rows of B, as of the weight
    row-parallel      the rank's columns of A, as of the weight, summed over the ranks; B on every rank, for its tokens
    routed experts    the rank's experts. Their layers communicate nothing themselves, so under expert tensor
                      parallelism what they return is what all ranks sum, and the adapters' part with it (B is linear)

Which projections, shapes and names: `hymeg.checkpoint.adapter_table`.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import Module, adapter_modules
from hymeg.hf.config import HyConfig
from hymeg.models.freezing import require_gradients_of_inputs
from hymeg.platform.kernels import grouped_linear

_SAME_ON_ALL_SHARDS = "adapters-of-experts"  # random numbers, the same on the ranks that share an expert


class Groups(NamedTuple):
    """The ranks among which a linear layer is shared."""

    shards: torch.distributed.ProcessGroup  # each with a part of every weight
    experts: torch.distributed.ProcessGroup | None  # each with some of the experts; None where there are none
    copies: torch.distributed.ProcessGroup  # each with the same


class Adapter(torch.nn.Module):
    """What is beside one linear layer. Parameters: `{projection}_lora_A`, `[rank, in]`, and `{projection}_lora_B`,
    `[out, rank]`, this rank's part of each; of experts `[local experts, ...]`.

    Calling it gives the A of all its projections in one, `[P * rank, in]`, and their B, `[out of the layer, P * rank]`,
    rows in the layer's order.

    Args:
        parts: the layer's projections in the order of its rows, None where one has no adapter.
        rows: of each projection in the layer's weight on this rank, for each of the `num_runs` runs that they
            alternate in.
        is_row_parallel: whether the layer's input is cut among the ranks, or its output.
    """

    def __init__(
        self,
        parts: Sequence[Module | None],
        rows: Sequence[int],
        num_runs: int,
        is_row_parallel: bool,
        groups: Groups,
        settings: AdapterSettings,
        seed: int,
        linears: Sequence[torch.nn.Module],
        sequence_parallel: bool,
    ):
        super().__init__()
        self.linears = tuple(linears)  # no children of this module
        self.parts, self.rows, self.num_runs = tuple(parts), tuple(rows), num_runs
        self.is_row_parallel, self.groups = is_row_parallel, groups
        self.rank, self.scale, self.dropout = settings.rank, settings.scale, settings.dropout
        self.seed = seed
        self.of_experts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part, num_rows in zip(parts, rows, strict=True):
            if part is None:
                continue
            a = _initial(part, settings.rank, seed, self._local_experts(part))
            if is_row_parallel:
                a = a.chunk(groups.shards.size(), dim=-1)[groups.shards.rank()]
            b = torch.zeros(*a.shape[:-2], num_runs * num_rows, settings.rank)
            for letter, tensor, is_cut, dim in (("A", a, is_row_parallel, -1), ("B", b, not is_row_parallel, -2)):
                parameter = torch.nn.Parameter(tensor.to(next(self.weights()), copy=True).contiguous())
                set_tensor_model_parallel_attributes(parameter, is_cut, parameter.dim() + dim if is_cut else -1, 1)
                if groups.experts is not None:
                    parameter.allreduce = False
                elif not is_cut:
                    # Each rank's gradient is of its tokens only, or of its part of B or A: Megatron sums them.
                    parameter.sequence_parallel = sequence_parallel
                self.register_parameter(f"{_name(part)}_lora_{letter}", parameter)

    def _local_experts(self, part: Module) -> range | None:
        if part.num_experts is None:
            return None
        each, group = part.num_experts // self.groups.experts.size(), self.groups.experts
        return range(group.rank() * each, (group.rank() + 1) * each)

    def weights(self) -> Iterator[torch.Tensor]:
        """Of the layer, `[out, in]` on this rank; of experts one after the other."""
        for linear in self.linears:
            for name, parameter in linear.named_parameters(recurse=False):
                if name.startswith("weight"):
                    yield parameter

    def pairs(self) -> Iterator[tuple[Module, torch.Tensor, torch.Tensor]]:
        """Each projection that has an adapter, its A and its B."""
        for part in self.parts:
            if part is not None:
                yield part, *(getattr(self, f"{_name(part)}_lora_{letter}") for letter in "AB")

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = {part: (a, b) for part, a, b in self.pairs()}
        width, first, blocks = len(pairs) * self.rank, 0, []
        for part, num_rows in zip(self.parts, self.rows, strict=True):
            if part is None:
                like = next(iter(pairs.values()))[1]
                blocks.append(like.new_zeros(*like.shape[:-2], self.num_runs, num_rows, width))
                continue
            b = pairs[part][1].unflatten(-2, (self.num_runs, num_rows))
            blocks.append(F.pad(b, (first, width - first - self.rank)))
            first += self.rank
        a, b = torch.cat([a for a, _ in pairs.values()], dim=-2), torch.cat(blocks, dim=-2).flatten(-3, -2)
        if self.groups.experts is not None and self.groups.shards.size() > 1:
            # What is on every shard has on each only a summand of its gradient.
            if self.is_row_parallel:
                b = copy_to_tensor_model_parallel_region(b, group=self.groups.shards)
            else:
                a = copy_to_tensor_model_parallel_region(a, group=self.groups.shards)
        return a, b

    def add(self, linear: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of a layer that all tokens go through: `[s, b, in]` (under sequence parallelism s is the rank's
        share where the layer takes or returns that) to `[s, b, out]`."""
        base, bias = output
        a, b = self()
        # A layer whose input the MoE layer has gathered already communicates nothing either.
        is_silent = getattr(linear, "explicit_expert_comm", False) or getattr(linear, "parallel_mode", "") is None
        communicates = self.groups.shards.size() > 1 and not is_silent
        inner = F.linear(self._dropped(_normalised(linear, args[0]), linear.training, communicates), a)
        if communicates and self.is_row_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.groups.shards)
        elif communicates:
            inner = gather_from_sequence_parallel_region(
                inner, tensor_parallel_output_grad=True, group=self.groups.shards
            )
        return self._sum(base, inner, b), bias

    def add_grouped(self, linear: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of a layer of all experts: tokens `[t, in]`, ordered by expert, and how many each has."""
        base, bias = output
        (a, b), (x, counts) = self(), args[:2]
        inner = grouped_linear(self._dropped(x, linear.training, False), a, counts)
        return torch.add(base, grouped_linear(inner, b, counts), alpha=self.scale), bias

    def unbind(self, experts: torch.nn.Module, args: tuple) -> None:
        """Forward pre-hook of experts that are layers of their own: their matrices are made once for all."""
        a, b = self()
        self.of_experts = list(zip(a.unbind(0), b.unbind(0), strict=True))

    def add_of_expert(self, expert: int, linear: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of one such expert's layer: `[t, in]` to `[t, out]`."""
        base, bias = output
        a, b = self.of_experts[expert]
        return self._sum(base, F.linear(self._dropped(args[0], linear.training, False), a), b), bias

    def _sum(self, base: torch.Tensor, inner: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(base.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=self.scale)
        return flat.view_as(base)

    def _dropped(self, x: torch.Tensor, training: bool, communicates: bool) -> torch.Tensor:
        if not training or self.dropout == 0:
            return x
        with self._random_numbers(communicates):
            return F.dropout(x, self.dropout)

    def _random_numbers(self, communicates: bool) -> contextlib.AbstractContextManager:
        """Ranks that hold the same tokens draw the same mask; those that hold parts of them, or others, masks of their
        own.
        """
        tracker = get_cuda_rng_tracker()
        if self.groups.experts is None:
            return tracker.fork() if self.is_row_parallel or communicates else contextlib.nullcontext()
        if self.is_row_parallel:
            return tracker.fork(get_expert_parallel_rng_tracker_name())
        if _SAME_ON_ALL_SHARDS not in tracker.get_states():
            tracker.add(_SAME_ON_ALL_SHARDS, self.seed + 50_000 + self.groups.experts.rank())
        return tracker.fork(_SAME_ON_ALL_SHARDS)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Its parameters as parts of the tensors that `adapter_table` names."""
        shards, experts = self.groups.shards, self.groups.experts
        found = {}
        for part, *both in self.pairs():
            stack = [] if experts is None else [(0, experts.rank(), experts.size())]
            for letter, key, parameter, axis in zip("AB", (part.lora_a, part.lora_b), both, (-1, -2), strict=True):
                is_cut = self.is_row_parallel == (letter == "A")
                cut = [(parameter.dim() + axis, shards.rank(), shards.size())] if is_cut else []
                replica = (0, 0 if is_cut else shards.rank(), self.groups.copies.rank())
                found[f"{prefix}{_name(part)}_lora_{letter}"] = ShardedTensor.from_rank_offsets(
                    key, parameter, *stack, *cut, replica_id=replica
                )
        return found


def _name(part: Module) -> str:
    return part.path.rpartition(".")[2]


def _initial(part: Module, rank: int, seed: int, experts: range | None) -> torch.Tensor:
    """A whole, as peft begins: uniform in +-1 / sqrt(in), which is kaiming_uniform_ with a = sqrt(5). Drawn by seed,
    name and expert, so that every layout begins alike."""

    def drawn(name: str) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(part.num_in)
        return torch.empty(rank, part.num_in).uniform_(-bound, bound, generator=generator)

    return drawn(part.path) if experts is None else torch.stack([drawn(f"{part.path} {e}") for e in experts])


def _normalised(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer multiplies: Transformer Engine's may begin with a norm."""
    weight = getattr(linear, "layer_norm_weight", None)
    return x if weight is None else F.rms_norm(x, weight.shape, weight, linear.eps)


def add_adapters(model: torch.nn.Module, config: HyConfig, settings: AdapterSettings, seed: int) -> None:
    """Freeze the model, one pipeline stage of it, and put adapters beside its layers: `model.adapters`, in order.

    Raises:
        UserError: a target means no module of the model.
    """
    wanted = {module.path: module for module in adapter_modules(config, settings.targets)}
    model.requires_grad_(False)
    model.adapters = torch.nn.ModuleDict()
    for prefix, layer in _layers(model, config):
        for path, owner, is_expert in _owners(layer):
            for name, names, is_row_parallel in _LINEARS:
                parts = [wanted.get(f"{prefix}{path}{projection}") for projection in names]
                linears = _linears(owner, name)
                if not linears or not any(parts):
                    continue
                adapter = Adapter(
                    parts,
                    *_rows(names, config, linears[0]),
                    is_row_parallel,
                    _groups(model.pg_collection, is_expert),
                    settings,
                    seed,
                    linears,
                    model.config.sequence_parallel,
                )
                model.adapters[f"{prefix}{path}{name}".replace(".", "-")] = adapter
                _hook(adapter, owner, name, is_expert)
    require_gradients_of_inputs(model)


# Attribute, projections in the order of its rows, whether it is row-parallel.
_LINEARS = (
    ("linear_qkv", ("q_proj", "k_proj", "v_proj"), False),
    ("linear_proj", ("o_proj",), True),
    ("linear_fc1", ("gate_proj", "up_proj"), False),
    ("linear_fc2", ("down_proj",), True),
)


def _layers(model: torch.nn.Module, config: HyConfig) -> Iterator[tuple[str, TransformerLayer]]:
    """The layers of this stage, and what their modules' paths begin with."""
    inner = {}
    for module in model.modules():
        if isinstance(module, MultiTokenPredictionLayer):
            inner[module.mtp_model_layer] = config.num_hidden_layers + module.layer_number - 1
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            yield f"model.layers.{inner.get(module, module.layer_number - 1)}.", module


def _owners(layer: TransformerLayer) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    yield "self_attn.", layer.self_attention, False
    if not isinstance(layer.mlp, MoELayer):
        yield "mlp.", layer.mlp, False
        return
    if layer.mlp.shared_experts is not None:
        yield "mlp.shared_mlp.", layer.mlp.shared_experts, False
    yield "mlp.experts.", layer.mlp.experts, True


def _linears(owner: torch.nn.Module, name: str) -> list[torch.nn.Module]:
    """The layers of that name: one, or one for each local expert, or none."""
    of = owner.local_experts if isinstance(owner, SequentialMLP) else [owner]
    return [getattr(one, name) for one in of if hasattr(one, name)]


def _rows(names: Sequence[str], config: HyConfig, linear: torch.nn.Module) -> tuple[list[int], int]:
    """Rows of each projection on this rank, in each run, and the number of runs."""
    num_rows = next(p for name, p in linear.named_parameters() if name.startswith("weight")).shape[0]
    if len(names) == 3:
        per_group = config.num_attention_heads // config.num_key_value_heads
        runs = num_rows // ((per_group + 2) * config.head_dim)
        return [per_group * config.head_dim, config.head_dim, config.head_dim], runs
    return [num_rows // len(names)] * len(names), 1


def _groups(collection: ProcessGroupCollection, is_expert: bool) -> Groups:
    if is_expert:
        return Groups(collection.expt_tp, collection.ep, collection.expt_dp)
    return Groups(collection.tp, None, collection.dp_cp)


def _hook(adapter: Adapter, owner: torch.nn.Module, name: str, is_expert: bool) -> None:
    if hasattr(owner, name):
        getattr(owner, name).register_forward_hook(adapter.add_grouped if is_expert else adapter.add)
        return
    owner.register_forward_pre_hook(adapter.unbind)
    for expert, mlp in enumerate(owner.local_experts):
        getattr(mlp, name).register_forward_hook(functools.partial(adapter.add_of_expert, expert))
