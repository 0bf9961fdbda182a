"""Flags that Megatron takes together, and fails on later, or lets one of them do nothing. What a single flag does is in
`hymeg/flag_table.py`.
"""

import argparse

from hymeg import platform
from hymeg.errors import UserError
from hymeg.training.checkpoints import is_distributed_checkpoint, tracked_step
from hymeg.training.flag_names import flag
from hymeg.training.refusals import named, shown_flag


def check_combinations(args: argparse.Namespace) -> None:
    """Raises UserError: flags that do not go together."""
    _check_saving(args)
    _check_profile(args)
    if args.sft_rows:
        _check_padding(args)
        _check_graphs(args)
    if args.ddp_average_in_collective and args.calculate_per_token_loss:
        raise UserError(
            "--ddp-average-in-collective takes a mean over ranks, and the loss is the mean over the tokens of a step; "
            "leave it out, or give --no-calculate-per-token-loss"
        )
    if args.hy_recompute_logits and args.cross_entropy_loss_fusion:
        raise UserError("--recompute-logits has no effect with --cross-entropy-loss-fusion, which keeps them; keep one")
    on_gpu = args.transformer_impl == "transformer_engine"
    if on_gpu and args.context_parallel_size > 1 and not (args.bf16 or args.fp16):
        raise UserError(
            f"--context-parallel-size {args.context_parallel_size} in fp32: Transformer Engine's attention has context "
            "parallelism in 16 bits only; add --bf16"
        )


def _check_saving(args: argparse.Namespace) -> None:
    if args.async_save and not args.use_persistent_ckpt_worker:
        raise UserError(
            "--async-save needs --use-persistent-ckpt-worker, or Megatron ignores it; add that, or leave it out"
        )
    if args.optimizer == "sgd" and args.save is not None and not args.no_save_optim:
        raise UserError(
            "--optimizer sgd: Megatron 0.19 saves its state, and cannot load it again; use adam, or add --no-save-optim"
        )
    if args.ckpt_step is not None and args.non_persistent_ckpt_type is not None:
        raise UserError(
            f"--ckpt-step {args.ckpt_step} with --non-persistent-ckpt-type {args.non_persistent_ckpt_type}: Megatron "
            "loads a newer non-persistent checkpoint instead; leave --non-persistent-ckpt-type out in this start"
        )
    removes = args.save is not None and args.save_retain_interval is not None and args.keep_last is None
    if removes and is_distributed_checkpoint(args.save) and tracked_step(args.save) is None:
        raise UserError(
            f"--save-retain-interval {args.save_retain_interval}: --save {args.save} holds a release, and Megatron "
            "fails in its first save there, where it looks for the iteration before; add --keep-last K, or give "
            f"another --save, with --pretrained-checkpoint {args.save}"
        )
    gathers = args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable
    if gathers and args.distrib_optim_fully_reshardable_mem_efficient and not args.use_gloo_process_groups:
        raise UserError(
            "--disable-gloo-process-groups: saves gather the optimizer's state over gloo; leave it out, or give "
            "--no-dist-ckpt-optim-fully-reshardable, or have each rank gather it in its GPU's memory: "
            "--no-distrib-optim-fully-reshardable-mem-efficient"
        )
    if gathers and args.non_persistent_ckpt_type == "local":
        raise UserError(
            "--non-persistent-ckpt-type local: Megatron fails in its first save where the optimizer's state is saved "
            "for any layout, hymeg's default; add --no-dist-ckpt-optim-fully-reshardable, or leave it out"
        )


def _check_profile(args: argparse.Namespace) -> None:
    if args.profile and args.profile_step_end <= args.profile_step_start:
        raise UserError(
            f"--profile-step-end {args.profile_step_end}: it must be above --profile-step-start "
            f"{args.profile_step_start}"
        )
    if args.use_pytorch_profiler and args.tensorboard_dir is None and not args.wandb_project:
        raise UserError("--use-pytorch-profiler writes to a folder beside --tensorboard-dir; add that")
    if args.profile and not args.use_pytorch_profiler and platform.judged_for_cpu():
        raise UserError("--profile cannot work on CPU: it starts CUDA's profiler; add --use-pytorch-profiler")


def _check_padding(args: argparse.Namespace) -> None:
    """Where Megatron calls the experts without the mask of padding (gpt/fine_grained_callables.py:130,
    transformer_layer.py:915).
    """
    unmasked = {"overlap_moe_expert_parallel_comm": args.overlap_moe_expert_parallel_comm}
    unmasked |= {"mlp_chunks_for_training": args.mlp_chunks_for_training > 1}
    for dest in filter(unmasked.get, unmasked):
        for cause in ("moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff"):
            if getattr(args, cause):
                with_what = shown_flag(flag(cause), getattr(args, cause))
                raise UserError(
                    f"{shown_flag(flag(dest), getattr(args, dest))} with --sft and {with_what}: padding would count "
                    "there, which Megatron does not tell the experts; leave one out"
                )


def _check_graphs(args: argparse.Namespace) -> None:
    """CUDA graphs hold what is the same in each step: where conversations begin and end is not."""
    graphs = {dest for dest in ("enable_cuda_graph", "external_cuda_graph") if getattr(args, dest)}
    graphs |= {"cuda_graph_impl"} if args.cuda_graph_impl != "none" else set()
    if not graphs:
        return
    dest = min(graphs)
    said = shown_flag(flag(dest), getattr(args, dest))
    if args.cuda_graph_impl == "full_iteration":
        raise UserError(f"{said} with --sft: conversations are read on the CPU in each step; leave {flag(dest)} out")
    modules = named(args.cuda_graph_modules or args.cuda_graph_scope_deprecated or ["attn"])
    if args.packed and "attn" in modules:
        raise UserError(
            f"{said} with --sft: packed conversations begin and end elsewhere in each step, and a graph of attention "
            "does not; give --no-sft-packing, or --cuda-graph-modules without attn"
        )
