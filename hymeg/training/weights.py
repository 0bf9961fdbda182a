"""Where the first weights come from: a distributed checkpoint, a Hugging Face folder, or, when asked for, chance. Never chance by accident."""

import argparse
import os
import warnings

import torch

from hymeg.checkpoint.adapter import HyStateDictAdapter
from hymeg.checkpoint.mapping import match_hf_tensors
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import MappedFiles, TensorEntry, open_checkpoint

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TRACKER = "latest_checkpointed_iteration.txt"


def is_distributed_checkpoint(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, TRACKER))


def is_hf_folder(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def check_weights(args: argparse.Namespace, config: HyConfig) -> None:
    """Decide where the weights come from, and set `args.hf_weights` to the Hugging Face folder to read them from, or None.

    `--load` of a folder with a checkpoint resumes from it. `--load` or `--pretrained-checkpoint` of a Hugging Face folder starts from its weights.
    A job script may give both: `--load` its own `--save` folder, empty in the job's first life, and `--pretrained-checkpoint` where to start.

    Raises:
        UserError: a folder without anything to load, nothing to load at all and no `--init-from-scratch`, or tensors that do not fit config.json.
    """
    args.hf_weights = None
    for flag in ("load", "pretrained_checkpoint"):
        folder = getattr(args, flag)
        if folder is None:
            continue
        if is_distributed_checkpoint(folder):
            _check_iteration(args, flag, folder)
            args.exit_on_missing_checkpoint = True
            return
        if is_hf_folder(folder):
            _check_hf_folder(open_checkpoint(folder), config)
            args.hf_weights, args.load, args.pretrained_checkpoint = folder, None, None
            return
        own_save_folder = flag == "load" and (args.init_from_scratch or args.pretrained_checkpoint is not None)
        if not own_save_folder:
            raise UserError(
                f"--{flag.replace('_', '-')} {folder}: {'no checkpoint in it' if os.path.isdir(folder) else 'no such folder'} (neither {TRACKER} nor a Hugging "
                f"Face config.json); give a folder that holds one, or --init-from-scratch for random weights"
            )
        args.load = None
    if not args.init_from_scratch:
        raise UserError("no weights: give --load FOLDER (a checkpoint or a Hugging Face folder), or --init-from-scratch for random weights")


def _check_hf_folder(tensors: dict[str, TensorEntry], config: HyConfig) -> None:
    for name, entry in tensors.items():
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.file}: {name} is {entry.dtype}; allowed are {', '.join(_DTYPES)}: dequantise the checkpoint first")
    match_hf_tensors(config, {name: entry.shape for name, entry in tensors.items()})


def _check_iteration(args, flag: str, folder: str) -> None:
    path = os.path.join(folder, TRACKER)
    with open(path) as file:
        content = file.read().strip()
    if args.ckpt_step is not None and flag == "load":
        content = str(args.ckpt_step)
    if content != "release" and not content.isdigit():
        raise UserError(f"{path} holds {content[:40]!r}; expected an iteration number or 'release'")
    name = "release" if content == "release" else f"iter_{int(content):07d}"
    if not os.path.isfile(os.path.join(folder, name, "metadata.json")):
        raise UserError(
            f"--{flag.replace('_', '-')} {folder}: {path} names {name}, but {name}/metadata.json is missing: the save was not completed; give --ckpt-step"
        )


def load_hf_weights(model_chunks: list, folder: str, config: HyConfig) -> None:
    """Fill this rank's share of the model from the Hugging Face folder, in place and in the model's dtypes, whatever the layout.

    The files are mapped, not read: a rank touches the tensors of its own pipeline stage only.
    """
    with MappedFiles() as files, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        tensors = {
            name: torch.frombuffer(files.view(entry), dtype=_DTYPES[entry.dtype]).view(entry.shape) for name, entry in open_checkpoint(folder).items()
        }
        HyStateDictAdapter(config).load_into(model_chunks, tensors)
        del tensors
