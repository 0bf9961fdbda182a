"""Seconds of a training step, three ways side by side: pretrain_hy.py, a bare loop over the same Megatron objects,
transformers' own.

One checkpoint, one batch size, one thread each, fp32, interleaved rounds, medians of all steps but the first three of
every process. Also the time from typing the command to the end of its first iteration, and what one more process start
costs.

    python tools/benchmarks/train_step.py [--rounds 3] [--steps 12]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPE = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
) | dict(
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=384,
    expert_hidden_dim=384,
    vocab_size=8192,
    initializer_range=0.02,
)
SEQ_LENGTH, BATCH, LEARNING_RATE, SKIPPED = 512, 2, 1e-4, 3


def trainer_command(folder: str, steps: int) -> list[str]:
    flags = f"--seq-length {SEQ_LENGTH} --micro-batch-size {BATCH} --global-batch-size {BATCH} --train-iters {steps} --lr {LEARNING_RATE}"
    fixed = "--mock-data --eval-iters 0 --log-interval 1 --lr-decay-style constant"
    return [
        sys.executable,
        str(ROOT / "pretrain_hy.py"),
        "--hf-model",
        folder,
        "--load",
        folder,
        *flags.split(),
        *fixed.split(),
    ]


def run_trainer(folder: str, steps: int) -> dict[str, list[float]]:
    """Step times as the trainer logs them, and seconds until its first iteration is logged."""
    start, times, first = time.perf_counter(), [], None
    process = subprocess.Popen(
        trainer_command(folder, steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tail = []
    for line in process.stdout:
        tail = [*tail[-20:], line]
        if found := re.search(r"elapsed time per iteration \(ms\): ([\d.]+)", line):
            first = first or time.perf_counter() - start
            times.append(float(found.group(1)) / 1e3)
    if process.wait() != 0:
        raise SystemExit("pretrain_hy.py failed:\n" + "".join(tail))
    return {"steps": times[SKIPPED:], "first": [first]}


def run_child(which: str, folder: str, steps: int) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--child", which, "--folder", folder, "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the {which} loop failed:\n{done.stdout[-3000:]}")
    return {
        "steps": [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("step ")][SKIPPED:]
    }


def timed_steps(step, steps: int) -> None:
    for _ in range(steps):
        start = time.perf_counter()
        step()
        print("step", time.perf_counter() - start, flush=True)


def batch_of(vocab_size: int):
    import torch

    tokens = torch.randint(0, vocab_size, (BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def bare_loop(folder: str, steps: int) -> None:
    """The trainer's model, DDP and optimizer, without its loop: no data, no logs, no checks."""
    from hymeg.training.arguments import parse
    from hymeg.training.preflight import preflight
    from hymeg.training.run import model_config_from_args, stand_alone

    stand_alone()
    args, config = parse(trainer_command(folder, steps)[2:])
    preflight(args, config, lambda note: None)
    import torch
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    validate_args(args)
    args.load, args.check_for_nan_in_loss_and_grad = None, False
    set_global_variables(args)
    settings = pretrain_cfg_container_from_args(args, model_config_from_args(args))
    initialize.initialize_megatron(allow_no_cuda=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks, optimizer, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=settings, pg_collection=groups
    )
    inputs, labels = batch_of(config.vocab_size)
    positions = torch.arange(SEQ_LENGTH).expand_as(inputs)

    def step():
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        losses = chunks[0](inputs, positions, None, labels=labels)
        losses.sum().backward()
        finalize_model_grads(chunks, torch.tensor(inputs.numel()), pg_collection=groups)
        optimizer.step()

    timed_steps(step, steps)


def transformers_loop(folder: str, steps: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    inputs, labels = batch_of(model.config.vocab_size)

    def step():
        optimizer.zero_grad()
        logits = model(inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    timed_steps(step, steps)


CHILDREN = {"bare": bare_loop, "transformers": transformers_loop}


def report(results: dict[str, list[dict]]) -> None:
    def median(which: str, key: str = "steps") -> float:
        return statistics.median(value for round_ in results[which] for value in round_[key])

    ours = median("trainer")
    print("\n| what | median, ms | pretrain_hy.py against it | bar |\n|---|---|---|---|")
    print(f"| a step of pretrain_hy.py | {ours * 1e3:.1f} | | |")
    for which, name, bar in (
        ("bare", "a bare loop over the same Megatron objects", "1.10x"),
        ("transformers", "transformers' own training step", "1.25x"),
    ):
        print(f"| {name} | {median(which) * 1e3:.1f} | {ours / median(which):.2f}x | <= {bar} |")
    print(f"| from the command to its first iteration, this model | {median('trainer', 'first') * 1e3:,.0f} | | |")
    print(f"| the same, the tiny model | {median('tiny', 'first') * 1e3:,.0f} | | <= 12,000 |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.child:
        CHILDREN[args.child](args.folder, args.steps)
        return
    from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
    from hymeg.hf.config import HyConfig

    with tempfile.TemporaryDirectory() as temporary:
        folder, tiny = f"{temporary}/checkpoint", f"{temporary}/tiny"
        write_tiny_checkpoint(folder, HyConfig.from_dict(TINY_CONFIG | SHAPE), dtype="fp32")
        write_tiny_checkpoint(tiny, dtype="fp32")
        results = {"trainer": [], "bare": [], "transformers": [], "tiny": []}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            results["trainer"].append(run_trainer(folder, args.steps))
            results["bare"].append(run_child("bare", folder, args.steps))
            results["transformers"].append(run_child("transformers", folder, args.steps))
            results["tiny"].append(run_trainer(tiny, 2))
    report(results)


if __name__ == "__main__":
    main()
