"""A peft folder as a source: adapter_config.json and adapter_model.safetensors, in either layout of `peft_table`,
whoever wrote it. Every tensor and every setting is accounted for: what has no place is an error.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import (
    FULL,
    PREFIX,
    Module,
    adapter_modules,
    all_modules,
    check_adapter_tensors,
    is_meant,
)
from hymeg.checkpoint.mapping import Range, hf_entries
from hymeg.checkpoint.peft_table import (
    CONFIG_FILE,
    DOWN_PARAMETER,
    GATE_UP_PARAMETER,
    LORA_A,
    LORA_B,
    MODEL,
    WEIGHTS_FILE,
    transformers_names,
    transformers_paths,
)
from hymeg.checkpoint.row_functions import Rearranged
from hymeg.checkpoint.row_tensors import Band, RowTensor, TensorReader, stacked
from hymeg.checkpoint.sources.adapter_folder import Adapter
from hymeg.checkpoint.sources.hf_folder import as_stored
from hymeg.errors import UserError, located
from hymeg.files import read_json, shown
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.hf.safetensors_files import TensorEntry, read_header

_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
# What changes nothing in how a trained adapter acts, or shows in the tensors that there are.
_WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "init_lora_weights", "runtime_config"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights too, as peft does again on loading.
_INITS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class _Adapted(NamedTuple):
    """What a pair of matrices of the file, A and B, is the adapter of."""

    path: str  # as rank_pattern and alpha_pattern name it
    modules: tuple[Module, ...]  # two: the gate and up projections, together
    expert: int | None = None  # the one of the module's; None: all that it has, stacked

    @property
    def num_stacked(self) -> int | None:
        return self.modules[0].num_experts if self.expert is None else None


_Pairs = Mapping[_Adapted, Mapping[str, RowTensor]]  # by "A" and "B"


def open_peft(folder: str | Path, config: HyConfig) -> Adapter:
    """The adapter in the peft folder `folder`, of a model of this config.

    Raises:
        UserError: a file is missing or broken; a setting is none that hymeg honours; a tensor is unknown, missing, or
            of a wrong shape; ranks or scales differ from module to module.
    """
    folder = Path(folder)
    raw, entries = peft_contents(folder)
    with located(folder):
        pairs, full = _sorted_out(config, entries, raw)
        ranks = {of: _rank(of, pair["A"], raw) for of, pair in pairs.items()}
        rank = _rank_of_all(ranks, raw)
        scaling = "rslora" if raw.get("use_rslora") else "lora"
        alpha = _alpha(ranks, rank, scaling, raw)
        dropout = float(raw.get("lora_dropout") or 0.0)
        base = raw.get("base_model_name_or_path")
        tensors = _tensors(folder, pairs, rank)
        for name, found in full.items():
            key = PREFIX + name + FULL
            tensors[key] = found._replace(key=key)
        targets = _targets(config, {module for of in pairs for module in of.modules})
        settings = AdapterSettings(rank, alpha, scaling, dropout, targets, {"source": base} if base else None)
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        check_adapter_tensors(config, rank, targets, shapes, full)
    is_served = any(of.expert is not None for of in pairs) or any(".shared_mlp." in name for name in entries)
    what = f"adapter, {'served' if is_served else 'peft'} layout"
    return Adapter(what, folder, config, settings, tensors)


def peft_contents(folder: str | Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """What adapter_config.json says, and where the tensors lie, by peft's names. Raises UserError as `open_peft` does,
    where it takes no model to tell.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    raw = read_json(path)
    kind = raw.get("peft_type") if type(raw) is dict else raw
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {shown(kind)}; LORA is needed")
    if raw.get("bias") not in (None, "none"):
        raise UserError(f"{path}: bias is {shown(raw['bias'])}; it must be none: these models have no biases")
    if (init := raw.get("init_lora_weights")) not in _INITS_BESIDE_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights is {shown(init)}, which makes it an adapter of other weights than its base's; "
            "have peft convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for name, value in raw.items():
        if value and name not in _READ | _WITHOUT_EFFECT | {"bias"}:
            raise UserError(f"{path}: {name} is {shown(value)}, which hymeg does not honour; train without it")
    for name in ("r", "lora_alpha"):
        if type(raw.get(name)) not in (int, float) or not raw[name] > 0:
            raise UserError(f"{path}: {name} is {shown(raw.get(name))}; a positive number is needed")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(name) or {}
        if type(pattern) is not dict or not all(type(v) in (int, float) and v > 0 for v in pattern.values()):
            raise UserError(f"{path}: {name} is {shown(pattern)}; an object of positive numbers is needed")
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; save the adapter with safe_serialization")
    return raw, read_header(folder / WEIGHTS_FILE)


def _sorted_out(
    config: HyConfig, entries: Mapping[str, TensorEntry], raw: Mapping[str, Any]
) -> tuple[_Pairs, dict[str, RowTensor]]:
    """The adapters, and what was trained in full, by hub name."""
    known = _paths(config, _parameters(raw))
    full_names = {name: name for name in (entry.hf_name for entry in hf_entries(config, "hub"))}
    full_names |= {theirs: ours for ours, theirs in transformers_names(config).items()}
    pairs, full, unknown = {}, {}, []
    for name, entry in entries.items():
        if entry.dtype not in WEIGHTS:
            raise UserError(f"{name} is {entry.dtype}; one of {', '.join(WEIGHTS)} is needed")
        if not 1 <= len(entry.shape) <= 2:
            raise UserError(f"{name} is {list(entry.shape)}; one or two axes are needed")
        kind = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), "")
        path = name.removeprefix(MODEL).removesuffix(kind) if name.startswith(MODEL) else ""
        if kind and path in known:
            pairs.setdefault(known[path], {})["A" if kind == LORA_A else "B"] = as_stored(name, entry)
        elif not kind and path in full_names:
            full[full_names[path]] = as_stored(name, entry)
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{len(unknown)} tensors that have no place in this model, such as {unknown[0]}")
    for pair in pairs.values():
        if len(pair) < 2:
            [(letter, tensor)] = pair.items()
            raise UserError(f"{tensor.key} is there, lora_{'B' if letter == 'A' else 'A'} is missing")
    return pairs, full


def _paths(config: HyConfig, parameters: list[str]) -> dict[str, _Adapted]:
    """Every path that an adapter may have in the file, in either layout."""
    modules = {module.path: module for module in all_modules(config)}
    single = transformers_paths(config, modules.values()) | {p: m for p, m in modules.items() if m.num_experts is None}
    known = {path: _Adapted(path, (module,)) for path, module in single.items()}
    for module in modules.values():
        for expert in range(module.num_experts or 0):
            path = module.weight(expert).removesuffix(".weight")
            known[path] = _Adapted(path, (module,), expert)
        above, _, name = module.path.rpartition(".")
        if module.num_experts and name == "down_proj":
            names = {GATE_UP_PARAMETER: ("gate_proj", "up_proj"), DOWN_PARAMETER: ("down_proj",)}
            # The inner wrapper's is the first of the parameters, the outer one's the last.
            for parameter, end in zip(reversed(parameters), ("", ".base_layer"), strict=False):
                path = above.removesuffix("mlp.experts") + parameter
                known[above + end] = _Adapted(path, tuple(modules[f"{above}.{name}"] for name in names[parameter]))
    return known


def _parameters(raw: Mapping[str, Any]) -> list[str]:
    """target_parameters, in full, in peft's order."""
    known = (GATE_UP_PARAMETER, DOWN_PARAMETER)
    found = set()
    for name in raw.get("target_parameters") or []:
        meant = {end for end in known if end.endswith(str(name)) or str(name).endswith(f".{end}")}
        if not meant:
            raise UserError(f"target_parameters: {shown(name)}; allowed are {' and '.join(known)}")
        found |= meant
    return [parameter for parameter in known if parameter in found]


def _rank(of: _Adapted, a: RowTensor, raw: Mapping[str, Any]) -> int:
    said = int(_by_pattern(raw.get("rank_pattern"), of.path, raw["r"]))
    needed = said * (of.num_stacked or 1)
    if len(a.shape) != 2 or a.shape[0] != needed:
        raise UserError(
            f"{a.key} is {list(a.shape)}; {needed} rows are needed for rank {said}, which {CONFIG_FILE} gives it"
        )
    return said


def _rank_of_all(ranks: Mapping[_Adapted, int], raw: Mapping[str, Any]) -> int:
    """The rank of ours: that of every adapter, but that gate and up projections together may have twice that one."""
    gate_up = sorted({rank for of, rank in ranks.items() if len(of.modules) > 1})
    others = sorted({rank for of, rank in ranks.items() if len(of.modules) == 1})
    if len(others) > 1:
        raise UserError(f"rank_pattern: ranks {', '.join(map(str, others))}; hymeg's adapters have one rank")
    rank = others[0] if others else int(raw["r"])
    if not others and gate_up and gate_up != [2 * rank]:
        rank = gate_up[0]
    if wrong := [other for other in gate_up if other not in (rank, 2 * rank)] or gate_up[1:]:
        raise UserError(
            f"rank_pattern: {GATE_UP_PARAMETER} has rank {wrong[0]}, the others {rank}; that one, or twice that one "
            "with a block-diagonal B, is possible"
        )
    return rank


def _alpha(ranks: Mapping[_Adapted, int], rank: int, scaling: str, raw: Mapping[str, Any]) -> float:
    """The one that gives every module its scale."""
    power, usual = 0.5 if scaling == "rslora" else 1.0, raw["lora_alpha"]
    alphas: dict[float, str] = {}
    for of, its_rank in ranks.items():
        alpha = _by_pattern(raw.get("alpha_pattern"), of.path, usual) * (rank / its_rank) ** power
        if not any(math.isclose(alpha, known, rel_tol=1e-9) for known in alphas):
            alphas[alpha] = of.path
    if len(alphas) > 1:
        both = " and ".join(f"{alpha:g} of {path}" for alpha, path in [*alphas.items()][:2])
        raise UserError(f"alpha_pattern: {both} differ; hymeg's adapters have one scale")
    alpha = next(iter(alphas), usual)
    return usual if math.isclose(alpha, usual, rel_tol=1e-9) else alpha


def _tensors(folder: Path, pairs: _Pairs, rank: int) -> dict[str, RowTensor]:
    made: dict[str, RowTensor] = {}
    of_experts: dict[Module, dict[int, Mapping[str, RowTensor]]] = {}
    for of, pair in pairs.items():
        if of.num_stacked:
            made |= _from_stack(folder, of.modules, rank, pair["A"], pair["B"])
        elif of.expert is None:
            [module] = of.modules
            made[module.lora_a] = pair["A"]._replace(key=module.lora_a)
            made[module.lora_b] = pair["B"]._replace(key=module.lora_b)
        else:
            of_experts.setdefault(of.modules[0], {})[of.expert] = pair
    for module, experts in of_experts.items():
        everyone = range(module.num_experts)
        if missing := [expert for expert in everyone if expert not in experts]:
            which = f"{len(missing)} missing ({missing[0]})"
            raise UserError(f"{module.path}: experts: {which}; the model has {module.num_experts}")
        for key, letter in ((module.lora_a, "A"), (module.lora_b, "B")):
            made[key] = stacked(key, [experts[expert][letter] for expert in everyone], module.num_experts)
    return made


def _from_stack(
    folder: Path, modules: tuple[Module, ...], rank: int, a: RowTensor, b: RowTensor
) -> dict[str, RowTensor]:
    """Of each module that a stack is for: with twice the rank, ranks of its own."""
    num_experts, num_out = modules[0].num_experts, b.shape[0] // len(modules)
    in_stack = a.shape[0] // num_experts
    if len(b.shape) != 2 or b.shape[1] != in_stack * num_experts:
        raise UserError(f"{b.key} is {list(b.shape)}; {in_stack * num_experts} columns are needed")
    if in_stack > rank:
        _check_blocks(b)
    [piece], made = a.bands[0].pieces, {}
    for part, module in enumerate(modules):
        first = part * rank if in_stack > rank else 0
        bands = tuple(
            Band(e * rank, (e + 1) * rank, (piece._replace(row=e * in_stack + first),)) for e in range(num_experts)
        )
        rows, ranks = (part * num_out, (part + 1) * num_out), (first, first + rank)
        arrange = functools.partial(_experts_first, num_experts=num_experts, rows=rows, ranks=ranks)
        of_b = Rearranged(f"{folder}: {module.lora_b}", (b,), arrange)
        made[module.lora_a] = RowTensor(module.lora_a, a.dtype, (num_experts, rank, a.shape[1]), bands)
        made[module.lora_b] = RowTensor(module.lora_b, "F32", (num_experts, num_out, rank), (), of_b)
    return made


def _experts_first(stored: np.ndarray, num_experts: int, rows: Range, ranks: Range) -> np.ndarray:
    """[out, R * experts], columns rank by rank -> [experts * rows, ranks]."""
    by_rank = stored.reshape(len(stored), -1, num_experts)[slice(*rows), slice(*ranks)]
    return np.ascontiguousarray(by_rank.transpose(2, 0, 1)).reshape(-1, ranks[1] - ranks[0])


def _check_blocks(b: RowTensor) -> None:
    """Gate's rows are zero for up's ranks, and up's for gate's."""
    with TensorReader() as reader:
        numbers = reader.numbers(b, b.all_rows)
    numbers = numbers.reshape(2, b.shape[0] // 2, 2, -1)  # [gate or up, out, gate's or up's ranks, ...]
    if numbers[0, :, 1].any() or numbers[1, :, 0].any():
        raise UserError(
            f"rank_pattern: {b.key} has twice the rank of the others and is not block-diagonal; hymeg's adapters have "
            "one rank"
        )


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """As peft looks it up: the first of the regular expressions that match the end of the path."""
    try:
        matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        return next(matching, otherwise)
    except re.error as error:
        raise UserError(f"rank_pattern or alpha_pattern: not a regular expression: {error}") from None


def _targets(config: HyConfig, modules: set[Module]) -> tuple[str, ...]:
    """The fewest that mean these modules; projections of all kinds by their name alone."""
    narrow = list(dict.fromkeys(module.target for module in all_modules(config) if module in modules))
    targets: dict[str, None] = {}
    for target in narrow:
        prefix = "mtp." * target.startswith("mtp.")
        short = prefix + target.rpartition(".")[2]
        kinds = {module.target for module in all_modules(config) if is_meant(short, module)}
        targets[short if kinds <= set(narrow) else target] = None
    missing = [module for module in adapter_modules(config, targets) if module not in modules] if targets else []
    if missing:
        raise UserError(
            f"{len(missing)} modules have no adapter, such as {missing[0].path}, which others of their kind have; "
            "adapters in some layers only (layers_to_transform) are not supported"
        )
    return tuple(targets)
