"""A peft folder as a source: adapter_config.json and adapter_model.safetensors, in either layout of `peft_table`,
whoever wrote it. Every tensor and every setting is accounted for: what has no place is an error.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
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
from hymeg.checkpoint.mapping import Range, hf_entries, num_rows
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
from hymeg.checkpoint.row_tensors import Band, Piece, RowTensor, TensorReader
from hymeg.checkpoint.sources.adapter_folder import Adapter
from hymeg.errors import UserError
from hymeg.files import read_json, shown
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.hf.safetensors_files import SafetensorsFile, TensorEntry

_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
# What changes nothing in how a trained adapter acts, or shows in the tensors that there are.
_WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "init_lora_weights", "runtime_config"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)(\.base_layer)?")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)")


class _Matrix(NamedTuple):
    """A or B of something, as it is stored."""

    name: str
    entry: TensorEntry

    def tensor(self) -> RowTensor:
        return _tensor(self.name, self.entry)


class _Found(NamedTuple):
    """What the file holds, by what it is of."""

    single: dict[str, dict[str, _Matrix]]  # path in our table -> "A", "B"
    experts: dict[str, dict[int, dict[str, _Matrix]]]  # path in our table -> expert
    stacked: dict[tuple[str, str], dict[str, _Matrix]]  # (path of the experts, parameter)
    full: dict[str, TensorEntry]  # by hub name


def open_peft(folder: str | Path, config: HyConfig) -> Adapter:
    """The adapter in the peft folder `folder`, of a model of this config.

    Raises:
        UserError: a file is missing or broken; a setting is none that hymeg honours; a tensor is unknown, missing, or
            of a wrong shape; ranks or scales differ from module to module.
    """
    folder = Path(folder)
    raw, entries = peft_contents(folder)
    try:
        found = _sorted_out(config, entries, raw)
        settings, tensors = _Reading(folder, config, raw, found).adapter()
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        check_adapter_tensors(config, settings.rank, settings.targets, shapes, found.full)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    is_served = bool(found.experts) or any(".shared_mlp." in name for name in entries)
    what = f"adapter, {'served' if is_served else 'peft'} layout"
    return Adapter(what, folder, config, settings, tensors)


def peft_contents(folder: str | Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """What adapter_config.json says, and where the tensors lie, by peft's names. Raises UserError as `open_peft` does,
    where it takes no model to tell.
    """
    folder = Path(folder)
    raw = _checked_settings(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; save the adapter with safe_serialization")
    return raw, SafetensorsFile(folder / WEIGHTS_FILE).tensors


def _checked_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    raw = read_json(path)
    if type(raw) is not dict or raw.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {shown(raw.get('peft_type') if type(raw) is dict else raw)}; LORA is needed"
        )
    if raw.get("bias") not in (None, "none"):
        raise UserError(f"{path}: bias is {shown(raw['bias'])}; it must be none: these models have no biases")
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
    return raw


def _sorted_out(config: HyConfig, entries: Mapping[str, TensorEntry], raw: Mapping[str, Any]) -> _Found:
    modules = {module.path: module for module in all_modules(config)}
    single = transformers_paths(config, modules.values()) | {p: m for p, m in modules.items() if m.num_experts is None}
    full = {name: name for name in (entry.hf_name for entry in hf_entries(config, "hub"))}
    full |= {theirs: ours for ours, theirs in transformers_names(config).items()}
    parameters = [p for p in (GATE_UP_PARAMETER, DOWN_PARAMETER) if p in _parameters(raw)]
    found, unknown = _Found({}, {}, {}, {}), []
    for name, entry in entries.items():
        if entry.dtype not in WEIGHTS:
            raise UserError(f"{name} is {entry.dtype}; one of {', '.join(WEIGHTS)} is needed")
        kind = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), "")
        path = name.removeprefix(MODEL).removesuffix(kind) if name.startswith(MODEL) else ""
        letter, matrix = kind[6:7], _Matrix(name, entry)
        if kind and path in single:
            found.single.setdefault(single[path].path, {})[letter] = matrix
        elif kind and (of := _EXPERT.fullmatch(path)) and f"{of[1]}.{of[3]}" in modules:
            experts = found.experts.setdefault(f"{of[1]}.{of[3]}", {})
            experts.setdefault(int(of[2]), {})[letter] = matrix
        elif kind and (of := _STACKED.fullmatch(path)) and f"{of[1]}.gate_proj" in modules and parameters:
            # The inner wrapper's is the first of the parameters, the outer one's the last.
            parameter = parameters[0] if of[2] else parameters[-1]
            if of[2] and len(parameters) < 2:
                unknown.append(name)
            found.stacked.setdefault((of[1], parameter), {})[letter] = matrix
        elif not kind and path in full:
            found.full[full[path]] = entry
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{len(unknown)} tensors that have no place in this model, such as {unknown[0]}")
    return found


def _parameters(raw: Mapping[str, Any]) -> list[str]:
    """target_parameters, in full."""
    known = (GATE_UP_PARAMETER, DOWN_PARAMETER)
    listed = raw.get("target_parameters") or []
    found = []
    for name in listed:
        meant = [
            parameter for parameter in known if parameter.endswith(str(name)) or str(name).endswith(f".{parameter}")
        ]
        if not meant:
            raise UserError(f"target_parameters: {shown(name)}; allowed are {' and '.join(known)}")
        found += meant
    return found


class _Reading:
    """One folder's way to settings and tensors."""

    def __init__(self, folder: Path, config: HyConfig, raw: Mapping[str, Any], found: _Found):
        self.folder, self.config, self.raw, self.found = folder, config, raw, found
        self.modules = {module.path: module for module in all_modules(config)}
        self.is_rslora = bool(raw.get("use_rslora"))

    def adapter(self) -> tuple[AdapterSettings, dict[str, RowTensor]]:
        ranks = {self._rank(path, matrices["A"], 1) for path, matrices in self._plain()}
        ranks |= {self._rank(*self._of(at)) for at in self.found.stacked if at[1] == DOWN_PARAMETER}
        if len(ranks) > 1:
            raise UserError(f"rank_pattern: ranks {', '.join(map(str, sorted(ranks)))}; hymeg's adapters have one rank")
        gate_up = {self._rank(*self._of(at)) for at in self.found.stacked if at[1] == GATE_UP_PARAMETER}
        rank = next(iter(ranks)) if ranks else int(self.raw["r"])
        if not ranks and gate_up and gate_up != {2 * rank}:
            rank = next(iter(gate_up))
        if wrong := sorted(gate_up - {rank, 2 * rank}) or (sorted(gate_up) if len(gate_up) > 1 else []):
            raise UserError(
                f"rank_pattern: {GATE_UP_PARAMETER} has rank {wrong[0]}, the others {rank}; that one, or twice that "
                "one with a block-diagonal B, is possible"
            )
        is_split = gate_up == {2 * rank}
        tensors = self._tensors(rank, is_split)
        targets = _targets(self.config, {self._module_of(key) for key in tensors if not key.endswith(FULL)})
        base = self.raw.get("base_model_name_or_path")
        settings = AdapterSettings(
            rank,
            self._alpha(rank, is_split),
            "rslora" if self.is_rslora else "lora",
            float(self.raw.get("lora_dropout") or 0.0),
            targets,
            {"source": base} if base else None,
        )
        return settings, tensors

    def _plain(self) -> Iterable[tuple[str, dict[str, _Matrix]]]:
        """Every adapter that is no stack, with its path in transformers."""
        yield from self._complete(self.found.single.items())
        for path, experts in self.found.experts.items():
            above, _, name = path.rpartition(".")
            missing = set(range(self.config.num_experts)) - set(experts)
            foreign = set(experts) - set(range(self.config.num_experts))
            if missing or foreign:
                which = f"{len(missing)} missing ({min(missing)})" if missing else f"{min(foreign)} is none"
                raise UserError(f"{path}: experts: {which}; the model has {self.config.num_experts}")
            yield from self._complete((f"{above}.{e}.{name}", matrices) for e, matrices in sorted(experts.items()))

    def _complete(self, adapters: Iterable[tuple[str, dict[str, _Matrix]]]) -> Iterable[tuple[str, dict[str, _Matrix]]]:
        for path, matrices in adapters:
            if len(matrices) < 2:
                [(letter, matrix)] = matrices.items()
                raise UserError(f"{matrix.name} is there, lora_{'B' if letter == 'A' else 'A'} is missing")
            yield path, matrices

    def _of(self, at: tuple[str, str]) -> tuple[str, _Matrix, int]:
        [(_, matrices)] = self._complete([(at[0], self.found.stacked[at])])
        return f"{at[0].removesuffix('.mlp.experts')}.{at[1]}", matrices["A"], self.config.num_experts

    def _rank(self, path: str, matrix: _Matrix, num_experts: int) -> int:
        rows = matrix.entry.shape[0] if len(matrix.entry.shape) == 2 else 0
        said = int(_by_pattern(self.raw.get("rank_pattern"), path, self.raw["r"]))
        if rows != said * num_experts:
            raise UserError(
                f"{matrix.name} is {list(matrix.entry.shape)}; {said * num_experts} rows are needed for rank {said}, "
                f"which {CONFIG_FILE} gives it"
            )
        return said

    def _alpha(self, rank: int, is_split: bool) -> float:
        """The one that gives every module its scale."""
        paths = [(path, rank) for path, _ in self._plain()]
        for at in self.found.stacked:
            twice = is_split and at[1] == GATE_UP_PARAMETER
            paths.append((self._of(at)[0], 2 * rank if twice else rank))
        power = 0.5 if self.is_rslora else 1.0
        alphas: dict[float, str] = {}
        for path, of_path in paths:
            alpha = _by_pattern(self.raw.get("alpha_pattern"), path, self.raw["lora_alpha"]) * (rank / of_path) ** power
            if not any(math.isclose(alpha, known, rel_tol=1e-9) for known in alphas):
                alphas[alpha] = path
        if len(alphas) > 1:
            both = " and ".join(f"{alpha:g} of {path}" for alpha, path in [*alphas.items()][:2])
            raise UserError(f"alpha_pattern: {both} differ; hymeg's adapters have one scale")
        alpha = next(iter(alphas), self.raw["lora_alpha"])
        return self.raw["lora_alpha"] if math.isclose(alpha, self.raw["lora_alpha"], rel_tol=1e-9) else alpha

    def _module_of(self, key: str) -> Module:
        return self.modules[key.removeprefix(PREFIX).rpartition(".")[0]]

    def _tensors(self, rank: int, is_split: bool) -> dict[str, RowTensor]:
        made = {}
        for path, matrices in self.found.single.items():
            for key, matrix in zip(self._keys(path), (matrices["A"], matrices["B"]), strict=True):
                made[key] = matrix.tensor()._replace(key=key)
        for path, experts in self.found.experts.items():
            for key, letter in zip(self._keys(path), "AB", strict=True):
                made[key] = _stack(key, [experts[e][letter].tensor() for e in sorted(experts)])
        for (above, parameter), matrices in self.found.stacked.items():
            if parameter == DOWN_PARAMETER:
                made |= self._from_stack(f"{above}.down_proj", matrices, rank, 0, 0)
                continue
            if is_split:
                _check_blocks(matrices["B"], self.config.num_experts)
            for i, name in enumerate(("gate_proj", "up_proj")):
                made |= self._from_stack(f"{above}.{name}", matrices, rank, i, i * rank * is_split)
        for name, entry in self.found.full.items():
            made[PREFIX + name + FULL] = _tensor(PREFIX + name + FULL, entry)
        return made

    def _keys(self, path: str) -> tuple[str, str]:
        return self.modules[path].lora_a, self.modules[path].lora_b

    def _from_stack(
        self, path: str, matrices: dict[str, _Matrix], rank: int, part: int, first_rank: int
    ) -> dict[str, RowTensor]:
        """Of a stack's ranks those from `first_rank` on, of B's rows the part'th module's."""
        module = self.modules[path]
        num_experts = module.num_experts
        a, b = matrices["A"].tensor(), matrices["B"].tensor()
        in_stack = a.shape[0] // num_experts
        num_out = b.shape[0] // (1 if path.endswith("down_proj") else 2)
        if len(b.shape) != 2 or b.shape[1] != in_stack * num_experts:
            raise UserError(f"{b.key} is {list(b.shape)}; {in_stack * num_experts} columns are needed")
        piece = a.bands[0].pieces[0]
        bands = tuple(
            Band(e * rank, (e + 1) * rank, (piece._replace(row=e * in_stack + first_rank),)) for e in range(num_experts)
        )
        rows, ranks = (part * num_out, (part + 1) * num_out), (first_rank, first_rank + rank)
        arrange = functools.partial(_experts_first, num_experts=num_experts, rows=rows, ranks=ranks)
        made = Rearranged(f"{self.folder}: {module.lora_b}", (b,), arrange)
        return {
            module.lora_a: RowTensor(module.lora_a, a.dtype, (num_experts, rank, a.shape[1]), bands),
            module.lora_b: RowTensor(module.lora_b, "F32", (num_experts, num_out, rank), (), made),
        }


def _experts_first(stored: np.ndarray, num_experts: int, rows: Range, ranks: Range) -> np.ndarray:
    """[out, R * experts], columns rank by rank -> [experts * rows, ranks]."""
    by_rank = stored.reshape(len(stored), -1, num_experts)[slice(*rows), slice(*ranks)]
    return np.ascontiguousarray(by_rank.transpose(2, 0, 1)).reshape(-1, ranks[1] - ranks[0])


def _check_blocks(b: _Matrix, num_experts: int) -> None:
    """Gate's rows are zero for up's ranks, and up's for gate's."""
    tensor = b.tensor()
    with TensorReader() as reader:
        numbers = reader.numbers(tensor, [(0, tensor.shape[0])])
    numbers = numbers.reshape(2, tensor.shape[0] // 2, 2, -1)  # [gate or up, out, gate's or up's ranks, ...]
    if numbers[0, :, 1].any() or numbers[1, :, 0].any():
        raise UserError(
            f"rank_pattern: {b.name} has twice the rank of the others and is not block-diagonal; hymeg's adapters have "
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


def _tensor(key: str, entry: TensorEntry) -> RowTensor:
    shape = tuple(entry.shape)
    if not 1 <= len(shape) <= 2:
        raise UserError(f"{key} is {list(shape)}; one or two axes are needed")
    piece = Piece(str(entry.file), entry.offset, 0, shape, 0, 0, shape[-1], entry.dtype)
    return RowTensor(key, entry.dtype, shape, (Band(0, num_rows(shape), (piece,)),))


def _stack(key: str, tensors: list[RowTensor]) -> RowTensor:
    first = tensors[0]
    for tensor in tensors:
        if tensor.shape != first.shape:
            raise UserError(
                f"{tensor.key} is {list(tensor.shape)}, {first.key} {list(first.shape)}; one shape is needed"
            )
    kinds = {tensor.dtype for tensor in tensors}
    height = first.shape[0]
    bands = tuple(Band(i * height, (i + 1) * height, tensor.bands[0].pieces) for i, tensor in enumerate(tensors))
    return RowTensor(key, kinds.pop() if len(kinds) == 1 else "F32", (len(tensors), *first.shape), bands)
