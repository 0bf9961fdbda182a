"""One pass of new tokens through the model, over all its pipeline stages.

A rank works with those of its tensor-parallel and pipeline-parallel groups. Context-parallel ranks hold the same
weights and each work on prompts of their own, as data-parallel ranks do. Expert parallelism ties all of them together:
their passes must be equally many, and equally long.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model

from hymeg.generation.cache import Cache
from hymeg.platform import device


class Stages:
    """This rank's part of the model.

    Args:
        model: the model, or its virtual stages on this rank in their order; wrapped or not.

    Attributes:
        holds_head: whether this rank sees logits.
    """

    def __init__(self, model: torch.nn.Module | Sequence[torch.nn.Module]):
        chunks = list(model) if isinstance(model, Sequence | torch.nn.ModuleList) else [model]
        self.chunks = [unwrap_model(chunk) for chunk in chunks]
        self.config, groups = self.chunks[0].config, self.chunks[0].pg_collection
        self.tensor_group, self.pipeline_group = groups.tp, groups.pp
        self.pipeline_ranks = dist.get_process_group_ranks(groups.pp)
        self.holds_head = self.chunks[-1].post_process
        self.experts_tie_ranks = (
            self.config.expert_model_parallel_size > 1
            or self.config.expert_tensor_parallel_size != self.config.tensor_model_parallel_size
        )

    def cache(self, num_slots: int, max_length: int) -> Cache:
        rotary = self.chunks[0].rotary_pos_emb
        # packed_seq: the angles of all positions, where context parallelism would give a rank's own
        return Cache(lambda length: rotary(length, packed_seq=True), num_slots, max_length, device.current())

    def pass_length(self, num_tokens: int) -> int:
        """How long the next pass must be, padding included, where this rank has so many tokens; 0 when no rank that it
        is tied to has any. To be asked by all of them.
        """
        if self.experts_tie_ranks:
            longest = torch.tensor([num_tokens], device=device.current())
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            num_tokens = int(longest)
        multiple = self.tensor_group.size() if self.config.sequence_parallel else 1
        if self.config.fp8 or self.config.fp4:
            multiple *= 16  # rows of a product of 8-bit numbers
        return -(-num_tokens // multiple) * multiple

    def hidden_states(self, tokens: Sequence[int], length: int, cache: Cache) -> torch.Tensor | None:
        """The trunk's hidden states `[length, 1, h]` of `tokens`, which `cache` was told of; None on ranks without the
        head. Under sequence parallelism the rank's part of them.
        """
        tokens = torch.tensor([[*tokens, *[0] * (length - len(tokens))]], device=device.current())
        hidden = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                hidden = self._receive(length)
            hidden = self._through(chunk, tokens, hidden, cache)
            if not chunk.post_process:
                dist.send(hidden.contiguous(), self._neighbour(1), group=self.pipeline_group)
                hidden = None
        return hidden

    def logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Logits `[len(rows), vocab]` after these tokens of a pass with the hidden states `hidden`."""
        head, hidden = self.chunks[-1].output_layer, self.whole(hidden)
        sequence_parallel, head.sequence_parallel = head.sequence_parallel, False
        try:
            logits, _ = head(hidden[rows], runtime_gather_output=True)
        finally:
            head.sequence_parallel = sequence_parallel
        return logits[:, 0]

    def whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states `[length, 1, h]` of a pass, of which a rank has a part under sequence parallelism."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self.tensor_group)
        return hidden

    def agreed(self, numbers: torch.Tensor) -> torch.Tensor:
        """`numbers` of the rank with the head, on every rank of the pipeline."""
        if len(self.pipeline_ranks) > 1:
            dist.broadcast(numbers, self.pipeline_ranks[-1], group=self.pipeline_group)
        return numbers

    @staticmethod
    def _through(chunk, tokens: torch.Tensor, hidden: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        if chunk.pre_process:
            hidden = chunk.embedding(input_ids=tokens, position_ids=None)
        else:
            chunk.decoder.set_input_tensor(hidden)
        return chunk.decoder(hidden_states=hidden, attention_mask=None, inference_context=cache)

    def _receive(self, length: int) -> torch.Tensor:
        if self.config.sequence_parallel:
            length //= self.tensor_group.size()
        dtype = torch.float32 if self.config.fp32_residual_connection else self.config.params_dtype
        hidden = torch.empty(length, 1, self.config.hidden_size, dtype=dtype, device=device.current())
        dist.recv(hidden, self._neighbour(-1), group=self.pipeline_group)
        return hidden

    def _neighbour(self, step: int) -> int:
        return self.pipeline_ranks[(self.pipeline_group.rank() + step) % len(self.pipeline_ranks)]
