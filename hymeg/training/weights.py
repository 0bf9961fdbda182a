"""Where the first weights come from: a distributed checkpoint, a Hugging Face folder, or chance, never by accident."""

import contextlib
import difflib
import math
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from hymeg.checkpoint.adapter_settings import ADAPTER_FILE
from hymeg.checkpoint.dist_files import FORMAT, FORMAT_FILE, MODEL_KEYS, TRACKER, iteration_folder, tracker_content
from hymeg.checkpoint.mapping import check_distributed_tensors
from hymeg.checkpoint.metadata_file import stored_shapes
from hymeg.checkpoint.sources import open_hf
from hymeg.checkpoint.verification import verification_notes
from hymeg.checksums import Damaged, open_verified
from hymeg.errors import UserError, about
from hymeg.files import read_json, shown
from hymeg.hf.config import CONFIG_FILE, HyConfig
from hymeg.progress import Say
from hymeg.training.checkpoints import complete_steps, is_distributed_checkpoint, newest_undamaged, tracked_step
from hymeg.training.flag_names import flag
from hymeg.training.freezing import trained_keys

_NO_HASHES = (
    "has no integrity.json, which Megatron writes in saves under this flag only, and then demands; leave it out: "
    "checksums are verified in any case"
)


def is_hf_folder(folder: str) -> bool:
    """config.json and weights: a run's own `--save` folder holds config.json from its start."""
    return Path(folder, CONFIG_FILE).is_file() and any(Path(folder).glob("*.safetensors"))


def check_weights(args: Namespace, config: HyConfig, say: Say, is_base: bool = False) -> None:
    """Decide where the weights come from; `args.hf_weights` becomes the Hugging Face folder that they lie in, or None.

    `--load` of a folder with a checkpoint resumes from it. `--load` or `--pretrained-checkpoint` of a Hugging Face
    folder starts from its weights. A job script may give its own `--save` folder to `--load` as well, empty in the
    job's first life, and `--pretrained-checkpoint` (or `--init-from-scratch`) where to start.

    Args:
        is_base: the weights are to be frozen beside adapters: of a checkpoint its optimizer is not read.

    Raises:
        UserError: a folder without anything to load, nothing to load at all and no `--init-from-scratch`, tensors that
            do not fit config.json, or a `--save` folder whose checkpoints would be overwritten.
    """
    args.hf_weights = None
    chosen = _choose(args)
    check_not_overwriting(args, chosen, is_base)
    if chosen is None:
        if not args.init_from_scratch:
            raise UserError("no weights: give --load FOLDER (checkpoint or Hugging Face model), or --init-from-scratch")
        if not args.perform_initialization:
            raise UserError(
                "--no-initialization with --init-from-scratch trains what memory held; leave --no-initialization out"
            )
        return
    dest, folder = chosen
    if is_distributed_checkpoint(folder):
        _check_distributed(args, dest, folder, config, say, is_base)
        args.exit_on_missing_checkpoint = True
        return
    if args.ckpt_step is not None:
        raise UserError(
            f"--ckpt-step {args.ckpt_step}: {flag(dest)} {folder} is a Hugging Face folder, which has no iterations; "
            "leave it out"
        )
    _check_phases(args, dest, folder, is_base)
    if args.verify_integrity and not is_base:
        raise UserError(f"--verify-integrity: {flag(dest)} {folder} {_NO_HASHES}")
    if args.local_rank == 0:  # one look a node: every rank's would be thousands of opened files
        with about(f"{flag(dest)} {folder}: "):
            open_hf(folder, config)
    args.hf_weights, args.load, args.pretrained_checkpoint = folder, None, None


def _check_phases(args: Namespace, dest: str, folder: str, is_base: bool) -> None:
    """Of weights that no run has saved."""
    if args.phase_transition_iterations and not is_base:
        raise UserError(
            f"--phase-transition-iterations {args.phase_transition_iterations}: {flag(dest)} {folder} does not say "
            "with what batch size it was trained, which Megatron compares; train the phases as runs of their own"
        )


def _choose(args: Namespace) -> tuple[str, str] | None:
    """(destination, folder) of what is loaded. A run's own `--save` folder may still be without a checkpoint:
    `args.load` is then None.
    """
    for dest in ("load", "pretrained_checkpoint"):
        folder = getattr(args, dest)
        if folder is None:
            continue
        if is_distributed_checkpoint(folder) or is_hf_folder(folder):
            return dest, folder
        own = dest == "load" and args.save is not None and _same_folder(folder, args.save)
        if own and not args.init_from_scratch and args.pretrained_checkpoint is None:
            raise UserError(
                f"--load {folder} is this run's own --save folder and holds no checkpoint yet: say with "
                "--pretrained-checkpoint where to start"
            )
        if own and args.ckpt_step is not None:
            raise UserError(
                f"--ckpt-step {args.ckpt_step}: --load {folder} holds no checkpoint yet, of which to take an iteration;"
                " leave it out"
            )
        if not own:
            raise UserError(f"{flag(dest)} {folder}: {_nothing_in(folder)}")
        args.load = None
    return None


def _same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _nothing_in(folder: str) -> str:
    """Why nothing can be loaded from `folder`, and what could."""
    needed = f"a folder with a checkpoint ({TRACKER}) or a Hugging Face model (config.json) is needed"
    parent, name = os.path.split(os.path.abspath(folder))
    if os.path.isfile(os.path.join(folder, "metadata.json")) and (step := re.fullmatch(r"iter_0*(\d+)", name)):
        return f"this is one iteration of a checkpoint; give --load {parent} --ckpt-step {step[1]}"
    if not os.path.exists(folder):
        siblings = os.listdir(parent) if os.access(parent, os.R_OK | os.X_OK) else []
        near = difflib.get_close_matches(name, siblings, n=1)
        guess = f"did you mean {os.path.join(parent, near[0])}? " if near else ""
        return f"no such folder; {guess}{needed}, or --init-from-scratch for random weights"
    if not os.path.isdir(folder):
        return f"a file, not a folder; {needed}"
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"not readable by this user; change its permissions, or give another folder: {needed}"
    return f"no checkpoint in it; {needed}, or --init-from-scratch for random weights"


def check_not_overwriting(args: Namespace, chosen: tuple[str, str] | None, is_base: bool = False) -> None:
    """`chosen`: what is loaded; `is_base`: beside adapters, which alone are saved."""
    if args.save is None or not is_distributed_checkpoint(args.save):
        return
    if chosen is None or not _same_folder(chosen[1], args.save):
        start = f"{flag(chosen[0])} {chosen[1]}" if chosen else "--init-from-scratch"
        keep = f"--pretrained-checkpoint {chosen[1]}" if chosen else start
        raise UserError(
            f"--save {args.save} holds a checkpoint already, which {start} would overwrite; to go on from it give "
            f"--load {args.save} {keep}, to start anew another --save"
        )
    if is_base:
        raise UserError(
            f"--save {args.save} holds the base, {flag(chosen[0])}, which the adapters' checkpoints would overwrite; "
            "give them a folder of their own"
        )
    begins = "--finetune" if args.finetune else flag(chosen[0])
    if begins != "--load" and tracked_step(args.save) is not None:
        raise UserError(
            f"--save {args.save} holds a checkpoint already, and {begins} would begin at iteration 0 and overwrite it; "
            f"to go on from it give --load {args.save} without {begins}, to start anew another --save"
        )


def _check_distributed(args: Namespace, dest: str, folder: str, config: HyConfig, say: Say, is_base: bool) -> None:
    label, resumes = f"{flag(dest)} {folder}", dest == "load"
    if resumes and args.fall_back_to_older_checkpoint:
        fall_back(args, say)
    with about(f"{flag(dest)} "):
        path, step = iteration_folder(folder, args.ckpt_step if resumes else None, "--ckpt-step")
    if (path / ADAPTER_FILE).is_file():
        raise UserError(
            f"{label}: holds adapters, not a model; give --lora-rank to go on training them with --load, or merge them "
            "into their base first (tools/convert_checkpoint.py merge)"
        )
    if step is None:
        _check_phases(args, dest, folder, is_base)
    if args.verify_integrity and not is_base and not (path / "integrity.json").is_file():
        raise UserError(f"--verify-integrity: {path} {_NO_HASHES}")
    if args.rank > 0:  # Megatron unpickles the same file on every rank, but not before all of them have met
        return
    with about(f"{label}: ", ", or give --ckpt-step or --fall-back-to-older-checkpoint"):
        found = read_json(path / FORMAT_FILE, open_verified)
        if found != FORMAT:
            raise UserError(f"{path / FORMAT_FILE}: holds {shown(found)}; {shown(FORMAT)} is needed")
        shapes = stored_shapes(path)
    with about(f"{label}: ", "; give the --hf-model that this checkpoint was made from"):
        of_model = {key: shape for key, shape in shapes.items() if shape is not None and key.startswith(MODEL_KEYS)}
        check_distributed_tensors(config, of_model)
    if resumes and step is not None and not (args.finetune or is_base or args.no_load_optim):
        check_optimizer(label, shapes, args)
        _check_states(label, shapes, trained_keys(args, config))
    for note in verification_notes(path):
        say(note)


def fall_back(args: Namespace, say: Say) -> None:
    """Where the checkpoint that `args.load` is asked for is damaged or incomplete, let `args.ckpt_step` name the newest
    older good one. All ranks call it.
    """
    folder, content, wanted = args.load, tracker_content(Path(args.load)), args.ckpt_step
    if wanted is None:
        if content == "release":
            return
        wanted = int(content) if content.isdecimal() else math.inf
    found, wrong = newest_undamaged(folder, [step for step in complete_steps(folder) if step <= wanted])
    if found is None:
        raise UserError(
            f"--fall-back-to-older-checkpoint: no undamaged checkpoint in --load {folder}: "
            f"{'; '.join(wrong) or 'there is no complete one in it'}"
        )
    if found != wanted:
        said = "; ".join(wrong) or f"{os.path.join(folder, TRACKER)} names {content[:40]!r}, which is not complete"
        say(f"{said}: falling back to iteration {found}")
        args.ckpt_step = found


@contextlib.contextmanager
def naming_undamaged(args: Namespace) -> Iterator[None]:
    """Where what is loaded is damaged, which is found on all ranks, say what to do about it."""
    try:
        yield
    except Damaged as error:
        raise UserError(f"{error}; {_remedy(args, os.path.basename(os.path.dirname(error.path)))}") from None


def _remedy(args: Namespace, damaged: str) -> str:
    again = "copy that file again, or convert again"
    if args.load is None or not is_distributed_checkpoint(args.load):
        return again
    others = [step for step in complete_steps(args.load) if f"iter_{step:07d}" != damaged]
    found, _ = newest_undamaged(args.load, others)
    if found is None:
        return f"no other iteration in --load {args.load} is undamaged: {again}"
    return (
        f"the newest undamaged iteration in --load {args.load} is {found}: give --ckpt-step {found} or "
        "--fall-back-to-older-checkpoint"
    )


def check_optimizer(label: str, keys: Iterable[str], args: Namespace) -> None:
    """The three forms that Megatron stores an optimizer's state in; none can be read as another."""
    distributed, without = "with --use-distributed-optimizer", "without --use-distributed-optimizer"
    mixed, plain = f"in 16 bits {without}", f"in fp32 {without}"
    keys = [key for key in keys if "optimizer." in key]
    if not keys:
        raise UserError(f"{label}: saved without the optimizer (--no-save-optim); add --no-load-optim to begin it anew")
    marks = {
        "optimizer.state.param.": distributed,
        "optimizer.distributed.": distributed,
        "optimizer.state.fp32_param.": mixed,
        "optimizer.state.exp_avg.": plain,
    }
    saved = next((form for mark, form in marks.items() if any(mark in key for key in keys)), None)
    wanted = distributed if args.use_distributed_optimizer else mixed if args.bf16 or args.fp16 else plain
    if saved not in (None, wanted):
        raise UserError(
            f"{label}: its optimizer was saved {saved}, but this run is {wanted}; make them agree, or begin the "
            "optimizer anew with --no-load-optim"
        )


def _check_states(label: str, keys: Iterable[str], trained: set[str]) -> None:
    """Whether the optimizer's states are those of what is trained; where their form names no parameters, nothing."""
    saved = {found[1] for key in keys if (found := re.search(r"optimizer\.state\.exp_avg\.(.+)", key))}
    if saved and saved != trained:
        key = min(saved ^ trained)
        was, now = ("trained", "frozen") if key in saved else ("frozen", "trained")
        raise UserError(
            f"{label}: {key} was {was} when it was saved and would now be {now}; give the same --freeze, "
            "--train-only and --mtp-loss-scaling-factor, or begin the optimizer anew with --no-load-optim"
        )
