"""How long, how often and how fast: what Megatron's learning-rate scheduler and training loop assert late."""

import argparse
import math

from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches

from hymeg.errors import UserError
from hymeg.progress import Say
from hymeg.training.flag_names import flag

# A count of iterations or samples; what is 0 or less would divide by zero or never happen.
_AT_LEAST_1 = """train_iters train_samples train_epochs lr_decay_iters lr_decay_samples lr_wsd_decay_iters
    lr_wsd_decay_samples eval_interval log_interval tensorboard_log_interval save_interval save_hf_interval
    save_retain_interval exit_interval valid_generate keep_last eval_global_batch_size eval_micro_batch_size
    num_dataset_builder_threads dist_ckpt_workers make_vocab_size_divisible_by distributed_timeout_minutes
    exit_duration_in_mins recompute_num_layers fault_injector_num_ranks lora_rank ckpt_step log_memory_interval
    check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval non_persistent_save_interval
    save_activations_interval save_dgrads_interval save_params_interval save_tokens_per_expert_interval
    save_wgrads_interval mlp_chunks_for_training"""
_AT_LEAST_0 = """lr min_lr lr_warmup_init decoupled_lr decoupled_min_lr lr_warmup_iters lr_warmup_samples clip_grad
    adam_eps weight_decay start_weight_decay end_weight_decay eval_iters num_workers init_method_std
    mtp_loss_scaling_factor moe_router_bias_update_rate"""
_BELOW_1 = "lr_warmup_fraction hidden_dropout attention_dropout adam_beta1 adam_beta2 lora_dropout"

_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_AT_LEAST_1.split(), (1, math.inf)),
    **dict.fromkeys(_AT_LEAST_0.split(), (0, math.inf)),
    **dict.fromkeys(_BELOW_1.split(), (0, math.nextafter(1, 0))),
    "seed": (1, 2**32 - 1),  # Megatron's _set_random_seed and numpy's
}
"""Destination -> the lowest and the highest value."""

_ADVICE = {
    "eval_interval": "; to evaluate never, give --eval-iters 0",
    "save_interval": "; to save never, leave --save out",
    "save_hf_interval": "; for the last iteration alone, leave it out",
}


def check_schedule(args: argparse.Namespace) -> None:
    """Raises UserError: a length, an interval or a rate that cannot work, alone or with the others."""
    _check_length(args)
    if args.lr is None:
        raise UserError("--lr is missing: give the peak learning rate, e.g. --lr 1e-5 for fine-tuning")
    for dest, (low, high) in _RANGES.items():
        value = getattr(args, dest)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"{flag(dest)} {value}: it must be {_allowed(low, high, value)}{_ADVICE.get(dest, '')}")
    _check_units(args)
    for dest in ("min_lr", "lr_warmup_init"):
        if getattr(args, dest) > args.lr:
            raise UserError(f"{flag(dest)} {getattr(args, dest)} exceeds --lr {args.lr}, the peak; lower it")
    _check_warmup(args)
    start, end, style = args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style
    if style != "constant" and (start is None or end is None or start > end):
        raise UserError(
            f"--weight-decay-incr-style {style} needs --start-weight-decay (found {start}) and --end-weight-decay "
            f"(found {end}), the first not above the second"
        )
    if style == "constant" and (start, end) != (None, None):
        raise UserError(
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine; for a "
            "constant use --weight-decay"
        )
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 are both given; keep --bf16, the precision these models are published in")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise UserError("--use-checkpoint-opt-param-scheduler and --override-opt-param-scheduler are given; keep one")
    if args.save_retain_interval is not None and args.save_retain_interval % (args.save_interval or 1):
        raise UserError(
            f"--save-retain-interval {args.save_retain_interval} is no multiple of --save-interval "
            f"{args.save_interval}; with {2 * args.save_interval} every second checkpoint is kept"
        )
    # From a recipe that several runs share it is only noted.
    if args.save is None and args.save_interval is not None and not args.explicit["save_interval"][1]:
        raise UserError(
            f"--save-interval {args.save_interval} without --save saves nothing; add --save FOLDER, or leave it out"
        )


def set_iterations(args: argparse.Namespace, num_sequences: int, say: Say) -> None:
    """`--train-epochs` in iterations, once the sequences of an epoch are counted. The last batch is filled up with the
    first sequences of the epoch that would come next: a run that goes on with more epochs goes on after these.

    Raises:
        UserError: all epochs do not fill one batch; a warmup as long as the training.
    """
    batch, total = args.global_batch_size, args.train_epochs * num_sequences
    if total < batch:
        raise UserError(
            f"--train-epochs {args.train_epochs}: {num_sequences:,} sequences an epoch do not fill one "
            f"--global-batch-size {batch}; lower that, or give more epochs or a shorter --seq-length"
        )
    args.train_iters = -(-total // batch)
    if args.save is not None and "save_interval" not in args.explicit:
        args.save_interval = args.train_iters
    beyond = args.train_iters * batch - total
    filled = f"; the last batch is filled up with {beyond:,} of the next epoch" if beyond else ""
    say(
        f"--train-iters {args.train_iters} set: --train-epochs {args.train_epochs} of {num_sequences:,} sequences, "
        f"{batch:,} an iteration{filled}"
    )
    _check_warmup(args)


def check_last_batch(args: argparse.Namespace) -> None:
    """Raises UserError where batches of several sizes end beyond `--train-samples`: there would be no samples for the
    last one. Megatron's calculator of batches must be there.
    """
    if args.step_batch_size_schedule is None:
        return
    consumed, last = 0, 0
    while consumed < args.train_samples:
        update_num_microbatches(consumed, consistency_check=False)
        last = get_current_global_batch_size()
        consumed += last
    update_num_microbatches(0, consistency_check=False)
    if consumed > args.train_samples:
        raise UserError(
            f"--train-samples {args.train_samples}: the batches of --step-batch-size-schedule "
            f"{args.step_batch_size_schedule} end at {consumed - last} or {consumed} samples; give one of these"
        )


def samples_to_the_end(args: argparse.Namespace, num_samples: tuple) -> tuple:
    """How many samples of training, validation and test data a run needs that goes on from what `args` hold of its
    checkpoint. Megatron's `num_samples` are those of one that was under these flags from its first iteration. Where
    more was evaluated than these flags ask for, or nothing is left to train, it asserts, or evaluation runs dry.
    """
    train, valid, test = num_samples
    if args.skip_train:
        return num_samples
    if not args.phase_transition_iterations:
        train = max(train, args.consumed_train_samples + 1)
    if valid is not None:
        done, end = max(args.iteration, (args.start_eval_at_iter or 0) - 1), args.train_iters
        evaluations = max(0, end // args.eval_interval - done // args.eval_interval) + 1
        valid = max(valid, args.consumed_valid_samples + evaluations * args.eval_iters * args.eval_global_batch_size)
    return train, valid, test


def _allowed(low: float, high: float, value: float) -> str:
    if high == math.inf:
        return f"{'a finite number, ' if isinstance(value, float) else ''}at least {low}"
    return f"from {low} to {high}" if high >= 1 else f"at least {low} and below 1"


def _check_length(args: argparse.Namespace) -> None:
    """One length of the training. That of the command line wins over another of the recipe, and so makes it None."""
    given = [dest for dest in ("train_iters", "train_samples", "train_epochs") if getattr(args, dest) is not None]
    if not given:
        raise UserError(
            "--train-iters is missing: say how long to train (or in --train-samples, or with --sft in --train-epochs)"
        )
    typed = [dest for dest in given if not args.explicit[dest][1]]
    for dest in set(given) - set(typed) if len(typed) == 1 else ():
        setattr(args, dest, None)
    if len(typed or given) > 1:
        raise UserError(f"{' and '.join(map(flag, typed or given))} are given; keep one")
    if args.train_samples is not None:
        return
    length = next(dest for dest in ("train_iters", "train_epochs") if getattr(args, dest) is not None)
    if args.phase_transition_iterations is not None:
        raise UserError(
            f"{flag(length)} {getattr(args, length)}: Megatron counts the last phase of "
            f"--phase-transition-iterations {args.phase_transition_iterations} in samples; give --train-samples"
        )
    if args.step_batch_size_schedule is not None:
        raise UserError(
            f"{flag(length)} {getattr(args, length)}: iterations, data and learning rate are counted for one batch "
            f"size, which --step-batch-size-schedule {args.step_batch_size_schedule} changes; give --train-samples"
        )


def _check_units(args: argparse.Namespace) -> None:
    """A schedule counts iterations or samples, never both."""
    unit, other = ("samples", "iters") if args.train_samples is not None else ("iters", "samples")
    length = "epochs" if args.train_epochs is not None else unit
    for name in ("lr_decay", "lr_wsd_decay", "lr_warmup"):
        if value := getattr(args, f"{name}_{other}"):
            wrong, right = flag(f"{name}_{other}"), flag(f"{name}_{unit}")
            raise UserError(
                f"{wrong} {value} does not go with --train-{length}: give {right}, so that both count {unit}"
            )


def _check_warmup(args: argparse.Namespace) -> None:
    unit = "samples" if args.train_samples is not None else "iters"
    warmup, decay, length = (getattr(args, f"{name}_{unit}") for name in ("lr_warmup", "lr_decay", "train"))
    if warmup and (fraction := args.lr_warmup_fraction) is not None:
        raise UserError(f"--lr-warmup-{unit} {warmup} and --lr-warmup-fraction {fraction} are both given; keep one")
    end = decay or length
    if end is not None and warmup >= end:
        until = f"--lr-decay-{unit} {decay}" if decay else f"--train-{unit} {length}"
        raise UserError(
            f"--lr-warmup-{unit} {warmup} is not below {until}: the learning rate would never reach its peak; lower it"
        )
    if args.lr_decay_style != "WSD":
        return
    last = getattr(args, f"lr_wsd_decay_{unit}")
    if last is None:
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: how long the decay at the end takes")
    if end is not None and last > end - (warmup or 0):
        raise UserError(
            f"--lr-wsd-decay-{unit} {last}, the decay at the end, is longer than what follows the warmup of "
            f"--lr-warmup-{unit} {warmup or 0} in {end} {unit}: the learning rate would never be at its peak; lower it"
        )
