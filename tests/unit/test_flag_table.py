"""Every flag of Megatron's does something under hymeg, or is refused by name."""

import argparse
import ast
import re
from pathlib import Path
from typing import Any

import pytest

from hymeg import platform

platform.install()

import megatron.training  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG  # noqa: E402
from hymeg.errors import UserError  # noqa: E402
from hymeg.flag_table import _DEFAULT, ALWAYS, ON_CPU, TABLE, WITHOUT, Row, cpu_values  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.models.flags import architecture_flags, default_flags  # noqa: E402
from hymeg.platform import for_gpus  # noqa: E402
from hymeg.training import flag_names, schedule  # noqa: E402
from hymeg.training.arguments import _parser, parse  # noqa: E402
from hymeg.training.own_flags import DEFAULTS  # noqa: E402
from hymeg.training.refusals import named, refuse  # noqa: E402

MEGATRON = Path(megatron.training.__file__).parents[1]
HYMEG = Path(platform.__file__).parents[1]

ACTIONS = {action.dest: action for action in _parser()._actions if action.dest != "help"}
"""Every flag, by its destination."""

NOT_ON_THE_WAY = (
    "core/datasets/bert_dataset.py",
    "core/datasets/masked_dataset.py",
    "core/datasets/multimodal_dataset.py",
    "core/datasets/t5_dataset.py",
    "core/distributed/fsdp",
    "core/export",
    "core/inference",
    "core/models/T5",
    "core/models/audio",
    "core/models/bert",
    "core/models/hybrid",
    "core/models/mamba",
    "core/models/mimo",
    "core/models/multimodal",
    "core/models/vision",
    "core/post_training",
    "core/resharding",
    "core/ssm",
    "core/tokenizers",
    "core/transformer/experimental_attention_variant",
    "core/transformer/heterogeneous",
    "core/transformer/multi_latent_attention.py",
    "training/config",  # where the flags are declared
    "training/datasets/fim_dataset.py",
    "training/datasets/sft_dataset.py",
    "training/distillation",
    "training/inprocess_restart.py",
    "training/models/hybrid.py",
    "training/theoretical_memory_usage.py",
    "training/yaml_arguments.py",
    # Functions. hymeg gives `pretrain` a model configuration, which is built by training/models instead.
    "training/training.py:get_model",
    "training/training.py:num_floating_point_operations",  # replaced by hymeg.planning.flops
    "training/checkpointing.py:load_args_from_checkpoint",
    "training/checkpointing.py:check_checkpoint_args",
    "training/checkpointing.py:_maybe_setup_gpt_to_hybrid_load",
    "training/arguments.py",  # most of it only compares; what it puts into other arguments is TRANSLATED
)
"""Megatron's modules and functions that a run of hymeg never enters."""

TRANSLATED = {
    "cuda_graph_scope_deprecated": "cuda_graph_modules",
    "grad_reduce_in_bf16": "accumulate_allreduce_grads_in_fp32",
    "no_weight_decay_cond_type": "apply_wd_to_qk_layernorm",
    "num_layers_per_virtual_pipeline_stage": "virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "override_ckpt_iteration": "override_ckpt_iteration",
    "recompute_activations": "recompute_granularity",
    "use_rotary_position_embeddings": "position_embedding_type",
}
"""What Megatron's validation makes another argument of."""


def reads(root: Path, left_out: tuple[str, ...] = ()) -> set[str]:
    """The names that the code below `root` reads as an attribute, or gives to getattr."""
    found = set()
    for path in root.rglob("*.py"):
        name = str(path.relative_to(root))
        if not name.startswith(tuple(entry for entry in left_out if ":" not in entry)):
            functions = {entry.partition(":")[2] for entry in left_out if entry.startswith(f"{name}:")}
            found |= _reads_of(ast.parse(path.read_text()), functions)
    return found


def _reads_of(node: ast.AST, left_out: set[str]) -> set[str]:
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and child.name in left_out:
            continue
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            found.add(child.attr)
        if isinstance(child, ast.Call) and getattr(child.func, "id", "") in ("getattr", "hasattr"):
            found.add(getattr(child.args[1], "value", None))
        found |= _reads_of(child, left_out)
    return found


@pytest.fixture(scope="module")
def read() -> set[str]:
    arguments = ast.parse((MEGATRON / "training/arguments.py").read_text())
    validated = next(node for node in arguments.body if getattr(node, "name", "") == "validate_args")
    assert _reads_of(validated, set()) >= TRANSLATED.keys()
    # emerging_optimizers.py asks its configuration for "muon_" and the names of its optimizer's parameters.
    muon = {field for field in OptimizerConfig.__dataclass_fields__ if field.startswith("muon_")}
    return reads(MEGATRON, NOT_ON_THE_WAY) | reads(HYMEG) | TRANSLATED.keys() | muon


def refused_everywhere(dest: str) -> bool:
    return any(row.when == ALWAYS and not row.values and row.names(dest) for row in TABLE)


def test_every_flag_is_read_or_fixed_or_refused_by_name(read):
    fixed = {"tokenizer_type", "tokenizer_model", *architecture_flags(HyConfig.from_dict(TINY_CONFIG))}
    left = [dest for dest in ACTIONS if dest not in read | fixed and not refused_everywhere(dest)]
    assert not left, " ".join(left)


def test_the_list_of_what_is_not_on_the_way_is_megatrons():
    """An upgrade that moves a file must not make the walk see less than there is."""
    for entry in NOT_ON_THE_WAY:
        path, _, function = entry.partition(":")
        assert (MEGATRON / path).exists(), entry
        assert f"def {function}(" in (MEGATRON / path).read_text() if function else True, entry


def test_every_word_of_the_table_is_a_flag():
    """An upgrade that renames a flag must not leave a refusal without effect."""
    for row in TABLE:
        for pattern in row.dests.split():
            assert any(row._replace(dests=pattern).names(dest) for dest in ACTIONS), pattern
        for need in row.needs.split():
            assert re.split("[=>]", need)[0] in ACTIONS, need
            if "=" in need:
                _check_choices(*need.split("="))
        if names := [value for value in row.values if isinstance(value, str)]:
            _check_choices(row.dests, ",".join(names))
    assert not [dest for dest in (*cpu_values(), *schedule._RANGES, *DEFAULTS) if dest not in ACTIONS]


def _check_choices(dest: str, values: str) -> None:
    choices = ACTIONS[dest].choices
    names = [getattr(choice, "name", choice) for choice in choices or ()]
    assert not choices or set(values.split(",")) <= set(names), (dest, values, names)


def test_no_flag_is_refused_twice_in_the_same_case():
    """The second row would never be read."""
    for dest in ACTIONS:
        rows = [row for row in TABLE if row.when not in (WITHOUT,) and not row.values and row.names(dest)]
        cases = [row.when for row in rows]
        assert len(cases) == len(set(cases)) and (ALWAYS not in cases or len(cases) == 1), (dest, cases)


ROWS = [(row, dest) for row in TABLE for dest in ACTIONS if row.names(dest)]


def test_every_row_refuses_each_of_its_flags():
    parser = _parser()
    defaults = {dest: action.default for dest, action in ACTIONS.items()} | DEFAULTS
    for row, dest in ROWS:
        option = ACTIONS[dest].option_strings[-1]
        for value in row.values or (_another_value(ACTIONS[dest], row, defaults[dest]),):
            given = [value] if isinstance(defaults[dest], list) else value
            with pytest.raises(UserError) as raised:
                refuse(parser, {dest: given}, {dest: (option, "")}, defaults, _nothing_set(defaults, row), [row])
            said = str(raised.value)
            assert said.startswith(option) and row.when in said and row.why in said and "; " in said, said
            assert row.instead or f"leave {option} out" in said, said


def test_no_row_refuses_a_default():
    defaults = {dest: action.default for dest, action in ACTIONS.items()} | DEFAULTS
    defaults |= default_flags(HyConfig.from_dict(TINY_CONFIG))
    for row, dest in ROWS:
        if row.when != ON_CPU:  # whose values are given where nothing is said
            assert row.refused(named(defaults[dest]), named(defaults[dest])) is None or row.only is False, dest


def _another_value(action: argparse.Action, row: Row, default: Any) -> Any:
    """One that the row should refuse."""
    allowed = default if row.only is _DEFAULT else row.only
    if isinstance(allowed, bool):
        return not allowed
    names = [getattr(choice, "name", choice) for choice in action.choices or ()]
    return next((name for name in names if name != named(allowed)), "another")


def _nothing_set(defaults: dict[str, Any], row: Row) -> dict[str, Any]:
    """What all flags are where none that the row asks for is set."""
    return defaults | {re.split("[=>]", need)[0]: 0 if ">" in need else None for need in row.needs.split()}


def test_help_lists_every_flag():
    text = _parser().format_help()
    hidden = {"--help"} | {o for a in ACTIONS.values() if a.help is argparse.SUPPRESS for o in a.option_strings}
    assert (
        not {o for a in ACTIONS.values() for o in a.option_strings if o.startswith("--")}
        - hidden
        - set(re.findall(r"--[\w-]+", text))
    )
    assert "(e.g., " in text and "%%" not in text


@pytest.mark.parametrize("name", sorted(flag_names._BY_NAME))
def test_every_name_from_elsewhere_leads_to_a_flag(name):
    options = [option for action in _parser()._actions for option in action.option_strings]
    right = flag_names._BY_NAME[name]
    assert f"--{right}" in options and f"--{name}" not in options
    assert flag_names.hint(f"--{name}", options) == f"; did you mean --{right}?"


def test_a_flag_without_effect_is_refused_unless_the_command_line_is_a_plans(tmp_path):
    HyConfig.from_dict(TINY_CONFIG).save(tmp_path)
    argv = ["--hf-model", str(tmp_path), "--train-iters", "1", "--lora-alpha", "8"]
    with pytest.raises(UserError, match=r"--lora-alpha.*--lora-rank"):
        parse(argv)
    assert parse(argv, is_whole=False)[0].lora_alpha == 8


def test_both_precisions_are_refused_on_a_gpu(tmp_path):
    HyConfig.from_dict(TINY_CONFIG).save(tmp_path)
    with for_gpus():
        args, _ = parse(["--hf-model", str(tmp_path), "--train-iters", "1", "--lr", "1e-3", "--fp16", "--bf16"])
        with pytest.raises(UserError, match=r"--fp16 and --bf16 are both given; keep --bf16"):
            schedule.check_schedule(args)
        args.fp16 = False
        schedule.check_schedule(args)
