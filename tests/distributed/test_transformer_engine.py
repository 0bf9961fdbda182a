"""Transformer Engine's layers train as the local ones do: its own Python sources, with a GPU's default flags, over
kernels that are computed plainly (tests/transformer_engine). In every layout, from one loaded checkpoint, in fp32,
losses and gradient norms of three steps equal one process under the local spec to 1e-5. And every recipe for GPUs
trains, in a small world of its shape.
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_adapters_in_training import ALSO, assert_same_adapters, lora
from test_conversations import write_rows
from test_freezing import WHAT
from test_layouts import LAYOUTS
from worlds import Worlds, assert_same_training, largest_difference

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
TE_SITE = Path(sys.prefix) / "te-site"
CP2, EP2 = "--context-parallel-size 2", "--expert-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MODULES = "--recompute-granularity selective --recompute-modules"

ONE_PROCESS = {  # name -> flags, checkpoint
    "a GPU's defaults": ("", "mtp"),
    "fused router and permutation": ("--moe-router-fusion --moe-permute-fusion", "mtp"),
    "sequential experts": ("--no-moe-grouped-gemm", "trunk"),
    "all recomputed": (FULL, "mtp"),
    "modules recomputed": (f"{MODULES} core_attn layernorm moe_act mlp shared_experts", "trunk"),
    "MoE recomputed": (f"{MODULES} moe", "trunk"),
    "distributed optimizer": ("--use-distributed-optimizer", "trunk"),
}
TWO = ("TP2 SP", "PP2 VPP2", "EP2 alltoall", "ETP2", "CP2", "DP2 distributed optimizer, overlaps")
FOUR = ("TP2 PP2 EP2 ETP1", "EP2 CP2")


@pytest.fixture(scope="module")
def te_worlds(tmp_path_factory):
    """Skipped where pip cannot bring Transformer Engine's sources."""
    command = ["bash", TESTS / "layer_specs" / "environment.sh", TE_SITE, sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode != 0:
        pytest.skip(f"Transformer Engine's sources cannot be installed: {result.stderr.strip()[-300:]}")
    script = TESTS / "transformer_engine" / "te_forks.py"
    started = Worlds(tmp_path_factory.mktemp("te_forks") / "logs", script, TE_SITE)
    yield started
    started.end()


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_one_process_trains_as_under_the_local_spec(te_worlds, one_process, command, name):
    flags, checkpoint = ONE_PROCESS[name]
    found = te_worlds.run(1, command(flags, checkpoint=checkpoint))
    assert_same_training(found["steps"], one_process[checkpoint]["steps"][:3])


@pytest.mark.parametrize(("size", "name"), [(2, name) for name in TWO] + [(4, name) for name in FOUR])
def test_every_layout_trains_as_one_process(te_worlds, one_process, command, size, name):
    flags, checkpoint = LAYOUTS[size][name]
    found = te_worlds.run(size, command(flags, checkpoint=checkpoint))
    assert_same_training(found["steps"], one_process[checkpoint]["steps"][:3])


def test_logits_and_every_gradient_are_transformers(te_worlds, command, folder):
    from transformers import AutoModelForCausalLM

    path = str(folder / "te_gradients.safetensors")
    te_worlds.run(1, [*command("--no-gradient-accumulation-fusion"), path], "logits_and_gradients")
    found = load_file(path)
    tokens, logits = found.pop("tokens"), found.pop("logits")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "trunk", dtype=torch.float32, attn_implementation="eager")
    expected = theirs.train()(tokens[:, :-1]).logits
    assert expected.std() > 0.5 and (logits - expected).abs().max() <= 1e-5
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name in found if "e_score_correction_bias" not in name}
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0 and error <= 1e-4, f"{name}: {error:.1e}"


ADAPTED = [  # size, flags, checkpoint
    (2, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2", "mtp"),
    (1, "", "mtp"),
    (1, "--no-moe-grouped-gemm", "trunk"),
    (1, f"{MODULES} core_attn layernorm moe_act mlp shared_experts", "trunk"),
    (2, "--tensor-model-parallel-size 2 --moe-shared-expert-overlap", "trunk"),
    (2, f"{EP2} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", "trunk"),
]


@pytest.mark.parametrize(
    ("size", "flags", "checkpoint"), [ADAPTED[0], *(pytest.param(*c, marks=pytest.mark.soak) for c in ADAPTED[1:])]
)
def test_adapters_train_as_under_the_local_spec(te_worlds, worlds, command, size, flags, checkpoint):
    """Beside layers that begin with a norm, and those of all experts at once; every number of A and B."""
    found = te_worlds.run(size, lora(command, flags, checkpoint))
    expected = worlds.run(1, lora(command, checkpoint=checkpoint))
    assert_same_training(found["steps"], expected["steps"])
    assert_same_adapters(found["adapters"], expected["adapters"])


def test_small_parts_trained_in_full_beside_adapters(te_worlds, worlds, command):
    """Norms too, which are the linear layers' own here."""
    found = te_worlds.run(2, lora(command, f"{ALSO} --tensor-model-parallel-size 2", "mtp"))["adapters"]
    assert sum(key.endswith("norm.weight.full") for key in found) > 10
    assert_same_adapters(found, worlds.run(1, lora(command, ALSO, "mtp"))["adapters"])


@pytest.mark.parametrize("way", ["all_gather", pytest.param("a2a", marks=pytest.mark.soak)])
def test_context_parallelism_by_its_other_ways(te_worlds, one_process, command, way):
    """Than the ring, which is the default."""
    found = te_worlds.run(2, command(f"{CP2} --cp-comm-type {way}"))
    assert_same_training(found["steps"], one_process["trunk"]["steps"][:3])


@pytest.mark.parametrize(("size", "flags"), [(1, ""), (2, EP2)])
def test_experts_without_a_token(te_worlds, worlds, command, size, flags):
    """Two tokens choose two experts each: of eight, four at least have none."""
    there, here = command(flags, steps=2), command(steps=2)
    for argv in (there, here):
        argv[argv.index("--seq-length") + 1] = "2"
    assert_same_training(te_worlds.run(size, there)["steps"], worlds.run(1, here)["steps"])


@pytest.mark.parametrize("flags", [CP2, f"{CP2} --no-sft-packing", EP2])
def test_packed_conversations_train_as_under_the_local_spec(te_worlds, worlds, command, folder, flags):
    """Under context parallelism through Transformer Engine's own ring."""
    write_rows(folder / "te_rows.jsonl", 16, seed=2)
    argv = command(flags, checkpoint="mtp", steps=3)
    start = argv.index("--data-path")
    argv[start : start + 2] = ["--sft", "--data-path", str(folder / "te_rows.jsonl")]
    argv[argv.index("--seq-length") + 1] = "192"
    found, expected = te_worlds.run(2, argv), worlds.run(2, argv)
    assert_same_training(found["steps"], expected["steps"])


def test_a_part_is_trained_as_under_the_local_spec(te_worlds, worlds, command, folder, tmp_path):
    """Fused norms and grouped experts among what is frozen."""
    steps, moved = [], []
    for one, name in ((te_worlds, "te"), (worlds, "local")):
        argv = command(f"{WHAT['half']} --save-hf {tmp_path / name}", checkpoint="mtp", steps=2)
        steps.append(one.run(1, argv)["steps"])
        before, after = (
            load_file(at / "model.safetensors") for at in (folder / "mtp", tmp_path / name / "iter_0000002")
        )
        moved.append({key for key in before if not before[key].equal(after[key])})
    assert_same_training(*steps)
    assert moved[0] == moved[1] and len(moved[0]) < len(before)


def test_bf16_with_the_precision_aware_optimizer_trains_like_fp32_to_its_precision(te_worlds, one_process, command):
    """The recipes' numerics: bf16 weights whose fp32 copies are put together from the weight and 16 bits more."""
    flags = "--bf16 --use-distributed-optimizer --use-precision-aware-optimizer"
    steps = te_worlds.run(1, command(flags, checkpoint="mtp"))["steps"]
    plain = te_worlds.run(1, command("--bf16 --use-distributed-optimizer", checkpoint="mtp"))["steps"]
    assert_same_training(steps, plain, tolerance=1e-6)
    assert 0 < largest_difference(steps, one_process["mtp"]["steps"][:3], "loss") < 1e-2


@pytest.mark.parametrize("direction", ["Transformer Engine's to local", "local to Transformer Engine's"])
def test_a_checkpoint_of_one_spec_is_resumed_under_the_other(
    te_worlds, worlds, one_process, command, folder, direction
):
    """Optimizer state included, in another layout."""
    first, then = (te_worlds, worlds) if direction.startswith("Trans") else (worlds, te_worlds)
    save = str(folder / "saves" / direction.replace(" ", "-"))
    before, after = (LAYOUTS[2][name][0] for name in ("DP2 distributed optimizer", "TP2 SP"))
    saved = first.run(2, command(before, f"--save {save}", checkpoint="mtp", steps=2))
    resumed = then.run(2, command(after, "--use-distributed-optimizer", checkpoint="mtp", load=save, steps=4))
    assert_same_training(saved["steps"], one_process["mtp"]["steps"][:2])
    assert_same_training(resumed["steps"], one_process["mtp"]["steps"][2:])


@pytest.mark.parametrize(("size", "flags"), [(1, ""), (2, "--tensor-model-parallel-size 2")])
def test_the_same_text_as_under_the_local_spec(te_worlds, worlds, command, size, flags):
    local = worlds.run(1, command(checkpoint="mtp"), "generation")
    assert te_worlds.run(size, command(flags, checkpoint="mtp"), "generation") == local


def small(recipe: Path) -> tuple[int, list[str]]:
    """A world in which all that the recipe cuts is cut in two, and the recipe's flags for it."""
    said, size = yaml.safe_load(recipe.read_text()), 1
    layout = said.pop("pipeline-model-parallel-layout", None)
    for name in [name for name in said if name.endswith("parallel-size")]:
        said[name] = min(said[name], 2)
    for name in ("tensor", "pipeline", "context"):
        size *= said.get(f"{name}-{'' if name == 'context' else 'model-'}parallel-size", 1)
    if layout is not None:
        said["num-virtual-stages-per-pipeline-rank"] = 2
    ranks_of_experts = (said.get(f"{name}-parallel-size", 1) for name in ("expert-model", "expert-tensor"))
    size = max(size, math.prod(ranks_of_experts) * said.get("pipeline-model-parallel-size", 1))
    for name in ("lr-warmup-iters", "lr-warmup-fraction", "train-iters", "lr", "seq-length", "global-batch-size"):
        said.pop(name, None)
    for name in ("log-interval", "eval-interval", "eval-iters", "save-interval", "lr-decay-style", "init-from-scratch"):
        said.pop(name, None)
    words = []
    for name, value in said.items():
        words += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return size, words


IN_EVERY_RUN = ("sft_256xh100", "long_context", "continue_16xh100", "sft_8xh100")  # all kinds of flags; the rest: soak
RECIPES = [
    pytest.param(
        path,
        id=f"{path.parent.name}-{path.stem}",
        marks=[] if path.stem.startswith(IN_EVERY_RUN) else pytest.mark.soak,
    )
    for path in sorted(EXAMPLES.glob("hy*/*.yaml"))
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_as_one_process_to_the_precision_of_bf16(te_worlds, worlds, command, folder, recipe):
    """Its flags and its kinds of parallelism, at tiny widths; against fp32 in one process under the local spec."""
    size, words = small(recipe)
    write_rows(folder / "recipe_rows.jsonl", 64, seed=4)
    checkpoint = "mtp" if recipe.parent.name == "hy3" else "trunk"
    sample = ["--global-batch-size 4", *re.findall(r"--micro-batch-size \d", " ".join(words))]

    def on_its_data(*flags: str) -> list[str]:
        argv = command(*sample, *flags, checkpoint=checkpoint, steps=2)
        if "--sft" in words:
            start = argv.index("--data-path")
            argv[start : start + 2] = ["--data-path", str(folder / "recipe_rows.jsonl")]
            argv[argv.index("--seq-length") + 1] = "192"
        return argv

    found = te_worlds.run(size, on_its_data(" ".join(words)))["steps"]
    alone = worlds.run(1, on_its_data("--sft" if "--sft" in words else ""))["steps"]
    assert 0 < largest_difference(found, alone, "loss") < 1e-2
