"""One measurement of tools/benchmarks/gpu.py, in a process of its own: python tools/benchmarks/gpu_worker.py JOB.json
RESULT.json.

A job is `{"engine": "ceilings" | "hymeg" | "transformers", "folder": DIR, "seq_length": n, "micro_batch_size": n,
"steps": n, "flags": TEXT, "recompute": bool, "profile": bool, "tiny": bool}`. hymeg's is the trainer itself, from its
own command line, with its step timed from outside.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

from hymeg import platform

platform.install()

import torch  # noqa: E402
from gpu_profile import mark, marked, marking_optimizer, profiled  # noqa: E402

from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.planning.flops import training_flops  # noqa: E402
from hymeg.platform import device  # noqa: E402

SKIPPED = 3
"""Steps before the first that counts: they compile, allocate and tune."""
FIXED = "--mock-data --init-from-scratch --eval-iters 0 --log-interval 1000 --lr 1e-5 --lr-decay-style constant"
FIXED += " --bf16 --use-distributed-optimizer"


def seconds(run: Callable[[], object]) -> float:
    device.synchronize()
    start = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - start


def ceilings(job: dict) -> dict:
    """bf16 TFLOP/s of the best of several square products, GB/s of a copy on the device, read and write counted."""
    sizes, num_bytes, repeats = ((256,), 2**20, 2) if job["tiny"] else ((4096, 8192, 16384), 2**32, 10)
    rates = []
    for size in sizes:
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device.current()) for _ in range(2))
        out = torch.empty_like(a)
        time_of_one = [seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(SKIPPED + repeats)]
        rates.append(2 * size**3 / statistics.median(time_of_one[SKIPPED:]) / 1e12)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device.current())
    target = torch.empty_like(source)
    copies = [seconds(lambda: target.copy_(source)) for _ in range(SKIPPED + repeats)]
    return {"matmul_tflops": max(rates), "copy_gb_per_s": 2 * num_bytes / statistics.median(copies[SKIPPED:]) / 1e9}


class Watch:
    """Times the steps of a training, and profiles the last one when asked to."""

    def __init__(self, num_steps: int, profile: bool):
        self.num_steps, self.profile = num_steps, profile
        self.times: list[float] = []
        self.classes: dict[str, float] | None = None

    def step(self, run: Callable[[], object], model: torch.nn.Module, optimizer) -> object:
        results = []
        if self.profile and len(self.times) == self.num_steps - 1:
            mark(model)
            with marking_optimizer(optimizer):
                self.classes = profiled(lambda: results.append(run()))
        else:
            self.times.append(seconds(lambda: results.append(run())))
        return results[0]

    def result(self, config: HyConfig, job: dict) -> dict:
        """Medians, without the first steps."""
        step = statistics.median(self.times[SKIPPED:])
        tokens = job["micro_batch_size"] * job["seq_length"]
        flops = training_flops(config, job["micro_batch_size"], job["seq_length"])
        figures = {
            "seconds": step,
            "tokens_per_s": tokens / step,
            "model_tflops": flops / step / 1e12,
            "spread": max(self.times[SKIPPED:]) / step,
        }
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        return figures | ({"classes_ms": self.classes} if self.classes else {})


def hymeg(job: dict) -> dict:
    from megatron.training import training

    from hymeg.platform.patches import patched
    from hymeg.training.arguments import parse
    from hymeg.training.preflight import preflight
    from hymeg.training.run import stand_alone, train

    stand_alone()
    batch = f"--seq-length {job['seq_length']} --micro-batch-size {job['micro_batch_size']}"
    batch += f" --global-batch-size {job['micro_batch_size']}"
    argv = [*f"--hf-model {job['folder']} --train-iters {job['steps']} {batch} {FIXED} {job['flags']}".split()]
    args, config = parse(argv)
    preflight(args, config, lambda note: None)
    watch, train_step = Watch(job["steps"], job["profile"]), training.train_step

    def timed(forward_step, data_iterator, model, optimizer, *rest, **named):
        run = functools.partial(train_step, forward_step, data_iterator, model, optimizer, *rest, **named)
        return watch.step(run, torch.nn.ModuleList(model), optimizer)

    with patched(training, "train_step", timed, "the benchmark times steps"):
        train(args, config)
    return watch.result(config, job) | {"predicted": predicted(argv)}


def predicted(argv: list[str]) -> dict:
    """The planner's memory and step time for this command line on this GPU (on CPU: on an H100)."""
    from hymeg.planning.memory import Device
    from hymeg.planning.network import HARDWARE
    from hymeg.planning.search import Machine, Planner
    from hymeg.planning.settings import settings_of
    from hymeg.platform import for_gpus
    from hymeg.training.arguments import parse
    from hymeg.training.preflight import layout_of

    with for_gpus():
        args, config = parse(argv)
    hardware = next(
        (HARDWARE[name] for name in sorted(HARDWARE, key=len, reverse=True) if name in device.name()), HARDWARE["H100"]
    )
    plan = Planner(config, Machine(1, 8, Device(hardware.memory_gib), hardware), imbalance=1.0).plan(
        layout_of(args), settings_of(args)
    )
    return {"peak_bytes": plan.peak, "seconds": plan.time.total, "gpu": hardware.name}


def transformers(job: dict) -> dict:
    """Its own model with sdpa and grouped_mm experts (its default), bf16 weights, fused AdamW with bf16 moments: less
    state than hymeg's fp32.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = HyConfig.from_dir(job["folder"])
    torch.set_default_device(device.current())
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(job["folder"]), dtype=torch.bfloat16, attn_implementation="sdpa"
    ).train()
    if job["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    tokens = torch.randint(0, config.vocab_size, (job["micro_batch_size"], job["seq_length"] + 1))
    loss_of = marked(torch.nn.functional.cross_entropy, "head and loss")

    def step():
        optimizer.zero_grad()
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss_of(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    watch = Watch(job["steps"], job["profile"])
    for _ in range(job["steps"]):
        watch.step(step, model, optimizer)
    return watch.result(config, job) | {"experts": model.config._experts_implementation}


def main(job_path: str, result_path: str) -> None:
    with open(job_path) as file:
        job = json.load(file)
    result = {"ceilings": ceilings, "hymeg": hymeg, "transformers": transformers}[job["engine"]](job)
    with open(result_path, "w") as file:
        json.dump(result, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
