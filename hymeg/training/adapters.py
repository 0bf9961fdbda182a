"""Training of adapters (`--lora-rank`): where base and adapters come from, and what a save holds.

Megatron's loop sees a model whose parameters are frozen but for the adapters'. Its checkpoints hold these, their
optimizer's state and the place in the data; `adapter.json` beside them says what they are, and of which weights.
"""

import argparse
import contextlib
import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.utils import unwrap_model

from hymeg.checkpoint.adapter_settings import ADAPTER_FILE, AdapterSettings
from hymeg.checkpoint.adapter_table import PREFIX, adapter_shapes, check_adapter_tensors, full_shapes
from hymeg.checkpoint.dist_files import iteration_folder
from hymeg.checkpoint.fingerprint import MODULUS, part_of_fingerprint, shown_fingerprint
from hymeg.checkpoint.mapping import VOCABULARY_KEYS, num_parameters
from hymeg.checkpoint.metadata_file import stored_shapes
from hymeg.checkpoint.sources.adapter_folder import full_names
from hymeg.errors import UserError, about
from hymeg.hf.config import HyConfig
from hymeg.models.freezing import train_in_full
from hymeg.models.lora import add_adapters
from hymeg.platform import device, megatron
from hymeg.platform.patches import patched
from hymeg.progress import Say
from hymeg.training import weights
from hymeg.training.adapter_log import AdapterLog
from hymeg.training.checkpoints import complete_steps, is_distributed_checkpoint
from hymeg.training.freezing import trained_in_full


def settings_of(args: argparse.Namespace) -> AdapterSettings:
    """What the flags say of the adapters."""
    alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    targets = tuple(dict.fromkeys(args.lora_targets))
    return AdapterSettings(args.lora_rank, alpha, args.lora_scaling, args.lora_dropout, targets)


def check_adapters(args: argparse.Namespace, config: HyConfig, say: Say) -> None:
    """Decide where base and adapters come from. `args.load` is then a checkpoint of adapters, or None; the base is
    `args.hf_weights` or `args.lora_base`, a distributed checkpoint; `args.lora_record` is the base that the loaded
    adapters were trained on, if any.

    Raises:
        UserError: flags that make no adapters, or others than are loaded; no base; tensors that do not fit.
    """
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise UserError(f"--lora-alpha {args.lora_alpha}: it must be above 0")
    if args.moe_router_bias_update_rate > 0:
        raise UserError(
            f"--moe-router-bias-update-rate {args.moe_router_bias_update_rate}: it would change the base, which a save "
            "of adapters does not hold; leave it out, or 0"
        )
    with about("--lora-targets: "):
        shapes = adapter_shapes(config, args.lora_rank, args.lora_targets)
    resumed = _resumed_folder(args, say)
    if resumed is not None:
        args.lora_record = _check_resumed(args, config, resumed).base or {}
        base = _base_of(args)
        weights.check_not_overwriting(args, ("load", args.load))
    elif args.init_from_scratch:
        raise UserError("--init-from-scratch with --lora-rank: adapters of chance's weights serve nothing; give --load")
    else:
        args.lora_record, base = {}, copy.copy(args)
    base.fall_back_to_older_checkpoint = False  # done, of what --load names
    weights.check_weights(base, config, say, is_base=True)
    source = base.hf_weights or base.load or base.pretrained_checkpoint
    args.hf_weights, args.lora_source = base.hf_weights, os.path.abspath(source)
    args.lora_base, args.lora_base_step = (None if base.hf_weights else source), base.ckpt_step
    args.pretrained_checkpoint = None
    if resumed is None:
        args.load = args.ckpt_step = None
    in_full = sum(map(math.prod, full_shapes(config, trained_in_full(args, config).values()).values()))
    trained, frozen = sum(map(math.prod, shapes.values())), num_parameters(config) - in_full
    also = f" and {in_full:,} in full ({' '.join(args.train_also)})" if in_full else ""
    say(
        f"training {trained:,} parameters in adapters of rank {args.lora_rank}{also} beside {frozen:,} frozen ones "
        f"({(trained + in_full) / frozen:.2%}): {', '.join(args.lora_targets)}"
    )


def _resumed_folder(args: argparse.Namespace, say: Say) -> Path | None:
    """Of the iteration that `--load` names, or falls back to, where it is of adapters."""
    if args.load is None or not is_distributed_checkpoint(args.load):
        return None
    if args.fall_back_to_older_checkpoint:
        weights.fall_back(args, say)
    with about("--load "):
        folder, _ = iteration_folder(args.load, args.ckpt_step, "--ckpt-step")
    return folder if (folder / ADAPTER_FILE).is_file() else None


def _check_resumed(args: argparse.Namespace, config: HyConfig, folder: Path) -> AdapterSettings:
    stored, wanted = AdapterSettings.from_folder(folder), settings_of(args)
    for name in ("rank", "alpha", "scaling", "targets"):
        was, now = (getattr(one, name) for one in (stored, wanted))
        if name == "targets":
            was, now = (" ".join(sorted(targets)) for targets in (was, now))
        if was != now:
            raise UserError(
                f"--lora-{name} {now}: the adapters in {folder} were made with --lora-{name} {was}; say that, or give "
                "--load of the base to begin anew"
            )
    if args.rank == 0:
        label, shapes = f"--load {args.load}", stored_shapes(folder)
        of_model = {key: shape for key, shape in shapes.items() if shape is not None and key.startswith(PREFIX)}
        was, now = (sorted(one) for one in (full_names(of_model), trained_in_full(args, config).values()))
        if was != now:
            raise UserError(
                f"--train-also: the adapters in {folder} were made with {' '.join(was) or 'none'} trained in full, not "
                f"{' '.join(now) or 'none'}; say that, or give --load of the base to begin anew"
            )
        with about(f"{label}: "):
            check_adapter_tensors(config, stored.rank, stored.targets, of_model, now)
        if not args.finetune and not args.no_load_optim:
            weights.check_optimizer(label, shapes, args)
    args.exit_on_missing_checkpoint = True
    return stored


def _base_of(args: argparse.Namespace) -> argparse.Namespace:
    """The args as if the base of the resumed adapters alone were loaded."""
    base, recorded = copy.copy(args), args.lora_record
    base.load, base.pretrained_checkpoint = args.pretrained_checkpoint or recorded.get("source"), None
    if base.load is None or not os.path.isdir(base.load):
        where = f" in {base.load}" if base.load else ""
        raise UserError(
            f"--load {args.load} holds adapters, whose base is not found{where}; give it by --pretrained-checkpoint"
        )
    base.save, base.ckpt_step, base.finetune = None, None, True
    if is_distributed_checkpoint(base.load) and recorded.get("iteration") in complete_steps(base.load):
        base.ckpt_step = recorded["iteration"]  # its tracker may name another by now
    return base


@contextlib.contextmanager
def training_adapters(args: argparse.Namespace, config: HyConfig, model_config, say: Say) -> Iterator[None]:
    """While the context is open, the model that Megatron builds has adapters, its saves hold them, and what they do to
    the weights is said. Raises UserError: the adapters that are resumed were trained on other weights.
    """
    settings, in_full, save_config = settings_of(args), trained_in_full(args, config), serialization.save_config

    def attach(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Before the model is wrapped: what is frozen then has neither gradients nor optimizer."""
        for chunk in chunks:
            add_adapters(chunk, config, settings, args.seed)
            train_in_full(in_full, chunk)
        return chunks

    def load_base(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Once it is wrapped, and its tensors have the types that they keep."""
        nonlocal settings
        settings = settings._replace(base=_loaded_base(args, config, unwrap_model(chunks)))
        return chunks

    def save(common_config, folder: str) -> None:
        settings.save(folder)
        save_config(common_config, folder)

    model_config.pre_wrap_hooks = [*(model_config.pre_wrap_hooks or []), attach]
    model_config.post_wrap_hooks = [*(model_config.post_wrap_hooks or []), load_base]
    with (
        patched(serialization, "save_config", save, "serialization.py:449: the mark that makes a save valid"),
        megatron.after_steps(AdapterLog(args, config, say)),
    ):
        yield


def _loaded_base(args: argparse.Namespace, config: HyConfig, models: list[torch.nn.Module]) -> dict[str, str]:
    """Fill `models` with the base's weights: what adapter.json says of them."""
    folder, step = iteration_folder(args.lora_base, args.lora_base_step)
    wanted = {f"model{i}": model.weights_sharded_state_dict(metadata={}) for i, model in enumerate(models)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for i, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[f"model{i}"], strict=False)
        if unexpected or any(not name.startswith("adapters.") for name in missing):
            raise RuntimeError(f"the base did not fit the model: {missing[:5]}, {unexpected[:5]}")
    base, found = args.lora_record, fingerprint(models, config.vocab_size)
    if base.get("fingerprint") not in (None, found):
        of_step = f", of which it was iteration {base['iteration']}" if base.get("iteration") else ""
        raise UserError(
            f"--load {args.load}: its adapters were trained on other weights than {args.lora_source} holds (fingerprint"
            f" {base['fingerprint']}, found {found}); give their base, --pretrained-checkpoint {base.get('source')}"
            f"{of_step}"
        )
    return {"source": args.lora_source, "iteration": step, "fingerprint": found}


def fingerprint(models: list[torch.nn.Module], vocab_size: int) -> str:
    """Of the weights, adapters left out; the same in every layout. Collective: every rank calls it."""
    total = 0
    for model in models:
        state_dict = model.weights_sharded_state_dict(metadata={})
        apply_factories(state_dict)
        for shard in nested_values(state_dict):
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
                total += _part(shard, vocab_size)
    summed = torch.tensor(total % MODULUS, device=device.current())
    torch.distributed.all_reduce(summed)
    return shown_fingerprint(int(summed))


def _part(shard: ShardedTensor, vocab_size: int) -> int:
    """Of one rank's part of a tensor; padding of the vocabulary left out."""
    offset, data = shard.global_offset, shard.data.detach()
    data = data.reshape(math.prod(data.shape[:-2]) if data.dim() > 2 else 1, -1, data.shape[-1])
    if shard.key in VOCABULARY_KEYS:
        data = data[:, : max(0, vocab_size - offset[0])]
    height = shard.global_shape[-2] if len(shard.global_shape) > 1 else 1
    first = (offset[0] * height if len(offset) > 2 else 0) + (offset[-2] if len(offset) > 1 else 0)
    return sum(part_of_fingerprint(shard.key, rows, first + i * height, offset[-1]) for i, rows in enumerate(data))
