"""Which adapters (LoRA) a model can have, and what their tensors are called: names and shapes only, as in `mapping`.

A target is the end of a projection's Hugging Face path, without the layer's and the expert's number, cut at a dot:

    q_proj k_proj v_proj o_proj                     of the attention
    mlp.gate_proj                                   of dense layers
    shared_mlp.gate_proj                            of the shared experts
    experts.gate_proj                               of the routed experts, which have an adapter each
    gate_proj                                       all three of these; up_proj and down_proj likewise
    mtp.q_proj, mtp.experts.gate_proj, ...          the same in the MTP layers, which other targets leave alone

In a distributed checkpoint the adapter of `model.layers.3.self_attn.q_proj` is that path after `adapter.`, followed by
`.lora_A` [rank, in] and `.lora_B` [out, rank]; those of the experts of a layer are one, of
`model.layers.3.mlp.experts.gate_proj`: [experts, rank, in] and [experts, out, rank]. MTP layer i is layer
num_hidden_layers + i. A weight's delta is scale * B @ A. A parameter trained in full beside the adapters is `adapter.`,
its Hugging Face name, `.full`.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hymeg.checkpoint.dist_files import ADAPTER_KEYS
from hymeg.checkpoint.mapping import TABLE, Shape, account_for, hf_entries, scopes
from hymeg.errors import UserError
from hymeg.files import shown
from hymeg.hf.config import HyConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MTP = "mtp."  # begins a target that means the MTP layers
PREFIX, LORA_A, LORA_B, FULL = ADAPTER_KEYS, ".lora_A", ".lora_B", ".full"
_WEIGHT, _EXPERT = ".weight", "{e}."


class Module(NamedTuple):
    """A linear map that can have an adapter; with `num_experts`, one for each expert of a layer."""

    path: str  # in the hub layout, without the expert's number: model.layers.3.mlp.experts.gate_proj
    num_in: int
    num_out: int
    num_experts: int | None
    is_mtp: bool

    @property
    def target(self) -> str:
        """The narrowest target that means it: mlp.experts.gate_proj, mtp.self_attn.q_proj."""
        return (MTP if self.is_mtp else "") + self.path.split(".", 3)[3]

    @property
    def lora_a(self) -> str:
        return PREFIX + self.path + LORA_A

    @property
    def lora_b(self) -> str:
        return PREFIX + self.path + LORA_B

    def shapes(self, rank: int) -> dict[str, Shape]:
        """Of both tensors of its adapter, by distributed key."""
        stack = () if self.num_experts is None else (self.num_experts,)
        return {self.lora_a: (*stack, rank, self.num_in), self.lora_b: (*stack, self.num_out, rank)}

    def weight(self, expert: int | None = None) -> str:
        """Hub name of the weight that the adapter adds to; with experts, of one."""
        if expert is None:
            return self.path + _WEIGHT
        above, _, name = self.path.rpartition(".")
        return f"{above}.{expert}.{name}{_WEIGHT}"


def is_meant(target: str, module: Module) -> bool:
    """Whether the target means the module."""
    in_mtp = target.startswith(MTP)
    return in_mtp == module.is_mtp and f".{module.path}".endswith(f".{target.removeprefix(MTP)}")


def all_modules(config: HyConfig) -> list[Module]:
    """Every module of the model that can have an adapter, layer by layer."""
    modules = []
    for scope, prefix, dist_prefix in scopes(config):
        for row in TABLE[scope]:
            name = row.hf.removesuffix(_WEIGHT).rpartition(".")[2]
            if "hub" in row.layouts and name in PROJECTIONS:
                num_out, num_in = row.how.place(config).hf_shape
                path = prefix + row.hf.removesuffix(_WEIGHT).replace(_EXPERT, "")
                num_experts = config.num_experts if _EXPERT in row.hf else None
                modules.append(Module(path, num_in, num_out, num_experts, dist_prefix.startswith(MTP)))
    return modules


def adapter_modules(config: HyConfig, targets: Iterable[str]) -> list[Module]:
    """The modules that have an adapter under these targets, layer by layer.

    Raises:
        UserError: a target means no module of this model.
    """
    targets, modules = list(targets), all_modules(config)
    for target in targets:
        if not any(is_meant(target, module) for module in modules):
            raise UserError(f"target {shown(target)}: means no module of this model; {_allowed(modules)}")
    if not targets:
        raise UserError(f"no targets; {_allowed(modules)}")
    return [module for module in modules if any(is_meant(target, module) for target in targets)]


def _allowed(modules: Iterable[Module]) -> str:
    narrow = dict.fromkeys(module.target.rpartition("self_attn.")[2] for module in modules if not module.is_mtp)
    has_mtp = any(module.is_mtp for module in modules)
    end = f"; {MTP}q_proj and so on mean the MTP layers" if has_mtp else "; the model has no MTP layers"
    return f"allowed are {', '.join(narrow)}, or their ends, such as gate_proj for all kinds{end}"


def adapter_shapes(config: HyConfig, rank: int, targets: Iterable[str], full: Iterable[str] = ()) -> dict[str, Shape]:
    """Global shape of every tensor of an adapter checkpoint, by key.

    Args:
        full: hub names of the parameters that were trained in full beside the adapters.

    Raises:
        UserError: a target means no module, or a name no parameter of this model.
    """
    shapes: dict[str, Shape] = {}
    for module in adapter_modules(config, targets):
        shapes |= module.shapes(rank)
    return shapes | full_shapes(config, full)


def full_shapes(config: HyConfig, names: Iterable[str]) -> dict[str, Shape]:
    """As `adapter_shapes`, of the parameters trained in full alone. Experts are named one by one, as in the hub."""
    names = list(names)
    known = {entry.hf_name: entry.hf_shape for entry in hf_entries(config, "hub")} if names else {}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{shown(unknown[0])}: no parameter of this model in the published names")
    return {PREFIX + name + FULL: known[name] for name in names}


def check_adapter_tensors(
    config: HyConfig, rank: int, targets: Iterable[str], shapes: Mapping[str, Shape], full: Iterable[str] = ()
) -> None:
    """Account for every tensor of an adapter checkpoint, given the global shapes by key.

    Raises:
        UserError: one is missing, unexpected or of a wrong shape (one line: how many of each kind, and the first ten).
    """
    wanted = adapter_shapes(config, rank, targets, full)
    account_for("the adapter's tensors", config, shapes, wanted, wanted, needed_by="its targets and rank")
