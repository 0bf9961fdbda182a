"""What makes a layout legal: written once, asked by preflight and by the planner. No Megatron and no torch.

What is accepted, Megatron accepts, and what Megatron runs is accepted, but for a tensor-parallel size that does not
divide the hidden size, which only the projection of a multi-token-prediction layer minds. Some of what Megatron's own
checks let through fails later there, and is refused here.
"""

import dataclasses
import functools
import math
import re
from operator import attrgetter

from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.planning.settings import Settings

_TP, _PP, _CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
_EP, _ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
_VPP = "--num-virtual-stages-per-pipeline-rank"
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_EMBEDDING, _LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
_INSTANCES, _LAYOUT = "--num-distributed-optimizer-instances", "--pipeline-model-parallel-layout"
_MICRO, _GLOBAL, _LENGTH = "--micro-batch-size", "--global-batch-size", "--seq-length"


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

    # For formulas.
    tp = property(attrgetter("tensor_model_parallel_size"))
    pp = property(attrgetter("pipeline_model_parallel_size"))
    cp = property(attrgetter("context_parallel_size"))
    ep = property(attrgetter("expert_model_parallel_size"))
    etp = property(attrgetter("expert_tensor_parallel_size"))

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def num_virtual_stages(self) -> int:
        """Of a rank."""
        if self.pipeline_model_parallel_layout is not None:
            return len(unrolled(self.pipeline_model_parallel_layout)) // self.pp
        return self.virtual_pipeline_model_parallel_size or 1


def check(config: HyConfig, layout: Layout, settings: Settings | None = None) -> None:
    """Refuse a layout that Megatron cannot run, or would run wrongly.

    Args:
        settings: those that it is to run with; without them, only the layout is looked at.

    Raises:
        UserError: one line: flag, value, what would do.
    """
    sizes = {_TP: layout.tp, _PP: layout.pp, _CP: layout.cp, _EP: layout.ep, _ETP: layout.etp}
    sizes |= {_VPP: layout.virtual_pipeline_model_parallel_size, _INSTANCES: layout.num_distributed_optimizer_instances}
    sizes |= {_FIRST: layout.decoder_first_pipeline_num_layers, _LAST: layout.decoder_last_pipeline_num_layers}
    sizes |= {_MICRO: layout.micro_batch_size, _GLOBAL: layout.global_batch_size, _LENGTH: layout.seq_length}
    for flag, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{flag} {size}: a size is at least 1")
    _check_widths(config, layout)
    _check_world(config, layout)
    _check_batch(layout)
    if layout.pipeline_model_parallel_layout is None:
        _check_depth(config, layout)
    else:
        _check_layout_string(config, layout)
    if layout.num_virtual_stages > 1:
        _check_interleaving(layout)
    _check_sequence(config, layout)
    if settings is not None and settings.moe_shared_expert_overlap:
        _check_shared_overlap(settings)
    if settings is not None and settings.overlap_moe_expert_parallel_comm:
        _check_overlap(config, layout, settings)


def _check_widths(config: HyConfig, layout: Layout) -> None:
    groups = config.num_key_value_heads
    tensor = {
        "attention heads": config.num_attention_heads,
        "hidden size": config.hidden_size,
        "dense feed-forward width": config.intermediate_size,
        "shared expert width": config.shared_expert_intermediate_size,
    }

    def share_groups(size: int) -> bool:
        """Ranks hold whole query groups each, or groups whole sets of ranks, which compute keys and values together."""
        return groups % size == 0 or size % groups == 0

    for flag, size, widths in (
        (_TP, layout.tp, tensor),
        (_EP, layout.ep, {"experts": config.num_experts}),
        (_ETP, layout.etp, {"expert feed-forward width": config.moe_intermediate_size}),
    ):
        wrong = [f"does not divide the model's {width} {what}" for what, width in widths.items() if width % size]
        if flag == _TP and not share_groups(size):
            wrong.append(f"and the model's {groups} query groups (key/value heads): neither divides the other")
        if wrong:
            allowed = [one for one in _divisors(math.gcd(*widths.values())) if flag != _TP or share_groups(one)]
            raise UserError(f"{flag} {size} {wrong[0]}; it may be {_listed(allowed)}")


def _check_world(config: HyConfig, layout: Layout) -> None:
    world, tp, pp, cp, ep, etp = layout.world_size, layout.tp, layout.pp, layout.cp, layout.ep, layout.etp
    processes = "1 process" if world == 1 else f"{world} processes"
    if world % (tp * pp * cp):
        raise UserError(
            f"{_product({_TP: tp, _PP: pp, _CP: cp})} does not divide the {processes} of this job; start "
            f"{_multiples(world, tp * pp * cp)} (torchrun --nproc-per-node, --nnodes) or lower it"
        )
    if world % (ep * etp * pp):
        allowed = [size for size in _divisors(config.num_experts) if world % (size * etp * pp) == 0]
        choices = [f"{_EP} {_listed(allowed)} would do"] if allowed else []
        if etp > 1 and world % (ep * pp) == 0:
            choices.append(f"so would {_ETP} 1 (unset, it is the tensor-parallel size)")
        raise UserError(
            f"{_product({_EP: ep, _ETP: etp, _PP: pp})} does not divide the {processes} of this job (experts are "
            f"spread over tensor, context and data parallel ranks); {', and '.join(choices) or 'lower one of them'}"
        )
    if layout.use_tp_pp_dp_mapping and pp > 1 and ep * etp != tp * cp:
        raise UserError(
            f"--use-tp-pp-dp-mapping with {_PP} {pp} needs expert x expert-tensor parallel size ({ep} x {etp}) to "
            f"equal tensor x context parallel size ({tp} x {cp}); leave --use-tp-pp-dp-mapping out"
        )
    instances = layout.num_distributed_optimizer_instances
    for what, ranks in (("data x context", world // (tp * pp)), ("expert-data", world // (ep * etp * pp))):
        if ranks % instances:
            raise UserError(f"{_INSTANCES} {instances} does not divide the {ranks} {what} parallel ranks; it may be 1")


def _check_batch(layout: Layout) -> None:
    step = layout.micro_batch_size * layout.data_parallel_size
    if layout.global_batch_size % step:
        raise UserError(
            f"{_GLOBAL} {layout.global_batch_size} is no multiple of {_MICRO} {layout.micro_batch_size} x "
            f"data-parallel size {layout.data_parallel_size} = {step}; use {_multiples(layout.global_batch_size, step)}"
        )


def _check_depth(config: HyConfig, layout: Layout) -> None:
    pp, vpp, layers = layout.pp, layout.num_virtual_stages, config.num_hidden_layers
    extra = _num_accounted(layout)
    over = f"{pp} pipeline stages" if vpp == 1 else f"{pp} x {vpp} (virtual) pipeline stages"
    ends = {_FIRST: layout.decoder_first_pipeline_num_layers, _LAST: layout.decoder_last_pipeline_num_layers}
    ends = {flag: size for flag, size in ends.items() if size is not None}
    if not ends:
        if (layers + extra) % (pp * vpp):
            counted = f"{layers} layers" + (f" + {extra} for embedding or loss" if extra else "")
            raise UserError(
                f"{_PP} {pp}: {counted} do not divide over {over}; use {_listed(_divisors(layers + extra))} stages in "
                f"all, or set {_FIRST}, {_LAST} or {_LAYOUT}"
            )
        return
    given = " and ".join(f"{flag} {size}" for flag, size in ends.items())
    if extra:
        raise UserError(f"{given} cannot be combined with {_EMBEDDING} or {_LOSS}; leave one out")
    for flag, size in ends.items():
        if size % vpp:
            raise UserError(
                f"{flag} {size} is no multiple of the {vpp} virtual stages of a rank; use {_multiples(size, vpp)}"
            )
    middle_layers, middle_stages = layers - sum(ends.values()), pp - len(ends)
    if middle_stages < 0:
        raise UserError(f"{given} set more stages than {_PP} {pp}; leave one out")
    if middle_layers < 0:
        raise UserError(f"{given}: more than the model's {layers} layers; lower it")
    if bool(middle_layers) != bool(middle_stages) or (middle_stages and middle_layers % (middle_stages * vpp)):
        raise UserError(
            f"{given} leave{'s' if len(ends) == 1 else ''} {middle_layers} of {layers} layers for the other "
            f"{middle_stages} of {over}, over which they do not divide; change it, or use {_LAYOUT}"
        )


def _num_accounted(layout: Layout) -> int:
    """Embedding and loss, where they count as a layer each."""
    return layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split


def _check_layout_string(config: HyConfig, layout: Layout) -> None:
    """Megatron's rules for `E|(t|)*3,m|m||L`: E embedding, t layer, m multi-token prediction, L loss."""
    text, pp, mtp = layout.pipeline_model_parallel_layout, layout.pp, config.num_nextn_predict_layers
    said = f"{_LAYOUT} {text}"
    for flags, is_given in {
        _FIRST: layout.decoder_first_pipeline_num_layers,
        _LAST: layout.decoder_last_pipeline_num_layers,
        _VPP: layout.virtual_pipeline_model_parallel_size,
        f"{_EMBEDDING} and {_LOSS}": _num_accounted(layout),
    }.items():
        if is_given:
            raise UserError(f"{said} says where layers lie; leave {flags} out")
    stages = unrolled(text)
    flat = "".join(stages)
    if wrong := re.search(r"[^ELtm]", flat):
        raise UserError(
            f"{said}: found {wrong[0]!r}; E, t, m, L stand for embedding, layer, multi-token prediction and loss, | "
            "ends a stage, (...)*n repeats"
        )
    if len(stages) % pp:
        raise UserError(
            f"{said} has {len(stages)} stages, no multiple of {_PP} {pp}; use {_multiples(len(stages), pp)}"
        )
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


@functools.lru_cache(maxsize=1024)
def unrolled(layout_string: str) -> tuple[str, ...]:
    """`E(t|)*3L` as ("Et", "t", "t", "L"): the virtual stages of all ranks."""
    text = layout_string.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return tuple(text.split("|"))


def _check_shared_overlap(settings: Settings) -> None:
    """What Megatron asks for to compute shared experts beside the all-to-all (transformer_config.py:1648, 1817)."""
    for what, is_wrong in {
        "--moe-token-dispatcher-type allgather": settings.moe_token_dispatcher_type == "allgather",
        "shared_experts in --recompute-modules": "shared_experts" in settings.recompute_modules,
    }.items():
        if is_wrong:
            raise UserError(f"--moe-shared-expert-overlap cannot be combined with {what}; leave one out")


def _check_overlap(config: HyConfig, layout: Layout, settings: Settings) -> None:
    """What Megatron asks for to hide the experts' all-to-all (transformer_config.py:2669)."""
    needs_virtual_stages = layout.pp > 1 and layout.num_virtual_stages == 1
    is_full, is_gathering = settings.recompute_granularity == "full", settings.moe_token_dispatcher_type == "allgather"
    clash = "cannot be combined with"
    for what, is_wrong in {
        f"with {_PP} {layout.pp} needs virtual stages; add {_VPP} 2 or more": needs_virtual_stages,
        f"needs {_EP} 2 or more: there is no all-to-all to hide": layout.ep == 1,
        f"{clash} --recompute-granularity full; recompute selectively, or leave one out": is_full,
        f"{clash} moe in --recompute-modules; take moe_act, or leave one out": "moe" in settings.recompute_modules,
        "needs --bf16": not settings.bf16,
        f"{clash} --moe-token-dispatcher-type allgather; leave that out": is_gathering,
        f"{clash} --moe-shared-expert-overlap; leave one out": settings.moe_shared_expert_overlap,
        "takes models with at most one multi-token-prediction layer": config.num_nextn_predict_layers > 1,
    }.items():
        if is_wrong:
            raise UserError(f"--overlap-moe-expert-parallel-comm {what}")


def _check_interleaving(layout: Layout) -> None:
    pp, microbatches, batch = layout.pp, layout.num_microbatches, layout.global_batch_size
    if pp == 1:
        source = _LAYOUT if layout.pipeline_model_parallel_layout else _VPP
        raise UserError(f"{layout.num_virtual_stages} virtual stages a rank ({source}) need {_PP} 2 or more; add it")
    if not layout.overlap_p2p_comm and pp == 2:
        raise UserError(
            f"--no-overlap-p2p-communication with virtual stages and {_PP} 2 pairs the wrong messages; leave it out, "
            "or use 4 stages"
        )
    group = layout.microbatch_group_size_per_vp_stage or pp
    if not pp <= group <= max(pp, microbatches):
        raise UserError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group} must lie between {_PP} {pp} and the "
            f"{microbatches} micro-batches of a step"
        )
    if microbatches < group or 0 < microbatches % group < pp:
        raise UserError(
            f"{_GLOBAL} {batch} makes {microbatches} micro-batches a step; virtual pipeline stages need a multiple of "
            f"{group}: use {_multiples(batch, batch // microbatches * group)}"
        )


def _check_sequence(config: HyConfig, layout: Layout) -> None:
    length, tp, cp = layout.seq_length, layout.tp, layout.cp
    if length > config.max_position_embeddings:
        raise UserError(
            f"{_LENGTH} {length} exceeds the model's context of {config.max_position_embeddings} "
            "(max_position_embeddings in config.json)"
        )
    # Each context-parallel rank takes two chunks, and tensor-parallel ranks share what it has (sequence parallelism).
    multiple = math.lcm(2 * cp, cp * tp) if cp > 1 else tp
    if length % multiple:
        sizes = _product({_CP: cp, _TP: tp}).partition(" =")[0]
        chunks = ", two chunks a rank," if cp > 1 else ""
        raise UserError(
            f"{_LENGTH} {length} is no multiple of {multiple}, as {sizes}{chunks} needs; use "
            f"{_multiples(length, multiple)}"
        )


def _product(sizes: dict[str, int]) -> str:
    """`--a-size 2 x --b-size 4 = 8`, without sizes of 1."""
    given = [f"{flag} {size}" for flag, size in sizes.items() if size > 1]
    return " x ".join(given) + (f" = {math.prod(sizes.values())}" if len(given) > 1 else "")


def _multiples(number: int, step: int) -> str:
    """The multiples of `step` on either side of `number`."""
    below = number // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
