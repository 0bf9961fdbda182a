"""What a person got wrong is told in one line before anything heavy; what is right passes, and Megatron agrees; what is
corrected is said.
"""

import contextlib
import copy
import importlib.util
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest

from hymeg import platform

platform.install()

from invocations import (  # noqa: E402
    DATA,
    LOAD,
    NEEDED,
    PP2,
    WRONG,
    WRONG_FOR_MEGATRON,
    WRONG_ON_CPU,
    WRONG_ON_GPU,
)
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.training.argument_utils import core_transformer_config_from_args  # noqa: E402
from megatron.training.arguments import validate_args  # noqa: E402
from places import make_places  # noqa: E402

from hymeg.errors import UserError  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.models.hy import HyTransformerConfig  # noqa: E402
from hymeg.platform import connections  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.preflight import _check_build_tools, preflight  # noqa: E402
from hymeg.training.run import megatron_refusals  # noqa: E402

OPTIONAL = ("deep_ep", "einops", "emerging_optimizers", "nvidia_resiliency_ext", "pynvml", "wandb")
"""Packages that a test must not find, whether they are installed or not."""

on_cpu = pytest.mark.skipif(not platform.is_cpu(), reason="the CPU's own refusals")


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture
def checked(places, monkeypatch):
    """Parse and check a command line in a world of some processes, as rank 0."""

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name in OPTIONAL else find_spec(name, *args)
    )

    def check(added: str, world_size: int = 1, needed: str = NEEDED):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", "0")
        args, config = parse(f"{needed} {added}".format(**places).split())
        notes = []
        preflight(args, config, notes.append)
        return args, notes

    return check


def told(checked, *command) -> str:
    with pytest.raises(UserError) as raised:
        checked(*command)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 2000
    return said


# ---- wrong


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_invocation_is_told_flag_value_and_remedy(checked, places, case):
    world_size, added, words = WRONG[case]
    if case == "two precisions" and platform.is_cpu():
        words = ("--fp16", "bf16 or fp32")
    said = told(checked, added, world_size)
    for word in words:
        assert word.format(**places) in said, said


def test_phases_begin_with_weights_of_a_run(checked, places):
    in_samples = NEEDED.replace("--train-iters 10", "--train-samples 10 --phase-transition-iterations 5")
    said = told(checked, f"{LOAD} --load {{hf}}", 1, in_samples)
    assert f"--phase-transition-iterations 5: --load {places['hf']} does not say with what batch size" in said
    checked(f"{LOAD} --load {{ckpt}}", 1, in_samples)
    checked("", 1, in_samples)


@on_cpu
@pytest.mark.parametrize("added", WRONG_ON_CPU)
def test_what_the_cpu_cannot_do_is_refused_by_name(checked, added):
    said = told(checked, added)
    for word in (*WRONG_ON_CPU[added], "cannot work on CPU"):
        assert word in said, said


@pytest.fixture
def on_gpus(monkeypatch):
    """As on a machine with two Hopper GPUs and Transformer Engine."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "transformer_engine" or find_spec(name))
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.version.cuda", "13.0")


@pytest.mark.parametrize("added", WRONG_ON_GPU)
def test_what_fails_on_gpus_is_told_before(checked, on_gpus, added):
    said = told(checked, added, 2)
    for word in WRONG_ON_GPU[added]:
        assert word in said, said


@pytest.mark.parametrize("added", WRONG_FOR_MEGATRON)
def test_what_megatron_refuses_is_told_in_its_words(checked, added):
    args, _ = checked(added)
    destroy_num_microbatches_calculator()
    with pytest.raises(UserError) as raised, megatron_refusals():
        validate_quietly(args)
    for word in (*WRONG_FOR_MEGATRON[added], "Megatron refuses"):
        assert word in str(raised.value)


def test_few_tokens_for_many_experts_are_said(checked):
    """8 experts, of which a token takes 2."""
    idle = [note for note in checked("--seq-length 4")[1] if "experts none" in note]
    assert idle == [
        "a micro-batch gives an expert 1 tokens on average, and about 32% of the 8 experts none: raise --seq-length, "
        "--micro-batch-size or the expert-parallel size"
    ]
    assert not [note for note in checked("--seq-length 16")[1] if "experts none" in note]
    cut = checked("--seq-length 16 --tensor-model-parallel-size 4 --expert-tensor-parallel-size 1", 4)[1]
    assert any("gives an expert 1 tokens" in note for note in cut)


def validate_quietly(args) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        validate_args(args)
        core_transformer_config_from_args(args, HyTransformerConfig)


@pytest.mark.parametrize(
    ("capability", "cuda", "said", "recipe"),
    [
        ((9, 0), "13.0", "", "blockwise"),
        ((9, 0), "12.6", "", "tensorwise"),
        ((8, 9), "13.0", "", "tensorwise"),
        ((8, 9), "13.0", " --fp8-recipe mxfp8", "mxfp8"),
    ],
)
def test_fp8_has_a_recipe_that_runs_and_can_be_resumed(checked, on_gpus, monkeypatch, capability, cuda, said, recipe):
    """Megatron's own default, delayed, keeps a state that Transformer Engine refuses to load."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert checked(f"--bf16 --fp8-format hybrid{said}")[0].fp8_recipe == recipe


@pytest.mark.parametrize(
    "said",
    [
        "--sft --no-mock-data --data-path {rows} --overlap-moe-expert-parallel-comm",
        "--overlap-moe-expert-parallel-comm --moe-router-bias-update-rate 1e-3",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
    ],
)
def test_what_works_on_gpus_is_let_through(checked, on_gpus, said):
    checked(f"--bf16 --expert-model-parallel-size 2 {said}", 2)


def test_the_slowest_ranks_are_told(checked, on_gpus, monkeypatch):
    """In lines of a level that hymeg's default leaves out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for said, level in (("", 20), (" --logging-level 30", 30)):
        args, notes = checked(f"--log-straggler{said}", 2)
        assert args.logging_level == level and ("--logging-level 20 set" in str(notes)) == (level == 20)


def test_muon_with_overlaps_is_right(checked, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    validate_quietly(checked("--bf16 --optimizer dist_muon --overlap-param-gather --overlap-grad-reduce", 2)[0])


def test_only_the_first_rank_of_a_node_opens_the_weights(checked, places, monkeypatch):
    opened = []
    monkeypatch.setattr("hymeg.training.weights.open_hf", lambda folder, config: opened.append(folder))
    for local_rank in ("0", "1", "7"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert checked(f"{LOAD} --load {{hf}}")[0].hf_weights == places["hf"]
    assert opened == [places["hf"]]


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("", "--hf-model is missing"),
        ("--hf-model {hf}", "--train-iters is missing"),
        ("--hf-model {hf} --train-iters 10", "--lr is missing"),
        ("--hf-model {hf} --train-iters 10 --lr 1e-5", "--seq-length is missing"),
        ("--hf-model {hf} --train-iters 10 --lr 1e-5 --seq-length 32", "no data: give --data-path PREFIX"),
        ("--hf-model {hf} --train-iters 10 --lr 1e-5 --seq-length 32 --mock-data", "no weights: give --load FOLDER"),
    ],
)
def test_what_is_missing_is_asked_for_one_thing_at_a_time(checked, command, word):
    assert told(checked, command, 1, "").startswith(word)


def test_nothing_in_a_hostile_checkpoint_is_run(checked, places):
    told(checked, f"{LOAD} --load {{ckpt_hostile}}")
    assert not os.path.exists(f"{places['tmp']}/hostile-was-here")
    with open(f"{places['ckpt_hostile']}/iter_0000010/.metadata", "rb") as file:
        pickle.load(file)  # it would have been
    assert os.path.exists(f"{places['tmp']}/hostile-was-here")


def test_a_mistake_in_the_recipe_is_told_with_its_line(checked, places):
    path = f"{places['tmp']}/batch.yaml"
    with open(path, "w") as file:
        file.write("bf16: true\n\nglobal-batch-size: 7\nmicro-batch-size: 2\n")
    said = told(checked, f"--config {path}")
    assert said.endswith(f"use 6 or 8 (--global-batch-size: {path}, line 3; --micro-batch-size: {path}, line 4)")
    assert checked(f"--config {path} --global-batch-size 8")[0].global_batch_size == 8


@pytest.mark.parametrize(
    ("added", "denied", "words"),
    [
        (f"{DATA} --data-path {{text}}", "{text}.bin", ("--data-path {text}", "{text}.bin is not readable", "chmod")),
        (f"{DATA} --data-path {{text}}", "{tmp}", ("--data-path", "{tmp} is not writable", "--data-cache-path")),
        (
            f"{DATA} --data-path {{text}} --data-cache-path {{empty}}",
            "{empty}",
            ("--data-cache-path {empty}", "not writable"),
        ),
        ("--save {empty}/new", "{empty}", ("--save {empty}/new", "{empty} is not writable", "another folder")),
        (f"{LOAD} --load {{empty}}", "{empty}", ("--load {empty}", "not readable by this user")),
    ],
)
def test_missing_permissions_are_told(checked, places, monkeypatch, added, denied, words):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != denied.format(**places) and allowed(path, mode))
    said = told(checked, added)
    for word in words:
        assert word.format(**places) in said, said


def test_a_full_disk_is_told(checked, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert "no space left" in told(checked, "--save {tmp}/new")
    assert "0.002 GB are needed for each folder and 0.000 GB are free" in told(checked, "--save-hf {tmp}/new")


def test_more_processes_than_gpus_and_a_missing_package_are_told_on_cuda(checked, monkeypatch):
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    said = told(checked, "")
    assert "--nproc-per-node 8" in said and "2 GPUs" in said and "as many processes as GPUs" in said
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = told(checked, "")
    assert "--transformer-impl transformer_engine" in said and "pip install 'hymeg[gpu]'" in said


@pytest.mark.parametrize(("missing", "advice"), [("ninja", "pip install ninja"), ("g++-13", "in CXX")])
def test_a_compiler_that_the_first_step_would_not_find_is_told_on_cuda(monkeypatch, missing, advice):
    def check(*modules: str, granularity: str = "selective") -> None:
        _check_build_tools(SimpleNamespace(recompute_granularity=granularity, recompute_modules=list(modules)))

    monkeypatch.setenv("CXX", "g++-13 -O1")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    check("moe_act")  # on a CPU nothing is compiled
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    for modules in (["moe_act"], ["core_attn", "layernorm"]):
        told = rf"--recompute-modules {modules[-1]}: .*{re.escape(missing)} is not on PATH"
        with pytest.raises(UserError, match=told) as raised:
            check(*modules)
        assert advice in str(raised.value)
    check("core_attn", "mlp")
    check("moe_act", granularity=None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check("moe_act")


# ---- right

RIGHT: dict[str, tuple[int, str]] = {
    "nothing more": (1, ""),
    "what config.json says": (
        1,
        "--num-experts 8 --num-layers 4 --swiglu --moe-layer-freq [0,1,1,1] --tokenizer-model {hf}",
    ),
    "what the CPU needs": (
        1,
        "--transformer-impl local --no-rope-fusion --no-moe-grouped-gemm" if platform.is_cpu() else "",
    ),
    "bf16": (2, "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "TP": (2, "--tensor-model-parallel-size 2"),
    "TP beyond the query groups": (4, "--tensor-model-parallel-size 4"),
    "EP over DP": (8, "--tensor-model-parallel-size 2 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1"),
    "CP": (4, "--context-parallel-size 2 --seq-length 64 --global-batch-size 4"),
    "PP": (2, PP2),
    "PP and VPP": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4"),
    "PP and VPP by layers": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 4"),
    "uneven first": (2, f"{PP2} --decoder-first-pipeline-num-layers 1"),
    "uneven both": (
        3,
        "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 1",
    ),
    "embedding and loss as layers": (
        3,
        "--pipeline-model-parallel-size 3 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
    ),
    "layout string": (2, f"{PP2} --pipeline-model-parallel-layout Et|tttL"),
    "layout string with VPP": (2, f"{PP2} --pipeline-model-parallel-layout E|tt|tt|L --global-batch-size 4"),
    "layout string with MTP": (2, f"--hf-model {{mtp}} {PP2} --pipeline-model-parallel-layout Ettt|tmL"),
    "all at once": (
        16,
        f"{PP2} --tensor-model-parallel-size 2 --context-parallel-size 2 --expert-model-parallel-size 4 "
        "--expert-tensor-parallel-size 1 "
        "--global-batch-size 8",
    ),
    "data": (1, f"{DATA} --data-path {{text}}"),
    "blend": (1, f"{DATA} --data-path {{text}} {{corpus_text_document}} {{text}}"),
    "blend with weights": (1, f"{DATA} --data-path 0.3 {{text}} 7 {{corpus_text_document}} --split 100,0,0"),
    "data per split": (1, f"{DATA} --train-data-path {{text}} --valid-data-path 1 {{text}}"),
    "weights": (1, f"{LOAD} --load {{hf}}"),
    "resume": (1, f"{LOAD} --load {{ckpt}} --train-iters 50"),
    "resume with the distributed optimizer": (
        1,
        f"{LOAD} --load {{ckpt_distributed}} --use-distributed-optimizer --bf16",
    ),
    "resume in 16 bits": (1, f"{LOAD} --load {{ckpt_bf16}} --bf16"),
    "resume without the optimizer": (1, f"{LOAD} --load {{ckpt_distributed}} --no-load-optim"),
    "resume with more frozen": (1, f"{LOAD} --load {{ckpt}} --train-iters 50 --freeze *.router.* --no-load-optim"),
    "resume weights alone": (1, f"{LOAD} --load {{ckpt_no_optimizer}} --finetune"),
    "resume at a step": (1, f"{LOAD} --load {{ckpt}} --ckpt-step 10 --train-iters 50"),
    "resume an unfinished save at a step": (1, f"{LOAD} --load {{ckpt_unfinished}} --ckpt-step 10 --train-iters 50"),
    "resume in place": (1, f"{LOAD} --load {{ckpt}} --save {{ckpt}} --pretrained-checkpoint {{hf}} --train-iters 50"),
    "first life of a job": (1, f"{LOAD} --load {{tmp}}/new --save {{tmp}}/new --pretrained-checkpoint {{hf}}"),
    "first life from scratch": (1, "--load {empty} --save {empty}"),
    "finetune from a checkpoint": (1, f"{LOAD} --pretrained-checkpoint {{ckpt}} --save {{tmp}}/new"),
    "samples": (1, "--train-iters 10 --lr-warmup-fraction 0.1 --lr-decay-style cosine --min-lr 1e-5"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "recompute selectively": (1, "--recompute-granularity selective --recompute-modules core_attn mlp"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_invocation_passes_and_megatron_takes_it(checked, monkeypatch, case):
    world_size, added = RIGHT[case]
    args, _ = checked(added, world_size)
    destroy_num_microbatches_calculator()
    validate_quietly(args)


def test_a_length_on_the_command_line_wins_over_another_kind_in_the_recipe(checked, places):
    recipe = f"{places['tmp']}/length.yaml"
    with open(recipe, "w") as file:
        file.write("train-iters: 1000\nsft: true\neval-iters: 0\nlr-warmup-iters: 5\n")
    needed = f"--config {recipe} {NEEDED.replace('--train-iters 10', '').replace('--mock-data', '')}"
    data = "--data-path {rows} --split 100,0,0 --save {tmp}/epochs"
    args, _ = checked(f"{data} --train-epochs 3", needed=needed)
    assert (args.train_iters, args.train_epochs) == (None, 3)
    destroy_num_microbatches_calculator()
    validate_quietly(args)
    assert checked(data, needed=needed)[0].train_iters == 1000
    with open(recipe, "a") as file:
        file.write("train-epochs: 2\n")
    said = told(checked, data, 1, needed)
    assert "--train-iters and --train-epochs are given" in said and "line 1" in said and "line 5" in said
    said = told(checked, f"{data} --train-epochs 2 --lr-warmup-samples 3", 1, needed)
    assert "--lr-warmup-samples 3 does not go with --train-epochs: give --lr-warmup-iters" in said
    said = told(checked, f"{data} --train-epochs 2 --step-batch-size-schedule 0:4", 1, needed)
    assert "--train-epochs 2: iterations, data and learning rate are counted for one batch size" in said


def test_samples_instead_of_iterations(checked):
    args, _ = checked(
        "--train-samples 100 --lr-warmup-samples 10 --save {tmp}/new", 1, NEEDED.replace("--train-iters 10", "")
    )
    assert args.save_interval == 100


@pytest.mark.parametrize(
    ("added", "hf_weights", "load", "pretrained"),
    [
        ("", None, None, None),
        (f"{LOAD} --load {{hf}}", "{hf}", None, None),
        (f"{LOAD} --pretrained-checkpoint {{hf}}", "{hf}", None, None),
        (f"{LOAD} --load {{ckpt}}", None, "{ckpt}", None),
        (f"{LOAD} --load {{ckpt}} --save {{ckpt}} --pretrained-checkpoint {{hf}}", None, "{ckpt}", "{hf}"),
        (f"{LOAD} --load {{tmp}}/new --save {{tmp}}/new --pretrained-checkpoint {{hf}}", "{hf}", None, None),
        (f"{LOAD} --load {{tmp}}/new --save {{tmp}}/new --pretrained-checkpoint {{ckpt}}", None, None, "{ckpt}"),
        ("--load {tmp}/new --save {tmp}/new", None, None, None),
    ],
)
def test_where_the_weights_come_from(checked, places, added, hf_weights, load, pretrained):
    args, _ = checked(added)
    expected = [path and path.format(**places) for path in (hf_weights, load, pretrained)]
    assert [args.hf_weights, args.load, args.pretrained_checkpoint] == expected
    assert args.exit_on_missing_checkpoint is (("{ckpt}" in (load, pretrained)) and hf_weights is None)


@pytest.mark.parametrize(
    ("added", "split"),
    [
        (f"{DATA} --data-path {{many}}", "969, 30, 1"),
        (f"{DATA} --data-path {{many}} {{twenty}}", "90, 10, 0"),
        (f"{DATA} --data-path 1 {{text}}", "100, 0, 0"),
        (f"{DATA} --data-path {{text}} --split 2,1", "2,1"),
        (f"{DATA} --train-data-path {{text}}", None),
    ],
)
def test_the_default_split_leaves_no_part_without_documents(checked, places, added, split):
    """Megatron builds its datasets of them; with a part that is empty it would not come back."""
    args, notes = checked(added)
    assert args.split == split
    assert [note for note in notes if note.startswith("--split")] == (
        [f"--split {split} set: too few documents for 969, 30, 1"] if split in ("90, 10, 0", "100, 0, 0") else []
    )


# ---- corrected, and said


@pytest.mark.parametrize(
    ("world_size", "added", "dest", "value", "word"),
    [
        (2, "--tensor-model-parallel-size 2", "sequence_parallel", True, "--sequence-parallel set"),
        (1, f"{LOAD} --load {{ckpt}}", "override_opt_param_scheduler", True, "--override-opt-param-scheduler set"),
        (1, "--save {tmp}/new", "save_interval", 10, "--save-interval 10 set"),
        (
            1,
            "--no-mock-data --data-path {text}",
            "eval_iters",
            0,
            "--eval-iters 0 set: --split 100, 0, 0 leaves no data",
        ),
        (
            1,
            "--no-mock-data --train-data-path {text}",
            "eval_iters",
            0,
            "--eval-iters 0 set: there is no data for validation",
        ),
        (1, "--config {interval}", "save_interval", 7, "--save-interval 7 has no effect"),
    ],
)
def test_what_is_corrected_is_said(checked, places, world_size, added, dest, value, word):
    args, notes = checked(added, world_size)
    assert getattr(args, dest) == value
    assert [note for note in notes if note.startswith(word.format(**places))], notes
    assert all("\n" not in note for note in notes)


def test_weights_and_biases_is_given_the_losses(checked, places, monkeypatch):
    """Megatron logs there only what it writes for TensorBoard."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or find_spec(name))
    args, notes = checked("--wandb-project x --wandb-exp-name y --save {tmp}/new")
    assert args.tensorboard_dir == f"{places['tmp']}/new/tensorboard"
    assert any(note.startswith(f"--tensorboard-dir {args.tensorboard_dir} set: ") for note in notes)
    assert told(checked, "--wandb-project x --save {tmp}/new").endswith("name for the run: add --wandb-exp-name NAME")


def test_nothing_is_said_of_what_needs_no_correction(checked):
    assert checked("--eod-mask-loss --context-parallel-size 2", 2)[1] == []
    assert checked("--tensor-model-parallel-size 2 --sequence-parallel", 2)[1] == []


@pytest.mark.parametrize(
    ("line", "recipe", "gpu", "before", "after"),
    [
        ("--tensor-model-parallel-size 2", "", "H100", None, "1"),
        ("--tensor-model-parallel-size=2", "", "H100", None, "1"),
        ("--config {recipe}", "context_parallel_size: 4", "H100", None, "1"),
        ("--config={recipe}", "context-parallel-size: 4  # of 8", "H100", None, "1"),
        ("--config {recipe} --context-parallel-size 1", "context-parallel-size: 4", "H100", None, None),
        ("--config {recipe}", "# tensor-model-parallel-size: 2", "H100", None, None),
        ("--config {recipe}", "tensor-model-parallel-size: 2  # caf\udce9", "H100", None, "1"),  # not UTF-8
        ("--tensor-model-parallel-size 1", "", "H100", None, None),
        ("--pipeline-model-parallel-size 2", "", "H100", None, None),
        ("--tensor-model-parallel-size 2 --overlap-moe-expert-parallel-comm", "", "H100", None, None),
        ("--tensor-model-parallel-size 2", "", "GB200", None, None),
        ("--tensor-model-parallel-size 2", "", "RTX PRO 6000 Blackwell", None, None),
        ("--tensor-model-parallel-size 2", "", "H100", "32", "32"),
    ],
)
def test_connections_are_set_where_needed_before_torch_is_there(
    tmp_path, monkeypatch, line, recipe, gpu, before, after
):
    """The driver reads the variable once, and importing Megatron asks the driver for its GPUs."""
    (tmp_path / "recipe.yaml").write_bytes(f"bf16: true\n{recipe}\n".encode(errors="surrogateescape"))
    (tmp_path / "information").write_text(f"Model: \t\t NVIDIA {gpu}\nIRQ: 16\n")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(connections, "were_set", False)
    connections.set_connections(line.format(recipe=tmp_path / "recipe.yaml").split(), str(tmp_path / "info*"))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == after
    assert connections.were_set is (after == "1")


@pytest.mark.parametrize("were_set", [True, False])
def test_connections_that_were_set_are_said(monkeypatch, were_set):
    monkeypatch.setattr(connections, "were_set", were_set)
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    said = [note for note in platform.announcement() if note.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 set")]
    assert bool(said) is were_set


def test_checking_twice_finds_the_same(places, monkeypatch):
    """Preflight changes args: a second look at the result must not refuse it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = f"{NEEDED} --tensor-model-parallel-size 2 --data-path {{text}} --no-mock-data".format(**places).split()
    args, config = parse(command)
    assert isinstance(config, HyConfig)
    preflight(args, config, [].append)
    before = copy.copy(vars(args))
    preflight(args, config, [].append)
    assert vars(args) == before
