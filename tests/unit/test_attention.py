"""Core attention of the local spec: grouped queries, causal, softmax in fp32, sequences of a packed sample apart."""

import itertools
import math

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from single_process import ensure_world

from hymeg.models.attention import CoreAttention, _chunk_spans

HEADS, GROUPS, DIM = 6, 2, 8


def naive(query, key, value, dtype=torch.float64):
    """softmax(q k^T / sqrt(d)) v, head by head, `[s, b, n, d]` -> `[s, b, n * d]`."""
    s, b, heads, d = query.shape
    out = torch.empty(s, b, heads, d, dtype=dtype)
    for head in range(heads):
        group = head // (heads // key.shape[2])
        for sample in range(b):
            scores = query[:, sample, head].to(dtype) @ key[:, sample, group].to(dtype).T / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
            out[:, sample, head] = torch.softmax(scores, -1) @ value[:, sample, group].to(dtype)
    return out.flatten(2)


@pytest.fixture
def core():
    ensure_world()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_dropout=0.0
    )
    return CoreAttention(config, ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]))


def random_qkv(s: int, b: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, b, n, DIM, generator=generator).to(dtype) for n in (HEADS, GROUPS, GROUPS)]


def test_equals_naive_attention(core):
    query, key, value = random_qkv(19, 2)
    assert (core(query, key, value) - naive(query, key, value)).abs().max() < 1e-6


def test_softmax_is_taken_in_fp32(core):
    """In bf16 the error is that of rounding probabilities and result once, which a softmax of rounded scores would
    exceed.
    """
    query, key, value = random_qkv(64, 1, torch.bfloat16)
    query = query * 6
    exact = naive(query, key, value)
    bound = 2 * 2**-8 * naive(query, key, value.abs())  # bf16 rounds to 2^-8
    assert ((core(query, key, value) - exact).abs() <= bound).all()
    scores = torch.einsum("sbnd,tbnd->bnst", query, key.repeat_interleave(HEADS // GROUPS, 2)) / math.sqrt(DIM)
    rounded = torch.softmax(scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf), -1)
    coarse = torch.einsum(
        "bnst,tbnd->sbnd", rounded.double(), value.repeat_interleave(HEADS // GROUPS, 2).double()
    ).flatten(2)
    assert not ((coarse - exact).abs() <= bound).all()


def test_packed_sequences_do_not_see_one_another(core):
    lengths = [3, 1, 9, 6]
    query, key, value = random_qkv(sum(lengths), 1)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=9, max_seqlen_kv=9
    )
    found = core(query[:, 0], key[:, 0], value[:, 0], packed_seq_params=packed)
    parts = [naive(*(x[a:b] for x in (query, key, value))) for a, b in itertools.pairwise(boundaries)]
    assert found.shape == (sum(lengths), HEADS * DIM)
    assert (found - torch.cat(parts)[:, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_chunks_cover_every_query_with_its_past(cp_size):
    boundaries = [0, 16, 48]
    seen = {}
    for rank in range(cp_size):
        for queries, keys in _chunk_spans(boundaries, cp_size, rank):
            length = queries.stop - queries.start
            for offset in range(length):
                seen[keys.stop - length + offset] = keys.start
    assert seen == {position: 0 if position < 16 else 16 for position in range(48)}
