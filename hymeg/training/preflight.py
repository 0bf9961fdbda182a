"""What is checked, and what is corrected, before anything heavy: the layout, the files, the settings that Megatron would run wrongly.

Every check raises a `UserError` that names the flag, what was found, and what to do. What is corrected is said, in one place, on rank 0.
"""

import argparse
import os
import shutil
from collections.abc import Callable

import torch

from hymeg import platform
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.tokenizer import load_tokenizer
from hymeg.planning import layout as layouts
from hymeg.training.weights import check_weights


def preflight(args: argparse.Namespace, config: HyConfig, say: Callable[[str], None]) -> None:
    """Check and correct `args` (parsed, not validated by Megatron yet).

    Args:
        say: told one line for every setting that was corrected.

    Raises:
        UserError: a setting that cannot work.
    """
    _check_schedule(args)
    _check_devices(args)
    layouts.check(config, layout_of(args))
    _check_recompute(args)
    _correct(args, say)
    _check_data(args)
    load_tokenizer(args.hf_model, config)
    check_weights(args, config)
    _check_save(args)


def layout_of(args: argparse.Namespace) -> layouts.Layout:
    """The layout that `args` describe. A virtual size may be given as stages per rank or as layers per virtual stage."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    vpp = args.num_virtual_stages_per_pipeline_rank
    per_stage = args.num_layers_per_virtual_pipeline_stage
    if per_stage is not None:
        if per_stage < 1 or args.num_layers % (pp * per_stage):
            raise UserError(
                f"--num-layers-per-virtual-pipeline-stage {per_stage}: {args.num_layers} layers are no multiple of {per_stage} x --pipeline-model-parallel-size {pp}"
            )
        vpp = args.num_layers // (pp * per_stage)
    if args.seq_length is None:
        raise UserError("--seq-length is missing: give the tokens of a sample, e.g. --seq-length 4096")
    for flag in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "micro_batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: a size is at least 1")
    data_parallel_size = max(1, args.world_size // (tp * pp * cp))
    return layouts.Layout(
        world_size=args.world_size,
        seq_length=args.seq_length,
        global_batch_size=args.micro_batch_size * data_parallel_size if args.global_batch_size is None else args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=tp if args.expert_tensor_parallel_size is None else args.expert_tensor_parallel_size,
        decoder_first_pipeline_num_layers=args.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=args.decoder_last_pipeline_num_layers,
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
        overlap_p2p_comm=args.overlap_p2p_comm,
    )


def _check_schedule(args) -> None:
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing: say how long to train, in iterations (or in samples with --train-samples)")
    if args.train_iters is not None and args.train_samples is not None:
        raise UserError("--train-iters and --train-samples are both given; keep one")
    if args.lr is None:
        raise UserError("--lr is missing: give the peak learning rate, e.g. --lr 1e-5 for fine-tuning")
    if args.min_lr is not None and args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr} exceeds --lr {args.lr}; lower it")
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 are both given; keep --bf16, the precision these models are published in")


def _check_devices(args) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not platform.is_cpu() and local > torch.cuda.device_count():
        raise UserError(
            f"torchrun --nproc-per-node {local}, but this machine shows {torch.cuda.device_count()} GPUs; start as many processes as GPUs"
        )


def _check_recompute(args) -> None:
    if args.recompute_granularity == "full" and args.recompute_method is None:
        raise UserError("--recompute-granularity full needs --recompute-method uniform or block, and --recompute-num-layers")
    if args.recompute_granularity == "full" and args.recompute_num_layers is None:
        raise UserError("--recompute-granularity full needs --recompute-num-layers: how many layers a recomputed piece holds, 1 saves most")
    if args.recompute_granularity != "full" and args.recompute_method is not None:
        raise UserError(f"--recompute-method {args.recompute_method} goes with --recompute-granularity full only; leave it out or add that")


def _correct(args, say) -> None:
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        args.sequence_parallel = True
        say("--sequence-parallel set: experts under tensor parallelism need it")
    if args.eod_mask_loss and args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        args.calculate_per_token_loss = True
        say("--calculate-per-token-loss set: with masked tokens the loss would otherwise depend on the context-parallel size")
    if args.load is not None and not args.override_opt_param_scheduler and not args.use_checkpoint_opt_param_scheduler:
        # A resume under another --train-iters or --lr would otherwise end in an assertion of the scheduler.
        args.override_opt_param_scheduler = True
        if "train_iters" in args.explicit and os.path.isfile(os.path.join(args.load, "latest_checkpointed_iteration.txt")):
            say("--override-opt_param-scheduler set: the learning-rate schedule is this command's, not the checkpoint's")
    if args.save is not None and args.save_interval is None:
        args.save_interval = args.train_iters or max(1, args.train_samples // (args.global_batch_size or 1))
        say(f"--save-interval {args.save_interval} set: one checkpoint, at the end")


def _check_data(args) -> None:
    for flag in ("reset_attention_mask", "dataloader_inter_document_masking"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} is not supported: attention is causal over the whole sample; leave it out")
    lists = {flag: getattr(args, flag) for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path") if getattr(args, flag)}
    files = [flag for flag in ("data_args_path", "per_split_data_args_path") if getattr(args, flag)]
    if args.mock_data and (lists or files):
        raise UserError(f"--mock-data and --{next(iter([*lists, *files])).replace('_', '-')} are both given; keep one source of data")
    if not args.mock_data and not lists and not files:
        raise UserError("no data: give --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data for random tokens")
    for name in files:
        if not os.access(getattr(args, name), os.R_OK):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: no such readable file")
    for name, entries in lists.items():
        for prefix in _prefixes(name, entries):
            _check_prefix(name.replace("_", "-"), prefix)


def _prefixes(name: str, entries: list[str]) -> list[str]:
    """The data sets of a blend: 'prefix prefix ...' or 'weight prefix weight prefix ...'."""
    flag = name.replace("_", "-")
    weights = [_number(word) for word in entries[0::2]]
    if len(entries) % 2 == 0 and all(weight is not None for weight in weights):
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"--{flag}: weights {entries[0::2]} must not be negative, nor all zero")
        return entries[1::2]
    odd = next((word for word in entries if _number(word) is not None), None)
    if odd is not None:
        raise UserError(f"--{flag}: found the weight {odd}, but not before every data set; write WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes alone")
    return entries


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check_prefix(flag: str, prefix: str) -> None:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix) and os.path.isfile(prefix):
            raise UserError(f"--{flag} {prefix}: give the prefix without {suffix}: {prefix.removesuffix(suffix)}")
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            near = (
                f"; did you mean {prefix}_text_document?"
                if os.path.isfile(prefix + "_text_document.idx")
                else "; make it with tools/preprocess_data.py"
            )
            raise UserError(f"--{flag} {prefix}: no file {prefix}{suffix}{near}")
        if not os.access(prefix + suffix, os.R_OK):
            raise UserError(f"--{flag} {prefix}: {prefix}{suffix} is not readable by this user")


def _check_save(args) -> None:
    if args.save is None:
        return
    if os.path.exists(args.save) and not os.path.isdir(args.save):
        raise UserError(f"--save {args.save}: a file stands there; give a folder")
    parent = os.path.abspath(args.save)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--save {args.save}: {parent} is not writable by this user")
    if shutil.disk_usage(parent).free == 0:
        raise UserError(f"--save {args.save}: no space left on its disk")
