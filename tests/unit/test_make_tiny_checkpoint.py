"""Tiny checkpoints: transformers loads them whole; the numbers depend on seed and name alone; tokenizer, template and
config fit each other.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, HYV3Config, HYV3ForCausalLM

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import open_checkpoint
from hymeg.hf.tokenizer import SMALLEST_VOCAB_SIZE, SPECIAL_TOKENS, load_tokenizer, train_tiny_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_tiny_checkpoint.py"
LINES = ["the quick brown fox jumps over the lazy dog", "你好，世界", "¿Qué tal?"] * 20


def read_all(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder / "hub")
    write_tiny_checkpoint(folder / "fused", layout="fused", max_shard_bytes=100_000)
    write_tiny_checkpoint(folder / "fp32", dtype="fp32", max_shard_bytes=300_000)
    write_tiny_checkpoint(folder / "mtp", num_mtp_layers=2)
    write_tiny_checkpoint(folder / "mtp_fused", num_mtp_layers=2, layout="fused")
    return folder


def load(folder, **kwargs):
    model, info = HYV3ForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def assert_equal(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """To the bit. Since 5.24 transformers keeps the router's weight in fp32, whatever the file holds."""
    if name.endswith("gate.weight") and theirs.dtype == torch.float32:
        ours = ours.float()
    assert theirs.dtype == ours.dtype and torch.equal(theirs, ours), name


def test_transformers_loads_every_layout_whole_and_equal(checkpoints):
    hub, fused = load(checkpoints / "hub", dtype="auto"), load(checkpoints / "fused", dtype="auto")
    assert hub.dtype == fused.dtype == torch.bfloat16
    states = hub.state_dict(), fused.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    rounded, stored = load(checkpoints / "fp32", dtype=torch.float32).state_dict(), read_all(checkpoints / "fused")
    for name, tensor in states[0].items():
        assert_equal(name, tensor, rounded[name].to(stored[name].dtype))


def test_fused_files_hold_what_transformers_holds_in_memory(checkpoints):
    memory, stored = load(checkpoints / "hub", dtype="auto").state_dict(), read_all(checkpoints / "fused")
    assert memory.keys() == stored.keys()
    for name, tensor in memory.items():
        assert_equal(name, tensor, stored[name])


def test_hub_files_hold_what_transformers_saves(checkpoints, tmp_path):
    load(checkpoints / "hub", dtype="auto").save_pretrained(tmp_path)
    ours, theirs = read_all(checkpoints / "hub"), read_all(tmp_path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_equal(name, theirs[name], tensor)


def test_tests_on_it_are_sensitive(checkpoints):
    """Routing differs by token and by bias, norms differ from one, no two tensors are alike."""
    model = load(checkpoints / "fp32", dtype=torch.float32)
    ids = torch.arange(512)[None]
    with torch.no_grad():
        logits, router_logits = (output := model(ids, output_router_logits=True)).logits, output.router_logits
        for layer, scores in zip(model.model.layers[1:], router_logits, strict=True):
            bias = layer.mlp.e_score_correction_bias
            chosen = [(torch.sigmoid(scores) + b).topk(2).indices.sort().values for b in (bias, 0 * bias)]
            assert len(chosen[0].unique(dim=0)) > 5 and 0.1 < (chosen[0] != chosen[1]).any(-1).float().mean() < 0.9
            layer.mlp.e_score_correction_bias.zero_()
        assert (model(ids).logits - logits).abs().max() > 0.1
    tensors = read_all(checkpoints / "hub")
    assert all(
        0.02 < tensor.float().std() < 0.2 and 0.9 < tensor.float().mean() < 1.1
        for name, tensor in tensors.items()
        if "norm.weight" in name
    )
    assert len({tensor.float().numpy().tobytes() for tensor in tensors.values()}) == len(tensors)


def test_mtp_layers_have_names_and_shapes_of_the_publisher(checkpoints):
    tensors, trunk, fused = (
        read_all(checkpoints / "mtp"),
        read_all(checkpoints / "hub"),
        read_all(checkpoints / "mtp_fused"),
    )
    assert HyConfig.from_dir(checkpoints / "mtp").num_nextn_predict_layers == 2
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in trunk.items())
    for layer in (4, 5):
        prefix = f"model.layers.{layer}."
        own = {
            name.removeprefix(prefix): list(tensor.shape) for name, tensor in tensors.items() if name.startswith(prefix)
        }
        extra = {
            "eh_proj.weight": [64, 128],
            "enorm.weight": [64],
            "hnorm.weight": [64],
            "final_layernorm.weight": [64],
        }
        moe_layer = {
            name.removeprefix("model.layers.3."): list(tensor.shape)
            for name, tensor in trunk.items()
            if name.startswith("model.layers.3.")
        }
        assert own == moe_layer | extra
        experts = [tensors[f"{prefix}mlp.experts.{e}.{name}_proj.weight"] for e in range(8) for name in ("gate", "up")]
        assert torch.equal(fused[f"{prefix}mlp.experts.gate_up_proj"], torch.cat(experts).reshape(8, 64, 64))


def test_seed_and_size_decide(tmp_path):
    wide = HyConfig.from_dict(TINY_CONFIG | {"intermediate_size": 6000})  # a tensor of more than one block
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_checkpoint(tmp_path / name, wide, seed=seed)
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert [name for name in files["a"] if files["a"][name] != files["c"][name]] == ["model.safetensors"]
    up = read_all(tmp_path / "a")["model.layers.0.mlp.up_proj.weight"].float()
    assert up.shape == (6000, 64) and len(up.unique(dim=0)) == 6000 and abs(up.std() - 0.08) < 0.002


def test_shapes_come_from_the_config(tmp_path):
    raw = TINY_CONFIG | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 0,
        "num_shared_experts": 2,
        "num_experts": 6,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "vocab_size": 300,
        "eod_token_id": 290,
        "sep_token_id": 7,
    }
    raw |= {"mlp_layer_types": ["sparse"] * 3}  # transformers ignores first_k_dense_replace
    config = write_tiny_checkpoint(tmp_path, HyConfig.from_dict(raw), dtype="fp32")
    load(tmp_path, dtype=torch.float32)
    tokenizer = load_tokenizer(tmp_path, config)
    assert config == HyConfig.from_dir(tmp_path) and config.dtype == "float32" and len(tokenizer) <= 300
    assert tokenizer.convert_ids_to_tokens([config.raw["eod_token_id"], config.raw["sep_token_id"]]) == [
        SPECIAL_TOKENS[5],
        "<｜hy_Assistant｜>",
    ]


def test_a_model_without_expert_bias_has_none(tmp_path):
    write_tiny_checkpoint(tmp_path, HyConfig.from_dict(TINY_CONFIG | {"moe_router_enable_expert_bias": False}))
    assert not [name for name in open_checkpoint(tmp_path) if "bias" in name]


def test_config_tokenizer_and_generation_agree_with_transformers(checkpoints):
    config, oracle = HyConfig.from_dir(checkpoints / "hub"), HYV3Config.from_pretrained(checkpoints / "hub")
    generation, tokenizer = (
        GenerationConfig.from_pretrained(checkpoints / "hub"),
        AutoTokenizer.from_pretrained(checkpoints / "hub"),
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert (
            getattr(config, name)
            == getattr(oracle, name)
            == getattr(generation, name)
            == getattr(tokenizer, name)
            < config.vocab_size
        )
    assert (config.enable_lm_head_fp32, config.enable_moe_fp32_combine, config.dtype) == (True, False, "bfloat16")
    assert list(config.raw) == [*TINY_CONFIG, "dtype", "bos_token_id", "eos_token_id", "pad_token_id"]


def test_tokenizer_gives_every_text_back_and_knows_the_special_tokens(checkpoints):
    tokenizer = load_tokenizer(checkpoints / "hub", HyConfig.from_dir(checkpoints / "hub"))
    text = "Hello,  世界\n\té 😀 <not special>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer("".join(SPECIAL_TOKENS)).input_ids
    assert (
        len(ids) == len(SPECIAL_TOKENS)
        and ids == tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        and max(ids) < 1024
    )


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
]
HEAD = "<｜hy_begin▁of▁sentence｜>Be brief.<｜reasoning_mode｜>reasoning_effort:"
SECOND_TURN = "<｜hy_User｜>u2<｜hy_Assistant｜><think></think>a2"


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        (
            MESSAGES,
            {"is_training": True},
            HEAD
            + "no_think<｜hy_User｜>u1<｜hy_Assistant｜><think>r1</think>a1<eos:6124c78e>"
            + SECOND_TURN
            + "<eos:6124c78e>",
        ),
        (MESSAGES, {}, HEAD + "no_think<｜hy_User｜>u1<｜hy_Assistant｜><think></think>a1<eos:6124c78e>" + SECOND_TURN),
        (MESSAGES[:3], {"reasoning_effort": "high"}, HEAD + "high<｜hy_User｜>u1<｜hy_Assistant｜><think>r1</think>a1"),
        (
            MESSAGES[:2],
            {"add_generation_prompt": True},
            HEAD + "no_think<｜hy_User｜>u1<｜hy_Assistant｜><think></think>",
        ),
        (
            MESSAGES[:2],
            {"add_generation_prompt": True, "reasoning_effort": "low"},
            HEAD + "low<｜hy_User｜>u1<｜hy_Assistant｜><think>",
        ),
        (MESSAGES[1:2], {}, HEAD.replace("Be brief.", "") + "no_think<｜hy_User｜>u1"),
    ],
    ids=range(6),
)
def test_chat_template_has_the_form_of_hy(messages, options, expected, checkpoints):
    tokenizer = load_tokenizer(checkpoints / "hub")
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == expected


@pytest.mark.parametrize(
    ("role", "options", "told"),
    [("user", {"reasoning_effort": "max"}, "low or high, not max"), ("tool", {}, "not tool")],
)
def test_chat_template_refuses_what_it_does_not_know(role, options, told, checkpoints):
    with pytest.raises(Exception, match=told):
        load_tokenizer(checkpoints / "hub").apply_chat_template(
            [{"role": role, "content": "x"}], tokenize=False, **options
        )


def test_tokenizer_training_is_deterministic_and_bounded():
    first, second = train_tiny_tokenizer(LINES, 320), train_tiny_tokenizer(iter(LINES), 320)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str() and len(first) <= 320
    with pytest.raises(UserError, match=f"vocab_size is {SMALLEST_VOCAB_SIZE - 1}"):
        train_tiny_tokenizer(LINES, SMALLEST_VOCAB_SIZE - 1)


def test_tokenizer_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        load_tokenizer(tmp_path)
    train_tiny_tokenizer(LINES, 320).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has id \d+, outside the model's vocabulary; ids below vocab_size \(300\)"):
        load_tokenizer(tmp_path, HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 300}))
    for name, text in (("tokenizer.json", "{}"), ("tokenizer_config.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}: the tokenizer cannot be loaded") and "\n" not in str(
            error.value
        )


def run_tool(*args, cwd):
    return subprocess.run([sys.executable, str(TOOL), *args], cwd=cwd, capture_output=True, text=True)


def test_the_tool_runs_from_anywhere(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(TINY_CONFIG | {"num_hidden_layers": 2, "eos_token_id": 1000}))
    done = run_tool(
        "out",
        "--config",
        "shape.json",
        "--layout",
        "fused",
        "--dtype",
        "fp32",
        "--shard-size",
        "100KB",
        "--mtp",
        "1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(open_checkpoint(tmp_path / "out")) == 48 and "out: 48 tensors" in done.stdout
    assert HyConfig.from_dir(tmp_path / "out").num_nextn_predict_layers == 1


def test_the_tool_tells_a_users_mistake_in_one_line(tmp_path):
    done = run_tool("out", "--mtp", "-1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: config.json: num_nextn_predict_layers is -1; zero or a positive integer is needed"
    ]
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_tiny_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"mine\.txt: cannot be made"):
        write_tiny_checkpoint(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="vocab_size is 100"):
        write_tiny_checkpoint(tmp_path / "new", HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 100}))
