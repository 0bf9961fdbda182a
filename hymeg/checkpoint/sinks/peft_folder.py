"""A peft folder as a sink: adapter_model.safetensors and adapter_config.json, in either layout of `peft_table`."""

import functools
import json
from collections.abc import Sequence

import numpy as np

from hymeg.checkpoint.adapter_table import FULL, PREFIX, Module
from hymeg.checkpoint.mapping import is_mtp
from hymeg.checkpoint.peft_table import (
    CONFIG_FILE,
    MODEL,
    WEIGHTS_FILE,
    PeftTensor,
    peft_config,
    peft_tensors,
    served_tensors,
    transformers_names,
)
from hymeg.checkpoint.row_functions import Rearranged
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader
from hymeg.checkpoint.sinks.hf_folder import files_of_shards
from hymeg.checkpoint.sinks.transfer import FilesToWrite
from hymeg.checkpoint.sources.adapter_folder import Adapter
from hymeg.hf.safetensors_files import TensorSpec, one_shard


def files_of_peft(
    adapter: Adapter, modules: Sequence[Module], layout: str, dtype: str | None, workers: int
) -> FilesToWrite:
    """A peft folder that holds the adapters of `modules` and what was trained in full, in `dtype` (None: their own)."""
    rank, has_one_a = adapter.settings.rank, layout == "peft" and _have_one_a(adapter, modules)
    of_layout = served_tensors(modules, rank) if layout == "served" else peft_tensors(modules, rank, has_one_a)
    wanted = [(tensor.name, tensor.shape, *_rows_of(tensor, adapter)) for tensor in of_layout]
    names = transformers_names(adapter.config)
    full = [name for name in adapter.full if not is_mtp(adapter.config, name)]
    for name in full:
        whole = adapter.tensors[PREFIX + name + FULL]
        wanted.append((MODEL + names[name], whole.shape, whole, whole.all_rows))
    specs = [TensorSpec(name, dtype or tensor.dtype_kept, shape) for name, shape, tensor, _ in wanted]
    made_of = {name: (tensor, rows) for name, _, tensor, rows in wanted}
    config = peft_config(adapter.settings, modules, layout, has_one_a, [names[name] for name in full])
    text = json.dumps(config, indent=2) + "\n"
    return files_of_shards([one_shard(WEIGHTS_FILE, specs)], made_of, workers, {CONFIG_FILE: text.encode()})


def _have_one_a(adapter: Adapter, modules: Sequence[Module]) -> bool:
    """Whether gate and up projections of all experts have the same A, to the bit."""
    of_experts = {module.path: adapter.tensors[module.lora_a] for module in modules if module.num_experts}
    ups = {path: path.replace(".gate_proj", ".up_proj") for path in of_experts if path.endswith(".gate_proj")}
    pairs = [(of_experts[path], of_experts[up]) for path, up in ups.items() if up in of_experts]
    with TensorReader() as of_gate, TensorReader() as of_up:
        for gate, up in pairs:
            both = of_gate.blocks(gate, gate.all_rows, 1024), of_up.blocks(up, up.all_rows, 1024)
            if gate.dtype != up.dtype or any(a != b for a, b in zip(*both, strict=True)):
                return False
    return bool(pairs)


def _rows_of(wanted: PeftTensor, adapter: Adapter) -> tuple[RowTensor, list[tuple[int, int]]]:
    tensors = tuple(adapter.tensors[key] for key in wanted.keys)
    height = wanted.shape[0]
    if wanted.num_experts is None:
        first = (wanted.expert or 0) * height
        return tensors[0], [(first, first + height)]
    num_experts, rank = wanted.num_experts, adapter.settings.rank
    if not wanted.is_b and wanted.rank == rank:
        return tensors[0], [(0, height)]
    if wanted.is_b:
        offsets = [wanted.modules[0].num_out * module.path.endswith(".up_proj") for module in wanted.modules]
        ranks = [i * rank * (wanted.rank > rank) for i in range(len(tensors))]
        arrange = functools.partial(
            _ranks_first, num_experts=num_experts, num_out=height, rank=wanted.rank, offsets=offsets, ranks=ranks
        )
    else:
        arrange = functools.partial(_interleaved, num_experts=num_experts)
    made = Rearranged(f"{adapter.folder}: {wanted.name}", tensors, arrange)
    return RowTensor(wanted.name, "F32", wanted.shape, (), made), [(0, height)]


def _interleaved(*stacks: np.ndarray, num_experts: int) -> np.ndarray:
    """A of gate and of up, [experts * rank, in] each -> [experts * 2 * rank, in]."""
    by_expert = [stack.reshape(num_experts, -1, stack.shape[-1]) for stack in stacks]
    return np.concatenate(by_expert, axis=1).reshape(-1, stacks[0].shape[-1])


def _ranks_first(
    *stacks: np.ndarray, num_experts: int, num_out: int, rank: int, offsets: list[int], ranks: list[int]
) -> np.ndarray:
    """B of one or two modules, [experts * out, r] each -> [num_out, rank * experts]: each one's from its offset among
    the rows, and its rank among the ranks, on.
    """
    made = np.zeros((num_out, rank, num_experts), np.float32)
    for stack, row, first in zip(stacks, offsets, ranks, strict=True):
        by_expert = stack.reshape(num_experts, -1, stack.shape[-1])
        _, height, width = by_expert.shape
        made[row : row + height, first : first + width] = by_expert.transpose(1, 2, 0)
    return made.reshape(num_out, -1)
