"""hymeg.planning.layout against Megatron's own rules, asked on grids of sizes; and what its messages say."""

import dataclasses
import importlib.util
import itertools
import random
from types import SimpleNamespace

import pytest

from hymeg import platform

platform.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG  # noqa: E402
from hymeg.errors import UserError  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.planning.layout import Layout, check  # noqa: E402
from hymeg.planning.settings import Settings  # noqa: E402

# Everything divides by 24, so that only what a test varies can be illegal.
ROOMY = {
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "hidden_size": 96,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 24,
}


def config_of(**changes) -> HyConfig:
    return HyConfig.from_dict(TINY_CONFIG | ROOMY | {"num_hidden_layers": 12, "expert_hidden_dim": None} | changes)


def refusal(config: HyConfig, layout: Layout, settings: Settings | None = None) -> str | None:
    try:
        check(config, layout, settings)
    except UserError as error:
        return str(error)
    return None


def layout_of(world_size: int = 1, **sizes) -> Layout:
    """A layout whose batch and sequence are legal whatever the sizes."""
    return Layout(**{"world_size": world_size, "seq_length": 2304, "global_batch_size": 576} | sizes)


# ---- against Megatron


@pytest.fixture
def megatron_groups(monkeypatch):
    """Megatron's initialize_model_parallel in a module of its own, so that its globals are nobody else's, making no
    groups.
    """
    spec = importlib.util.find_spec(parallel_state.__name__)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 0)

    def accepts(world_size: int, **sizes) -> bool:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        module.create_group = lambda *args, **kwargs: group
        module.create_hierarchical_groups = lambda *args, **kwargs: ([group] * 2, [group] * 2)
        try:
            module.initialize_model_parallel(local_world_size=world_size, **sizes)
        except (RuntimeError, AssertionError):
            return False
        return True

    return accepts


SIZES = """
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size num_distributed_optimizer_instances decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers micro_batch_size global_batch_size seq_length
"""


@pytest.mark.parametrize("field", SIZES.split())
def test_a_size_of_nothing_is_refused_by_the_name_of_its_flag(field):
    flag = f"--{field.replace('_', '-')}"
    assert refusal(config_of(), layout_of(4, **{field: 0})) == f"{flag} 0: a size is at least 1"


def test_worlds_are_legal_where_megatron_can_form_its_groups(megatron_groups):
    grid = list(
        itertools.product(
            (1, 2, 3, 4, 6, 8, 12, 16),
            (1, 2, 4),
            (1, 2, 3),
            (1, 2, 4),
            (1, 2, 3, 4, 8),
            (1, 2, 4),
            (1, 2),
            (False, True),
        )
    )
    verdicts = []
    for world_size, tp, pp, cp, ep, etp, instances, pp_before_dp in random.Random(0).sample(grid, 600):
        sizes = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": etp,
            "num_distributed_optimizer_instances": instances,
        }
        said = refusal(config_of(), layout_of(world_size, use_tp_pp_dp_mapping=pp_before_dp, **sizes))
        accepted = megatron_groups(world_size, order="tp-cp-ep-pp-dp" if pp_before_dp else "tp-cp-ep-dp-pp", **sizes)
        assert (said is None) == accepted, (
            f"world {world_size}, {sizes}, pp before dp {pp_before_dp}: Megatron {accepted}, we say {said}"
        )
        verdicts.append(accepted)
    assert 50 < sum(verdicts) < len(verdicts) - 50


def transformer_config(config: HyConfig, **sizes) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        pipeline_dtype=torch.float32,
        **sizes,
    )


def test_heads_and_query_groups_are_legal_where_megatron_takes_them():
    verdicts = []
    for heads, groups, tp in itertools.product((4, 8, 12, 24), (1, 2, 4, 8, 24), (1, 2, 3, 4, 6, 8, 12)):
        if heads % groups:
            continue
        config = config_of(num_attention_heads=heads, num_key_value_heads=groups)
        said = refusal(config, layout_of(tp, tensor_model_parallel_size=tp))
        try:
            transformer_config(config, tensor_model_parallel_size=tp)
        except ValueError:
            accepted = False
        else:
            accepted = True
        assert (said is None) == accepted, said
        verdicts.append(accepted)
    assert 10 < sum(verdicts) < len(verdicts) - 10


def test_a_sequence_is_legal_where_every_rank_gets_two_equal_chunks_and_shares_them_evenly():
    for length, cp, tp in itertools.product(range(1, 97), (1, 2, 3, 4), (1, 2, 3, 4)):
        chunks, rest = divmod(length, 2 * cp if cp > 1 else 1)
        of_a_rank = 2 * chunks if cp > 1 else chunks
        said = refusal(
            config_of(), layout_of(cp * tp, seq_length=length, context_parallel_size=cp, tensor_model_parallel_size=tp)
        )
        assert (said is None) == (rest == 0 and of_a_rank % tp == 0), (length, cp, tp, said)


def layers_by_stage(config: HyConfig, layout: Layout) -> list[int] | None:
    """How many layers Megatron builds on each (virtual) stage; None where it refuses."""
    pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        return None  # refused by initialize_model_parallel and by validate_args
    try:
        made = transformer_config(
            config,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            num_layers_in_first_pipeline_stage=layout.decoder_first_pipeline_num_layers,
            num_layers_in_last_pipeline_stage=layout.decoder_last_pipeline_num_layers,
            account_for_embedding_in_pipeline_split=layout.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=layout.account_for_loss_in_pipeline_split,
        )
        return [
            get_num_layers_to_build(made, stage if vpp else None, rank)
            for stage in range(vpp or 1)
            for rank in range(pp)
        ]
    except (AssertionError, ValueError):
        return None


def test_pipelines_are_legal_where_megatron_builds_every_layer_once():
    sizes = (None, 1, 2, 3, 4)
    verdicts = []
    for layers, pp, vpp, first, last, embedding, loss in itertools.product(
        range(2, 13), (1, 2, 3, 4), (None, 2, 3), sizes, sizes, (0, 1), (0, 1)
    ):
        if (first or last) and (embedding or loss) and (first, last) != (2, None):
            continue  # one such combination is enough
        if pp == 1 and first and last:
            continue  # Megatron counts -1 stages between the two, and lets it pass when as many layers are left
        config = config_of(num_hidden_layers=layers)
        layout = layout_of(
            pp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            decoder_first_pipeline_num_layers=first,
            decoder_last_pipeline_num_layers=last,
            account_for_embedding_in_pipeline_split=bool(embedding),
            account_for_loss_in_pipeline_split=bool(loss),
        )
        said, built = refusal(config, layout), layers_by_stage(config, layout)
        legal = built is not None and sum(built) == layers and min(built) >= 0
        assert (said is None) == legal, f"{layout}: Megatron builds {built}, we say {said}"
        verdicts.append(legal)
    assert 200 < sum(verdicts) < len(verdicts) - 200


def test_layout_strings_are_legal_where_megatron_parses_and_validates_them():
    pick = random.Random(0)
    verdicts = []
    for trial in range(4000):
        mtp, pp = pick.choice([0, 1, 2]), pick.choice([1, 2, 3])
        middle = ["t"] * 4 + ["m"] * mtp + ["|"] * pick.randrange(7)
        if trial % 4:
            middle.sort(key=lambda letter: (letter == "m") if letter != "|" else pick.random() * 1.5 - 0.2)
        else:
            pick.shuffle(middle)
        text = "E" + "".join(middle) + "L"
        text = pick.choice(
            [
                text,
                text,
                text.replace("tt", "t*2"),
                text.replace("t|t|", "(t|)*2"),
                text[:-1],
                text + "t",
                "," + text,
                text.replace("t", "x", 1),
            ]
        )
        config = config_of(num_hidden_layers=4, num_nextn_predict_layers=mtp)
        said = refusal(config, layout_of(pp, pipeline_model_parallel_size=pp, pipeline_model_parallel_layout=text))
        try:
            parsed = PipelineParallelLayerLayout(text, pp)
            parsed.validate_layer_layout(num_layers=4, mtp_num_layers=mtp or None)
            legal = not (pp == 1 and parsed.virtual_pipeline_model_parallel_size > 1)  # refused by validate_args
        except AssertionError:
            legal = False
        assert (said is None) == legal, (
            f"{text} over {pp} stages with {mtp} MTP layers: Megatron {legal}, we say {said}"
        )
        verdicts.append(legal)
    assert 300 < sum(verdicts) < len(verdicts) - 300


def test_a_hidden_all_to_all_is_legal_where_megatron_takes_it():
    """--overlap-moe-expert-parallel-comm or not, over stages, experts, recomputation, precision, dispatchers."""
    recomputations = [
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
        {"recompute_granularity": "selective", "recompute_modules": ("moe_act", "shared_experts")},
    ]
    verdicts = []
    for overlap, (pp, vpp), ep, recomputed, bf16, dispatcher, shared, mtp in itertools.product(
        (True, False),
        ((1, None), (2, None), (2, 2)),
        (1, 2),
        recomputations,
        (True, False),
        ("alltoall", "allgather"),
        (False, True),
        (0, 1, 2),
    ):
        sizes = {"pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep}
        settings = {
            **recomputed,
            "bf16": bf16,
            "moe_token_dispatcher_type": dispatcher,
            "moe_shared_expert_overlap": shared,
            "overlap_moe_expert_parallel_comm": overlap,
        }
        config = config_of(num_nextn_predict_layers=mtp)
        layout = layout_of(2 * pp, virtual_pipeline_model_parallel_size=vpp, **sizes)
        said = refusal(config, layout, Settings(**settings))
        asked = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        try:
            transformer_config(
                config,
                **sizes,
                **asked,
                virtual_pipeline_model_parallel_size=vpp,
                num_moe_experts=24,
                moe_grouped_gemm=True,
                moe_shared_expert_intermediate_size=24,
                mtp_num_layers=mtp or None,
            )
        except (AssertionError, ValueError):
            accepted = False
        else:
            accepted = True
        assert (said is None) == accepted, f"{sizes}, {vpp}, {settings}, {mtp}: Megatron {accepted}, we say {said}"
        assert accepted or "--overlap-moe-expert-parallel-comm" in said or "--moe-shared-expert-overlap" in said
        verdicts.append(accepted)
    assert 300 < sum(verdicts) < len(verdicts) - 300


def test_a_layout_string_of_single_stages_does_not_hide_the_all_to_all():
    """Virtual stages may also stand in a layout string."""
    settings = Settings(overlap_moe_expert_parallel_comm=True)
    sizes = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    said = refusal(config_of(), layout_of(4, **sizes, pipeline_model_parallel_layout="Et*6|t*6L"), settings)
    assert "--pipeline-model-parallel-size 2" in said and "--num-virtual-stages-per-pipeline-rank 2" in said
    assert refusal(config_of(), layout_of(4, **sizes, pipeline_model_parallel_layout="E(t*3|)*3t*3L"), settings) is None


# ---- on their own


INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"world_size": 3, "tensor_model_parallel_size": 2},
            ["--tensor-model-parallel-size 2", "3 processes", "start 2 or 4"],
        ),
        ({"world_size": 1, "context_parallel_size": 2}, ["--context-parallel-size 2", "1 process of", "start 2 "]),
        (
            {"world_size": 8, "tensor_model_parallel_size": 5},
            ["--tensor-model-parallel-size 5", "24 attention heads", "1, 2, 3, 4, 6, 8, 12, 24"],
        ),
        (
            {
                "world_size": 8,
                "tensor_model_parallel_size": 2,
                "expert_model_parallel_size": 8,
                "expert_tensor_parallel_size": 2,
            },
            [
                "--expert-model-parallel-size 8 x --expert-tensor-parallel-size 2 = 16",
                "8 processes",
                "size 1, 2, 4 would",
                "tensor-parallel-size 1",
            ],
        ),
        ({"expert_model_parallel_size": 5}, ["--expert-model-parallel-size 5", "24 experts", "it may be 1, 2, 3"]),
        (
            {"expert_tensor_parallel_size": 7},
            ["--expert-tensor-parallel-size 7", "24 expert feed-forward", "it may be 1, 2, 3"],
        ),
        ({"world_size": 2, "global_batch_size": 9}, ["--global-batch-size 9", "data-parallel size 2", "use 8 or 10"]),
        ({"micro_batch_size": 4, "global_batch_size": 2}, ["--global-batch-size 2", "--micro-batch-size 4", "use 4"]),
        ({"seq_length": 8192}, ["--seq-length 8192", "4096", "max_position_embeddings"]),
        (
            {"world_size": 4, "context_parallel_size": 2, "tensor_model_parallel_size": 2, "seq_length": 2050},
            ["--seq-length 2050", "use 2048 or 2052"],
        ),
        ({"context_parallel_size": 0}, ["--context-parallel-size 0", "at least 1"]),
        ({"virtual_pipeline_model_parallel_size": 2}, ["2 virtual stages", "--pipeline-model-parallel-size 2 or more"]),
        (
            {"world_size": 2, **INTERLEAVED, "overlap_p2p_comm": False},
            ["--no-overlap-p2p-communication", "leave it out"],
        ),
        (
            {"world_size": 2, **INTERLEAVED, "global_batch_size": 5},
            ["--global-batch-size 5", "5 micro-batches", "use 4 or 6"],
        ),
        (
            {"world_size": 2, **INTERLEAVED, "global_batch_size": 4, "microbatch_group_size_per_vp_stage": 1},
            [
                "--microbatch-group-size-per-virtual-pipeline-stage 1",
                "--pipeline-model-parallel-size 2",
                "4 micro-batches",
            ],
        ),
    ],
)
def test_a_refusal_names_flag_value_and_what_would_do(sizes, words):
    said = refusal(config_of(), layout_of(**sizes))
    assert said is not None and "\n" not in said
    for word in words:
        assert word in said


def test_query_groups_and_ranks_of_which_neither_divides_the_other():
    config = config_of(num_attention_heads=24, num_key_value_heads=6)
    said = refusal(config, layout_of(4, tensor_model_parallel_size=4))
    assert "--tensor-model-parallel-size 4 and the model's 6 query groups" in said and said.endswith(
        "it may be 1, 2, 3, 6, 12, 24"
    )
    assert refusal(config, layout_of(12, tensor_model_parallel_size=12)) is None


def test_what_a_refusal_proposes_is_accepted():
    """The numbers behind 'use', 'start' and 'it may be'."""
    wrong = layout_of(2, **INTERLEAVED, global_batch_size=5)
    assert refusal(config_of(), dataclasses.replace(wrong, global_batch_size=6)) is None
    wrong = layout_of(8, tensor_model_parallel_size=2, expert_model_parallel_size=8, expert_tensor_parallel_size=2)
    assert refusal(config_of(), dataclasses.replace(wrong, expert_model_parallel_size=4)) is None
    assert refusal(config_of(), dataclasses.replace(wrong, expert_tensor_parallel_size=1)) is None
    wrong = layout_of(4, context_parallel_size=2, tensor_model_parallel_size=2, seq_length=2050)
    assert refusal(config_of(), dataclasses.replace(wrong, seq_length=2052)) is None


def test_a_group_of_microbatches_may_leave_a_rest_of_at_least_the_stages():
    grouped = layout_of(2, **INTERLEAVED, microbatch_group_size_per_vp_stage=3)
    assert refusal(config_of(), dataclasses.replace(grouped, global_batch_size=5)) is None
    assert refusal(config_of(), dataclasses.replace(grouped, global_batch_size=4)) is not None
