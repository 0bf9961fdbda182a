"""Checks that run inside a world, called by name from worker.py. Each returns what the test judges; every rank must
come to the same collectives.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from generated import generated
from megatron.training import training
from safetensors.torch import save_file

from hymeg.checkpoint.live import export_weights, load_weights
from hymeg.models.linear_cross_entropy import VocabShard, linear_cross_entropy
from hymeg.models.lora import Adapter
from hymeg.platform import megatron
from hymeg.platform.patches import patched
from hymeg.training.arguments import parse
from hymeg.training.loaded import build_model
from hymeg.training.preflight import preflight
from hymeg.training.run import train


def save_untrained(argv: list[str]) -> dict:
    """Load and save, as the trainer does, and no step between. "{node}" in a word: 0 on ranks of an even number, 1 on
    the others.
    """
    args, config = parse([word.replace("{node}", str(dist.get_rank() % 2)) for word in argv])
    preflight(args, config, lambda note: None)
    with patched(
        training,
        "train",
        lambda *_, **__: (1, 0),
        "iteration 1 is reached without a step; the trainer then saves it as its last",
    ):
        train(args, config)
    return {}


def generation(argv: list[str]) -> dict:
    """What this layout generates."""
    return generated(*parse(argv))


def logits_and_gradients(argv: list[str]) -> dict:
    """Of the model in --load on tokens that transformers' padding is not among, into the file that `argv` ends with:
    `tokens`, `logits`, and the gradients of the mean loss under transformers' names.
    """
    args, config = parse(argv[:-1])
    load = args.load
    preflight(args, config, lambda note: None)
    chunks = build_model(args)
    load_weights(chunks, config, load)
    tokens = torch.randint(0, config.pad_token_id, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs = tokens[:, :-1], torch.arange(32).expand(2, 32), None
    with torch.no_grad():
        logits = chunks[0](*inputs)
    chunks[0](*inputs, labels=tokens[:, 1:]).mean().backward()
    for parameter in chunks[0].parameters():
        parameter.data = parameter.grad
    gradients = {name: gradient.contiguous() for name, gradient in export_weights(chunks, config, layout="fused")}
    save_file({"tokens": tokens, "logits": logits.contiguous(), **gradients}, argv[-1])
    return {}


def adapter_masks(argv: list[str]) -> dict:
    """What every rank's adapters drop in a training: `[is of experts, is row-parallel, shape, digest]` of each mask."""
    noted, dropped = [], Adapter._dropped

    def noting(adapter, x, *args):
        kept = dropped(adapter, x, *args)
        digest = hashlib.sha256((kept == 0).numpy().tobytes()).hexdigest()
        noted.append([adapter.groups.experts is not None, adapter.is_row_parallel, list(x.shape), digest])
        return kept

    args, config = parse(argv)
    preflight(args, config, lambda note: None)
    with patched(Adapter, "_dropped", noting, "masks are seen nowhere else"):
        train(args, config)
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, noted)
    return {"ranks": ranks}


def vocabulary_shards(argv: list[str]) -> dict:
    """Losses, hits and gradients from a head whose rows, padded to 1024, are cut over the world; for vocabularies that
    end in various places.
    """
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(29, 32, generator=generator), torch.randn(1024, 32, generator=generator)
    rows = len(weight) // group.size()
    found = {}
    for vocab_size in (1024, 1000, 400):
        labels = torch.randint(0, vocab_size, (29,), generator=generator)
        for recompute in (False, True):
            start = group.rank() * rows
            shard = VocabShard(
                start, min(max(vocab_size - start, 0), rows), fp32_logits=True, recompute=recompute, group=group
            )
            mine = [hidden.clone().requires_grad_(), weight[start : start + rows].clone().requires_grad_()]
            losses, hits = linear_cross_entropy(*mine, labels, shard)
            (losses * torch.arange(29)).sum().backward()
            dist.all_reduce(mine[0].grad)
            gradients = [torch.empty_like(mine[1]) for _ in range(group.size())]
            dist.all_gather(gradients, mine[1].grad)
            figures = {
                "losses": losses,
                "hits": hits,
                "hidden gradient": mine[0].grad,
                "weight gradient": torch.cat(gradients),
            }
            found[f"{vocab_size} recompute={recompute}"] = {name: tensor.tolist() for name, tensor in figures.items()}
    return found


def gloo_collectives(argv: list[str]) -> dict:
    """What gloo lacks, as the platform provides it: split sizes as tensors, shards of unequal length."""
    rank, size = dist.get_rank(), dist.get_world_size()
    gathered = [torch.empty(n + 1, 2) for n in range(size)]
    dist.all_gather(gathered, torch.full((rank + 1, 2), float(rank)))
    scattered = torch.empty(rank + 1)
    dist.reduce_scatter(scattered, [torch.full((n + 1,), float(rank + n)) for n in range(size)])
    received = torch.empty(size * (rank + 1))
    sends = torch.tensor([n + 1 for n in range(size)])
    dist.all_to_all_single(
        received, torch.arange(float(sends.sum())) + 100 * rank, torch.full((size,), rank + 1), sends
    )
    dist.barrier(device_ids=[0])
    found = {"gathered": [t.tolist() for t in gathered], "scattered": scattered.tolist(), "received": received.tolist()}
    everyone = [None] * size
    dist.all_gather_object(everyone, found)
    return {"ranks": everyone}


def goes_wrong(argv: list[str]) -> dict:
    """Rank 1 does what `argv` says; the others wait for it in a collective."""
    if dist.get_rank() == 1:
        {"raises": json.loads, "dies": lambda _: os._exit(7), "sleeps": lambda _: time.sleep(600)}[argv[0]](argv[0])
    dist.barrier()
    return {}


def spoken(argv: list[str]) -> dict:
    """What tools/generate.py prints with this command line, on rank 0."""
    return _said("generate", argv)


def evaluated(argv: list[str]) -> dict:
    """What tools/evaluate.py prints with this command line, on rank 0."""
    return _said("evaluate", argv)


def _said(tool: str, argv: list[str]) -> dict:
    path = Path(__file__).parents[2] / "tools" / f"{tool}.py"
    with (
        patched(sys, "argv", [str(path), *argv], "the command line"),
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        runpy.run_path(str(path), run_name="__main__")
    return {"said": said.getvalue()}


def hand_over(argv: list[str]) -> dict:
    """Train with examples/hand_over.py, every two steps; how far the logits differ from those of the other process, and
    from hand-over to hand-over.
    """
    spec = importlib.util.spec_from_file_location("hand_over", Path(__file__).parents[2] / "examples" / "hand_over.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    args, config = parse(argv)
    preflight(args, config, lambda note: None)
    hand_over, logits = example.HandOver(2), []

    def after_step(*step):
        hand_over.after_step(*step)
        logits.append(hand_over.logits)

    with megatron.after_steps(after_step):
        try:
            train(args, config)
        finally:
            hand_over.end()
    moved = [(b - a).abs().max().item() for a, b in zip(logits[1::2], logits[3::2], strict=False)]
    return {"differences": hand_over.differences, "moved": moved, "largest": logits[-1].abs().max().item()}
