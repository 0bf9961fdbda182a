"""The adapter agrees with transformers and with element-wise loops, loses no bit on a round trip, and fills sharded
models of any layout.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from model_weights import gather_from, load_into
from safetensors.torch import load_file, save_file
from transformers import HYV3Config, HYV3ForCausalLM

from hymeg import platform
from hymeg.checkpoint.adapter import HyMT2StateDictAdapter, HyStateDictAdapter, HYV3StateDictAdapter
from hymeg.checkpoint.mapping import HF_LAYOUTS, distributed_shapes, hf_entries
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

platform.install()

TINY = {
    "model_type": "hy_v3",
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "router_scaling_factor": 2.826,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
}


def make_config(**changes) -> HyConfig:
    return HyConfig.from_dict(TINY | changes)


def hf_shapes(config: HyConfig, layout: str) -> dict[str, tuple[int, ...]]:
    return {entry.hf_name: entry.hf_shape for entry in hf_entries(config, layout)}


def random_hf(config: HyConfig, layout: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32 if "bias" in name else dtype)
        for name, shape in hf_shapes(config, layout).items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """One model's tensors in both layouts, both made by transformers: "hub" from its files, "fused" from its memory."""
    names = [name for name in TINY if name not in ("model_type", "rope_theta")]
    model = HYV3ForCausalLM(HYV3Config(**{name: TINY[name] for name in names}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(generator=generator)
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    hub = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {"hub": hub, "fused": model.state_dict()}


def test_both_layouts_of_transformers_become_the_same_distributed_tensors(of_transformers):
    adapter = HyStateDictAdapter(make_config())
    from_hub = adapter.from_hf(of_transformers["hub"])
    assert {key: tuple(tensor.shape) for key, tensor in from_hub.items()} == distributed_shapes(make_config())
    assert_same(adapter.from_hf(of_transformers["fused"]), from_hub)


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_distributed_tensors_become_what_transformers_holds_in_either_layout(of_transformers, layout):
    adapter = HyStateDictAdapter(make_config())
    assert_same(adapter.to_hf(adapter.from_hf(of_transformers["hub"]), layout=layout), of_transformers[layout])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 1},
        {"num_nextn_predict_layers": 2, "mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
        {"mlp_layer_types": ["dense"] * 4},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1, "num_shared_experts": 2},
        {"moe_router_enable_expert_bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_round_trip_keeps_every_bit(changes, layout):
    config = make_config(**changes)
    adapter = HyStateDictAdapter(config)
    original = random_hf(config, layout, torch.bfloat16)
    assert_same(adapter.to_hf(adapter.from_hf(original), layout=layout), original)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4, 8])
def test_qkv_rows_are_query_heads_then_key_then_value_of_each_group(num_key_value_heads):
    config = make_config(num_key_value_heads=num_key_value_heads)
    hf = random_hf(config, "hub")
    q, k, v = (hf[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "qkv")
    expected, head, queries = [], 16, 8 // num_key_value_heads
    for group in range(num_key_value_heads):
        for query in range(group * queries, (group + 1) * queries):
            for row in range(head):
                expected.append(q[query * head + row])
        for matrix in (k, v):
            for row in range(head):
                expected.append(matrix[group * head + row])
    assert torch.equal(
        HyStateDictAdapter(config).from_hf(hf)["decoder.layers.2.self_attention.linear_qkv.weight"],
        torch.stack(expected),
    )


def test_experts_are_stacked_with_the_gate_above_the_up_projection():
    config = make_config()
    hf = random_hf(config, "hub")
    distributed = HyStateDictAdapter(config).from_hf(hf)
    for expert, row in itertools.product(range(8), range(24)):
        stacked = distributed["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"][expert]
        assert torch.equal(stacked[row], hf[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"][row])
        assert torch.equal(stacked[24 + row], hf[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][row])
    for expert in range(8):
        down = distributed["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"][expert]
        assert torch.equal(down, hf[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"])


def test_dtypes_are_kept_but_the_expert_bias_is_fp32():
    config = make_config()
    hf = {name: tensor.bfloat16() for name, tensor in random_hf(config, "hub").items()}
    for key, tensor in HyStateDictAdapter(config).from_hf(hf).items():
        assert tensor.dtype == (torch.float32 if key.endswith("expert_bias") else torch.bfloat16), key


def test_vocabulary_is_padded_with_zeros_and_cut_back():
    config = make_config()
    adapter, hf = HyStateDictAdapter(config), random_hf(config, "hub")
    padded = adapter.from_hf(hf, padded_vocab_size=128)
    assert {key: tuple(tensor.shape) for key, tensor in padded.items()} == distributed_shapes(
        config, padded_vocab_size=128
    )
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        assert torch.equal(padded[key][:90], hf[name])
        assert not padded[key][90:].any()
    assert_same(adapter.to_hf(padded), hf)
    assert_same(adapter.from_hf(hf, padded_vocab_size=90), adapter.from_hf(hf))
    with pytest.raises(UserError, match=r"padded_vocab_size is 89; at least vocab_size \(90"):
        adapter.from_hf(hf, padded_vocab_size=89)


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_tensors_converted_one_at_a_time_are_those_converted_together(layout):
    config = make_config(num_nextn_predict_layers=1)
    adapter = HyStateDictAdapter(config)
    distributed = adapter.from_hf(random_hf(config, layout), padded_vocab_size=96)
    one_at_a_time = [
        pair
        for key, tensor in distributed.items()
        for pair in adapter.convert_single_tensor_to_hf(key, tensor, layout=layout)
    ]
    assert_same(dict(one_at_a_time), adapter.to_hf(distributed, layout=layout))
    assert len(one_at_a_time) == len(hf_shapes(config, layout))


def test_tensor_of_another_model_is_not_converted():
    adapter = HyStateDictAdapter(make_config())
    with pytest.raises(UserError, match=r"1 unexpected \(decoder.layers.4.mlp.router.weight\)"):
        adapter.convert_single_tensor_to_hf("decoder.layers.4.mlp.router.weight", torch.zeros(8, 64))
    with pytest.raises(UserError, match=r"1 misshapen \(decoder.layers.3.mlp.router.weight is \[9, 64\]"):
        adapter.convert_single_tensor_to_hf("decoder.layers.3.mlp.router.weight", torch.zeros(9, 64))


def test_excluded_names_are_left_out():
    config = make_config(num_nextn_predict_layers=1)
    adapter = HyStateDictAdapter(config)
    distributed = adapter.from_hf(random_hf(config, "hub"))
    without_mtp = adapter.to_hf(distributed, exclude_key_regex=r"model\.layers\.4\.")
    assert without_mtp.keys() == hf_shapes(make_config(), "hub").keys()


def test_results_can_be_saved_together(tmp_path):
    config = make_config()
    adapter = HyStateDictAdapter(config)
    hf = adapter.to_hf(adapter.from_hf(random_hf(config, "hub"), padded_vocab_size=128))
    save_file(hf, tmp_path / "model.safetensors")  # refuses tensors that share memory
    assert_same(load_file(tmp_path / "model.safetensors"), hf)


def test_parts_of_one_tensor_must_agree_on_dtype():
    config = make_config()
    hf = random_hf(config, "hub")
    hf["model.layers.0.self_attn.k_proj.weight"] = hf["model.layers.0.self_attn.k_proj.weight"].half()
    with pytest.raises(
        UserError, match=r"q_proj.weight is torch.float32 and model.layers.0.self_attn.k_proj.weight is torch.float16"
    ):
        HyStateDictAdapter(config).from_hf(hf)


def test_incomplete_layers_are_refused():
    config = make_config()
    adapter, hf = HyStateDictAdapter(config), random_hf(config, "hub")
    distributed = adapter.from_hf(hf)
    router, expert = "decoder.layers.2.mlp.router.weight", "model.layers.3.mlp.experts.7.up_proj.weight"
    with pytest.raises(UserError, match=rf"1 missing \({expert}\)"):
        adapter.from_hf({name: tensor for name, tensor in hf.items() if name != expert})
    with pytest.raises(UserError, match=rf"1 missing \({router}\)"):
        adapter.to_hf({key: tensor for key, tensor in distributed.items() if key != router})
    with pytest.raises(UserError, match=r"1 unexpected \(decoder.layers.0.mlp.linear_fc1._extra_state\)"):
        adapter.to_hf(distributed | {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(1)})


# ---- NeMo Automodel 0.7.0 constructs and calls its adapters like this.


@pytest.fixture(scope="module", params=[HYV3StateDictAdapter, HyMT2StateDictAdapter])
def of_automodel(request):
    """hy_v3/model.py:276, hy_mt2/model.py:346."""
    names = [name for name in TINY if name not in ("model_type", "rope_theta")]
    config = HYV3Config(**{name: TINY[name] for name in names}, rope_parameters={"rope_theta": 10000.0})
    return request.param(config, object(), object(), dtype=torch.bfloat16)


def test_a_transformers_config_will_do_and_weights_come_in_the_dtype_that_was_asked_for(of_automodel):
    found = of_automodel.from_hf(random_hf(make_config(), "hub"), device_mesh=None)
    expected = HyStateDictAdapter(make_config()).from_hf(random_hf(make_config(), "hub"))
    assert_same(found, {key: tensor if "bias" in key else tensor.bfloat16() for key, tensor in expected.items()})


def test_automodels_calls_for_saving_and_loading(of_automodel):
    """checkpointing.py:717 and 1225 by way of :2952, and :3285; peft_export.py:97; infrastructure.py:664."""
    hf = {name: t if "bias" in name else t.bfloat16() for name, t in random_hf(make_config(), "hub").items()}
    native = of_automodel.from_hf(hf)
    extra = {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(1)}
    common = {"exclude_key_regex": r".*_extra_state.*", "quantization": False}
    for further in (
        {"device_mesh": None, "v4_compatible": False, "legacy_paramwrapper_layout": False},
        {"device_mesh": None, "for_checkpoint_load": True},
        {},
    ):
        assert_same(of_automodel.to_hf(native | extra, **common, **further), hf)
    assert of_automodel.get_hf_state_dict_keys(native | extra) == list(of_automodel.to_hf(native))
    of_automodel._paramwrapper_layout_hint = None
    assert_same(of_automodel.from_hf(of_automodel.to_hf(native), device_mesh=None), native)
    for key, tensor in (native | extra).items():
        pairs = of_automodel.convert_single_tensor_to_hf(key, tensor, **common)
        assert_same(dict(pairs), {} if key in extra else {name: hf[name] for name, _ in pairs})


def test_a_pipeline_stage_is_converted_by_itself(of_automodel):
    native = of_automodel.from_hf(random_hf(make_config(), "hub"))
    stage = {key: tensor for key, tensor in native.items() if key.startswith(("decoder.layers.3.", "output"))}
    hf = of_automodel.to_hf(stage, exclude_key_regex=r".*_extra_state.*", quantization=False)
    assert {name.split(".layers.")[-1].split(".")[0] for name in hf} == {"3", "lm_head"}
    assert_same(of_automodel.from_hf(hf), stage)


def test_what_the_adapter_does_not_do_is_said(of_automodel):
    with pytest.raises(UserError, match="does not quantize"):
        of_automodel.to_hf({}, quantization=True)
    mesh = SimpleNamespace(size=lambda: 8)
    for convert in (of_automodel.from_hf, of_automodel.to_hf):
        with pytest.raises(UserError, match=r"8 ranks.*hymeg\.checkpoint\.live"):
            convert({}, device_mesh=mesh)


# ---- models: what one rank of a Megatron model shows of itself, without the processes. The split axes are those of its
# parallel layers.

SPLIT_AXIS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


@dataclasses.dataclass
class Rank:
    """The tensors of rank (tp, ep) of a stage that holds `prefixes`, NaN at first; TP and EP of 2, the vocabulary
    padded to 96.
    """

    config: SimpleNamespace
    shapes: dict[str, tuple[int, ...]]
    tp: int
    ep: int
    prefixes: tuple[str, ...]

    def __post_init__(self):
        self.local = {}
        for key, shape in self.shapes.items():
            if key.startswith(self.prefixes):
                experts = range(self.ep * 4, self.ep * 4 + 4) if "experts.experts" in key else (None,)
                local = list(shape if experts == (None,) else shape[1:])
                if (axis := self.axis(key)) is not None:
                    local[axis] //= 2
                self.local[key] = [(expert, torch.full(local, math.nan)) for expert in experts]

    def axis(self, key: str) -> int | None:
        return next((axis for name, axis in SPLIT_AXIS.items() if key.endswith(name)), None)

    def sharded_state_dict(self, metadata=None):
        from megatron.core.dist_checkpointing.mapping import ShardedObject
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

        shards = {
            f"{key}{expert}": self.sharded(key, expert, data, apply_swiglu_sharded_factory)
            for key, tensors in self.local.items()
            for expert, data in tensors
        }
        return {
            "layers": shards,
            "object": ShardedObject("decoder.layers.0.mlp.linear_fc1._extra_state", None, (1,), (0,)),
        }

    def sharded(self, key, expert, data, swiglu):
        from megatron.core.dist_checkpointing import ShardedTensor

        stack = () if expert is None else ((0, expert, 8),)
        axis = self.axis(key)
        split = () if axis is None else ((axis + len(stack), self.tp, 2),)
        padded = key in ("embedding.word_embeddings.weight", "output_layer.weight")
        shard = ShardedTensor.from_rank_offsets(
            key, data, *stack, *split, prepend_axis_num=len(stack), allow_shape_mismatch=padded
        )
        return swiglu(shard, stack) if key.endswith("linear_fc1.weight") else shard


def ranks(config: HyConfig, stages: tuple[tuple[str, ...], ...] = (("",),), **of_model) -> list[Rank]:
    """One `Rank` for every (stage, ep, tp)."""
    model_config = SimpleNamespace(
        num_layers=config.num_hidden_layers, mtp_num_layers=config.num_nextn_predict_layers or None
    )
    vars(model_config).update(of_model)
    shapes = distributed_shapes(config, padded_vocab_size=96)
    return [Rank(model_config, shapes, tp, ep, stage) for stage in stages for ep in range(2) for tp in range(2)]


STAGES = (
    ("embedding", "decoder.layers.0.", "decoder.layers.1."),
    ("decoder.layers.2.", "decoder.layers.3.", "decoder.final", "mtp", "output_layer"),
)


@pytest.mark.parametrize("layout", HF_LAYOUTS)
@pytest.mark.parametrize("stages", [(("",),), STAGES], ids=["one stage", "two stages"])
def test_every_rank_gets_its_part_and_all_together_give_the_whole_back(stages, layout):
    config = make_config(num_nextn_predict_layers=1)
    adapter, hf = HyStateDictAdapter(config), random_hf(config, layout)
    model = ranks(config, stages)
    for rank in model:
        load_into(config, [rank], hf)
    whole = adapter.from_hf(hf, padded_vocab_size=96)
    for rank in model:
        for key, tensors in rank.local.items():
            for expert, local in tensors:
                expected = whole[key] if expert is None else whole[key][expert]
                if key.endswith(
                    "linear_fc1.weight"
                ):  # a rank holds its part of the gate above its part of the up projection
                    expected = torch.cat([half.chunk(2)[rank.tp] for half in expected.chunk(2)])
                elif rank.axis(key) is not None:
                    expected = expected.chunk(2, dim=rank.axis(key))[rank.tp]
                assert torch.equal(local, expected), key
    assert_same(gather_from(config, model, layout=layout), hf)
