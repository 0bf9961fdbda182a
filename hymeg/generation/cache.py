"""Keys and values of the sequences that are being generated.

A pass of the model takes the new tokens of all sequences one after another, `[t, 1, h]`: a whole prompt of one, a
single token of another. Nothing is padded for prompts of different lengths, and sequence parallelism cuts passes of one
token a sequence as it cuts training's.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

_SMALLEST_CAPACITY = 256


@dataclasses.dataclass
class _Run:
    """Neighbouring slots with equally many new tokens, which attend together.

    Attributes:
        slots: of the cache.
        tokens: of the pass.
        num_new: for each slot.
        num_keys: that the longest sequence has.
        mask: which keys a query sees, bool `[slots, 1, new, keys]`; None: all of them, or the past where `causal`.
        causal: whether the new tokens are all there is.
    """

    slots: slice
    tokens: slice
    num_new: int
    num_keys: int
    mask: torch.Tensor | None
    causal: bool


class Cache:
    """What Megatron's layers are given as inference context; `SelfAttention` asks it to `attend`.

    Args:
        rotary: gives the angles `[length, 1, 1, head_dim]` of so many positions.
        num_slots: sequences at a time.
        max_length: of a sequence, in tokens.
        device: where keys and values lie.
    """

    def __init__(self, rotary: Callable[[int], torch.Tensor], num_slots: int, max_length: int, device: torch.device):
        self.rotary, self.num_slots, self.max_length, self.device = rotary, num_slots, max_length, device
        self.capacity = 0
        self.runs: list[_Run] = []
        self.layers: dict[int, list[torch.Tensor]] = {}

    def is_static_batching(self) -> bool:
        return True

    def is_dynamic_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return True

    def begin(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Say what the next passes bring: `counts[i]` tokens of the sequence in slot i, from position `starts[i]`."""
        spans = list(zip(starts, counts, strict=True))
        self._grow(max((start + count for start, count in spans), default=0))
        self.slots = self._index([slot for slot, count in enumerate(counts) for _ in range(count)])
        self.positions = self._index([start + i for start, count in spans for i in range(count)])
        self.runs, slot, token = [], 0, 0
        for count, run in itertools.groupby(spans, key=lambda span: span[1]):
            starts = [start for start, _ in run]
            slots, tokens = slice(slot, slot + len(starts)), slice(token, token + len(starts) * count)
            if count:
                self.runs.append(self._run(slots, tokens, starts, count))
            slot, token = slots.stop, tokens.stop
        if self.runs:
            angles = self.angles[self.positions]  # [n, 1, head_dim]
            self.cos, self.sin = angles.cos(), angles.sin()
            self.sin[..., : self.sin.size(-1) // 2].neg_()

    def move(self, source: int, target: int) -> None:
        """Let the sequence in slot `source` be that of slot `target`."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor[target] = tensor[source]

    def attend(
        self, layer: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Keep the new keys and values of `layer`, and attend.

        Args:
            layer: a self-attention of the model; of it only who it is counts.
            query: `[t, 1, heads, head_dim]`; what follows the tokens that `begin` announced is padding.
            key, value: the same with `query_groups` in place of heads.

        Returns:
            `[t, 1, heads * head_dim]`, zeros for the padding.
        """
        if not self.runs:
            return query.new_zeros(query.flatten(2).shape)
        keys, values = self._of(layer, key)
        num_tokens, num_padded = len(self.positions), len(query)
        query, key, value = (x[:num_tokens, 0] for x in (query, key, value))
        query, key = self._rotated(torch.cat((query, key), dim=1)).split((query.size(1), key.size(1)), dim=1)
        keys[self.slots, :, self.positions] = key
        values[self.slots, :, self.positions] = value
        parts = [_attend(run, query[run.tokens], keys, values) for run in self.runs]
        if num_padded > num_tokens:
            parts.append(query.new_zeros(num_padded - num_tokens, query.size(1) * query.size(2)))
        return torch.cat(parts).unsqueeze(1) if len(parts) != 1 else parts[0].unsqueeze(1)

    def _run(self, slots: slice, tokens: slice, starts: list[int], count: int) -> _Run:
        num_keys, mask, causal = max(starts) + count, None, not any(starts)
        if not causal and (count > 1 or min(starts) != max(starts)):
            mask = torch.arange(num_keys, device=self.device) <= self.positions[tokens].view(-1, 1, count, 1)
        return _Run(slots, tokens, count, num_keys, mask, causal)

    def _of(self, layer: torch.nn.Module, key: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values `[slots, query_groups, capacity, head_dim]` of the layer."""
        if id(layer) not in self.layers:
            shape = (self.num_slots, key.size(2), self.capacity, key.size(3))
            # zeros: what is masked is multiplied with a probability of 0, and must be a number
            self.layers[id(layer)] = [torch.zeros(shape, dtype=key.dtype, device=self.device) for _ in range(2)]
        return self.layers[id(layer)]

    def _grow(self, length: int) -> None:
        if length <= self.capacity:
            return
        capacity = min(max(_SMALLEST_CAPACITY, 2 * self.capacity, length), self.max_length)
        for tensors in self.layers.values():
            tensors[:] = [F.pad(tensor, (0, 0, 0, capacity - self.capacity)) for tensor in tensors]
        self.capacity = capacity
        self.angles = self.rotary(capacity)[:, 0]

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions, `[n, heads, head_dim]`: the halves of each head are the coordinates of the planes."""
        return x * self.cos.to(x.dtype) + x.roll(x.size(-1) // 2, dims=-1) * self.sin.to(x.dtype)

    def _index(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _attend(run: _Run, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The run's tokens `[n, heads, d]` over keys and values `[slots, groups, capacity, d]`; gives `[n, heads * d]`."""
    keys, values = (x[run.slots, :, : run.num_keys] for x in (keys, values))
    num_slots, num_groups, _, head_dim = keys.shape
    # [n, heads, d] -> [slots, heads, new, d]
    query = query.reshape(num_slots, run.num_new, -1, head_dim).transpose(1, 2)
    if run.causal:
        context = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        return context.transpose(1, 2).reshape(-1, context.size(1) * head_dim)
    # The heads of a group are so many queries more of its keys, which then are not copied for each.
    num_heads = query.size(1)
    query = query.reshape(num_slots, num_groups, -1, head_dim)
    mask = None if run.mask is None else run.mask.repeat(1, 1, num_heads // num_groups, 1)
    context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return context.view(num_slots, num_heads, run.num_new, head_dim).transpose(1, 2).reshape(-1, num_heads * head_dim)
