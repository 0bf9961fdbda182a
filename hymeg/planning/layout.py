"""What makes a layout legal: written once, asked by preflight and by the planner. No Megatron and no torch.

What is accepted, Megatron accepts, and what Megatron runs is accepted, but for a tensor-parallel size that does not
divide the hidden size, which only the projection of a multi-token-prediction layer minds. Some of what Megatron's own
checks let through fails later there, and is refused here.
"""

import dataclasses
import math
import re

from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.planning.settings import Settings

_FLAG = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "num_distributed_optimizer_instances": "--num-distributed-optimizer-instances",
    "decoder_first_pipeline_num_layers": "--decoder-first-pipeline-num-layers",
    "decoder_last_pipeline_num_layers": "--decoder-last-pipeline-num-layers",
    "micro_batch_size": "--micro-batch-size",
    "global_batch_size": "--global-batch-size",
    "seq_length": "--seq-length",
}
_LAYOUT = "--pipeline-model-parallel-layout"
_OVERLAP = "--overlap-moe-expert-parallel-comm"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model and a batch are cut over `world_size` ranks. Sizes are Megatron's flags of the same names."""

    world_size: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None
    """Megatron's layout string; when given, it alone says where layers lie, and how many virtual stages a rank has."""
    microbatch_group_size_per_vp_stage: int | None = None
    overlap_p2p_comm: bool = True
    use_tp_pp_dp_mapping: bool = False
    num_distributed_optimizer_instances: int = 1

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def check(config: HyConfig, layout: Layout, settings: Settings | None = None) -> None:
    """Refuse a layout that Megatron cannot run, or would run wrongly.

    Args:
        settings: those that it is to run with; without them, only the layout is looked at.

    Raises:
        UserError: one line: flag, value, what would do.
    """
    for field, flag in _FLAG.items():
        size = getattr(layout, field)
        if size is not None and size < 1:
            raise UserError(f"{flag} {size}: a size is at least 1")
    _check_widths(config, layout)
    _check_world(config, layout)
    _check_batch(layout)
    num_virtual_stages = _check_depth(config, layout)
    _check_interleaving(layout, num_virtual_stages)
    _check_sequence(config, layout)
    if settings is not None and settings.overlap_moe_expert_parallel_comm:
        _check_overlap(config, layout, settings, num_virtual_stages)


def _check_widths(config: HyConfig, layout: Layout) -> None:
    tensor = {
        "attention heads": config.num_attention_heads,
        "hidden size": config.hidden_size,
        "dense feed-forward width": config.intermediate_size,
        "shared expert width": config.shared_expert_intermediate_size,
    }
    groups = config.num_key_value_heads
    for field, widths in (
        ("tensor_model_parallel_size", tensor),
        ("expert_model_parallel_size", {"experts": config.num_experts}),
        ("expert_tensor_parallel_size", {"expert feed-forward width": config.moe_intermediate_size}),
    ):
        parallel = getattr(layout, field)
        wrong = next((what for what, size in widths.items() if size % parallel), None)
        if wrong is None and (widths is not tensor or _shares(parallel, groups)):
            continue
        allowed = [
            size for size in _divisors(math.gcd(*widths.values())) if widths is not tensor or _shares(size, groups)
        ]
        if wrong is not None:
            raise UserError(
                f"{_FLAG[field]} {parallel} does not divide the model's {widths[wrong]} {wrong}; it may be "
                f"{_listed(allowed)}"
            )
        if widths is tensor:
            raise UserError(
                f"{_FLAG[field]} {parallel} and the model's {groups} query groups (key/value heads): neither divides "
                "the other; "
                f"it may be {_listed(allowed)}"
            )


def _shares(tensor_parallel: int, groups: int) -> bool:
    """Whether ranks hold whole query groups each, or groups whole sets of ranks, which then compute a group's keys and
    values together.
    """
    return groups % tensor_parallel == 0 or tensor_parallel % groups == 0


def _check_world(config: HyConfig, layout: Layout) -> None:
    world, tp, pp, cp = (
        layout.world_size,
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    if world % (tp * pp * cp):
        product = _product(
            layout, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
        )
        below = world // (tp * pp * cp) * (tp * pp * cp)
        start = f"{below} or {below + tp * pp * cp}" if below else f"{tp * pp * cp}"
        raise UserError(
            f"{product} does not divide the {_processes(world)} of this job; start {start} (torchrun --nproc-per-node, "
            "--nnodes) or lower it"
        )
    if world % (ep * etp * pp):
        product = _product(
            layout, "expert_model_parallel_size", "expert_tensor_parallel_size", "pipeline_model_parallel_size"
        )
        allowed = [size for size in _divisors(config.num_experts) if world % (size * etp * pp) == 0]
        choices = [f"--expert-model-parallel-size {_listed(allowed)} would do"] if allowed else []
        if etp > 1 and world % (ep * pp) == 0:
            choices.append("so would --expert-tensor-parallel-size 1 (unset, it is the tensor-parallel size)")
        raise UserError(
            f"{product} does not divide the {_processes(world)} of this job (experts are spread over tensor, context "
            "and data parallel ranks); "
            f"{', and '.join(choices) or 'lower one of them'}"
        )
    if layout.use_tp_pp_dp_mapping and pp > 1 and ep * etp != tp * cp:
        raise UserError(
            f"--use-tp-pp-dp-mapping with --pipeline-model-parallel-size {pp} needs expert x expert-tensor parallel "
            f"size ({ep} x {etp}) to equal "
            f"tensor x context parallel size ({tp} x {cp}); leave --use-tp-pp-dp-mapping out"
        )
    instances = layout.num_distributed_optimizer_instances
    for what, ranks in (("data x context", world // (tp * pp)), ("expert-data", world // (ep * etp * pp))):
        if ranks % instances:
            raise UserError(
                f"--num-distributed-optimizer-instances {instances} does not divide the {ranks} {what} parallel ranks; "
                "it may be 1"
            )


def _check_batch(layout: Layout) -> None:
    step = layout.micro_batch_size * layout.data_parallel_size
    if layout.global_batch_size % step:
        raise UserError(
            f"--global-batch-size {layout.global_batch_size} is no multiple of --micro-batch-size "
            f"{layout.micro_batch_size} x data-parallel size "
            f"{layout.data_parallel_size} = {step}; use {_multiples(layout.global_batch_size, step)}"
        )


def _check_depth(config: HyConfig, layout: Layout) -> int:
    """Returns the number of virtual stages of a rank."""
    if layout.pipeline_model_parallel_layout is not None:
        return _check_layout_string(config, layout)
    pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    layers = config.num_hidden_layers
    extra = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    over = f"{pp} pipeline stages" if vpp == 1 else f"{pp} x {vpp} (virtual) pipeline stages"
    if first is None and last is None:
        if (layers + extra) % (pp * vpp):
            counted = f"{layers} layers" + (f" + {extra} for embedding or loss" if extra else "")
            raise UserError(
                f"--pipeline-model-parallel-size {pp}: {counted} do not divide over {over}; use "
                f"{_listed(_divisors(layers + extra))} stages in all, "
                f"or set --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers or {_LAYOUT}"
            )
        return vpp
    flags = {
        flag: size
        for flag, size in (
            (_FLAG["decoder_first_pipeline_num_layers"], first),
            (_FLAG["decoder_last_pipeline_num_layers"], last),
        )
        if size
    }
    given = " and ".join(f"{flag} {size}" for flag, size in flags.items())
    if extra:
        raise UserError(
            f"{given} cannot be combined with --account-for-embedding-in-pipeline-split or "
            "--account-for-loss-in-pipeline-split; leave one out"
        )
    for flag, size in flags.items():
        if size % vpp:
            raise UserError(
                f"{flag} {size} is no multiple of the {vpp} virtual stages of a rank; use {_multiples(size, vpp)}"
            )
    middle_layers, middle_stages = layers - sum(flags.values()), pp - len(flags)
    if middle_stages < 0:
        raise UserError(f"{given} set more stages than --pipeline-model-parallel-size {pp}; leave one out")
    if middle_layers < 0:
        raise UserError(f"{given}: more than the model's {layers} layers; lower it")
    if bool(middle_layers) != bool(middle_stages) or (middle_stages and middle_layers % (middle_stages * vpp)):
        raise UserError(
            f"{given} leave{'s' if len(flags) == 1 else ''} {middle_layers} of {layers} layers for the other "
            f"{middle_stages} of {over}"
            f", over which they do not divide; "
            f"change it, or use {_LAYOUT}"
        )
    return vpp


def _check_layout_string(config: HyConfig, layout: Layout) -> int:
    """Megatron's rules for `E|(t|)*3,m|m||L`: E embedding, t layer, m multi-token prediction, L loss. Returns the
    virtual stages of a rank.
    """
    text, pp = layout.pipeline_model_parallel_layout, layout.pipeline_model_parallel_size
    said = f"{_LAYOUT} {text}"
    for field in (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "virtual_pipeline_model_parallel_size",
    ):
        if getattr(layout, field) is not None:
            raise UserError(f"{said} says where layers lie; leave {_FLAG[field]} out")
    if layout.account_for_embedding_in_pipeline_split or layout.account_for_loss_in_pipeline_split:
        raise UserError(
            f"{said} says where layers lie; leave --account-for-embedding-in-pipeline-split and "
            "--account-for-loss-in-pipeline-split out"
        )
    stages = unrolled(text)
    flat = "".join(stages)
    if wrong := re.search(r"[^ELtm]", flat):
        raise UserError(
            f"{said}: found {wrong[0]!r}; E, t, m, L stand for embedding, layer, multi-token prediction and loss, | "
            "ends a stage, (...)*n repeats"
        )
    if len(stages) % pp:
        raise UserError(
            f"{said} has {len(stages)} stages, no multiple of --pipeline-model-parallel-size {pp}; use "
            f"{_multiples(len(stages), pp)}"
        )
    mtp = config.num_nextn_predict_layers
    for letter, what, wanted in (
        ("t", "layers", config.num_hidden_layers),
        ("m", "multi-token-prediction layers", mtp),
    ):
        if flat.count(letter) != wanted:
            raise UserError(f"{said} has {flat.count(letter)} {what} ({letter}), the model {wanted}; make them agree")
    if not (flat.startswith("E") and flat.endswith("L") and flat.count("E") == flat.count("L") == 1):
        raise UserError(f"{said} must begin with the embedding (E) and end with the loss (L), each once")
    if mtp and (
        "t" in flat[flat.index("m") :]
        or flat.count("m") != max(stage.count("m") for stage in stages)
        or "m" in "".join(stages[:-pp])
    ):
        raise UserError(
            f"{said}: all multi-token-prediction layers (m) lie in one stage after the last layer (t), the last "
            "virtual stage of its rank"
        )
    return len(stages) // pp


def unrolled(layout_string: str) -> list[str]:
    """`E(t|)*3L` as ["Et", "t", "t", "L"]: the virtual stages of all ranks."""
    text = layout_string.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def _check_overlap(config: HyConfig, layout: Layout, settings: Settings, num_virtual_stages: int) -> None:
    """What Megatron asks for to hide the experts' all-to-all (transformer_config.py:2669)."""
    pp, modules = layout.pipeline_model_parallel_size, settings.recompute_modules
    for is_wrong, what in (
        (
            pp > 1 and num_virtual_stages == 1,
            f"with {_FLAG['pipeline_model_parallel_size']} {pp} needs virtual stages; add "
            f"{_FLAG['virtual_pipeline_model_parallel_size']} 2 or more",
        ),
        (
            layout.expert_model_parallel_size == 1,
            f"needs {_FLAG['expert_model_parallel_size']} 2 or more: there is no all-to-all to hide",
        ),
        (
            settings.recompute_granularity == "full",
            "cannot be combined with --recompute-granularity full; recompute selectively, or leave one out",
        ),
        ("moe" in modules, "cannot be combined with moe in --recompute-modules; take moe_act, or leave one out"),
        (not settings.bf16, "needs --bf16"),
        (
            settings.moe_token_dispatcher_type == "allgather",
            "cannot be combined with --moe-token-dispatcher-type allgather; leave that out",
        ),
        (settings.moe_shared_expert_overlap, "cannot be combined with --moe-shared-expert-overlap; leave one out"),
        (config.num_nextn_predict_layers > 1, "takes models with at most one multi-token-prediction layer"),
    ):
        if is_wrong:
            raise UserError(f"{_OVERLAP} {what}")


def _check_interleaving(layout: Layout, num_virtual_stages: int) -> None:
    pp, microbatches = layout.pipeline_model_parallel_size, layout.num_microbatches
    if num_virtual_stages == 1:
        return
    if pp == 1:
        source = _LAYOUT if layout.pipeline_model_parallel_layout else _FLAG["virtual_pipeline_model_parallel_size"]
        raise UserError(
            f"{num_virtual_stages} virtual stages a rank ({source}) need --pipeline-model-parallel-size 2 or more; add "
            "it"
        )
    if not layout.overlap_p2p_comm and pp == 2:
        raise UserError(
            "--no-overlap-p2p-communication with virtual stages and --pipeline-model-parallel-size 2 pairs the wrong "
            "messages; leave it out, "
            "or use 4 stages"
        )
    group = layout.microbatch_group_size_per_vp_stage or pp
    if not pp <= group <= max(pp, microbatches):
        raise UserError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group} must lie between "
            f"--pipeline-model-parallel-size {pp} and the {microbatches} "
            f"micro-batches of a step"
        )
    rest = microbatches % group
    if microbatches < group or 0 < rest < pp:
        step = layout.global_batch_size // microbatches
        raise UserError(
            f"--global-batch-size {layout.global_batch_size} makes {microbatches} micro-batches a step; virtual "
            "pipeline stages need a multiple of "
            f"{group}: use {_multiples(layout.global_batch_size, step * group)}"
        )


def _check_sequence(config: HyConfig, layout: Layout) -> None:
    s, tp, cp = layout.seq_length, layout.tensor_model_parallel_size, layout.context_parallel_size
    if s > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {s} exceeds the model's context of {config.max_position_embeddings} "
            "(max_position_embeddings in config.json)"
        )
    # Each context-parallel rank takes two chunks, and tensor-parallel ranks share what it has (sequence parallelism).
    multiple = math.lcm(2 * cp, cp * tp) if cp > 1 else tp
    if s % multiple:
        sizes = _product(layout, "context_parallel_size", "tensor_model_parallel_size").partition(" =")[0]
        chunks = ", two chunks a rank," if cp > 1 else ""
        raise UserError(
            f"--seq-length {s} is no multiple of {multiple}, as {sizes}{chunks} needs; use {_multiples(s, multiple)}"
        )


def _product(layout: Layout, *fields: str) -> str:
    """`--a-size 2 x --b-size 4 = 8`, without sizes of 1."""
    sizes = {field: getattr(layout, field) for field in fields if getattr(layout, field) > 1}
    total = f" = {math.prod(sizes.values())}" if len(sizes) > 1 else ""
    return " x ".join(f"{_FLAG[field]} {size}" for field, size in sizes.items()) + total


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _multiples(number: int, step: int) -> str:
    """The multiples of `step` on either side of `number`."""
    below = number // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
