"""Recipes: what a YAML file says to the trainer, who wins over whom, and what is refused, with its line."""

import argparse

import pytest

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.training.arguments import _parser_of, _read, parse
from hymeg.training.yaml_file import read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "model"
    write_tiny_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parser():
    parser = _parser_of.__wrapped__(None, None)  # its own, to be changed
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"

    def write(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def words(parser, recipe):
    """The words of a command line that a recipe stands for."""
    return lambda text: [word for setting in read_settings(recipe(text), parser) for word in setting.words]


@pytest.fixture
def args(model, recipe):
    """What the trainer makes of a recipe and a command line."""
    return lambda text, *argv: parse(["--hf-model", model, "--config", recipe(text), *argv])[0]


# ---- what a line says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-5", ["--lr=1e-5"]),
        ("lr: 1.0E-5", ["--lr=1.0E-5"]),
        ("train-iters: 010", ["--train-iters=010"]),
        ("micro_batch_size: 2", ["--micro-batch-size=2"]),
        ("micro-batch-size: 2", ["--micro-batch-size=2"]),
        ("save: 2024-01-01", ["--save=2024-01-01"]),
        ("save: a: b", None),
        ('save: "a: b"', ["--save=a: b"]),
        ("seed: -1", ["--seed=-1"]),
        ("bf16: true", ["--bf16"]),
        ("bf16: yes", ["--bf16"]),
        ("bf16: false", ["--no-bf16"]),
        ("no_rope_fusion: true", ["--no-rope-fusion"]),
        ("no-rope-fusion: false", ["--rope-fusion"]),
        ("rl-profile: false", ["--no-rl-profile"]),
        ("no-rl-skip-bos-token: true", ["--no-rl-skip-bos-token"]),
        ("rl-skip-bos-token: false", ["--no-rl-skip-bos-token"]),
        ("no-rl-skip-bos-token: false", ["--rl-skip-bos-token"]),
        ("global-batch-size: null", []),
        ("global-batch-size: ~", []),
        ("data-path: [0.3, /a, 0.7, /b c]", ["--data-path", "0.3", "/a", "0.7", "/b c"]),
        ("data-path: 0.3 /a 0.7 /b", ["--data-path", "0.3", "/a", "0.7", "/b"]),
        ("data-path:\n- /a\n- /b", ["--data-path", "/a", "/b"]),
        ("recompute-modules: core_attn", ["--recompute-modules", "core_attn"]),
        ("moe-layer-freq: [0, 1, 1, 1]", ["--moe-layer-freq=[0,1,1,1]"]),
        ("moe-layer-freq: ([0]*1+[1]*3)", ["--moe-layer-freq=([0]*1+[1]*3)"]),
        ("split: 969, 30, 1", ["--split=969, 30, 1"]),
        ("# a comment\n\nlr: 1e-5 # another", ["--lr=1e-5"]),
        ("a: &one 3\nlr: *one", None),
        ("lr: &one 3\nmin-lr: *one", ["--lr=3", "--min-lr=3"]),
        ("", []),
        ("# nothing", []),
    ],
)
def test_a_line_stands_for_words_of_a_command_line(words, text, expected):
    if expected is None:
        with pytest.raises(UserError):
            words(text)
    else:
        assert words(text) == expected


def test_every_switch_can_be_set_and_undone_and_every_flag_of_megatrons_can_stand_in_a_recipe(words, parser):
    """Through argparse itself: whatever kinds of flags Megatron has, true is the switch's value and false its
    opposite.
    """
    num_switches = 0
    fixed = {
        "--ckpt-fully-parallel-save",
        "--no-ckpt-fully-parallel-save",
    }  # two flags of opposite names that set different things
    for option, action in parser._option_string_actions.items():
        if option in ("-h", "--help", "--config"):
            continue
        key = option.removeprefix("--")
        if action.nargs == 0:
            num_switches += 1
            true = vars(parser.parse_args(words(f"{key}: true")))[action.dest]
            assert true is getattr(action, "const", None) or (
                isinstance(action, argparse.BooleanOptionalAction) and true is not key.startswith("no-")
            )
            if option not in fixed:
                assert vars(parser.parse_args(words(f"{key}: false")))[action.dest] is (not true)
        else:
            assert words(f"{key}: x")[0].split("=")[0] == option
    assert num_switches > 300


# ---- who wins


def test_command_line_wins_over_recipe_and_recipe_over_defaults(args):
    found = args(
        "lr: 1e-5\nmicro-batch-size: 4\neval-interval: 7\ndata-path: [/a, /b]", "--lr", "2e-5", "--data-path", "/c"
    )
    assert (found.lr, found.micro_batch_size, found.eval_interval, found.data_path) == (2e-5, 4, 7, ["/c"])
    assert found.log_interval == 100  # Megatron's default


def test_the_command_line_undoes_a_switch_of_the_recipe(args):
    found = args("bf16: true\nuse-distributed-optimizer: true\nno-save-optim: true", "--no-bf16", "--save-optim")
    assert (found.bf16, found.use_distributed_optimizer, found.no_save_optim) == (False, True, False)


def test_the_command_line_sets_what_the_recipe_has_set_to_false(args):
    assert args("bf16: false", "--bf16").bf16 is True


def test_false_undoes_a_default_of_hymegs(args):
    assert args("").log_throughput is True
    assert args("log-throughput: false").log_throughput is False
    assert args("", "--no-log-throughput").log_throughput is False


def test_what_a_run_adds_to_its_args_is_not_the_next_ones_default(args):
    """Runs of one process, as plans are, share a parser."""
    first = args("lr: 1.0")
    first.iterations_to_skip.append(7)
    first.cp_comm_type.append("a2a")
    second = args("lr: 1.0")
    assert (second.iterations_to_skip, second.cp_comm_type) == ([], ["p2p"])


def test_who_set_a_flag_is_known(args):
    found = args("lr: 1e-5\nmin_lr: 1e-6", "--lr", "2e-5", "--train-iters=3").explicit
    assert found["lr"] == ("--lr", "")
    assert found["train_iters"] == ("--train-iters", "")
    assert found["min_lr"][1].endswith("recipe.yaml, line 2")
    assert "micro_batch_size" not in found


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("lr: 1\nlearning_rate: 1e-5", 2, ["unknown key 'learning_rate'", "did you mean lr?"]),
        ("tensor_parallel_size: 2", 1, ["'tensor_parallel_size'", "tensor-model-parallel-size?"]),
        ("tp: 2", 1, ["'tp'", "tensor-model-parallel-size?"]),
        ("LR: 2", 1, ["'LR'", "did you mean lr?"]),
        ("--lr: 2", 1, ["'--lr'", "did you mean lr?", "without --"]),
        ("overlap_p2p_comm: false", 1, ["'overlap_p2p_comm'", "no-overlap-p2p-communication?"]),
        ("nnodes: 2", 1, ["'nnodes'", "torchrun's"]),
        ("xyzzy: 2", 1, ["unknown key 'xyzzy'", "flags of pretrain_hy.py"]),
        ("lr: 1\n\nbf16: true\nlr: 2", 4, ["'lr'", "line 1 already", "keep one"]),
        ("micro-batch-size: 1\nmicro_batch_size: 2", 2, ["'micro_batch_size'", "line 1 already"]),
        ("bf16: true\nno-bf16: true", 2, ["'no-bf16'", "line 1 already"]),
        ("lr: 1\nmodel:\n  num_layers: 3", 2, ["'model'", "section", "left margin"]),
        ("parallel: {tp: 2}", 1, ["'parallel'", "section"]),
        ("bf16: 1", 1, ["'bf16'", "switch", "'1'", "true or false"]),
        ('bf16: "true"', 1, ["'bf16'", "switch", "without quotes"]),
        ("bf16:", 1, ["'bf16'", "no value", "null"]),
        ("lr:", 1, ["'lr'", "no value", "remove the line"]),
        ("save: true", 1, ["'save'", "takes a value", "found true"]),
        ("save: off", 1, ["'save'", "found off", "quote it"]),
        ("data-path: [{a: 1}]", 1, ["'data-path'", "mapping inside a list"]),
        ("data-path: [[a, b]]", 1, ["'data-path'", "sequence inside a list"]),
        ("save: ~/x", 1, ["'save'", "'~/x'", "write it out"]),
        ("save: $HOME/x", 1, ["'save'", "'$HOME/x'", "write it out"]),
        ("data-path: [1, '${DATA}/x']", 1, ["'data-path'", "'${DATA}/x'"]),
        ("config: other.yaml", 1, ["'config'", "command line"]),
        ("help: true", 1, ["'help'", "command line"]),
        ("no-ckpt-fully-parallel-save: false", 1, ["'no-ckpt-fully-parallel-save'", "only be true", "remove"]),
        ("lr: 1\n\ttrain-iters: 2", 2, ["not YAML", "spaces, not tabs"]),
        ("lr:1e-5\nbf16: true", 2, ["not YAML", "space after the colon"]),
        ("lr: 'abc", 1, ["not YAML", "key: value"]),
        ("lr: 1\n---\nlr: 2", 2, ["not YAML", "another document"]),
        ("lr = 1e-5", 1, ["a scalar", "key: value"]),
        ("- lr: 1", 1, ["a sequence", "key: value"]),
        ("lr: 1\ntrain-iters: ten", 2, ["--train-iters ten", "a whole number"]),
        ("lr: abc", 1, ["--lr abc", "a number such as"]),
        ("optimizer: adamw", 1, ["--optimizer", "'adamw'", "'adam'"]),
        ("attention-backend: triton", 1, ["--attention-backend triton", "flash, fused"]),
        ("recompute-modules: []", 1, ["--recompute-modules", "needs a value"]),
        ("lr: [1, 2]", 1, ["--lr [1,2]", "a number"]),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong_in_it(parser, recipe, text, line, words):
    with pytest.raises(UserError) as raised:
        _read(parser, ["--config", recipe(text)])
    said = str(raised.value)
    assert f"recipe.yaml, line {line}" in said
    assert "\n" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lr: 1\nnum-experts: 64",
            ["--num-experts 64 contradicts", "says 8", "(--num-experts: ", "recipe.yaml, line 2)"],
        ),
        ("swiglu: false", ["--no-swiglu contradicts", "leave --no-swiglu out", "recipe.yaml, line 1)"]),
        ("\nbatch-size: 4", ["--batch-size 4 is not supported", "--micro-batch-size", "recipe.yaml, line 2)"]),
        ("rotary-interleaved: true", ["it makes another model", "recipe.yaml, line 1)"]),
    ],
)
def test_what_only_shows_later_still_names_the_line(args, text, words):
    with pytest.raises(UserError) as raised:
        args(text)
    for word in words:
        assert word in str(raised.value)


def test_no_line_is_named_for_what_the_command_line_has_set(args):
    with pytest.raises(UserError, match="--num-experts 64 contradicts") as raised:
        args("num-experts: 8", "--num-experts", "64")
    assert "recipe.yaml" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_named(model, tmp_path, make, word):
    path = tmp_path / "recipe.yaml"
    make(path)
    with pytest.raises(UserError) as raised:
        parse(["--hf-model", model, "--config", str(path)])
    assert str(raised.value).startswith(f"--config {path}: {word}")
    assert "give a YAML file" in str(raised.value)
