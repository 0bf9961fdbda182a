"""Seconds of a training step and memory: adapters, full fine-tuning of the same model, peft beside transformers.

One checkpoint, one batch, one thread each, fp32, AdamW; medians of all steps but the first three of every process. The
two of a comparison run at the same time, each on a core of its own, which they change in every round: what else the
machine does then slows both. Memory is what a process had of its own at most (RssAnon, looked at every 20 ms), in a
run of its own in which glibc gives back at once what is freed: otherwise the figure is the allocator's luck. The column
beside it takes away what the same libraries held once they were imported.

    python tools/benchmarks/adapters.py [--rounds 4] [--steps 12]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from train_step import BATCH, LEARNING_RATE, SEQ_LENGTH, SHAPE, SKIPPED, batch_of, timed_steps, trainer_command

RANK, ALPHA = 16, 32
LAYERS, EXPERTS = 6, 16
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Modules of transformers' model: attention, dense layers and shared experts, which hymeg adapts by default too."""
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EVERYTHING = "--lora-targets " + " ".join(DEFAULT_TARGETS)
PAIRS = (("everything", "full"), ("default", "peft default"), ("everything", "peft everything"))
NAMES = list(dict.fromkeys(name for pair in PAIRS for name in pair))


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Child(NamedTuple):
    """What a process measured. `memory`: bytes of its own at most; `imports`: the same when its libraries were in."""

    steps: list[float]
    memory: int
    imports: int


def own_memory(pid: int) -> int:
    """Bytes of a process that are no file's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(found.group(1)) if (found := re.search(r"RssAnon:\s+(\d+)", status)) else 0


def run(command: list[str], core: int | None = None, **environment: str) -> Child:
    """`command` prints the trainer's log lines or "step SECONDS", and "imported BYTES" where it says its libraries'."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    on_core = [] if core is None else ["taskset", "-c", str(core)]
    process = subprocess.Popen([*on_core, *command], text=True, env=os.environ | environment, **pipes)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], own_memory(process.pid))

    threading.Thread(target=watch, daemon=True).start()
    output, _ = process.communicate()
    ended.set()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    steps = [float(ms) / 1e3 for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)]
    steps = steps or [float(seconds) for seconds in re.findall(r"^step ([\d.]+)", output, re.MULTILINE)]
    imports = re.search(r"^imported (\d+)", output, re.MULTILINE)
    return Child(steps[SKIPPED:], peak[0], int(imports.group(1)) if imports else 0)


def train_with_peft(folder: str, steps: int, with_experts: bool) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.hy_v3 import modeling_hy_v3  # noqa: F401 (before memory is read)

    print("imported", own_memory(os.getpid()), flush=True)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"),
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=DEFAULT_TARGETS,
            target_parameters=EXPERT_PARAMETERS if with_experts else None,
        ),
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    inputs, labels = batch_of(model.config.vocab_size)

    def step():
        optimizer.zero_grad()
        logits = model(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    timed_steps(step, steps)


def megatron_imports() -> None:
    import hymeg.training.run  # noqa: F401

    print("imported", own_memory(os.getpid()), flush=True)


def report(steps: dict[tuple[str, str], tuple[list, list]], held: dict[str, Child], imports: int) -> None:
    """`steps`: of each comparison the seconds of ours and of the other's."""
    print("\n| what | ms a step | beside ours of | against it | MB at most | above imports | against it |")
    print("|---|---|---|---|---|---|---|")
    for said, (ours, name) in zip(
        (
            "full fine-tuning, pretrain_hy.py; ours: adapters of everything, routed experts too",
            "peft beside transformers; adapters of attention, dense layers, shared experts",
            "peft beside transformers; adapters of everything",
        ),
        PAIRS,
        strict=True,
    ):
        our_time, time = map(statistics.median, steps[ours, name])
        (_, our_memory, _), (_, most, before) = held[ours], held[name]
        figures = f"{time * 1e3:,.0f} | {our_time * 1e3:,.0f} | {our_time / time:.2f}x"
        memory = f"{most / 1e6:,.0f} | {(most - (before or imports)) / 1e6:,.0f} | {our_memory / most:.2f}x"
        print(f"| {said} | {figures} | {memory} |")


def command(name: str, folder: str, steps: int) -> list[str]:
    if name.startswith("peft"):
        return [sys.executable, __file__, "--folder", folder, "--steps", str(steps), "--child", name]
    adapters = "" if name == "full" else f"--lora-rank {RANK} --lora-alpha {ALPHA}"
    return [*trainer_command(folder, steps), *adapters.split(), *(EVERYTHING.split() if name == "everything" else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="an even number: each has both cores")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--child", choices=("peft default", "peft everything", "imports"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.child == "imports":
        megatron_imports()
        return
    if args.child:
        train_with_peft(args.folder, args.steps, args.child == "peft everything")
        return
    from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
    from hymeg.hf.config import HyConfig

    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | {"num_hidden_layers": LAYERS, "num_experts": EXPERTS}
        write_tiny_checkpoint(folder, HyConfig.from_dict(TINY_CONFIG | shape), dtype="fp32")
        imports = run([sys.executable, __file__, "--child", "imports"]).imports
        held = {name: run(command(name, folder, 4), **GIVES_BACK) for name in NAMES}
        cores, steps = sorted(os.sched_getaffinity(0))[:2], {pair: ([], []) for pair in PAIRS}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            for pair, found in steps.items():
                with futures.ThreadPoolExecutor(2) as pool:
                    both = pool.map(lambda name, core: run(command(name, folder, args.steps), core), pair, cores)
                    for of_one, child in zip(found, both, strict=True):
                        of_one.extend(child.steps)
            cores.reverse()
    print(f"{LAYERS} layers, {EXPERTS} experts, batch {BATCH} x {SEQ_LENGTH}, rank {RANK}; medians of {args.rounds}")
    report(steps, held, imports)


if __name__ == "__main__":
    main()
