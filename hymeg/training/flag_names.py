"""Names of flags: the right one for a wrong one, and the opposite of a switch."""

import argparse
import difflib
from collections.abc import Iterable

# What people type who come from papers, other trainers or Megatron-Bridge, without the "-size" that it may end with.
_ELSEWHERE = {
    "tensor-model-parallel-size": "tp tensor-parallel tensor-model-parallel model-parallel num-tp",
    "pipeline-model-parallel-size": "pp pipeline-parallel pipeline-model-parallel num-stages",
    "context-parallel-size": "cp context-model-parallel ring-attention",
    "expert-model-parallel-size": "ep expert-parallel moe-parallel",
    "expert-tensor-parallel-size": "etp expert-tensor-model-parallel",
    "num-virtual-stages-per-pipeline-rank": "vpp vp virtual-pipeline-model-parallel "
    "virtual-pipeline-parallel interleave",
    "sequence-parallel": "sp",
    "micro-batch-size": "mbs micro-batch per-device-train-batch train-micro-batch train-micro-batch-size-per-gpu",
    "global-batch-size": "gbs global-batch train-batch total-batch gradient-accumulation "
    "gradient-accumulation-steps grad-accum",
    "seq-length": "seq-len sequence-length max-seq-len max-seq-length max-length model-max-length context-length",
    "train-iters": "steps max-steps train-steps num-steps iters num-iters total-steps iterations",
    "train-epochs": "epochs num-epochs num-train-epochs max-epochs",
    "lr": "learning-rate max-lr peak-lr",
    "min-lr": "end-lr final-lr lr-min",
    "lr-warmup-iters": "warmup-steps warmup-iters num-warmup-steps lr-warmup-steps",
    "lr-warmup-fraction": "warmup-ratio warmup-fraction",
    "lr-decay-style": "lr-scheduler lr-scheduler-type scheduler lr-schedule",
    "clip-grad": "grad-clip gradient-clipping max-grad-norm gradient-clip-val clip-grad-norm",
    "adam-beta1": "beta1 betas adam-betas",
    "adam-beta2": "beta2",
    "weight-decay": "wd",
    "hf-model": "model model-path model-name model-name-or-path pretrained-model hf-path hf-checkpoint hf tokenizer "
    "tokenizer-path tokenizer-name",
    "load": "resume resume-from resume-from-checkpoint checkpoint ckpt checkpoint-dir load-dir load-path "
    "init-checkpoint",
    "save": "output output-dir out save-dir save-path checkpoint-save-dir",
    "save-interval": "save-steps save-every checkpoint-interval ckpt-interval",
    "log-interval": "logging-steps log-every log-steps",
    "eval-interval": "eval-steps eval-every val-interval val-check-interval",
    "data-path": "data dataset data-dir train-data train-file dataset-path data-prefix",
    "fp8-format": "fp8",
    "bf16": "bfloat16 dtype precision mixed-precision params-dtype",
    "recompute-granularity": "recompute gradient-checkpointing activation-checkpointing grad-checkpointing",
    "moe-token-dispatcher-type": "moe-dispatcher token-dispatcher dispatcher",
    "moe-router-topk": "topk top-k moe-topk num-experts-per-tok",
    "use-distributed-optimizer": "distributed-optimizer zero zero-stage zero1",
    "attention-backend": "flash-attn flash-attention attn-implementation use-flash-attention attn-backend",
    "tensorboard-dir": "tensorboard tb-dir log-dir logging-dir",
    "config": "cfg config-file yaml recipe",
    "init-from-scratch": "from-scratch random-init scratch random-weights",
}
_BY_NAME = {name: right for right, names in _ELSEWHERE.items() for name in names.split()}
_TORCHRUN = (
    "nproc-per-node nproc nnodes node-rank master-addr master-port rdzv-endpoint rdzv-backend rdzv-id standalone "
    "max-restarts num-gpus gpus"
)


def hint(wrong: str, options: Iterable[str]) -> str:
    """What to do about the unknown flag `wrong` (with or without dashes in front), as `"; did you mean --right-name?"`;
    nothing when none of `options`, with their dashes, is near.
    """
    name = plain(wrong)
    options = [option for option in options if option.startswith("--")]
    by_name = {plain(option): option for option in options}
    for candidate in (name, name.removesuffix("-size")):
        if candidate in _TORCHRUN.split():
            return "; that is torchrun's, and goes before pretrain_hy.py"
        right = candidate if candidate in by_name else _BY_NAME.get(candidate)
        if right in by_name:
            return f"; did you mean {by_name[right]}?"
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    return f"; did you mean {by_name[near[0]]}?" if near else ""


def plain(flag: str) -> str:
    """`--Flag_Name` as `flag-name`."""
    return flag.lstrip("-").replace("_", "-").lower()


def flag(dest: str) -> str:
    """The flag of an argparse destination, where the two agree, as most do."""
    return f"--{dest.replace('_', '-')}"


def opposite(option: str) -> str:
    """`--x` for `--no-x`, `--no-x` for `--x`."""
    return f"--{option[5:]}" if option.startswith("--no-") else f"--no-{option[2:]}"


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """Give every switch its opposite, which few of Megatron's have, to undo what a recipe or a default has set."""
    hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for action in list(parser._actions):
        if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
            opposites = map(opposite, action.option_strings)
            if free := [option for option in opposites if option not in parser._option_string_actions]:
                undo = "store_false" if action.const else "store_true"
                parser.add_argument(*free, dest=action.dest, action=undo, **hidden)
