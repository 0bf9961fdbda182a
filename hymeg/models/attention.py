"""Self-attention of both layer specs; core attention for the local one: grouped queries, context parallelism, packed
sequences.

Megatron's local `DotProductAttention` refuses the last two. Keys and values are gathered over the context-parallel
group; a rank's queries are two chunks of every sequence (`chunks_of_rank`), and each attends to the keys up to its own
end. Softmax is taken in fp32 by torch's kernel
whatever the dtype, so `enable_attention_fp32_softmax` always holds.
"""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import attention
from megatron.core.transformer.module import MegatronModule

from hymeg.platform.kernels import chunks_of_rank


class SelfAttention(attention.SelfAttention):
    """Megatron's in training. Given an `inference_context`, tokens `[t, 1, h]` of any sequences attend to what the
    context keeps of each, in place of Megatron's own caches: those want all prompts of one length, or CUDA.
    """

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.get("inference_context")
        if cache is None:
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        return self.linear_proj(cache.attend(self, query, key, value))


class CoreAttention(MegatronModule):
    """Causal attention. Arguments as Megatron's core attention modules; of the masks only the causal one is offered."""

    def __init__(
        self, config, pg_collection: ProcessGroupCollection, softmax_scale: float | None = None, **as_megatrons
    ):
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type=None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[s, b, heads, head_dim]`, or `[t, heads, head_dim]` when packed; s and t are this rank's share under
                context parallelism.
            key, value: the same with `query_groups` in place of heads.
            attention_mask: ignored: the mask is causal, and within each sequence when packed.
            packed_seq_params: where sequences start and end, in tokens of the whole sample (`cu_seqlens_q_padded`, or
                `cu_seqlens_q` without it).

        Returns:
            `[s, b, heads * head_dim]`, or `[t, heads * head_dim]` when packed.
        """
        cp_size = self.cp_group.size()
        boundaries = [0, query.size(0) * cp_size]
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
            padded = packed_seq_params.cu_seqlens_q_padded
            boundaries = (packed_seq_params.cu_seqlens_q if padded is None else padded).tolist()
        if cp_size == 1:
            spans = [(slice(a, b), slice(a, b)) for a, b in itertools.pairwise(boundaries)]
        else:
            key, value = _gather(key, value, boundaries, self.cp_group)
            spans = _chunk_spans(boundaries, cp_size, self.cp_group.rank())
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        parts = [self._attend(query[:, :, q], key[:, :, k], value[:, :, k]) for q, k in spans if q.stop > q.start]
        # [b, n, s, d] -> [s, b, n * d]
        context = torch.cat(parts, dim=2).permute(2, 0, 1, 3).flatten(2)
        return context.squeeze(1) if packed else context

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One span of queries `[b, n, sq, d]`, the last of its keys' positions, over keys `[b, groups, sk, d]`."""
        sq, sk = query.size(2), key.size(2)
        mask = None if sq == sk else torch.ones(sq, sk, dtype=torch.bool, device=query.device).tril(sk - sq)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=True,
        )


def _chunk_spans(boundaries: list[int], cp_size: int, rank: int) -> list[tuple[slice, slice]]:
    """For each of the rank's chunks: where it lies in the local queries, and the keys (in the whole sample's order) of
    its sequence up to its end.
    """
    spans, local = [], 0
    for first, start, end in chunks_of_rank(boundaries, cp_size, rank):
        spans.append((slice(local, local + end - start), slice(first, end)))
        local += end - start
    return spans


def _gather(key: torch.Tensor, value: torch.Tensor, boundaries: list[int], group) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' keys and values, `[s, b, groups, d] -> [s * cp, b, groups, d]`, in the whole sample's order. Gradients
    are reduce-scattered.
    """
    positions = [  # of the gathered rows, rank by rank
        torch.arange(start, end, device=key.device)
        for rank in range(group.size())
        for _, start, end in chunks_of_rank(boundaries, group.size(), rank)
    ]
    order = torch.argsort(torch.cat(positions))
    both = torch.cat([key, value], dim=-1).contiguous()
    both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=group)[order]
    return both.split([key.size(-1), value.size(-1)], dim=-1)
