"""Distributed checkpoints of other trainers: their keys are rows of a table, their tensors those of a GPTModel.

Written by megatron-core itself under other specs and flags, by Megatron-Bridge 0.6.2 and by NeMo 2. Sources, of
megatron-core 0.19.2: models/gpt/gpt_layer_specs.py (the local spec's `sharded_state_dict_keys_map`), transformer/mlp.py
and transformer/moe/experts.py (`singleton_local_shards`: a key for each expert, and one for each half of gate and up),
transformer/multi_token_prediction.py (`mtp_model_layer`).
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hymeg.checkpoint.dist_files import ADAPTER_KEYS, MODEL_KEYS
from hymeg.checkpoint.row_tensors import RowTensor, stacked
from hymeg.errors import UserError

_WRAPPER = "module."  # what NeMo 2 puts before every key
_LAYER = re.compile(r"(decoder\.layers\.\d+\.|mtp\.layers\.\d+\.)((?:mtp_model_layer|transformer_layer)\.)?(.+)")


_OF_MOE = re.compile(r"(.+?\.)mlp\.(?:router|experts)\.")


class Alias(NamedTuple):
    theirs: str  # below a layer; {e}: an expert's number
    ours: str
    half: int | None = None  # 0: the gate, 1: the up projection; None: all
    only_in: str = ""  # "moe" or "dense": layers in which the name means this


# fmt: off
ALIASES = (
    # Norms apart from linears; the stock local spec.
    Alias("input_layernorm.weight",             "self_attention.linear_qkv.layer_norm_weight"),
    Alias("pre_mlp_layernorm.weight",           "mlp.linear_fc1.layer_norm_weight", only_in="dense"),
    Alias("mlp.linear_fc1.layer_norm_weight",   "pre_mlp_layernorm.weight", only_in="moe"),
    # singleton_local_shards
    Alias("mlp.linear_fc1.weight_w",            "mlp.linear_fc1.weight", 0),
    Alias("mlp.linear_fc1.weight_v",            "mlp.linear_fc1.weight", 1),
    Alias("mlp.shared_experts.linear_fc1.weight_w", "mlp.shared_experts.linear_fc1.weight", 0),
    Alias("mlp.shared_experts.linear_fc1.weight_v", "mlp.shared_experts.linear_fc1.weight", 1),
    Alias("mlp.experts.experts.{e}.linear_fc1.weight",       "mlp.experts.experts.linear_fc1.weight"),
    Alias("mlp.experts.experts.{e}.linear_fc1.weight_w",     "mlp.experts.experts.linear_fc1.weight", 0),
    Alias("mlp.experts.experts.{e}.linear_fc1.weight_v",     "mlp.experts.experts.linear_fc1.weight", 1),
    Alias("mlp.experts.experts.{e}.linear_fc2.weight",       "mlp.experts.experts.linear_fc2.weight"),
    # Parameters' own names: sequential experts, grouped ones.
    Alias("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.experts.linear_fc1.weight"),
    Alias("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.experts.linear_fc2.weight"),
    Alias("mlp.experts.linear_fc1.weight{e}",                "mlp.experts.experts.linear_fc1.weight"),
    Alias("mlp.experts.linear_fc2.weight{e}",                "mlp.experts.experts.linear_fc2.weight"),
)
# fmt: on
_PATTERNS = [(re.compile(re.escape(alias.theirs).replace(r"\{e\}", r"(\d+)")), alias) for alias in ALIASES]


class Part(NamedTuple):
    """What a foreign key stands for: all of one of our tensors, or an expert of it, or a half of either."""

    ours: str
    expert: int | None = None
    half: int | None = None


def is_of_model(key: str) -> bool:
    """Or of an adapter."""
    return key.removeprefix(_WRAPPER).startswith((*MODEL_KEYS, ADAPTER_KEYS))


def our_parts(keys: Iterable[str]) -> dict[str, Part]:
    """What each key is. One that the table does not have stands for itself."""
    plain = {key: key.removeprefix(_WRAPPER) for key in keys}
    moe_layers = {found[1] for key in plain.values() if (found := _OF_MOE.match(key))}
    return {key: _our_part(name, moe_layers) for key, name in plain.items()}


def _our_part(name: str, moe_layers: set[str]) -> Part:
    found = _LAYER.fullmatch(name)
    if not found:
        return Part(name)
    layer, inner, below = found.groups(default="")
    kind = "moe" if layer + inner in moe_layers else "dense"
    inner = inner.replace("mtp_model_layer", "transformer_layer")
    for pattern, alias in _PATTERNS:
        if alias.only_in in ("", kind) and (matched := pattern.fullmatch(below)):
            expert = int(matched[1]) if matched.groups() else None
            return Part(layer + inner + alias.ours, expert, alias.half)
    return Part(layer + inner + below)


def under_our_keys(tensors: Mapping[str, RowTensor]) -> tuple[dict[str, RowTensor], list[str]]:
    """The tensors of a checkpoint under our keys, and which of theirs were others.

    Raises:
        UserError: one of ours has two names there, or lacks an expert or a half.
    """
    parts = our_parts(tensors)
    foreign = [key for key, part in parts.items() if key != part.ours]
    of_ours: dict[str, list[tuple[Part, RowTensor]]] = {}
    for key, part in parts.items():
        of_ours.setdefault(part.ours, []).append((part, tensors[key]))
    return {ours: _put_together(ours, some) for ours, some in of_ours.items()}, foreign


def _put_together(ours: str, some: list[tuple[Part, RowTensor]]) -> RowTensor:
    if some[0][0] == Part(ours) and len(some) == 1:
        return some[0][1]._replace(key=ours)
    by_part = dict(some)
    num_experts = max((part.expert + 1 for part in by_part if part.expert is not None), default=0)
    halves = (0, 1) if any(part.half is not None for part in by_part) else (None,)
    wanted = [Part(ours, *place) for place in itertools.product(range(num_experts) if num_experts else [None], halves)]
    if len(by_part) < len(some) or not set(by_part) <= set(wanted):
        keys = ", ".join(sorted(tensor.key for _, tensor in some)[:4])
        raise UserError(f"{ours} is stored under names that do not go together ({keys}); keep those of one writer")
    if missing := [part for part in wanted if part not in by_part]:
        of_expert = "" if missing[0].expert is None else f" of expert {missing[0].expert}"
        what = {None: "a part", 0: "the gate", 1: "the up projection"}[missing[0].half]
        raise UserError(f"{ours}: {what}{of_expert} is missing; the checkpoint was not saved to the end, copy it again")
    return stacked(ours, [by_part[part] for part in wanted], num_experts)
