"""From the command line to Megatron's training loop."""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from hymeg import platform
from hymeg.checkpoint.companions import carried_files, carry
from hymeg.errors import UserError, exit_on_user_error
from hymeg.hf.config import HyConfig
from hymeg.launch import rank
from hymeg.models.freezing import freeze
from hymeg.models.hy import HyModelConfig, HyTransformerConfig
from hymeg.models.specs import uses_transformer_engine
from hymeg.platform import device
from hymeg.training import metrics, once, save_lock
from hymeg.training.adapters import training_adapters
from hymeg.training.arguments import naming_lines, parse
from hymeg.training.batch import is_reader, takes_data
from hymeg.training.checkpoints import remove_older, step_of
from hymeg.training.data_record import compare_and_keep, contents_record, text_record
from hymeg.training.freezing import trained_keys
from hymeg.training.hf_folders import saving_hf
from hymeg.training.hf_weights import convert_hf_weights
from hymeg.training.preflight import preflight
from hymeg.training.run_record import recording
from hymeg.training.schedule import set_iterations
from hymeg.training.step import forward_step
from hymeg.training.weights import naming_undamaged


def main(argv: Sequence[str]) -> None:
    """`pretrain_hy.py`: everything but the process's own start."""
    with exit_on_user_error():
        stand_alone()
        # Megatron unpickles a checkpoint's objects as they come; PyTorch refuses any that has no place in one.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        args, config = parse(argv)
        notes: list[str] = []
        preflight(args, config, notes.append)
        for note in [*platform.announcement(), *notes]:
            _say(note)
        keeps = args.save is not None and once.rank() == 0
        if keeps:
            Path(args.save).mkdir(parents=True, exist_ok=True)
            save_lock.lock(args.save, _say)
            _carry_companions(Path(args.hf_model), Path(args.save), config)
        code = rank.exit_code_of(functools.partial(train, args, config), args)
        if keeps:
            save_lock.unlock(args.save)
        # Without it gloo aborts at exit.
        torch.distributed.destroy_process_group()
        sys.exit(code)


def _carry_companions(hf_model: Path, save: Path, config: HyConfig) -> None:
    """Put config.json, tokenizer and chat template beside the checkpoints, so that these can be exported and trained
    on.
    """
    if hf_model.resolve() != save.resolve():
        config.without_quantization().save(save)
        carry(carried_files(hf_model), save)


def stand_alone() -> None:
    """Without a launcher this process is a world of its own, as under `torchrun --nproc-per-node 1`."""
    if "RANK" in os.environ:
        return
    # Port 0: the system gives a free one in the moment in which it is listened at. One chosen before might be taken.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def train(args, config: HyConfig) -> None:
    """Run Megatron's `pretrain` on checked but not yet validated `args`."""
    from megatron.core.enums import ModelType
    from megatron.training import get_tokenizer, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import validate_args
    from megatron.training.checkpointing import get_loaded_iteration
    from megatron.training.global_vars import set_global_variables

    from hymeg.data.pretraining import build_datasets, build_index
    from hymeg.platform.saving import before_save, once_saved, user_errors
    from hymeg.training.row_data import RowData

    rank.admit_rerun_state()
    with megatron_refusals():
        validate_args(args)
        set_global_variables(args)
        model_config = model_config_from_args(args)
        rows = RowData(args, config, _say) if args.sft_rows else None
        if args.train_epochs is not None:
            with naming_lines(args.explicit):
                set_iterations(args, rows.num_training_sequences, _say)
        convert_hf_weights(args)
        data = (text_record(args) if rows is None else rows.record()) | contents_record(args)
        if once.rank() == 0:
            compare_and_keep(args, data, _say)
        settings = pretrain_cfg_container_from_args(args, model_config)
    # Where process groups are open, Megatron builds it with all ranks.
    if rows is None and not torch.distributed.is_initialized():
        once.by_rank_0("index of the text", functools.partial(build_index, args, get_tokenizer()))

    def datasets(num_samples, vp_stage=None):
        train, valid, test = num_samples
        args.test_iters = test // args.eval_global_batch_size
        if args.start_eval_at_iter is not None and valid is not None:
            # Megatron counts one too few where that is an iteration of --eval-interval (training.py:4483).
            num_samples = (train, valid + args.eval_iters * args.eval_global_batch_size, test)
        if rows is not None:
            return rows.datasets(args, num_samples)
        layout = model_config.transformer.pipeline_model_parallel_layout
        return build_datasets(
            args, get_tokenizer(), num_samples, lambda: is_reader() and takes_data(args, layout, vp_stage)
        )

    datasets.is_distributed = True
    before_save[:] = [functools.partial(save_lock.check_still_ours, args.save)] if args.save is not None else []
    once_saved.clear()
    if args.keep_last is not None:
        keep_every, args.save_retain_interval = args.save_retain_interval, None  # whose own removal knows no number
        once_saved[:] = [
            lambda new: remove_older(args.save, step_of(new), args.keep_last, keep_every, get_loaded_iteration())
        ]
    if args.freeze is not None or args.train_only is not None:
        model_config.pre_wrap_hooks = [functools.partial(freeze, trained_keys(args, config))]
    with (
        recording(args, config, data, _say) as record,
        metrics.logging(args, config, model_config, record, _say) as set_losses,
        saving_hf(args, config, _say),
        contextlib.nullcontext() if args.lora_rank is None else training_adapters(args, config, model_config, _say),
        _judging(args, config, record),
        naming_undamaged(args),
        user_errors(),
        contextlib.nullcontext() if uses_transformer_engine(model_config.transformer) else device.unwatched_backward(),
    ):
        step = functools.partial(forward_step, set_losses=set_losses)
        pretrain(settings, datasets, ModelType.encoder_or_decoder, rank.noting_steps(step, args))


def _judging(args, config: HyConfig, record) -> contextlib.AbstractContextManager:
    if args.valid_translations is None:
        return contextlib.nullcontext()
    from hymeg.training.translations import judging_translations  # and sacrebleu

    return judging_translations(args, config, record)


def _say(line: str) -> None:
    if once.rank() == 0:
        print(f"hymeg: {line}", flush=True)


def model_config_from_args(args) -> HyModelConfig:
    """What the model is built from. `args` must be validated by Megatron."""
    from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args

    transformer = core_transformer_config_from_args(args, HyTransformerConfig)
    for field, value in platform.transformer_overrides().items():
        setattr(transformer, field, value)
    padded_vocab_size, args.padded_vocab_size = args.padded_vocab_size, None
    model_config = gpt_config_from_args(args, transformer, HyModelConfig)
    args.padded_vocab_size = padded_vocab_size
    return model_config


@contextlib.contextmanager
def megatron_refusals():
    """Megatron's validators raise assertions, often without a text: say which one, as a user's error."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError, NotImplementedError, TypeError, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if "megatron" not in frame.filename:
            raise
        reason = str(error) or f"it requires `{frame.line.removeprefix('assert ').rstrip(', \\')}`"
        raise UserError(
            f"Megatron refuses this combination of flags: {reason} ({os.path.basename(frame.filename)}:{frame.lineno})"
        ) from error
