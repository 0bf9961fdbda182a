"""What a GPU machine builds before anything else, built here: the model of every recipe and of every run of the GPU
benchmark, under Transformer Engine's own sources, with every default that a GPU would have (but the backend).

Widths and the vocabulary are small; layers, heads, experts, layout and flags are the recipe's.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
from building import TE, work

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.hf.config import HyConfig

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tools" / "benchmarks")]

from gpu import PARTS, WIDTHS, jobs  # noqa: E402
from gpu_worker import FIXED  # noqa: E402
from published_models import PUBLISHED  # noqa: E402

EXAMPLES = ROOT / "examples"
MODELS = {"hy_mt2_30b_a3b": PUBLISHED["Hy-MT2-30B-A3B"], "hy3": PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1}}
RECIPES = [path for folder in MODELS for path in sorted((EXAMPLES / folder).glob("*.yaml"))]
NARROW = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "expert_hidden_dim": 32,
    "max_position_embeddings": 262144,
}
FUSING = {"TELayerNormColumnParallelLinear", "TERowParallelLinear"}
GROUPED = {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
BENCHMARKED = sorted(
    {(one["model"], one["flags"]) for one in jobs(list(PARTS), tiny=False) if one["engine"] == "hymeg"}
)


def write(folder: Path, shape: dict) -> Path:
    """config.json and a tokenizer with its chat template."""
    write_tiny_checkpoint(folder)
    layers = shape["num_hidden_layers"]
    sparse = {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)}
    HyConfig.from_dict(HyConfig.from_dir(str(folder)).to_dict() | shape | NARROW | sparse).save(folder)
    return folder


@pytest.fixture(scope="module")
def constructed(te_site, tmp_path_factory) -> dict:
    folder, wanted = tmp_path_factory.mktemp("gpu"), {}
    for name, shape in MODELS.items():
        write(folder / name, shape)
    for path in RECIPES:
        world_size = int(re.search(r"_(\d+)x", path.stem)[1])
        data = EXAMPLES / "data" / "conversations.jsonl"
        recipe = folder / path.parent.name / path.name  # adapters want weights to load, and are looked at in training
        recipe.write_text("".join(line for line in path.open() if not line.startswith("lora-")))
        argv = f"--config {recipe} --hf-model {folder / path.parent.name} --init-from-scratch"
        argv += (
            f" --data-path {data} --data-cache-path {folder / 'cache'}"
            if "\nsft: true" in path.read_text()
            else " --mock-data"
        )
        for first in (True, False):
            rank = 0 if first else world_size - 1
            wanted[f"{path.parent.name}/{path.name} {first}"] = (argv, rank, world_size)
    for name, widths in WIDTHS.items():
        write(folder / name, widths | {"num_hidden_layers": 2})
    for model, flags in BENCHMARKED:
        argv = f"--hf-model {folder / model} --seq-length 4096 --global-batch-size 2 --train-iters 13 {FIXED} {flags}"
        wanted[f"{model} {flags}"] = (argv, 0, 1)
    listed = {
        name: {"what": "construct", "argv": argv, "rank": rank, "world_size": world_size}
        for name, (argv, rank, world_size) in wanted.items()
    }
    return work(TE, listed, folder, te_site)


@pytest.mark.parametrize("first", [True, False], ids=["first rank", "last rank"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(constructed, recipe, first):
    found = constructed[f"{TE} {recipe.parent.name}/{recipe.name} {first}"]
    assert "error" not in found, found["traceback"]
    assert found["fusing"] >= FUSING | GROUPED and not found["not fusing"], "weight gradients are fused by default"


@pytest.mark.parametrize(("model", "flags"), BENCHMARKED)
def test_run_of_the_gpu_benchmark(constructed, model, flags):
    found = constructed[f"{TE} {model} {flags}"]
    assert "error" not in found, found["traceback"]
    fuses = "--no-gradient-accumulation-fusion" not in flags
    assert found["fusing" if fuses else "not fusing"] >= FUSING | GROUPED


def test_the_commands_of_the_readme_are_those_recipes():
    """They add where weights, data and checkpoints lie, and nothing that decides about modules."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [
        line.split("pretrain_hy.py", 1)[1] for line in text.splitlines() if "_bf16.yaml" in line and "torchrun" in line
    ]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert ROOT / words[words.index("--config") + 1] in RECIPES
        assert {word for word in words if word.startswith("--")} == {
            "--config",
            "--hf-model",
            "--pretrained-checkpoint",
            "--load",
            "--save",
            "--data-path",
        }
