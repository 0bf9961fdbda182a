"""What peft calls the tensors of an adapter, in two layouts: names and shapes only.

"peft" is what `PeftModel.from_pretrained` (peft 0.21) reads for transformers' hy_v3, which holds the experts of a layer
stacked: gate and up projections as one parameter [experts, 2 * width, in], down projections as another. The adapter of
such a parameter is two matrices: A [experts * R, in], whose rows are the R of expert 0, those of expert 1, and so on; B
[out, R * experts], whose columns are those of all experts for rank 0, then for rank 1, and so on
(peft/tuners/lora/layer.py, ParamWrapper.get_delta_weight). Gate and up have one adapter there. Ours have one each, so
theirs has rank R = 2 * rank: A is gate's rows and then up's, B is block-diagonal, zero where gate meets up's ranks and
up gate's. Where gate and up have the same A, as after training with peft, R = rank and B is one below the other.

"served" is what vLLM and SGLang read: every expert under its own name, as in the published checkpoint. peft itself
loads such a folder into hy_v3 without an error and without an effect on the experts.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import Module
from hymeg.checkpoint.mapping import Shape, hf_entries
from hymeg.hf.config import HyConfig

PEFT_LAYOUTS = ("peft", "served")
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
MODEL = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)
GATE_UP_PARAMETER, DOWN_PARAMETER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class PeftTensor(NamedTuple):
    """One tensor of a peft folder, and the modules whose A or B it holds.

    Without `num_experts` it is one module's, of `expert` or as it is; with it, it is a stack of the experts of one
    module or of gate and up together (layout "peft"), of rank `rank`.
    """

    name: str
    shape: Shape
    modules: tuple[Module, ...]
    is_b: bool
    expert: int | None = None
    num_experts: int | None = None
    rank: int = 0

    @property
    def keys(self) -> list[str]:
        """Of the distributed tensors of those modules."""
        return [module.lora_b if self.is_b else module.lora_a for module in self.modules]


def transformers_paths(config: HyConfig, modules: Iterable[Module]) -> dict[str, Module]:
    """The modules that are no routed experts by their path in transformers."""
    return {_in_transformers(module.path): module for module in modules if module.num_experts is None}


def _in_transformers(path: str) -> str:
    return path.replace(".mlp.shared_mlp.", ".mlp.shared_experts.")


def transformers_names(config: HyConfig) -> dict[str, str]:
    """Hub name -> transformers' name in memory, of every tensor but the routed experts' and the MTP layers'."""
    trunk = config.without_mtp()
    fused = {(entry.dist_key, entry.rows): entry.hf_name for entry in hf_entries(trunk, "fused")}
    hub = hf_entries(trunk, "hub")
    return {e.hf_name: fused[e.dist_key, e.rows] for e in hub if (e.dist_key, e.rows) in fused}


def served_tensors(modules: Iterable[Module], rank: int) -> list[PeftTensor]:
    """Every tensor of a folder in layout "served"."""
    made = []
    for module in modules:
        for expert in range(module.num_experts) if module.num_experts else (None,):
            made += _single(module.weight(expert).removesuffix(".weight"), module, rank, expert)
    return made


def _single(path: str, module: Module, rank: int, expert: int | None = None) -> list[PeftTensor]:
    return [
        PeftTensor(MODEL + path + LORA_A, (rank, module.num_in), (module,), False, expert),
        PeftTensor(MODEL + path + LORA_B, (module.num_out, rank), (module,), True, expert),
    ]


def peft_tensors(modules: Sequence[Module], rank: int, has_one_a: bool) -> list[PeftTensor]:
    """Every tensor of a folder in layout "peft".

    Args:
        has_one_a: gate and up projections of experts have the same A.
    """
    made, experts = [], {}
    for module in modules:
        if module.num_experts is None:
            made += _single(_in_transformers(module.path), module, rank)
        else:
            above, _, name = module.path.rpartition(".")
            experts.setdefault(above, {})[name] = module
    for above, of_layer in experts.items():
        inner = [of_layer[name] for name in _GATE_UP if name in of_layer]
        outer = [of_layer[name] for name in _DOWN if name in of_layer]
        # peft wraps the parameters of a module one around the other: down_proj's adapter is the outer one.
        for parameter, path in ((inner, ".base_layer" if outer else ""), (outer, "")):
            if parameter:
                made += _stacked(MODEL + above + path, parameter, rank, has_one_a)
    return made


def _stacked(path: str, modules: list[Module], rank: int, has_one_a: bool) -> list[PeftTensor]:
    first = modules[0]
    rank *= 1 if has_one_a else len(modules)
    num_out = first.num_out * (2 if first.path.endswith(_GATE_UP) else 1)
    shared = {"modules": tuple(modules), "num_experts": first.num_experts, "rank": rank}
    return [
        PeftTensor(path + LORA_A, (first.num_experts * rank, first.num_in), is_b=False, **shared),
        PeftTensor(path + LORA_B, (num_out, rank * first.num_experts), is_b=True, **shared),
    ]


def peft_config(
    settings: AdapterSettings, modules: Sequence[Module], layout: str, has_one_a: bool, full: Iterable[str]
) -> dict[str, Any]:
    """adapter_config.json. `full`: transformers' names of parameters trained in full beside the adapters."""
    routed = {module.path.rpartition(".")[2] for module in modules if module.num_experts}
    parameters, ranks, alphas = [], {}, {}
    if layout == "served":
        targets = {module.path.rpartition(".")[2] for module in modules}
    else:
        targets = {_in_transformers(module.path).split(".", 3)[3] for module in modules if module.num_experts is None}
        parameters = [GATE_UP_PARAMETER] * bool(routed & set(_GATE_UP)) + [DOWN_PARAMETER] * ("down_proj" in routed)
        if routed >= set(_GATE_UP) and not has_one_a:
            # The same scale at twice the rank.
            ranks[re.escape(GATE_UP_PARAMETER)] = 2 * settings.rank
            alphas[re.escape(GATE_UP_PARAMETER)] = settings.alpha * (2 if settings.scaling == "lora" else math.sqrt(2))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": (settings.base or {}).get("source"),
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0 if parameters else settings.dropout,  # peft refuses another one with target_parameters
        "use_rslora": settings.scaling == "rslora",
        "target_modules": sorted(targets),
        "target_parameters": parameters or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in full}) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
    }
