"""hymeg's own flags, beside Megatron's, and where its defaults differ from Megatron's."""

import argparse
import logging

from hymeg.checkpoint.adapter_settings import SCALINGS
from hymeg.data.packing import TRUNCATIONS
from hymeg.training.flag_names import add_opposites

DEFAULTS = {
    "micro_batch_size": 1,
    "log_throughput": True,
    # Megatron's INFO lists every parameter of every gradient bucket.
    "logging_level": logging.WARNING,
    "enable_one_logger": False,
    "eval_interval": 1000,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    # Attention kernels know the causal mask; a dense one costs seq_length^2 bytes a sample.
    "create_attention_mask_in_dataloader": False,
    # A mean over micro-batches or ranks, each with its own number of trained tokens, would depend on the layout.
    "calculate_per_token_loss": True,
    # The optimizer's state can then be resumed in any layout. By default every rank would gather, over NCCL and in its
    # GPU's memory, the state of all ranks that hold the same parameters; so only the first of them does, over gloo.
    "dist_ckpt_optim_fully_reshardable": True,
    "distrib_optim_fully_reshardable_mem_efficient": True,
    # Transformer Engine refuses to load the state of Megatron's default, delayed.
    "fp8_recipe": "blockwise",
}
"""Where hymeg's default differs from Megatron's."""

LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("shared_mlp.gate_proj", "shared_mlp.up_proj", "shared_mlp.down_proj"),
)
"""What every token goes through. The routed experts, an adapter each, are many parameters."""


_FLAGS = {
    "--config FILE.yaml": "recipe: these flags as keys of a flat YAML file; the command line wins, and undoes a switch "
    "with --no-SWITCH",
    "--hf-model DIR": "folder with config.json and tokenizer: sets the architecture and the tokenizer",
    "--init-from-scratch": "start from random weights where --load holds no checkpoint",
    "--save-hf DIR": "write the model as a Hugging Face folder, DIR/iter_0000100, after the last iteration, "
    "from rank 0",
    "--save-hf-interval N": "--save-hf: and after every N iterations",
    "--fall-back-to-older-checkpoint": "verify what --load names before it is loaded, and where it is damaged or not "
    "complete take the newest older iteration that is neither",
    "--valid-translations FILE.jsonl": "held-out rows that the model answers at every evaluation; its texts are judged "
    "(chrF, BLEU, alarms)",
    "--valid-generate N": "--valid-translations: how many of its rows, spread evenly over it (default: 64)",
    "--keep-last K": "--save: remove older checkpoints once a newer one is complete, but for the newest K, every "
    "multiple of --save-retain-interval, and the one that was loaded",
    "--recompute-logits": "compute the logits a second time in the backward pass: saves 2 bytes a token and vocabulary "
    "entry, costs a third more time in the head",
    "--train-epochs N": "--sft: in place of --train-iters, as many as N passes over the training data take",
    "--no-sft-packing": "--sft: one conversation a sequence, padded",
    "--sft-truncation HOW": "--sft: what to do with conversations longer than --seq-length: stop, cut their beginning "
    "or their end, leave them out",
    "--sft-bad-rows HOW": "--sft: what to do with rows that cannot be trained on: stop at the first, or count and "
    "leave them out",
    "--freeze PATTERN ...": "keep the parameters of these published names as they are, * and ? as in a shell: "
    "'*.experts.*' 'model.layers.0.*'",
    "--train-only PATTERN ...": "keep all the others as they are",
    "--lora-rank R": "train adapters (LoRA) of this rank beside the frozen weights; a save then holds these only",
    "--lora-alpha A": "their weight: A / R (twice the rank where nothing is said)",
    "--lora-targets NAME ...": "what has an adapter, by Hugging Face names: q_proj, mlp.gate_proj (dense layers), "
    "shared_mlp.gate_proj, experts.gate_proj, gate_proj for all three, mtp.q_proj; by default all that every token "
    "goes through, that is all but the routed experts",
    "--train-also PATTERN ...": "--lora-rank: train these parameters in full beside the adapters, by patterns as of "
    "--train-only: norms, routers, lm_head.weight (peft's modules_to_save)",
    "--lora-dropout P": "dropout of what goes into the adapters",
    "--lora-scaling HOW": "lora: alpha / rank; rslora: alpha / sqrt(rank), for high ranks",
}
"""Each flag, as a switch or with what stands behind it ("...": several words), and its help."""
_TYPES = {"N": int, "K": int, "R": int, "A": float, "P": float}
_MORE = {
    "--valid-generate": {"default": 64},
    "--recompute-logits": {"dest": "hy_recompute_logits"},
    "--no-sft-packing": {"dest": "sft_packing", "action": "store_false"},
    "--sft-truncation": {"choices": TRUNCATIONS, "default": "error", "metavar": None},
    "--sft-bad-rows": {"choices": ("stop", "skip"), "default": "stop", "metavar": None},
    "--lora-targets": {"default": list(LORA_TARGETS)},
    "--lora-dropout": {"default": 0.0},
    "--lora-scaling": {"choices": SCALINGS, "default": "lora", "metavar": None},
}


def add_hymeg_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("hymeg")
    for usage, text in _FLAGS.items():
        option, *values = usage.split()
        settings = {"metavar": values[0], "type": _TYPES.get(values[0])} if values else {"action": "store_true"}
        if values[1:]:
            settings["nargs"] = "+"
        group.add_argument(option, help=text, **settings | _MORE.get(option, {}))
    add_opposites(parser)
    return parser
