"""A rank's model and its DDP buffers as Megatron builds them, on the meta device in a process group that does not
exist: no memory, no other process. And where the planner's arithmetic differs.

The local layer spec is built, whose parameters are Transformer Engine's in number and size (tests/layer_specs). The
process can build no other world while one is open, and must have none of its own.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from hymeg import platform

platform.install()

import torch  # noqa: E402
from exact_memory import ExactSettings, buffers_of_chunk, chunk_parameters, shard_numel  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.arguments import validate_args  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from hymeg.flag_table import ON_CPU, TABLE, cpu_values  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.models.hy import construct  # noqa: E402
from hymeg.planning.layout import Layout  # noqa: E402
from hymeg.planning.parameters import chunk_numel  # noqa: E402
from hymeg.planning.stages import stages  # noqa: E402
from hymeg.platform import device  # noqa: E402
from hymeg.training.arguments import _parser  # noqa: E402
from hymeg.training.run import model_config_from_args  # noqa: E402


class Built(NamedTuple):
    """What one rank holds, in elements; dense parameters and experts apart."""

    parameters: tuple[int, int]
    buffers: tuple[int, int]  # DDP's, with padding
    shards: tuple[int, int]  # whose optimizer state the rank keeps
    num_chunks: int


@contextlib.contextmanager
def world(args: argparse.Namespace, rank: int) -> Iterator[ProcessGroupCollection]:
    """Be `rank` of a world of `args.world_size` processes (`args` validated by Megatron)."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def validated_for_cpu(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of `args`, as parsed for a GPU, with which the model can be constructed here. Gradients keep their
    dtype.
    """
    args = copy.copy(args)
    defaults = {one.dest: one.default for one in _parser()._actions if one.default is not argparse.SUPPRESS}
    refused = {dest for row in TABLE if row.when == ON_CPU and not row.values for dest in row.dests.split()}
    values = {dest: defaults[dest] for dest in refused} | cpu_values()
    vars(args).update({dest: value for dest, value in values.items() if dest in vars(args)})
    args.main_grads_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype, args.main_params_dtype = (
        "fp32",
        "fp32",
        "fp32",
        "fp32",
    )
    args.recompute_granularity = args.recompute_method = args.recompute_num_layers = args.recompute_modules = None
    args.sequence_parallel = args.tensor_model_parallel_size > 1
    args.mock_data, args.data_path, args.save = True, None, None
    args.train_iters, args.train_samples, args.lr_warmup_fraction, args.lr_decay_iters = (
        args.train_iters or 1,
        None,
        None,
        None,
    )
    args.lr = args.lr or 1e-5
    destroy_num_microbatches_calculator()
    with quiet():
        validate_args(args)
    return args


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Megatron prints, logs and warns of as it sets up."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def build(args: argparse.Namespace, pipeline_rank: int) -> Built:
    """The first rank of a pipeline stage.

    Args:
        args: validated by `validated_for_cpu`.
    """
    pp = args.pipeline_model_parallel_size
    step = (
        args.tensor_model_parallel_size * args.context_parallel_size
        if args.use_tp_pp_dp_mapping
        else args.world_size // pp
    )
    with quiet(), world(args, pipeline_rank * step) as groups, device.on_meta():
        chunks = _chunks(model_config_from_args(args), args, groups)
        for chunk in chunks:
            chunk.model_type = ModelType.encoder_or_decoder
        return _measured(chunks, _wrapped(chunks, args, groups), args)


def _chunks(config, args: argparse.Namespace, groups: ProcessGroupCollection) -> list[torch.nn.Module]:
    config.transformer.perform_initialization = False
    stages = args.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages or 1):
        if stages is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunks.append(construct(config, groups, vp_stage=stage if stages else None))
    return [chunk.bfloat16() for chunk in chunks] if args.bf16 else chunks


def _wrapped(chunks: list[torch.nn.Module], args: argparse.Namespace, groups: ProcessGroupCollection) -> list:
    """As Megatron's get_model wraps them (training.py:1843)."""
    ddp = training.get_megatron_ddp_config(args)
    num_parameters = sum(parameter.nelement() for chunk in chunks for parameter in chunk.parameters())
    ddp.bucket_size = training.resolve_ddp_bucket_size(ddp, groups.dp_cp, ddp.overlap_grad_reduce, num_parameters)
    is_first = parallel_state.get_pipeline_model_parallel_rank() == 0
    return training.wrap_model_chunks_with_ddp(
        chunks,
        chunks[0].config,
        ddp,
        bucket_sizes=[ddp.bucket_size if is_first and number == 0 else None for number in range(len(chunks))],
        disable_bucketing_per_chunk=[number > 0 for number in range(len(chunks))],
    )


def _measured(chunks: list[torch.nn.Module], wrapped: list, args: argparse.Namespace) -> Built:
    parameters, buffers, shards = [0, 0], [0, 0], [0, 0]
    for chunk, ddp in zip(chunks, wrapped, strict=True):
        for parameter in chunk.parameters():
            parameters[not getattr(parameter, "allreduce", True)] += parameter.numel()
        for is_expert, of_kind in enumerate((ddp.buffers, ddp.expert_parallel_buffers)):
            for buffer in of_kind:
                buffers[is_expert] += buffer.grad_data.numel()
                shards[is_expert] += _shard(buffer) if args.use_distributed_optimizer else buffer.grad_data.numel()
    return Built(tuple(parameters), tuple(buffers), tuple(shards), len(chunks))


def _shard(buffer) -> int:
    """Elements of parameters in this rank's part of the buffer, by the distributed optimizer's own map."""
    (ranges,) = DistributedOptimizer._build_gbuf_range_map(buffer).values()
    return sum(part["param"].size for bucket in ranges for part in bucket["param_map"].values())


def differences(
    args: argparse.Namespace, config: HyConfig, layout: Layout, settings: ExactSettings, pipeline_ranks: list[int]
) -> list[str]:
    """Where arithmetic (`exact_memory`, `hymeg.planning`) and the built stages differ: one line each; empty when all is
    equal.

    Args:
        args: as parsed for a GPU; layout and settings are put into a copy.
    """
    args = copy.copy(args)
    for name, value in vars(layout).items():
        if name in vars(args):
            setattr(args, name, value)
    args.num_virtual_stages_per_pipeline_rank = layout.virtual_pipeline_model_parallel_size
    args.num_layers_per_virtual_pipeline_stage = None
    for name in ("bf16", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        setattr(args, name, getattr(settings, name))
    args.grad_reduce_in_bf16 = settings.bf16 and not settings.grads_in_fp32
    args, local = validated_for_cpu(args), dataclasses.replace(settings, transformer_impl="local")
    found = []
    for rank in pipeline_ranks:
        built, expected = build(args, rank), expected_build(config, layout, local, rank)
        found += [
            f"stage {rank}: {name} {a}, by arithmetic {b}"
            for name, a, b in zip(Built._fields, built, expected, strict=True)
            if a != b
        ]
        chunks = stages(config, layout)[rank]
        held = tuple(map(sum, zip(*(chunk_numel(config, layout, local, chunk) for chunk in chunks), strict=True)))
        if held != built.parameters:
            found.append(f"stage {rank}: parameters {built.parameters}, the planner has {held}")
    return found


def expected_build(config: HyConfig, layout: Layout, settings: ExactSettings, pipeline_rank: int) -> Built:
    """What `build` should find, by arithmetic."""
    parameters, buffers, shards = [0, 0], [0, 0], [0, 0]
    chunks = stages(config, layout)[pipeline_rank]
    for virtual_stage, chunk in enumerate(chunks):
        for parameter in chunk_parameters(config, layout, settings, chunk):
            parameters[parameter.is_expert] += parameter.numel
        for buffer in buffers_of_chunk(config, layout, settings, chunk, pipeline_rank, virtual_stage):
            buffers[buffer.is_expert] += buffer.numel
            shards[buffer.is_expert] += shard_numel(buffer, 0) if settings.use_distributed_optimizer else buffer.numel
    return Built(tuple(parameters), tuple(buffers), tuple(shards), len(chunks))
