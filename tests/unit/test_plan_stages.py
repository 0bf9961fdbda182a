"""Where the planner puts layers and how many micro-batches a stage holds, against Megatron's own functions and a
schedule played by hand.
"""

import random
from types import SimpleNamespace

import pytest
from test_layout import config_of, layers_by_stage, layout_of, refusal

from hymeg.planning.stages import balanced, layout_string, micro_batches_held, pipeline_splits, stages


def test_stages_hold_the_layers_that_megatron_builds():
    pick, seen = random.Random(0), 0
    for _ in range(2000):
        pp, vpp = pick.choice((1, 2, 3, 4)), pick.choice((None, 2, 3))
        config = config_of(num_hidden_layers=pick.randrange(2, 25))
        layout = layout_of(
            pp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            decoder_first_pipeline_num_layers=pick.choice((None, None, 1, 2, 3, 4)) if pp > 1 else None,
            decoder_last_pipeline_num_layers=pick.choice((None, None, 1, 2, 3, 4)) if pp > 1 else None,
            account_for_embedding_in_pipeline_split=pick.random() < 0.2,
            account_for_loss_in_pipeline_split=pick.random() < 0.2,
        )
        if refusal(config, layout) is not None:
            continue
        seen += 1
        found = stages(config, layout)
        by_stage = [found[rank][stage] for stage in range(vpp or 1) for rank in range(pp)]
        assert [len(chunk.layers) for chunk in by_stage] == layers_by_stage(config, layout)
        kinds = [name == "sparse" for name in config.mlp_layer_types]
        assert [is_moe for chunk in by_stage for is_moe in chunk.layers] == kinds
        assert [chunk.has_embedding for chunk in by_stage] == [True] + [False] * (len(by_stage) - 1)
        assert [chunk.has_head for chunk in by_stage] == [False] * (len(by_stage) - 1) + [True]
    assert seen > 200


def test_stages_of_a_layout_string():
    config = config_of(num_hidden_layers=5, num_nextn_predict_layers=1)
    layout = layout_of(2, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et*2|(t|)*2,tmL")
    (first, third), (second, fourth) = stages(config, layout)
    assert [chunk.layers for chunk in (first, second, third, fourth)] == [(False, True), (True,), (True,), (True,)]
    assert [chunk.num_mtp_layers for chunk in (first, second, third, fourth)] == [0, 0, 0, 1]
    assert first.has_embedding and fourth.has_head and fourth.has_final_norm


def test_the_final_norm_lies_behind_the_last_layer_where_there_is_multi_token_prediction():
    for num_mtp, expected in ((0, [False, True]), (1, [True, False])):
        config = config_of(num_hidden_layers=2, num_nextn_predict_layers=num_mtp)
        layout = layout_of(2, pipeline_model_parallel_size=2, pipeline_model_parallel_layout=f"Ett|{'m' * num_mtp}L")
        assert [chunk.has_final_norm for (chunk,) in stages(config, layout)] == expected


@pytest.mark.parametrize(("pp", "count"), [(1, 4), (2, 1), (4, 2), (4, 16), (8, 8)])
def test_a_stage_holds_as_many_micro_batches_as_stages_follow_it(pp, count):
    assert [micro_batches_held(rank, pp, 1, count) for rank in range(pp)] == [
        ((min(pp - rank, count),),) for rank in range(pp)
    ]


def test_without_interleaving_a_hidden_all_to_all_holds_one_more():
    """One stage: a micro-batch's forward pass runs beside the backward pass of the one before it."""
    assert micro_batches_held(0, 1, 1, 8, overlap=True) == ((2,),)
    assert micro_batches_held(0, 1, 1, 1, overlap=True) == ((1,),)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("pp", "vpp", "count", "group"),
    [
        *((2, 2, 4, 2), (2, 3, 8, 2), (4, 2, 8, 4), (4, 4, 16, 4), (8, 2, 8, 8)),
        *((8, 2, 32, 16), (2, 3, 16, 3), (4, 2, 64, 6), (2, 2, 5, 3), (4, 3, 101, 8)),
    ],
)
def test_interleaved_stages_hold_what_megatrons_own_schedule_leaves_open(pp, vpp, count, group, overlap):
    """Megatron's schedule table and number of forward passes before the first backward pass, played through for every
    rank.
    """
    from megatron.core.pipeline_parallel import schedules

    table = schedules.get_schedule_table(count, vpp, group)
    for rank in range(pp):
        ranks = SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank)
        place = SimpleNamespace(pp_group=ranks, virtual_pipeline_model_parallel_size=vpp)
        total, _, warmup, _ = schedules.get_pp_rank_microbatches(
            count, vpp, group, overlap_moe_expert_parallel_comm=overlap, p2p_communicator=place
        )
        open_, most = [0] * vpp, []
        for step in range(total + warmup):
            if step < total:
                open_[table[step][1]] += 1
            if step >= warmup or step == total - 1:
                most.append(tuple(open_))
            if step >= warmup:
                open_[vpp - 1 - table[step - warmup][1]] -= 1
        assert open_ == [0] * vpp
        held = micro_batches_held(rank, pp, vpp, count, group, overlap)
        for weights in ((1,) * vpp, tuple(range(1, vpp + 1)), tuple(range(vpp, 0, -1))):
            assert _largest(held, weights) == _largest(most, weights)


@pytest.mark.parametrize(("flags", "expected"), [({}, 23), ({"overlap": True}, 24), ({"group": 16}, 31)])
def test_eight_stages_of_two_hold(flags, expected):
    """Of 32 micro-batches, on the first rank: by Megatron's schedules."""
    assert max(map(sum, micro_batches_held(0, 8, 2, 32, **flags))) == expected


def _largest(counts, weights) -> int:
    return max(sum(a * b for a, b in zip(one, weights, strict=True)) for one in counts)


def test_layout_strings_are_legal_and_give_the_last_stage_less():
    for layers, mtp in ((48, 0), (80, 1), (13, 0)):
        config = config_of(num_hidden_layers=layers, num_nextn_predict_layers=mtp)
        for pp in (2, 4, 8):
            for split in pipeline_splits(config, pp):
                layout = layout_of(pp, pipeline_model_parallel_size=pp, **split)
                assert refusal(config, layout) is None, split
                assert sum(len(chunk.layers) for chunks in stages(config, layout) for chunk in chunks) == layers
        four = layout_of(4, pipeline_model_parallel_size=4, pipeline_model_parallel_layout=balanced(config, 4))
        counts = [len(chunk.layers) for (chunk,) in stages(config, four)]
        assert counts[-1] <= min(counts[:-1]) and max(counts[:-1]) - min(counts[:-1]) <= 1


def test_a_last_stage_whose_head_weighs_more_than_its_share_has_no_layer():
    config = config_of(num_hidden_layers=7, vocab_size=1_000_000)
    assert balanced(config, 4) == "Et*2|t*2|t*3|L"


def test_layout_string_reads_back():
    layout = layout_of(5, pipeline_model_parallel_size=5, pipeline_model_parallel_layout="Et*2|(t*5|)*2t|mL")
    assert layout_string([2, 5, 5, 1, 0], 1) == layout.pipeline_model_parallel_layout
    assert layout.num_virtual_stages == 1
    assert layout_of(2, virtual_pipeline_model_parallel_size=3).num_virtual_stages == 3
