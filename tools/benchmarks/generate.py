"""Tokens a second of generation against transformers with its cache: the same weights, prompts and greedy tokens, in
one process, by turns.

    python tools/benchmarks/generate.py [--hidden 512] [--layers 8] [--experts 32] [--batch 1 16] [--rounds 3]

A prompt's tokens are not counted; both make the same number of new ones, and the same text. Time is the processor's, of
all threads, so that other jobs count little; transformers runs without the CPU platform's function mode.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hymeg import platform

platform.install()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint  # noqa: E402
from hymeg.generation import Sampling, generate  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.training.loaded import load_model  # noqa: E402


def checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """Hy-MT2's proportions: experts of three eighths of the hidden size, eight of them for a token."""
    shape = {
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 32,
        "num_key_value_heads": max(args.hidden // 256, 1),
        "head_dim": 64,
        "num_experts": args.experts,
        "num_experts_per_tok": min(8, args.experts // 4),
        "moe_intermediate_size": 3 * args.hidden // 8,
        "expert_hidden_dim": 3 * args.hidden // 8,
        "vocab_size": 8192,
        "initializer_range": 0.04,
        "mlp_layer_types": ["dense"] + ["sparse"] * (args.layers - 1),
    }
    write_tiny_checkpoint(folder, HyConfig.from_dict(TINY_CONFIG | shape), dtype="fp32")


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 8), ("experts", 32), ("prompt", 64), ("new", 48), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), args)
        model, _ = load_model(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)
    print("| batch | hymeg, tokens/s | transformers, tokens/s | times | same text |\n|---|---|---|---|---|")
    for batch in args.batch:
        prompts = torch.randint(0, 8000, (batch, args.prompt), generator=torch.Generator().manual_seed(batch))
        options = {"min_new_tokens": args.new, "max_new_tokens": args.new, "do_sample": False}

        def ours(prompts=prompts) -> list[list[int]]:
            return [answer.tokens for answer in generate(model, prompts.tolist(), Sampling(args.new))]

        def of_transformers(prompts=prompts, options=options) -> list[list[int]]:
            with torch._C.DisableTorchFunction():  # the CPU platform's mode, which users of transformers don't have
                found = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            return found[:, args.prompt :].tolist()

        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(args.rounds + 1):  # the first is not counted
            (ours_s, mine), (theirs_s, expected) = timed(ours), timed(of_transformers)
            if number:
                times["ours"].append(ours_s)
                times["theirs"].append(theirs_s)
        fast, slow = (batch * args.new / statistics.median(times[who]) for who in ("ours", "theirs"))
        print(f"| {batch} | {fast:,.1f} | {slow:,.1f} | {fast / slow:.2f} | {'yes' if mine == expected else 'no'} |")


if __name__ == "__main__":
    main()
