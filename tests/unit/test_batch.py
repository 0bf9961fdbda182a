"""A micro-batch of conversations: nothing of it asks the device, padding is known as such, and what multi-token
prediction rolls stays within each conversation.
"""

import types
from collections import Counter

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.core.utils import unwrap_model
from single_process import build, ensure_world
from torch.utils._python_dispatch import TorchDispatchMode

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.models.hy import HYV3ForCausalLM
from hymeg.models.router import Router
from hymeg.platform.mtp import roll_packed
from hymeg.platform.patches import INSTALLED
from hymeg.training import step
from hymeg.training.batch import get_batch, padding_of
from hymeg.training.step import SetLosses

LENGTHS, LENGTH = (20, 7, 13), 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "mtp"
    write_tiny_checkpoint(folder, dtype="fp32", num_mtp_layers=1)
    return folder


def samples(packed: bool) -> list[dict[str, torch.Tensor]]:
    """The conversations of LENGTHS, of whose tokens the first three are not trained, in one sample or in one each,
    padded to LENGTH, as ConversationDataset lays them out and the loader collates them."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in [None] if packed else LENGTHS:
        rows.append({key: torch.full((1, LENGTH), 5) for key in ("tokens", "labels")})
        rows[-1] |= {key: torch.zeros(1, LENGTH, dtype=torch.int64) for key in ("position_ids", "lengths")}
        rows[-1]["loss_mask"] = torch.zeros(1, LENGTH)
    start = 0
    for number, length in enumerate(LENGTHS):
        row, here = rows[0 if packed else number], slice(start, start + length)
        ids = torch.randint(10, 900, (length + 1,), generator=generator)
        row["tokens"][0, here], row["labels"][0, here] = ids[:-1], ids[1:]
        row["loss_mask"][0, start + 3 : start + length] = 1
        row["lengths"][0, start] = length
        row["position_ids"][0, start:] = torch.arange(LENGTH - start)
        start += length if packed else 0
    if packed:
        rows[0]["position_ids"][0, start:] = torch.arange(LENGTH - start)
    return rows


def args_of(packed: bool) -> types.SimpleNamespace:
    return types.SimpleNamespace(sft_rows=True, packed=packed, micro_batch_size=1, seq_length=LENGTH, mtp_num_layers=1)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen[operator._schema.name.removeprefix("aten::")] += 1
        indices = args[1] if operator._schema.name.startswith("aten::index") and isinstance(args[1], list) else ()
        self.seen["boolean index"] += any(i is not None and i.dtype == torch.bool for i in indices)
        return operator(*args, **(kwargs or {}))

    def waits(self) -> dict[str, int]:
        """Those for whose result the CPU would have to wait for the device."""
        names = ("_local_scalar_dense", "nonzero", "masked_select", "boolean index", "_unique2", "is_nonzero", "equal")
        return {name: self.seen[name] for name in names if self.seen[name]}


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_waits_for_the_device(packed):
    """The batch itself, and the four rolls of a multi-token-prediction layer."""
    ensure_world()
    with Operators() as operators:
        batch = get_batch(iter(samples(packed)), args_of(packed), None, None)
        for key in ("tokens", "position_ids", "labels", "loss_mask"):
            multi_token_prediction.roll_tensor(batch[key], -1, -1, None, batch["packed_seq_params"])
    assert not operators.waits() and operators.seen["roll"] == 4
    with Operators() as operators:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert operators.waits() == {"boolean index": 1, "_local_scalar_dense": 1}


def test_a_packed_batch_says_where_conversations_are():
    ensure_world()
    (sample,) = samples(packed=True)
    batch = get_batch(iter([sample]), args_of(True), None, None)
    packed = batch["packed_seq_params"]
    assert packed.cu_seqlens_q.tolist() == [0, 20, 27, 40, 64] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 24
    assert batch["padding_mask"].tolist() == [[False] * 40 + [True] * 24]
    assert [batch["loss_mask"][0, start : start + 4].tolist() for start in (0, 20, 27)] == [[0.0, 0.0, 0.0, 1.0]] * 3
    assert batch["loss_mask"].sum() == sum(LENGTHS) - 9 and batch["loss_mask"][0, 40:].tolist() == [0.0] * 24


WEIGHTS = (0.1, 3.0, 0.7)


def weighed(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each conversation of the packed sample with a weight of its own."""
    mask = sample["loss_mask"].clone()
    for weight, start, length in zip(WEIGHTS, (0, 20, 27), LENGTHS, strict=True):
        mask[0, start : start + length] *= weight
    return sample | {"loss_mask": mask}


def test_weights_arrive_as_they_are():
    ensure_world()
    sample = weighed(samples(packed=True)[0])
    expected = sample["loss_mask"].clone()
    batch = get_batch(iter([sample | {"dataset_id": torch.tensor([3])}]), args_of(True), None, None)
    assert torch.equal(batch["loss_mask"], expected) and batch["loss_mask"].dtype == torch.float32
    assert batch["loss_mask"].hymeg_is_weighted and batch["dataset_id"].tolist() == [3]
    assert batch["padding_mask"].tolist() == [[False] * 40 + [True] * 24]
    (plain,) = samples(packed=True)
    assert not get_batch(iter([plain]), args_of(True), None, None)["loss_mask"].hymeg_is_weighted


def test_multi_token_prediction_weighs_the_token_that_it_predicts(folder, monkeypatch):
    """And divides by the number of these, not by their weights."""
    model, given = build(folder).train(), []
    scaler = types.SimpleNamespace(apply=lambda hidden, losses: (given.append(losses.detach()), hidden)[1])
    monkeypatch.setattr(multi_token_prediction, "MTPLossAutoScaler", scaler)
    (plain,) = samples(packed=True)
    plain["loss_mask"][0, 0] = 1  # which nothing predicts twice: of 32 tokens 31 are left
    masks = plain["loss_mask"].clone(), weighed(plain)["loss_mask"]
    for mask in masks:
        batch = get_batch(iter([plain | {"loss_mask": mask.clone()}]), args_of(True), None, None)
        inputs = {key: batch[key] for key in ("labels", "loss_mask", "packed_seq_params", "padding_mask")}
        model(batch["tokens"], batch["position_ids"], None, **inputs)
    rolled = torch.zeros(1, LENGTH)
    for start, length in zip((0, 20, 27), LENGTHS, strict=True):
        rolled[0, start : start + length - 1] = masks[1][0, start + 1 : start + length]
    assert given[0].count_nonzero() == rolled.count_nonzero() == 31
    torch.testing.assert_close(given[1], given[0] * rolled, rtol=1e-6, atol=0)


def test_the_loss_of_each_data_set_is_that_of_its_trained_tokens():
    ensure_world()
    by_set = SetLosses(["a", "b", "c"])
    mask = torch.tensor([[1, 0.5, 0.0], [2, 0, 0], [0, 0, 0], [1, 1, 1]])
    weighed = torch.tensor([[3, 5, 0.0], [1, 0, 0], [0, 0, 0], [7, 8, 9]])
    assert by_set.means(forget=True) == {}
    with Operators() as operators:
        by_set.add(torch.tensor([0, 2, 1, 0], dtype=torch.int16), weighed, mask)
        by_set.add(torch.tensor([2]), weighed[:1], mask[:1])
    assert not operators.waits()
    assert by_set.means(forget=False) == by_set.means(forget=True) == {"a": 32 / 5, "c": 9 / 3}
    assert by_set.means(forget=True) == {}


def test_the_loss_counts_tokens_and_not_their_weights(monkeypatch):
    args = types.SimpleNamespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False)
    monkeypatch.setattr(step, "get_args", lambda: args)
    noted, mask = [], torch.tensor([[0.25, 0, 4]])
    loss, num_tokens, report = step.loss_function(mask, torch.tensor([[8, 5, 3.0]]), lambda *given: noted.append(given))
    assert (loss, num_tokens, num_tokens.dtype) == (14, 2, torch.int32) and report["lm loss"].tolist() == [14, 2]
    assert noted[0][0].tolist() == [[2, 0, 12]] and noted[0][1] is mask


def test_padding_of():
    """Behind a conversation, between two that are aligned, and all of an empty sample."""
    lengths = np.zeros((3, 8), np.int64)
    lengths[0, 0], lengths[0, 4], lengths[1, 0] = 3, 4, 8
    assert padding_of(lengths).astype(int).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0], [0] * 8, [1] * 8]


def counted(folder, packed: bool) -> list[list[int]]:
    """What each router counted: for the log, and for the bias."""
    model = build(folder).train()
    for sample in samples(packed):
        batch = get_batch(iter([sample]), args_of(packed), None, None)
        inputs = {key: batch[key] for key in ("labels", "loss_mask", "packed_seq_params", "padding_mask")}
        model(batch["tokens"], batch["position_ids"], None, **inputs)
    routers = [module for module in unwrap_model(model).modules() if isinstance(module, Router)]
    assert all(router.expert_load.tolist() == router.local_tokens_per_expert.tolist() for router in routers)
    return [router.expert_load.tolist() for router in routers]


def test_experts_count_the_same_tokens_packed_or_not(folder):
    """40 tokens, two experts each: no padding. The layer of multi-token prediction sees another token behind a
    conversation's last one, so that only its sum is the same.
    """
    packed, unpacked = counted(folder, True), counted(folder, False)
    assert packed[:-1] == unpacked[:-1] and len(packed) == 4
    assert [sum(counts) for counts in packed] == [sum(counts) for counts in unpacked] == [2 * sum(LENGTHS)] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_under_sequence_parallelism_the_mask_is_cut_like_the_sequence(monkeypatch, rank):
    """On every pipeline stage: tensor-parallel ranks hold pieces of the sequence one after the other."""
    tp = types.SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(sequence_parallel=True), pg_collection=types.SimpleNamespace(tp=tp)
    )
    base = types.SimpleNamespace(_preprocess=lambda: tuple("abcdef"))
    monkeypatch.setattr("hymeg.models.hy.super", lambda: base, raising=False)
    mask = torch.arange(8).view(2, 4) % 3 == 0
    made = HYV3ForCausalLM._preprocess(model, padding_mask=mask)
    assert made[:5] == tuple("abcde") and torch.equal(made[5], mask[:, 2 * rank : 2 * rank + 2])


CUTS = torch.tensor([0, 8, 24, 28, 40])


def megatrons_roll():
    return next(patch.original for patch in INSTALLED if patch.name == "roll_tensor")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_packed_roll_is_megatrons(dtype):
    tensor = torch.randint(1, 100, (1, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=CUTS.int(), cu_seqlens_kv=CUTS.int())
    expected, total = megatrons_roll()(tensor, -1, -1, None, packed)
    found, count = multi_token_prediction.roll_tensor(tensor, -1, -1, None, packed)
    assert torch.equal(found, expected) and count == total and found.dtype == dtype


@pytest.mark.parametrize("size", [1, 2])
def test_a_packed_roll_under_context_parallelism_is_the_whole_samples(monkeypatch, size):
    """Each rank holds a chunk of every conversation and its mirror."""
    whole = torch.randint(1, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    places = []
    for rank in range(size):
        mine = []
        for start, end in zip(CUTS[:-1].tolist(), CUTS[1:].tolist(), strict=True):
            chunk = (end - start) // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                mine += range(start + number * chunk, start + (number + 1) * chunk)
        places.append(mine)
    sent = {}

    def all_gather(ranks, tensor, group):
        sent[group.rank()] = tensor
        for rank in sent:
            ranks[rank].copy_(sent[rank])

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    groups = [types.SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank) for rank in range(size)]
    for _ in range(2):  # the second time round everyone's part is there
        rolled = [roll_packed(whole[:, mine], CUTS, group) for mine, group in zip(places, groups, strict=True)]
    expected = roll_packed(whole, CUTS, None)
    for mine, found in zip(places, rolled, strict=True):
        assert torch.equal(found, expected[:, mine])


def test_padding_is_not_rolled():
    mask = torch.tensor([[False, True, True]])
    assert multi_token_prediction.roll_tensor(mask, -1, -1, None, None)[0] is mask


def test_the_logged_mtp_loss_is_the_mean_over_all_tokens_under_context_parallelism(monkeypatch):
    """Two ranks that train 2 and 14 tokens. What process_mtp_loss logs is a rank's sum over the count that the roll
    told it; Megatron then takes the mean over the ranks.
    """
    masks = [(torch.arange(16) >= first).float()[None] for first in (14, 2)]
    sums = [3.0, 50.0]
    cuts = torch.tensor([0, 32], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cuts, cu_seqlens_kv=cuts)
    parts = {}

    def all_reduce(tensor, group):
        parts[group.rank()] = tensor.clone()
        tensor.copy_(sum(parts.values()))

    monkeypatch.setattr(torch.distributed, "all_gather", lambda ranks, tensor, group: [r.zero_() for r in ranks])
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr("hymeg.platform.mtp._weight", 1.0)  # put back at the end
    tracker = multi_token_prediction.MTPLossLoggingHelper.tracker
    for _ in range(2):  # the second time round everyone's part is there
        logged = []
        for rank in range(2):
            tracker.clear()
            group = types.SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank)
            _, count = multi_token_prediction.roll_tensor(masks[rank], -1, -1, group, packed)
            one = torch.tensor(1.0)
            multi_token_prediction.MTPLossLoggingHelper.save_metrics_to_tracker(sums[rank] / count, one, one, 0, 1)
            logged.append(tracker["loss_values"].item())
    tracker.clear()
    trained = sum(part[0].item() for part in parts.values())
    assert sum(logged) / 2 == pytest.approx(sum(sums) / trained) and trained > 10
