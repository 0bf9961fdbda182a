"""What adapters do to the weights, said now and then: the size of the update against the weights, and which adapters
have not moved, the failure that no loss shows."""

import argparse
from collections.abc import Sequence

import torch
from megatron.core.utils import unwrap_model

from hymeg.checkpoint.adapter_table import adapter_modules
from hymeg.hf.config import HyConfig
from hymeg.models.lora import Adapter
from hymeg.platform import device, megatron
from hymeg.progress import Say
from hymeg.training.run_record import write_scalars

STEPS = 10  # after which an adapter has moved, or something is wrong
_INTERVALS = 10  # of the log, between two lines


class AdapterLog:
    """Called on every rank after every step."""

    def __init__(self, args: argparse.Namespace, config: HyConfig, say: Say):
        self.args, self.say = args, say
        self.modules = adapter_modules(config, args.lora_targets)
        self.first: int | None = None
        self.began: dict[str, float] = {}  # path -> the squares of B here, added
        self.weights: dict[str, float] | None = None

    def __call__(self, iteration: int, model_chunks: Sequence[torch.nn.Module], optimizer) -> None:
        adapters = [one for model in unwrap_model(list(model_chunks)) for one in model.adapters.values()]
        if self.first is None:
            self.first, self.began = iteration, squares_of_b(adapters)
        if iteration == self.first + STEPS:
            self._say_unmoved(adapters)
        if iteration % (_INTERVALS * self.args.log_interval) == 0 or iteration == self.args.train_iters:
            megatron.gather_weights(model_chunks, optimizer)
            self._say_updates(iteration, adapters)

    def _say_unmoved(self, adapters: list[Adapter]) -> None:
        now = squares_of_b(adapters)
        moved = self._summed({path: float(now[path] != self.began[path]) for path in now})
        unmoved = [module.path for module in self.modules if not moved[module.path]]
        if unmoved:
            more = f", and {len(unmoved) - 5} more" if len(unmoved) > 5 else ""
            self.say(
                f"WARNING: {len(unmoved)} of {len(self.modules)} adapters have not moved in {STEPS} steps: "
                f"{', '.join(unmoved[:5])}{more}; leave them out of --lora-targets, or find out why nothing trains them"
            )

    def _say_updates(self, iteration: int, adapters: list[Adapter]) -> None:
        own = [adapter for adapter in adapters if adapter.groups.copies.rank() == 0]  # another rank has the same
        if self.weights is None:
            self.weights = self._summed(squares_of_weights(own))
        updates, by_target = self._summed(squares_of_updates(own)), {}
        for module in self.modules:
            both = by_target.setdefault(module.target, [0.0, 0.0])
            both[0] += updates[module.path]
            both[1] += self.weights[module.path]
        ratios = {target: (update / weight) ** 0.5 for target, (update, weight) in by_target.items()}
        shown = ", ".join(f"{target} {ratio:.2e}" for target, ratio in ratios.items())
        self.say(f"update against weights, iteration {iteration}: {shown}")
        write_scalars({f"adapter-update/{target}": ratio for target, ratio in ratios.items()}, iteration)

    def _summed(self, here: dict[str, float]) -> dict[str, float]:
        """By path, over all ranks: every one calls it."""
        values = torch.tensor([here.get(module.path, 0.0) for module in self.modules], device=device.current())
        torch.distributed.all_reduce(values)
        return dict(zip((module.path for module in self.modules), values.tolist(), strict=True))


def squares_of_b(adapters: Sequence[Adapter]) -> dict[str, float]:
    """Of this rank's part, copies included, by path."""
    return {part.path: _square(b) for adapter in adapters for part, _, b in adapter.pairs()}


def squares_of_updates(adapters: Sequence[Adapter]) -> dict[str, float]:
    """|scale * B A|^2 of this rank's part, by path. With r columns only, since it is the sum of (B^T B) * (A A^T)."""
    found = {}
    for adapter in adapters:
        for part, a, b in adapter.pairs():
            a, b = a.detach().float(), b.detach().float()
            found[part.path] = adapter.scale**2 * ((b.mT @ b) * (a @ a.mT)).sum().item()
    return found


def squares_of_weights(adapters: Sequence[Adapter]) -> dict[str, float]:
    """|W|^2 of this rank's part, by path."""
    found = {}
    for adapter in adapters:
        first = 0
        for part, num_rows in zip(adapter.parts, adapter.rows, strict=True):
            if part is not None:
                runs = (weight.unflatten(0, (adapter.num_runs, -1)) for weight in adapter.weights())
                found[part.path] = sum(_square(run[:, first : first + num_rows]) for run in runs)
            first += num_rows
    return found


def _square(tensor: torch.Tensor) -> float:
    return tensor.detach().float().square().sum().item()
