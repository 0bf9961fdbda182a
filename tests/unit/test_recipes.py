"""The recipes under examples/ are legal for the model and the number of GPUs in their names."""

import re
from pathlib import Path

import pytest
from test_models import PUBLISHED

from hymeg.hf.config import HyConfig
from hymeg.hf.tiny_checkpoint import TINY_CONFIG
from hymeg.planning.layout import check
from hymeg.training.arguments import parse
from hymeg.training.preflight import layout_of

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = {"hy_mt2_30b_a3b": PUBLISHED["Hy-MT2-30B-A3B"], "hy3": PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1}}
RECIPES = [path for folder in MODELS for path in sorted((EXAMPLES / folder).glob("*.yaml"))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_legal(recipe, tmp_path, monkeypatch):
    config = HyConfig.from_dict(TINY_CONFIG | MODELS[recipe.parent.name] | {"max_position_embeddings": 262144})
    config.save(tmp_path)
    num_gpus = int(re.search(r"_(\d+)x", recipe.stem)[1])
    monkeypatch.setenv("WORLD_SIZE", str(num_gpus))
    args, config = parse(["--config", str(recipe), "--hf-model", str(tmp_path)])
    layout = layout_of(args)
    check(config, layout)
    assert layout.world_size == num_gpus and args.bf16 and layout.num_microbatches >= layout.pipeline_model_parallel_size


def test_there_is_a_recipe_for_each_model():
    assert {path.parent.name for path in RECIPES} == set(MODELS)
