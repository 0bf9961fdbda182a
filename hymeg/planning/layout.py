"""What makes a layout legal: written once, asked by preflight and by the planner. No Megatron and no torch."""

import dataclasses

from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

_FLAG = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
    "micro_batch_size": "--micro-batch-size",
}


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
    pipeline_model_parallel_layout: str | None = None
    """Megatron's layout string; when given, it alone says where layers lie."""
    overlap_p2p_comm: bool = True

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size)

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def check(config: HyConfig, layout: Layout) -> None:
    """Refuse a layout that Megatron cannot run, or would run wrongly.

    Raises:
        UserError: one line: flag, value, what would do.
    """
    for field, flag in _FLAG.items():
        if getattr(layout, field) < 1:
            raise UserError(f"{flag} {getattr(layout, field)}: a size is at least 1")
    _check_world(layout)
    _check_widths(config, layout)
    _check_depth(config, layout)
    _check_sequence(config, layout)
    _check_batch(layout)


def _check_world(layout: Layout) -> None:
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    if layout.world_size % (tp * pp * cp):
        raise UserError(
            f"{layout.world_size} processes cannot hold --tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x "
            f"--context-parallel-size {cp} = {tp * pp * cp}: start a multiple of {tp * pp * cp} processes (torchrun --nproc-per-node) or lower one of them"
        )
    if layout.world_size % (ep * etp * pp):
        raise UserError(
            f"{layout.world_size} processes cannot hold --expert-model-parallel-size {ep} x --expert-tensor-parallel-size {etp} x "
            f"--pipeline-model-parallel-size {pp} = {ep * etp * pp}: it must divide the number of processes; experts are spread over tensor, context and data "
            f"parallel ranks together"
        )


def _check_widths(config: HyConfig, layout: Layout) -> None:
    tp, ep, etp = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    for what, size, flag, parallel in (
        ("attention heads", config.num_attention_heads, "--tensor-model-parallel-size", tp),
        ("hidden size", config.hidden_size, "--tensor-model-parallel-size", tp),
        ("dense feed-forward width", config.intermediate_size, "--tensor-model-parallel-size", tp),
        ("shared expert width", config.shared_expert_intermediate_size, "--tensor-model-parallel-size", tp),
        ("experts", config.num_experts, "--expert-model-parallel-size", ep),
        ("expert feed-forward width", config.moe_intermediate_size, "--expert-tensor-parallel-size", etp),
    ):
        if size % parallel:
            raise UserError(f"{flag} {parallel} does not divide the model's {size} {what}; it may be {_divisors(size)}")
    groups = config.num_key_value_heads
    if groups % tp:
        raise UserError(f"--tensor-model-parallel-size {tp} does not divide the model's {groups} query groups (key/value heads); it may be {_divisors(groups)}")


def _check_depth(config: HyConfig, layout: Layout) -> None:
    pp, vpp, layers = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size, config.num_hidden_layers
    if vpp is not None and vpp > 1:
        if pp == 1:
            raise UserError("interleaved stages (--num-virtual-stages-per-pipeline-rank) need --pipeline-model-parallel-size 2 or more")
        if not layout.overlap_p2p_comm and pp == 2:
            raise UserError(
                "--no-overlap-p2p-communication with interleaved stages and --pipeline-model-parallel-size 2 pairs the wrong messages; leave it out, or use 4 stages"
            )
        if layout.num_microbatches % pp:
            raise UserError(
                f"interleaved stages need the micro-batches of a step ({layout.num_microbatches}) to be a multiple of --pipeline-model-parallel-size {pp}; "
                f"change --global-batch-size"
            )
    if layout.pipeline_model_parallel_layout is not None:
        return
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    middle_layers = layers - (first or 0) - (last or 0)
    middle_stages = pp - (first is not None) - (last is not None)
    stages = middle_stages * (vpp or 1)
    if middle_layers < 0 or middle_stages < 0 or (middle_stages == 0 and middle_layers) or (stages and (middle_layers == 0 or middle_layers % stages)):
        # An uneven first or last stage is cut into its own virtual stages by Megatron.
        over = f"{pp} stages" if not vpp else f"{pp} x {vpp} virtual stages"
        given = "" if first is None and last is None else f" (first {first}, last {last})"
        raise UserError(
            f"--pipeline-model-parallel-size {pp}: {layers} layers do not divide over {over}{given}; use {_divisors(layers)} stages in all, or set "
            f"--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout"
        )
    for flag, size in (("--decoder-first-pipeline-num-layers", first), ("--decoder-last-pipeline-num-layers", last)):
        if size is not None and (size < 1 or size % (vpp or 1)):
            raise UserError(f"{flag} {size} must be positive and a multiple of the {vpp or 1} virtual stages of a rank")


def _check_sequence(config: HyConfig, layout: Layout) -> None:
    s, tp, cp = layout.seq_length, layout.tensor_model_parallel_size, layout.context_parallel_size
    if s > config.max_position_embeddings:
        raise UserError(f"--seq-length {s} exceeds the model's context of {config.max_position_embeddings} (max_position_embeddings in config.json)")
    # Each context-parallel rank takes two chunks, and tensor-parallel ranks share what it has (sequence parallelism).
    multiple = (2 * cp if cp > 1 else 1) * tp
    if s % multiple:
        nearest = max(multiple, round(s / multiple) * multiple)
        raise UserError(
            f"--seq-length {s} is no multiple of {multiple} = {'2 x context x ' if cp > 1 else ''}tensor parallel size ({f'2 x {cp} x ' if cp > 1 else ''}{tp}); "
            f"use {nearest}"
        )


def _check_batch(layout: Layout) -> None:
    step = layout.micro_batch_size * layout.data_parallel_size
    if layout.global_batch_size < 1 or layout.global_batch_size % step:
        below = layout.global_batch_size // step * step
        choices = f"{below} or {below + step}" if below > 0 else f"{step}"
        raise UserError(
            f"--global-batch-size {layout.global_batch_size} is no multiple of --micro-batch-size {layout.micro_batch_size} x data-parallel size "
            f"{layout.data_parallel_size} = {step}; use {choices}"
        )


def _divisors(n: int) -> str:
    found = [d for d in range(1, n + 1) if n % d == 0]
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
