"""Memory and time of the head and its loss, forward and backward: with whole logits (Megatron's cross entropies) and
without.

bf16 weights, fp32 logits. Peak is what a step holds above its inputs, as CUDA's allocator counts or, on CPU, in
tensors. Operations are those that torch dispatches, views left out: on a GPU each is a launch or more (on CPU two more
for each product to fp32, whose operands are copied there). The gradients of every way are held against the first's.

    python tools/benchmarks/head.py [--tokens 4096] [--hidden 2048] [--vocab 120832] [--slice-elements 16777216 ...]
"""

import argparse
import statistics
import time
from collections.abc import Callable

from hymeg import platform

platform.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy  # noqa: E402
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy  # noqa: E402
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from hymeg.models import head, linear_cross_entropy  # noqa: E402
from hymeg.platform import device  # noqa: E402
from hymeg.training.run import stand_alone  # noqa: E402

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def with_logits(cross_entropy: Callable) -> Way:
    """`cross_entropy` takes logits `[n, 1, v]`, labels `[n, 1]` and the group."""

    def losses(hidden, weight, labels):
        logits = head._LinearToFp32.apply(hidden, weight)
        return cross_entropy(logits[:, None], labels[:, None], dist.group.WORLD)

    return losses


def without_logits(vocab: int, recompute: bool, slice_elements: int) -> Way:
    shard = linear_cross_entropy.VocabShard(0, vocab, True, recompute, dist.group.WORLD, slice_elements)

    def losses(hidden, weight, labels):
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, shard)[0]

    return losses


def ways(vocab: int, slice_elements: list[int]) -> dict[str, Way]:
    found = {
        "Megatron": with_logits(
            lambda logits, labels, group: vocab_parallel_cross_entropy(logits, labels, tp_group=group)
        ),
        "Megatron, fused (native)": with_logits(fused_vocab_parallel_cross_entropy),
    }
    if not platform.is_cpu() and te_parallel_cross_entropy is not None:
        found["Megatron, fused (te)"] = with_logits(
            lambda logits, labels, group: te_parallel_cross_entropy(logits, labels, group, False)
        )
    for size in slice_elements:
        found[f"hymeg, kept, slices of {size:,}"] = without_logits(vocab, False, size)
        found[f"hymeg, recomputed, slices of {size:,}"] = without_logits(vocab, True, size)
    return found


def step(way: Way, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    hidden.grad = weight.grad = None
    losses = way(hidden, weight, labels)
    losses.sum().backward()
    return losses.detach()


def timed(run: Callable[[], object]) -> float:
    """Seconds of `run`, on the device's clock."""
    device.synchronize()
    start = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - start


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that `run` holds at its peak above what was held before."""
    if not platform.is_cpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    tracker = MemTracker()
    with tracker:
        run()
    return tracker.get_tracker_snapshot("peak")[device.current()]["Total"]


class _Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def measure(tokens: int, hidden_size: int, vocab: int, slice_elements: list[int], rounds: int) -> list[dict]:
    """For every way: seconds (median of `rounds`, interleaved), peak bytes, operations, and how far losses and
    gradients are from the first way's (relative norms)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, hidden_size, generator=generator).bfloat16() for n in (tokens, vocab))
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(device.current())
    hidden = hidden.to(device.current()).requires_grad_()
    weight = (weight / hidden_size**0.5).to(device.current()).requires_grad_()
    results = [{"name": name, "way": way, "seconds": []} for name, way in ways(vocab, slice_elements).items()]
    for number in range(1 + rounds):
        for result in results:
            seconds = timed(lambda way=result["way"]: step(way, hidden, weight, labels))
            result["seconds"] += [seconds] if number else []
    reference = None
    for result in results:
        hidden.grad = weight.grad = None
        result["peak"] = peak_of(lambda way=result["way"]: step(way, hidden, weight, labels))
        with _Operations() as operations:
            step(result["way"], hidden, weight, labels)
        result["operations"] = operations.count
        outcome = [
            step(result["way"], hidden, weight, labels).float().flatten(),
            hidden.grad.float(),
            weight.grad.float(),
        ]
        reference = reference or outcome
        result["errors"] = [
            ((found - first).norm() / first.norm()).item() for found, first in zip(outcome, reference, strict=True)
        ]
        result["seconds"] = statistics.median(result["seconds"])
        del outcome
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=120832)
    parser.add_argument("--slice-elements", type=int, nargs="+", default=[linear_cross_entropy.SLICE_ELEMENTS])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    stand_alone()
    dist.init_process_group("gloo" if platform.is_cpu() else "nccl")
    print(
        f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, bf16, fp32 logits, on {device.name()}, "
        f"torch {torch.__version__}\n"
    )
    columns = ("way", "ms", "peak MiB", "operations", "loss", "gradient of hidden", "gradient of weight")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for found in measure(args.tokens, args.hidden, args.vocab, args.slice_elements, args.rounds):
        errors = " | ".join(f"{error:.1e}" for error in found["errors"])
        figures = f"{found['seconds'] * 1e3:.1f} | {found['peak'] / 2**20:,.0f} | {found['operations']}"
        print(f"| {found['name']} | {figures} | {errors} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
