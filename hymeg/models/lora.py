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
        linears: the layer, or that of each local expert.
        parts: the layer's projections in the order of its rows, None where one has no adapter.
        is_row_parallel: whether the layer's input is cut among the ranks, or its output.

    Attributes:
        rows: of each projection in the layer's weight on this rank, for each of the `num_runs` runs that they
            alternate in.
    """

    def __init__(
        self,
        linears: Sequence[torch.nn.Module],
        parts: Sequence[Module | None],
        is_row_parallel: bool,
        groups: Groups,
        config: HyConfig,
        settings: AdapterSettings,
        seed: int,
        sequence_parallel: bool,
    ):
        super().__init__()
        self.linears, self.parts = tuple(linears), tuple(parts)  # no children of this module
        self.is_row_parallel, self.groups = is_row_parallel, groups
        self.rank, self.scale, self.dropout = settings.rank, settings.scale, settings.dropout
        self.seed = seed
        weight = next(self.weights())
        self.rows, self.num_runs = [len(weight) // len(parts)] * len(parts), 1
        if len(parts) == 3:  # q, k and v, which alternate
            per_group = config.num_attention_heads // config.num_key_value_heads
            self.rows = [per_group * config.head_dim, config.head_dim, config.head_dim]
            self.num_runs = len(weight) // sum(self.rows)
        self.of_experts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part, num_rows in zip(parts, self.rows, strict=True):
            if part is None:
                continue
            a = _initial(part, settings.rank, seed, groups.experts)
            if is_row_parallel:
                a = a.chunk(groups.shards.size(), dim=-1)[groups.shards.rank()]
            b = torch.zeros(*a.shape[:-2], self.num_runs * num_rows, settings.rank)
            for letter, tensor, is_cut, dim in (("A", a, is_row_parallel, -1), ("B", b, not is_row_parallel, -2)):
                parameter = torch.nn.Parameter(tensor.to(weight, copy=True).contiguous())
                set_tensor_model_parallel_attributes(parameter, is_cut, parameter.dim() + dim if is_cut else -1, 1)
                if groups.experts is not None:
                    parameter.allreduce = False
                elif not is_cut:
                    # Each rank's gradient is of its tokens only, or of its part of B or A: Megatron sums them.
                    parameter.sequence_parallel = sequence_parallel
                self.register_parameter(_name(part, letter), parameter)

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
                yield part, *(getattr(self, _name(part, letter)) for letter in "AB")

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = {part: (a, b) for part, a, b in self.pairs()}
        a = torch.cat([a for a, _ in pairs.values()], dim=-2)
        first, blocks = 0, []
        for part, num_rows in zip(self.parts, self.rows, strict=True):
            b = pairs[part][1] if part else a.new_zeros(*a.shape[:-2], self.num_runs * num_rows, 0)
            b = b.unflatten(-2, (self.num_runs, num_rows))
            blocks.append(F.pad(b, (first, a.shape[-2] - first - b.shape[-1])))
            first += b.shape[-1]
        b = torch.cat(blocks, dim=-2).flatten(-3, -2)
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
        shards = self.groups.shards
        a, b = self()
        # A layer whose input the MoE layer has gathered already communicates nothing either.
        is_silent = getattr(linear, "explicit_expert_comm", False) or getattr(linear, "parallel_mode", "") is None
        communicates = shards.size() > 1 and not is_silent
        x, norm = args[0], getattr(linear, "layer_norm_weight", None)
        if norm is not None:  # of Transformer Engine's, which begins with it
            x = F.rms_norm(x, norm.shape, norm, linear.eps)
        inner = F.linear(self._dropped(x, linear.training, communicates), a)
        if communicates and self.is_row_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=shards)
        elif communicates:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=shards)
        return self._sum(output, inner, b)

    def add_grouped(self, linear: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of a layer of all experts: tokens `[t, in]`, ordered by expert, and how many each has."""
        base, bias = output
        (a, b), (x, counts) = self(), args[:2]
        inner = grouped_linear(self._dropped(x, linear.training), a, counts)
        return torch.add(base, grouped_linear(inner, b, counts), alpha=self.scale), bias

    def unbind(self, experts: torch.nn.Module, args: tuple) -> None:
        """Forward pre-hook of experts that are layers of their own: their matrices are made once for all."""
        a, b = self()
        self.of_experts = list(zip(a.unbind(0), b.unbind(0), strict=True))

    def add_of_expert(self, expert: int, linear: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of one such expert's layer: `[t, in]` to `[t, out]`."""
        a, b = self.of_experts[expert]
        return self._sum(output, F.linear(self._dropped(args[0], linear.training), a), b)

    def _sum(self, output: tuple, inner: torch.Tensor, b: torch.Tensor) -> tuple:
        base, bias = output
        flat = torch.addmm(base.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=self.scale)
        return flat.view_as(base), bias

    def _dropped(self, x: torch.Tensor, training: bool, communicates: bool = False) -> torch.Tensor:
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
            seed = self.seed + 50_000 + self.groups.experts.rank()
            tracker.seeds_.discard(seed)  # a layer recomputed in the first step goes back to before there were any
            tracker.add(_SAME_ON_ALL_SHARDS, seed)
        return tracker.fork(_SAME_ON_ALL_SHARDS)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Its parameters as parts of the tensors that `adapter_table` names."""
        shards, experts = self.groups.shards, self.groups.experts
        stack = [] if experts is None else [(0, experts.rank(), experts.size())]
        found = {}
        for part, *both in self.pairs():
            for letter, key, parameter in zip("AB", (part.lora_a, part.lora_b), both, strict=True):
                is_cut = parameter.tensor_model_parallel
                cut = [(parameter.partition_dim, shards.rank(), shards.size())] if is_cut else []
                replica = (0, 0 if is_cut else shards.rank(), self.groups.copies.rank())
                found[prefix + _name(part, letter)] = ShardedTensor.from_rank_offsets(
                    key, parameter, *stack, *cut, replica_id=replica
                )
        return found


def _name(part: Module, letter: str) -> str:
    return f"{part.path.rpartition('.')[2]}_lora_{letter}"


def _initial(part: Module, rank: int, seed: int, experts: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    """A whole, of this rank's experts, as peft begins: uniform in +-1 / sqrt(in), which is kaiming_uniform_ with a =
    sqrt(5). Drawn by seed, name and expert, so that every layout begins alike."""

    def drawn(name: str) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(part.num_in)
        return torch.empty(rank, part.num_in).uniform_(-bound, bound, generator=generator)

    if experts is None:
        return drawn(part.path)
    first, each = experts.rank() * part.num_experts // experts.size(), part.num_experts // experts.size()
    return torch.stack([drawn(f"{part.path} {expert}") for expert in range(first, first + each)])


# Attribute, projections in the order of its rows, whether it is row-parallel.
_LINEARS = (
    ("linear_qkv", ("q_proj", "k_proj", "v_proj"), False),
    ("linear_proj", ("o_proj",), True),
    ("linear_fc1", ("gate_proj", "up_proj"), False),
    ("linear_fc2", ("down_proj",), True),
)


def add_adapters(model: torch.nn.Module, config: HyConfig, settings: AdapterSettings, seed: int) -> None:
    """Freeze the model, one pipeline stage of it, and put adapters beside its layers: `model.adapters`, in order.

    Raises:
        UserError: a target means no module of the model.
    """
    wanted = {module.path: module for module in adapter_modules(config, settings.targets)}
    groups = model.pg_collection
    of_all, of_experts = Groups(groups.tp, None, groups.dp_cp), Groups(groups.expt_tp, groups.ep, groups.expt_dp)
    model.requires_grad_(False)
    model.adapters = torch.nn.ModuleDict()
    for path, owner, is_expert in _owners(model, config):
        for name, names, is_row_parallel in _LINEARS:
            parts = [wanted.get(f"{path}{projection}") for projection in names]
            # One, or one for each local expert, or none.
            of = owner.local_experts if isinstance(owner, SequentialMLP) else [owner]
            linears = [getattr(one, name) for one in of if hasattr(one, name)]
            if not linears or not any(parts):
                continue
            adapter = Adapter(
                linears,
                parts,
                is_row_parallel,
                of_experts if is_expert else of_all,
                config,
                settings,
                seed,
                model.config.sequence_parallel,
            )
            model.adapters[f"{path}{name}".replace(".", "-")] = adapter
            if hasattr(owner, name):
                getattr(owner, name).register_forward_hook(adapter.add_grouped if is_expert else adapter.add)
                continue
            owner.register_forward_pre_hook(adapter.unbind)
            for expert, linear in enumerate(linears):
                linear.register_forward_hook(functools.partial(adapter.add_of_expert, expert))
    require_gradients_of_inputs(model)


def _owners(model: torch.nn.Module, config: HyConfig) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """The modules of this stage that have linear layers, what those's projections' paths begin with, and whether the
    layers are of experts.
    """
    mtp = {
        module.mtp_model_layer: config.num_hidden_layers + module.layer_number - 1
        for module in model.modules()
        if isinstance(module, MultiTokenPredictionLayer)
    }
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        prefix = f"model.layers.{mtp.get(layer, layer.layer_number - 1)}."
        yield f"{prefix}self_attn.", layer.self_attention, False
        if not isinstance(layer.mlp, MoELayer):
            yield f"{prefix}mlp.", layer.mlp, False
            continue
        if layer.mlp.shared_experts is not None:
            yield f"{prefix}mlp.shared_mlp.", layer.mlp.shared_experts, False
        yield f"{prefix}mlp.experts.", layer.mlp.experts, True
