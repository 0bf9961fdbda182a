"""What is checked, and what is corrected, before anything heavy: the settings that Megatron would refuse late, or run
wrongly. Cheap checks first.

Every check raises a `UserError` that names the flag, what was found, and what to do. What is corrected is said.
"""

import argparse
import importlib.util
import logging
import os
import re
import shutil

from hymeg.errors import UserError, about
from hymeg.hf.config import HyConfig
from hymeg.planning import layout as layouts
from hymeg.planning.settings import settings_of
from hymeg.platform import device
from hymeg.progress import Say
from hymeg.training.arguments import naming_lines
from hymeg.training.checkpoints import is_distributed_checkpoint
from hymeg.training.combinations import check_combinations
from hymeg.training.data_paths import check_writable, settle_data
from hymeg.training.flag_names import flag
from hymeg.training.freezing import check_freezing
from hymeg.training.hf_folders import check_save_hf
from hymeg.training.refusals import is_set, shown_flag
from hymeg.training.schedule import check_schedule
from hymeg.training.weights import check_weights

_VIRTUAL = "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank pipeline_model_parallel_layout"
_MANY_IDLE = 0.1  # of the experts, in a micro-batch
_DEEP_EP = ("deep_ep", "build it from github.com/deepseek-ai/DeepEP")
_NVRX = ("nvidia_resiliency_ext", "pip install 'hymeg[resiliency]'")
_EMERGING = "pip install 'emerging-optimizers @ git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers@v0.4.0'"
_PACKAGES = (
    ("transformer_impl=transformer_engine", "transformer_engine", "pip install 'hymeg[gpu]'"),
    ("moe_token_dispatcher_type=flex moe_flex_dispatcher_backend=deepep,hybridep", *_DEEP_EP),
    ("moe_enable_deepep", *_DEEP_EP),
    ("num_distributed_optimizer_instances>1", "einops", "pip install einops"),
    ("optimizer=muon,dist_muon,lion,soap,adaptive_muon", "emerging_optimizers", _EMERGING),
    ("async_save async_strategy=nvrx", _NVRX[0], f"{_NVRX[1]}, or give --async-strategy mcore"),
    ("non_persistent_ckpt_type=local", *_NVRX),
    ("enable_ft_package", *_NVRX),
    ("fault_injector_ranks", *_NVRX),
    ("fault_injector_num_ranks", *_NVRX),
    ("log_straggler", "pynvml", "pip install nvidia-ml-py"),
    ("log_energy", "pynvml", "pip install nvidia-ml-py"),
    ("wandb_project", "wandb", "pip install 'hymeg[wandb]'"),
)
"""What asks for a package, in words as of `hymeg.flag_table.Row.needs`, which must all hold; its name; where it is."""


def preflight(args: argparse.Namespace, config: HyConfig, say: Say) -> None:
    """Check and correct `args` (parsed, not validated by Megatron yet).

    Args:
        say: told one line for every setting that was corrected.

    Raises:
        UserError: a setting that cannot work.
    """
    with naming_lines(args.explicit):
        check_schedule(args)
        _check_devices()
        layout = layout_of(args)
        layouts.check(config, layout, settings_of(args))
        _check_evaluation(args, layout)
        check_combinations(args)
        _check_packages(args)
        _check_build_tools(args)
        if args.sft_rows:
            from hymeg.training.row_data import settle_rows  # imports transformers, which takes a second

            settle_rows(args)
        else:
            settle_data(args, config, say)
        _check_places(args)
        check_save_hf(args, config)
        _correct(args, say)
        _warn_of_idle_experts(args, config, layout, say)
        if args.lora_rank is None:
            check_freezing(args, config, say)
            check_weights(args, config, say)
        else:
            from hymeg.training.adapters import check_adapters  # imports the model

            check_adapters(args, config, say)
        from hymeg.hf.tokenizer import load_tokenizer  # and transformers, therefore checked last

        with about("--hf-model "):
            load_tokenizer(args.hf_model, config)
        if args.valid_translations is not None:
            from hymeg.training.translations import held_out_rows

            held_out_rows(args, config)


def layout_of(args: argparse.Namespace) -> layouts.Layout:
    """The layout that `args` describe; virtual stages may be given by their number on a rank or by their layers."""
    if args.seq_length is None:
        raise UserError("--seq-length is missing: give the tokens of a sample, e.g. --seq-length 4096")
    tp, pp, cp = (
        max(1, getattr(args, f"{name}_parallel_size")) for name in ("tensor_model", "pipeline_model", "context")
    )
    sizes = {field: getattr(args, field) for field in layouts.Layout.__dataclass_fields__ if hasattr(args, field)}
    sizes["virtual_pipeline_model_parallel_size"] = _virtual_stages(args, pp)
    if args.expert_tensor_parallel_size is None:
        sizes["expert_tensor_parallel_size"] = args.tensor_model_parallel_size
    if args.global_batch_size is None:
        sizes["global_batch_size"] = args.micro_batch_size * max(1, args.world_size // (tp * pp * cp))
    return layouts.Layout(**sizes)


def _virtual_stages(args: argparse.Namespace, pp: int) -> int | None:
    given = {flag(name): getattr(args, name) for name in _VIRTUAL.split() if getattr(args, name) is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(f'{option} {value}' for option, value in given.items())} are given; keep one")
    per_stage = args.num_layers_per_virtual_pipeline_stage
    if per_stage is None:
        return args.num_virtual_stages_per_pipeline_rank
    said = f"--num-layers-per-virtual-pipeline-stage {per_stage}"
    if args.decoder_first_pipeline_num_layers is not None or args.decoder_last_pipeline_num_layers is not None:
        raise UserError(f"{said} does not go with stages of unequal size; use --num-virtual-stages-per-pipeline-rank")
    layers = args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if per_stage < 1 or layers % (pp * per_stage):
        raise UserError(f"{said} x --pipeline-model-parallel-size {pp} does not divide {layers} layers; lower one")
    return layers // (pp * per_stage)


def _warn_of_idle_experts(args: argparse.Namespace, config: HyConfig, layout: layouts.Layout, say: Say) -> None:
    """Say where a micro-batch has too few tokens for its experts. The ranks of an expert-parallel group, whose tokens
    an expert sees, hold each a part of their sample under tensor and context parallelism.
    """
    ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    parts = layout.tensor_model_parallel_size * layout.context_parallel_size
    num_tokens = layout.micro_batch_size * args.seq_length * ranks / parts
    share = idle_share(num_tokens, config.num_experts_per_tok, config.num_experts)
    if share > _MANY_IDLE:
        each = num_tokens * config.num_experts_per_tok / config.num_experts
        say(
            f"a micro-batch gives an expert {each:.2g} tokens on average, and about {share:.0%} of the "
            f"{config.num_experts} experts none: raise --seq-length, --micro-batch-size or the expert-parallel size"
        )


def idle_share(num_tokens: float, top_k: int, num_experts: int) -> float:
    """The share of experts that none of `num_tokens` chooses, where each chooses `top_k` at random: (1 - k/E)^n."""
    return (1 - top_k / num_experts) ** num_tokens


def _check_devices() -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > device.count():
        raise UserError(
            f"torchrun --nproc-per-node {local}, but there are {device.count()} GPUs; start as many processes as GPUs"
        )


def _check_evaluation(args: argparse.Namespace, layout: layouts.Layout) -> None:
    batch = layout.global_batch_size if args.eval_global_batch_size is None else args.eval_global_batch_size
    micro = layout.micro_batch_size if args.eval_micro_batch_size is None else args.eval_micro_batch_size
    if batch % (micro * layout.data_parallel_size):
        raise UserError(
            f"--eval-global-batch-size {batch} is no multiple of --eval-micro-batch-size {micro} x data-parallel size "
            f"{layout.data_parallel_size}; use {micro * layout.data_parallel_size}"
        )


def _check_packages(args: argparse.Namespace) -> None:
    for needs, package, install in _PACKAGES:
        if all(is_set(vars(args), need) for need in needs.split()) and importlib.util.find_spec(package) is None:
            dest = re.match(r"\w+", needs)[0]
            said = shown_flag(flag(dest), getattr(args, dest))
            raise UserError(f"{said} needs {package}, which is not installed: {install}, or leave {flag(dest)} out")


def _check_build_tools(args: argparse.Namespace) -> None:
    """Megatron puts back what these modules gave through C++ that the first step compiles
    (tensor_parallel/random.py:69).
    """
    modules = [name for name in args.recompute_modules or () if name in ("layernorm", "moe_act")]
    if args.recompute_granularity == "selective" and modules and (tool := device.missing_build_tool()):
        how = "pip install ninja" if tool == "ninja" else "load the cluster's compiler, or name it in CXX"
        raise UserError(
            f"--recompute-modules {' '.join(modules)}: the first step compiles C++, and {tool} is not on PATH; {how}, "
            "or recompute other modules"
        )


def _check_places(args: argparse.Namespace) -> None:
    for name in ("te_precision_config_file", "nccl_communicator_config_path", "tp_comm_overlap_cfg"):
        path = getattr(args, name)
        if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            raise UserError(f"{flag(name)} {path}: no readable file; give one, or leave it out")
    if args.tensorboard_dir is not None:
        check_writable("--tensorboard-dir", args.tensorboard_dir)
    if args.wandb_project and not args.wandb_exp_name:  # Megatron finds it out on the last rank alone
        raise UserError(f"--wandb-project {args.wandb_project} needs a name for the run: add --wandb-exp-name NAME")
    if args.wandb_project and args.wandb_save_dir is None and args.save is None:
        raise UserError(f"--wandb-project {args.wandb_project} needs a folder to write to: --wandb-save-dir or --save")
    if args.save is not None and shutil.disk_usage(check_writable("--save", args.save)).free == 0:
        raise UserError(f"--save {args.save}: no space left on its disk; free some, or give another folder")


def _correct(args: argparse.Namespace, say: Say) -> None:
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        args.sequence_parallel = True
        say("--sequence-parallel set: experts under tensor parallelism need it")
    if args.load is not None and not args.override_opt_param_scheduler and not args.use_checkpoint_opt_param_scheduler:
        # A resume under another --train-iters or --lr would otherwise end in an assertion of the scheduler.
        args.override_opt_param_scheduler = True
        if args.explicit.keys() & {"train_iters", "train_epochs"} and is_distributed_checkpoint(args.load):
            say("--override-opt-param-scheduler set: the learning-rate schedule is the command's, not the checkpoint's")
    if args.wandb_project and args.tensorboard_dir is None:
        args.tensorboard_dir = os.path.join(args.wandb_save_dir or args.save, "tensorboard")
        say(
            f"--tensorboard-dir {args.tensorboard_dir} set: Megatron gives Weights & Biases losses, learning rate and "
            "gradient norm only when it writes them for TensorBoard too"
        )
    if args.log_straggler and "logging_level" not in args.explicit:
        args.logging_level = logging.INFO
        say(f"--logging-level {logging.INFO} set: Megatron tells the slowest ranks at that level")
    if args.save is None and args.save_interval is not None:
        say(f"--save-interval {args.save_interval} has no effect: without --save nothing is saved")
    if args.save is not None and args.save_interval is None and args.train_epochs is not None:
        args.save_interval = 2**31  # Megatron wants one; set once the iterations are known
    elif args.save is not None and args.save_interval is None:
        args.save_interval = args.train_iters or max(1, args.train_samples // (args.global_batch_size or 1))
        say(f"--save-interval {args.save_interval} set: one checkpoint, at the end")
