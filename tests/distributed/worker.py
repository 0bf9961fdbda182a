"""What a rank does with a case: its training recorded, or a function of checks.py called.

A training's result are the losses and gradient norms of every step as the trainer computed them, unrounded, with the
sequences of conversations that it drew; the loss of every evaluation; the bytes that each rank held all the time; and
with the check LIVE_WEIGHTS the weights that each was given by all others before the first step.
"""

import importlib
import sys
from pathlib import Path

import checks
import torch.distributed as dist
from adapter_values import adapter_values
from live_weights import LIVE_WEIGHTS, digest, live_digests
from megatron.core import parallel_state
from megatron.core.datasets.utils import Split
from megatron.training import arguments, training
from replaced_names import CALLED
from static_bytes import static_bytes

from hymeg.checkpoint.live import export_adapter_weights
from hymeg.data.conversations import ConversationDataset
from hymeg.flag_table import TABLE
from hymeg.platform.patches import patch, patched
from hymeg.training import run
from hymeg.training.arguments import _parser_of, parse
from hymeg.training.preflight import preflight
from hymeg.training.run import train

sys.path.append(str(Path(__file__).parents[1]))
import flag_help

IMPORTED_WHEN_NEEDED = (
    "torch._dynamo",
    "transformers.models.hy_v3",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.text_tokenizer",
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
    "hymeg.data.pretraining",
)


def prepare() -> None:
    """What every rank would do alike, before there is one."""
    for name in IMPORTED_WHEN_NEEDED:
        importlib.import_module(name)
    flag_help.read_once()
    for size in (1, 2, 4, 8):
        for rank in range(size):
            _parser_of(str(rank), str(size))
    for row in TABLE:
        row.names("")  # compiles its patterns
    patch(arguments, "_print_args", lambda title, args: None, "800 lines a training, which nobody reads here")


def run_case(argv: list[str], check: str | None) -> dict:
    """A training makes its process groups itself."""
    if check in (None, LIVE_WEIGHTS):
        return _train(argv, gives_weights=check is not None)
    dist.init_process_group("gloo")
    return getattr(checks, check)(argv)


def _train(argv: list[str], gives_weights: bool) -> dict:
    """Train as the command line says; on every rank the figures of the last pipeline stage."""
    args, config = parse(argv)
    notes = []
    preflight(args, config, notes.append)
    steps, evaluations, held, drawn, said, live = [], [], [], [], [], {}
    train_step, set_up, evaluate, sequence = (
        training.train_step,
        training.setup_model_and_optimizer,
        training.evaluate,
        ConversationDataset.sequence,
    )

    def noted(dataset, sample):
        if dataset.index_split == Split.train:
            drawn.append(sequence(dataset, sample))
        return sequence(dataset, sample)

    def recorded(*step_args, **step_kwargs):
        drawn.clear()
        result = train_step(*step_args, **step_kwargs)
        loss = {key: value.item() for key, value in result[0].items()}
        if result[5] is None:  # the rerun machine ends the run in the middle of the step
            return result
        steps.append({"loss": loss.get("lm loss"), "grad_norm": float(result[5]), "drawn": list(drawn)})
        return result

    def evaluated(*evaluate_args, **evaluate_kwargs):
        result = evaluate(*evaluate_args, **evaluate_kwargs)
        evaluations.extend(value.item() for key, value in result[0].items() if key == "lm loss")
        return result

    def watched(*set_up_args, **set_up_kwargs):
        made = set_up(*set_up_args, **set_up_kwargs)
        held.extend(made[:2])
        if gives_weights:
            live.update(live_digests(made[0], config))
        return made

    with (
        patched(run, "_say", said.append, "tests read what is said"),
        patched(training, "train_step", recorded, "tests read losses unrounded"),
        patched(training, "evaluate", evaluated, "tests read losses unrounded"),
        patched(ConversationDataset, "sequence", noted, "tests read what is drawn"),
        patched(training, "setup_model_and_optimizer", watched, "tests weigh what it made"),
    ):
        train(args, config)
    adapters = adapter_values(held[0]) if held else {}
    if args.lora_rank is not None and args.train_also is None:
        live["adapters"] = digest(export_adapter_weights(held[0], config))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (steps, evaluations, _speaks_for_its_data(), live, static_bytes(*held)))
    steps, evaluations, *_ = gathered[-1]
    for number, step in enumerate(steps):
        step["drawn"] = [
            one for steps_of_rank, _, speaks, *_ in gathered if speaks for one in steps_of_rank[number]["drawn"]
        ]
    static = [static_of_rank for *_, static_of_rank in gathered]
    live = [live_of_rank for *_, live_of_rank, _ in gathered]
    figures = {"steps": steps, "evaluations": evaluations, "static": static, "live": live}
    return {"notes": notes, "called": sorted(CALLED), "adapters": adapters, "said": said, **figures}


def _speaks_for_its_data() -> bool:
    """One rank of those that draw the same samples."""
    context_parallel = parallel_state.get_context_parallel_rank()
    return (
        parallel_state.is_pipeline_first_stage()
        and context_parallel == parallel_state.get_tensor_model_parallel_rank() == 0
    )
