"""What the log says beyond Megatron's own: tokens per second, model FLOPs by our formula, MFU, the load of the
experts. The same goes to TensorBoard, Weights & Biases and the run's record.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from hymeg.hf.config import HyConfig
from hymeg.models.router import Router
from hymeg.planning.flops import packed_training_flops, peak_tflops
from hymeg.platform import device, megatron
from hymeg.progress import Say
from hymeg.reporting.record import RunRecord
from hymeg.training.run_record import LINES_PER_HEAT_MAP, beat, write_heat_map, write_scalars
from hymeg.training.step import SetLosses, check_finite, training_sets

_STARVED_STEPS, _STARVED_TOKENS = 100, 100
_THROUGHPUT = re.compile(r"throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \|")


def expert_counts(model_chunks: Sequence[torch.nn.Module], config: HyConfig) -> np.ndarray:
    """Tokens that each expert was given since the last call, of the whole world: int64 `[layers, experts]`, multi-token
    prediction after the trunk, zeros where a layer has no experts. Collective: every rank calls it.
    """
    counts = torch.zeros(
        config.num_hidden_layers + config.num_nextn_predict_layers,
        config.num_experts,
        dtype=torch.int64,
        device=device.current(),
    )
    for chunk in model_chunks:
        for router in chunk.modules():
            if isinstance(router, Router):
                layer = router.layer_number - 1 + (config.num_hidden_layers if router.is_mtp_layer else 0)
                counts[layer] += router.expert_load
                router.expert_load.zero_()
    # Ranks of one layer see different tokens, ranks of different stages different layers: the sum is over both.
    torch.distributed.all_reduce(counts)
    return counts.cpu().numpy()


def busiest_over_mean(counts: np.ndarray, num_ranks: int) -> dict[int, float]:
    """Per layer that has experts, the tokens of the busiest of `num_ranks` expert-parallel ranks over their mean; of
    the busiest expert, where there are as many ranks as experts. 1.0 is perfect balance.

    Args:
        counts: `[layers, experts]`; each rank holds as many experts, in their order.
    """
    by_rank = counts.reshape(len(counts), num_ranks, -1).sum(axis=2)
    return {layer: max(row) * len(row) / sum(row) for layer, row in enumerate(by_rank.tolist()) if any(row)}


@contextlib.contextmanager
def logging(args, config: HyConfig, model_config, record: RunRecord, say: Say) -> Iterator[SetLosses | None]:
    """While the context is open, Megatron's log counts by our formula, and its line, TensorBoard and Weights & Biases
    say more; `record` is told the same, and `say` which experts get no tokens. Where there are several data sets, gives
    what must be told their losses.
    """

    def step_flops(batch_size: int, squared_lengths: float | None, num_tokens: float | None) -> float:
        num_tokens = batch_size * args.seq_length if num_tokens is None else num_tokens
        squared_lengths = batch_size * args.seq_length**2 if squared_lengths is None else squared_lengths
        return packed_training_flops(config, num_tokens, squared_lengths, is_frozen=args.lora_rank is not None)

    names = training_sets(args)
    line = LogLine(args, config, device.name(), record, say, SetLosses(names) if len(names) > 1 else None)
    model_config.post_wrap_hooks = [*(model_config.post_wrap_hooks or []), line.watch]
    with megatron.flops_formula(step_flops), megatron.log_line(line):
        yield line.set_losses


class LogLine:
    """Extends Megatron's line of every log interval, and writes the same to TensorBoard and Weights & Biases.

    Attributes:
        seconds: of an iteration, since the last line.
        losses: mean since the last line, by Megatron's names; on ranks of the last pipeline stage.
        learning_rate, grad_norm: of this iteration; None where this rank has none.
    """

    def __init__(
        self, args, config: HyConfig, device_name: str, record: RunRecord, say: Say, set_losses: SetLosses | None = None
    ):
        self.args, self.config, self.record, self.say = args, config, record, say
        self.starved = StarvedExperts()
        self.set_losses = set_losses
        self.by_set: dict[str, float] = {}
        self.losses: dict[str, float] = {}
        self.learning_rate = self.grad_norm = None
        self.peak = peak_tflops(device_name)
        self.model_chunks: list[torch.nn.Module] = []
        self.counts: np.ndarray | None = None
        self.packed: list[tuple[float, float]] = []
        self.iteration = self.seen = self.lines = 0
        self.seconds = math.nan
        self.peak_bytes: list[int] | None = None

    def watch(self, model_chunks: list) -> list:
        """Called once the model is built and wrapped."""
        self.model_chunks = model_chunks
        return model_chunks

    def check(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Called on every rank after each step that changed the weights, before anything of it is saved."""
        if self.args.check_for_nan_in_loss_and_grad:
            check_finite(iteration, losses, self.grad_norm)

    def before(
        self,
        iteration: int,
        is_first_iteration: bool,
        num_tokens: float | None = None,
        squared_lengths: float | None = None,
    ) -> None:
        """Called on every rank before Megatron logs, each iteration. `num_tokens`, `squared_lengths`: of its
        conversations, padding left out; None when samples are full.
        """
        if num_tokens is not None:
            self.packed.append((num_tokens, squared_lengths))
        self.record.begin(iteration - 1)
        if iteration % self.args.log_interval == 0 or is_first_iteration:
            self.counts = expert_counts(self.model_chunks, self.config)
            self.peak_bytes = device.peak_bytes_by_stage()
            if self.set_losses is not None:
                # Megatron's first line keeps its sums too.
                self.by_set = self.set_losses.means(forget=iteration % self.args.log_interval == 0)
            self.seen, self.iteration = self.iteration or iteration - 1, iteration
            if starved := self.starved.after(self.counts, self.iteration - self.seen):
                self.say(f"iteration {iteration}: no token for 100 steps and more: experts of {told(starved)}")

    def extended(self, line: str) -> str:
        """`line` with our figures."""
        if self.args.save is not None and self.args.rank == self.args.world_size - 1:
            beat(self.args.save, self.iteration, self.seconds, line)
        num_positions = get_current_global_batch_size() * self.args.seq_length
        num_tokens, squared_lengths, full = num_positions, num_positions * self.args.seq_length, None
        if self.packed:
            num_tokens, squared_lengths = (sum(of) / len(self.packed) for of in zip(*self.packed, strict=True))
            full = num_tokens / num_positions
            self.packed.clear()
        tokens = num_tokens / self.seconds
        is_frozen = self.args.lora_rank is not None
        flops = packed_training_flops(self.config, num_tokens, squared_lengths, is_frozen=is_frozen)
        tflops = flops / self.seconds / self.args.world_size / 1e12
        mfu = None if self.peak is None else tflops / self.peak
        loads, parallel_load = {}, None
        # Megatron's format has one decimal: 0.0 on a small model.
        line = _THROUGHPUT.sub(f"throughput per GPU (TFLOP/s/GPU): {tflops:.4g} |", line)
        line += f" tokens/s: {tokens:,.0f} |"
        if full is not None:
            line += f" full: {full:.1%} |"
        if mfu is not None:
            line += f" MFU: {mfu:.1%} |"
        if self.counts is not None and (loads := busiest_over_mean(self.counts, self.config.num_experts)):
            by_rank = busiest_over_mean(self.counts, self.args.expert_model_parallel_size).values()
            parallel_load = sum(by_rank) / len(by_rank)
            by_layer = " ".join(f"{layer}:{load:.2f}" for layer, load in loads.items())
            line += f" expert load max/mean: {max(loads.values()):.2f} (by layer {by_layer}) |"
            line += f" by expert-parallel rank: {parallel_load:.2f} |"
            if self.lines % LINES_PER_HEAT_MAP == 0:
                write_heat_map(self.counts, self.iteration)
            self.lines += 1
        if self.by_set:
            line += f" loss by data set: {' '.join(f'{name} {loss:.6E}' for name, loss in self.by_set.items())} |"
        self.record.add_step(
            self.iteration,
            self.counts,
            losses=self.losses | {f"lm loss, {name}": loss for name, loss in self.by_set.items()},
            learning_rate=self.learning_rate,
            grad_norm=None if self.grad_norm is None else float(self.grad_norm),
            seconds=self.seconds,
            tokens_per_second=tokens,
            tflops_per_gpu=tflops,
            mfu=mfu,
            full=full,
            expert_load=loads,
            expert_parallel_load=parallel_load,
            peak_bytes=self.peak_bytes,
        )
        scalars = {"tokens-per-second": tokens, "model-tflops-per-gpu": tflops, "full": full, "mfu": mfu}
        scalars |= {"expert-parallel-load": parallel_load}
        scalars |= {f"expert-load/layer-{layer}": load for layer, load in loads.items()}
        scalars |= {f"lm loss/{name}": loss for name, loss in self.by_set.items()}
        write_scalars({name: value for name, value in scalars.items() if value is not None}, self.iteration)
        return line


class StarvedExperts:
    """Names experts that got no token for 100 steps in which an even share would have been 100 tokens or more."""

    def __init__(self):
        self.steps: np.ndarray | int = 0  # without a token, and the tokens of an even share in them
        self.shares: np.ndarray | float = 0.0
        self.named: set[tuple[int, int]] = set()

    def after(self, counts: np.ndarray, num_steps: int) -> dict[int, list[int]]:
        """By layer the experts that have become starved. `counts`: `[layers, experts]` of the last `num_steps` steps;
        zeros where a layer has no experts.
        """
        idle = counts == 0
        self.steps = np.where(idle, self.steps + num_steps, 0)
        self.shares = np.where(idle, self.shares + counts.mean(axis=1, keepdims=True), 0)
        is_starved = (self.steps >= _STARVED_STEPS) & (self.shares >= _STARVED_TOKENS)
        starved = set(map(tuple, np.argwhere(is_starved).tolist()))
        new = sorted(starved - self.named)
        self.named = starved
        return {layer: [expert for other, expert in new if other == layer] for layer in sorted({x for x, _ in new})}


def told(starved: dict[int, list[int]]) -> str:
    """The experts on one line."""
    return "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in starved.items())
