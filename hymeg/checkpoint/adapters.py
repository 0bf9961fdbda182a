"""What is done with adapters' files: from distributed to peft folders and back, and into the weights of their base.
Streaming, in several processes, through the one pipe of `conversion`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hymeg.checkpoint.adapter_table import FULL, PREFIX
from hymeg.checkpoint.companions import carried_files, notes_of_tokenizer
from hymeg.checkpoint.conversion import Conversion, Summary, carry_out, check_apart, to_hf
from hymeg.checkpoint.mapping import hf_entries, is_mtp, num_rows, with_first_rows
from hymeg.checkpoint.options import ANY, TO_HF, VERIFIED, Options
from hymeg.checkpoint.reading import Read
from hymeg.checkpoint.row_functions import LowRank, PlusLowRank
from hymeg.checkpoint.row_tensors import RowTensor, TensorReader
from hymeg.checkpoint.sinks.dist_folder import files_of_adapter
from hymeg.checkpoint.sinks.peft_folder import files_of_peft
from hymeg.checkpoint.sources import open_adapter, open_dist_adapter, open_hf, open_peft
from hymeg.checkpoint.sources.adapter_folder import Adapter
from hymeg.checkpoint.sources.hf_folder import DEQUANTISED
from hymeg.checkpoint.workers import aside, run
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import WEIGHTS
from hymeg.progress import Progress


def adapter_to_peft(dist: str | Path, peft: str | Path, *, layout: str = "peft", **options: Any) -> Summary:
    """Write the adapter in the distributed checkpoint `dist` as a peft folder.

    Args:
        layout: "peft", for `PeftModel.from_pretrained`, or "served", for vLLM and SGLang.
        options: `ANY`, `iteration`, `base_hf`, as `options.Options` has them; the last where `dist` has no config.json.

    Raises:
        UserError: it is broken or incomplete; `peft` cannot be written; a layout cannot hold all of it.
    """
    how, dist, peft = Options.taken((*ANY, "iteration", "base_hf"), options), Path(dist), Path(peft)

    def planned() -> Conversion:
        base = how.base
        adapter = open_dist_adapter(dist, HyConfig.from_dir(base) if base else None, how.iteration)
        check_apart(peft, [adapter.folder, base], [dist])
        modules = [module for module in adapter.modules if not module.is_mtp]
        left_out = len(adapter.modules) - len(modules) + sum(is_mtp(adapter.config, name) for name in adapter.full)
        if not modules:
            raise UserError(f"{adapter.folder}: all of it is in MTP layers, which peft folders cannot hold; merge it")
        if layout == "served" and adapter.full:
            raise UserError(
                f"{adapter.folder}: {adapter.full[0]} was trained in full beside the adapters, which vLLM and SGLang "
                "cannot load with an adapter; merge it"
            )
        note = f"left out: what was trained of MTP layers, {left_out} in all, which no reader of peft folders has"
        files = files_of_peft(adapter, modules, layout, how.rounded_to, how.workers)
        read = {"from": str(adapter.folder.resolve()), "iteration": adapter.iteration, "base_hf": base and str(base)}
        record = {"command": "adapter-to-peft", **read, "dtype": how.dtype, "layout": layout}
        return Conversion(files, files.num_tasks, record, None, {}, [note] if left_out else [])

    return carry_out(planned, peft, "to peft", how)


def peft_to_adapter(peft: str | Path, dist: str | Path, *, base_hf: str | Path, **options: Any) -> Summary:
    """Write the adapter in the peft folder `peft`, in either layout, as a distributed checkpoint, to train on from.

    Args:
        base_hf: Hugging Face folder of its base model.
        options: `VERIFIED`, as `options.Options` has them.

    Raises:
        UserError: as `open_peft`; `dist` cannot be written.
    """
    how, peft, dist, base = Options.taken(VERIFIED, options), Path(peft), Path(dist), Path(base_hf)

    def planned() -> Conversion:
        adapter = open_peft(peft, HyConfig.from_dir(base).without_quantization())
        check_apart(dist, [peft, base])
        files = files_of_adapter(adapter.config, adapter.settings, adapter.tensors, how.rounded_to, how.workers)
        read = {"from": str(peft.resolve()), "base_hf": str(base)}
        record = {"command": "peft-to-adapter", **read, "dtype": how.dtype}
        carried = carried_files(base)
        notes = notes_of_tokenizer(carried, base)
        return Conversion(files, len(adapter.tensors), record, adapter.config, carried, notes, is_dist=True)

    return carry_out(planned, dist, "to distributed", how)


def merge(base_hf: str | Path, adapter: str | Path, hf: str | Path, **options: Any) -> Summary:
    """Write the Hugging Face checkpoint in folder `base_hf` with the adapter in its weights: W + scale * B @ A, in fp32
    and rounded once.

    Args:
        adapter: a distributed checkpoint or a peft folder.
        options: `VERIFIED`, `TO_HF`, `iteration`, as `options.Options` has them.

    Raises:
        UserError: one of them is broken, or they do not belong together (of a distributed one by the fingerprint of its
            base); `hf` cannot be written.
    """
    how = Options.taken((*VERIFIED, *TO_HF, "iteration"), options)
    base_hf, adapter, hf = Path(base_hf), Path(adapter), Path(hf)

    def planned() -> Conversion:
        base, rounded_to = open_hf(base_hf), how.rounded_to
        of_config = HyConfig.from_dir(base_hf)
        if of_config.without_quantization() is not of_config:
            # FP8 in fp32 as well, for one rounding.
            base, rounded_to = open_hf(base_hf, dtype="F32"), rounded_to or DEQUANTISED
        found = open_adapter(adapter, base.config, how.iteration)
        note = f"adapters of {len(found.modules):,} modules, scale {found.settings.scale:g}"
        carried = carried_files(base_hf)
        notes = (*base.notes, note, *notes_of_tokenizer(carried, base_hf))
        source = base._replace(tensors=merged(base.config, base.tensors, found), notes=notes)
        record = {"base_hf": str(base_hf.resolve()), "from": str(found.folder.resolve()), "iteration": found.iteration}
        read = Read(source, carried, [base_hf, found.folder], [adapter], record)
        return to_hf("merge", read, hf, how, rounded_to)

    check_base(base_hf, adapter, how)
    return carry_out(planned, hf, "merging", how)


def check_base(base_hf: Path, adapter: Path, how: Options) -> None:
    """Whether the adapter was trained on these weights, by the fingerprint that training left in adapter.json.

    Raises:
        UserError: it was trained on others; or one of the folders cannot be read.
    """
    record, _ = aside(lambda: open_adapter(adapter, open_hf(base_hf).config, how.iteration).settings.base)
    wanted = (record or {}).get("fingerprint")
    if wanted is None:
        how.say(f"{adapter} does not say which weights it was trained on: that they are {base_hf}'s is not checked")
        return

    def work(number: int, report: Callable[[int], None]) -> int:
        import torch  # not needed for anything else here, and large

        from hymeg.checkpoint.fingerprint import part_of_fingerprint

        torch.set_num_threads(1)
        total = 0
        with TensorReader() as reader:
            for place, tensor in enumerate(open_hf(base_hf).tensors.values()):
                if place % how.workers != number:
                    continue
                row, dtype = 0, getattr(torch, WEIGHTS[tensor.dtype].torch)
                for block in reader.blocks(tensor, [(0, num_rows(tensor.shape))]):
                    rows = torch.frombuffer(block, dtype=dtype).view(-1, tensor.num_columns)
                    total += part_of_fingerprint(tensor.key, rows, row)
                    row += len(rows)
                    report(block.nbytes)
        return total

    num_bytes = sum(path.stat().st_size for path in base_hf.glob("*.safetensors"))
    totals = run(work, range(how.workers), Progress("reading the base", num_bytes)).results
    if (found := f"{sum(totals) % 2**48:012x}") != wanted:
        raise UserError(
            f"{adapter}: trained on other weights than {base_hf} holds (fingerprint {wanted}, found {found}); give "
            f"their base, {record.get('source')}, with --base-hf"
        )


def merged(config: HyConfig, base: dict[str, RowTensor], adapter: Adapter) -> dict[str, RowTensor]:
    """The tensors of `base`, by key, with the adapter in them."""
    entries = {entry.hf_name: entry for entry in hf_entries(config, "hub")}
    parts: dict[str, list[LowRank]] = {}
    for module in adapter.modules:
        a, b = adapter.tensors[module.lora_a], adapter.tensors[module.lora_b]
        rank, scale = adapter.settings.rank, adapter.settings.scale
        for expert in range(module.num_experts) if module.num_experts else (None,):
            entry, index = entries[module.weight(expert)], expert or 0
            for start, stop, row in with_first_rows(entry.rows):
                part = LowRank(start, stop, b, index * module.num_out + row, a, index * rank, rank, scale)
                parts.setdefault(entry.dist_key, []).append(part)
    for name in adapter.full:
        entry = entries[name]
        for start, stop, row in with_first_rows(entry.rows):
            part = LowRank(start, stop, adapter.tensors[PREFIX + name + FULL], row)
            of_key = parts.setdefault(entry.dist_key, [])
            if any(other.start < stop and start < other.stop for other in of_key):
                raise UserError(f"{adapter.folder}: {name} was trained in full and has an adapter; one is needed")
            of_key.append(part)
    return {
        key: _plus(tensor, sorted(parts[key], key=lambda part: part.start)) if key in parts else tensor
        for key, tensor in base.items()
    }


def _plus(tensor: RowTensor, parts: list[LowRank]) -> RowTensor:
    return RowTensor(tensor.key, "F32", tensor.shape, (), PlusLowRank(tensor, tuple(parts)))
