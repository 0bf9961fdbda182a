"""`--valid-translations FILE`: at every evaluation the model answers held-out rows, and what it says is judged."""

import argparse
import contextlib
import time
from collections.abc import Sequence

import torch

from hymeg.errors import UserError, about
from hymeg.generation.held_out import METRICS, HeldOut, figures, line, rows
from hymeg.generation.prompts import published_sampling
from hymeg.generation.replies import generate_dealt
from hymeg.hf.config import HyConfig
from hymeg.hf.tokenizer import load_tokenizer
from hymeg.platform import megatron
from hymeg.reporting.record import RunRecord
from hymeg.training.run_record import write_scalars


def held_out_rows(args: argparse.Namespace, config: HyConfig) -> HeldOut:
    """Raises UserError: a file or a row of it that cannot be used, or no evaluation to use it in."""
    if args.eval_iters == 0 and not args.full_validation:
        raise UserError(
            f"--valid-translations {args.valid_translations}: nothing is evaluated, since --eval-iters is 0 or there "
            "is no validation data; give some, or leave --valid-translations out"
        )
    if args.moe_expert_capacity_factor is not None:
        raise UserError(
            f"--valid-translations {args.valid_translations} with --moe-expert-capacity-factor "
            f"{args.moe_expert_capacity_factor}: of answers made together, experts would drop tokens; leave one out, "
            "and judge what is saved with tools/evaluate.py"
        )
    with about("--valid-translations "):
        return HeldOut(args.valid_translations, load_tokenizer(args.hf_model), config, args.valid_generate)


def judging_translations(
    args: argparse.Namespace, config: HyConfig, record: RunRecord
) -> contextlib.AbstractContextManager:
    """While the context is open, translations are made and judged after every evaluation on validation data, and added
    to the record. Raises UserError: there is none.
    """
    return megatron.after_evaluations(_Judge(args, config, record).after_evaluation)


class _Judge:
    """All ranks answer; the last one, which also prints Megatron's log, judges and writes."""

    def __init__(self, args: argparse.Namespace, config: HyConfig, record: RunRecord):
        self.record = record
        self.held_out = held_out_rows(args, config)
        self.sampling = self.held_out.sampling(published_sampling(args.hf_model, config).stop_ids)
        self.iteration: int | None = None
        self.began, self.seconds = time.monotonic(), 0.0

    def after_evaluation(
        self, iteration: int, title: str, losses: list[dict[str, float]], model_chunks: Sequence[torch.nn.Module]
    ) -> None:
        """Collective, after each evaluation; the last step's may be evaluated twice."""
        if iteration == self.iteration or title.endswith("test set"):
            return
        self.iteration, began = iteration, time.monotonic()
        answers = generate_dealt(model_chunks, self.held_out.prompts, self.sampling)
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        examples = self.held_out.examples(answers)
        found = figures(examples)
        self.record.add_translations(iteration, rows(self.held_out.questions, examples), **found)
        scalars = {f"translations/{name}": found["overall"][name] for name in METRICS}
        for pair, of in found["pairs"].items():
            scalars |= {f"translations {pair}/{name}": of[name] for name in METRICS}
        write_scalars(scalars | {f"translation alarms/{name}": of for name, of in found["alarms"].items()}, iteration)
        seconds = time.monotonic() - began
        self.seconds += seconds
        took = f"{seconds:.1f}, in all {self.seconds / (time.monotonic() - self.began):.1%} of the run"
        print(f" translations at iteration {iteration} | {line(found)} | seconds: {took} |", flush=True)
