"""Which parameters `--freeze` and `--train-only` mean, and what they refuse."""

from types import SimpleNamespace

import pytest

from hymeg.checkpoint.mapping import distributed_shapes, num_parameters
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.training.freezing import check_freezing, trained_in_full, trained_keys

CONFIG = HyConfig.from_dict(TINY_CONFIG | {"num_nextn_predict_layers": 1})
ALL = {key for key in distributed_shapes(CONFIG) if not key.endswith("expert_bias")}
MTP = {key for key in ALL if key.startswith("mtp.")}


def arguments(freeze: str | None = None, train_only: str | None = None, mtp: float = 0.1) -> SimpleNamespace:
    words = [one and one.split() for one in (freeze, train_only)]
    return SimpleNamespace(freeze=words[0], train_only=words[1], mtp_loss_scaling_factor=mtp)


def keys(*ends: str) -> set[str]:
    return {key for key in ALL if key.endswith(ends)}


MEANT = {
    "*.mlp.experts.*": keys("experts.experts.linear_fc1.weight", "experts.experts.linear_fc2.weight"),
    "*.experts.*.down_proj.weight": keys("experts.experts.linear_fc2.weight"),
    "*.router.*": keys("router.weight"),
    "*norm*": {key for key in ALL if "norm" in key},
    "lm_head.weight model.embed_tokens.weight": {"output_layer.weight", "embedding.word_embeddings.weight"},
    "model.layers.2.*": {key for key in ALL if key.startswith("decoder.layers.2.")},
    "model.layers.4.*": MTP,
    "*.q_proj.* *.k_proj.* *.v_proj.*": keys("linear_qkv.weight"),
    "*.shared_mlp.gate_proj.weight *.shared_mlp.up_proj.weight": keys("shared_experts.linear_fc1.weight"),
}


@pytest.mark.parametrize("patterns", MEANT)
def test_patterns_are_of_published_names(patterns):
    meant = MEANT[patterns]
    assert meant and trained_keys(arguments(train_only=patterns), CONFIG) == meant
    assert trained_keys(arguments(freeze=patterns), CONFIG) == ALL - meant


def test_multi_token_prediction_of_weight_0_is_frozen_too():
    assert trained_keys(arguments(), CONFIG) == ALL
    assert trained_keys(arguments(mtp=0), CONFIG) == ALL - MTP
    assert trained_keys(arguments(train_only="*.router.*", mtp=0), CONFIG) == keys("router.weight") - MTP


def test_what_is_trained_is_counted_and_said():
    said = []
    check_freezing(arguments(train_only="lm_head.weight"), CONFIG, said.append)
    num, total = CONFIG.vocab_size * CONFIG.hidden_size, num_parameters(CONFIG)
    assert said == [f"training {num:,} of {total:,} parameters ({num / total:.2%}); the others are frozen"]
    check_freezing(arguments(), CONFIG, said.append)
    assert len(said) == 1


WRONG = {
    "a part of qkv": (
        arguments(freeze="model.layers.1.self_attn.q_proj.weight"),
        ("--freeze model.layers.1.self_attn.q_proj", "not model.layers.1.self_attn.k_proj.weight", "name both or"),
    ),
    "a part of gate and up": (
        arguments(train_only="*.mlp.gate_proj.weight"),
        ("--train-only *.mlp.gate_proj.weight", "layers.0.mlp.gate_proj.weight and not", "layers.0.mlp.up_proj.weight"),
    ),
    "one expert": (
        arguments(freeze="*.experts.5.*"),
        ("experts.5.gate_proj.weight and not model.layers.1.mlp.experts.0.gate_proj.weight", "one tensor in training"),
    ),
    "nothing": (
        arguments(freeze="*.router.gate.weight *.experts.*.dwon_proj.weight"),
        (
            "--freeze '*.experts.*.dwon_proj.weight'",
            "means no parameter",
            "'model.layers.*.mlp.experts.*.down_proj.weight'",
        ),
    ),
    "a module": (
        arguments(train_only="lm_head"),
        ("--train-only 'lm_head': means no parameter", "whole published names", "'lm_head.weight'"),
    ),
    "a layer too many": (arguments(freeze="model.layers.9.*"), ("--freeze 'model.layers.9.*'", "means no parameter")),
    "a regular expression": (arguments(freeze=r".*\.router\..*"), ("means no parameter", "* and ? as in a shell")),
    "the expert bias": (
        arguments(freeze="*.expert_bias"),
        ("model.layers.1.mlp.expert_bias, which is no parameter", "--moe-router-bias-update-rate 0"),
    ),
    "both": (arguments(freeze="*.router.*", train_only="lm_head.weight"), ("--freeze and --train-only", "keep one")),
    "everything": (arguments(freeze="*"), ("--freeze *: nothing is left to train", "give other patterns")),
    "what is frozen anyway": (
        arguments(train_only="model.layers.4.*", mtp=0),
        ("--train-only model.layers.4.*", "nothing is left to train; --mtp-loss-scaling-factor 0 freezes"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_pattern_is_told(case):
    args, words = WRONG[case]
    with pytest.raises(UserError) as raised:
        check_freezing(args, CONFIG, lambda line: None)
    for word in words:
        assert word in str(raised.value), raised.value


def also(patterns: str, **others) -> SimpleNamespace:
    given = {
        "lora_targets": ["q_proj", "down_proj"],
        "make_vocab_size_divisible_by": 128,
        "mtp_loss_scaling_factor": 0.1,
    }
    given |= {"train_also": patterns.split(), "tensor_model_parallel_size": 2}
    return SimpleNamespace(**given | others)


def test_small_parts_beside_adapters_by_their_published_names():
    found = trained_in_full(also("*.router.* lm_head.weight *.o_proj.weight"), CONFIG)
    assert found.keys() == keys("router.weight", "output_layer.weight", "linear_proj.weight")
    assert found["decoder.layers.1.mlp.router.weight"] == "model.layers.1.mlp.router.gate.weight"
    without = trained_in_full(also("*.router.*", mtp_loss_scaling_factor=0), CONFIG)
    assert without.keys() == keys("router.weight") - MTP
    assert trained_in_full(SimpleNamespace(train_also=None), CONFIG) == {}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (also("*.routers.*"), ("--train-also '*.routers.*': means no parameter", ".router.gate.weight'")),
        (also("*.q_proj.* *.k_proj.* *.v_proj.*"), ("q_proj.weight is a part of a tensor", "--lora-targets")),
        (also("*.k_proj.*"), ("--train-also *.k_proj.*: means model.layers.0.self_attn.k_proj.weight and not",)),
        (also("*.experts.*"), ("experts.0.gate_proj.weight is a part of a tensor",)),
        (also("*.shared_mlp.down_proj.*"), ("shared_mlp.down_proj.weight has an adapter already",)),
        (
            also("lm_head.weight", tensor_model_parallel_size=16),
            ("lm_head.weight would be padded", "from 1024 rows to a multiple of 2048", "lower --make-vocab-size"),
        ),
    ],
)
def test_what_cannot_be_trained_beside_adapters_is_told(args, words):
    with pytest.raises(UserError) as raised:
        trained_in_full(args, CONFIG)
    for word in words:
        assert word in str(raised.value), raised.value


def test_a_live_export_of_adapters_refuses_what_no_reader_can_load():
    from hymeg.checkpoint.sources.live_model import _check_adapters

    with pytest.raises(UserError, match=r"lm_head.weight is trained in full .*; save and merge it"):
        _check_adapters(CONFIG, {"adapter.lm_head.weight.full": (1024, 64)})
