"""Checks that run inside a world, called by name from worker.py. Each returns what the test judges; every rank must
come to the same collectives.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.arguments import validate_args
from model_weights import load_into
from safetensors.torch import load_file

from hymeg.models.attention import _chunk_spans
from hymeg.models.hy import construct
from hymeg.models.linear_cross_entropy import VocabShard, linear_cross_entropy
from hymeg.platform.patches import patched
from hymeg.training.arguments import parse
from hymeg.training.preflight import preflight
from hymeg.training.run import model_config_from_args, train


def _build(argv: list[str]):
    args, config = parse(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        validate_args(args)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = construct(model_config_from_args(args), ProcessGroupCollection.use_mpu_process_groups())
    load_into(config, [model], load_file(f"{args.hf_model}/model.safetensors"))
    return model


def packed_context_parallel(argv: list[str]) -> dict:
    """Losses and embedding gradient of a packed sample `[1, t]` cut over the context-parallel group, put together again
    in the sample's order.
    """
    model = _build(argv)
    group = parallel_state.get_context_parallel_group()
    lengths = [8, 16, 4, 12]
    boundaries = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = torch.randint(0, 900, (1, boundaries[-1] + 1), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in lengths])
    mine = torch.cat(_mine(boundaries, group)) if group.size() > 1 else torch.arange(boundaries[-1])
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=16, max_seqlen_kv=16
    )
    losses = model(
        tokens[:, :-1][:, mine], positions[None, mine], None, labels=tokens[:, 1:][:, mine], packed_seq_params=packed
    )
    losses.sum().backward()
    whole = torch.zeros(boundaries[-1])
    whole[mine] = losses.detach()[0]
    gradient = model.embedding.word_embeddings.weight.grad.clone()
    dist.all_reduce(whole)
    dist.all_reduce(gradient)
    return {"losses": whole.tolist(), "gradient": gradient.flatten()[::7].tolist()}


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


def _mine(boundaries: list[int], group) -> list[torch.Tensor]:
    """The sample's positions on this rank: for each sequence its two chunks, whose keys end where they do."""
    spans = _chunk_spans(boundaries, group.size(), group.rank())
    return [torch.arange(keys.stop - (queries.stop - queries.start), keys.stop) for queries, keys in spans]


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
