"""tools/evaluate.py: what must be said before checkpoints are judged side by side."""

import json
import runpy
from pathlib import Path

import pytest

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.errors import UserError

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "evaluate.py"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"num_nextn_predict_layers": 0, "torch_dtype": "float32"}, None),
        ({"rope_theta": 1.0}, "rope_theta is 1.0, and 11158840.0 in .*first: these are not checkpoints of one model"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3, and .* judge each alone"),
        ({"eos_token_id": 5}, "eos_token_id is 5, and .* --hf-model"),
    ],
)
def test_checkpoints_of_another_model_are_not_judged_by_the_first_ones_config(tmp_path, changes, said):
    folders = [tmp_path / name for name in ("first", "other", "distributed")]
    for folder, given in zip(folders, ({}, changes, None), strict=True):
        folder.mkdir()
        if given is not None:
            (folder / "config.json").write_text(json.dumps(TINY_CONFIG | given))
    if said is None:
        return TOOL["_check_one_model"](folders[0], folders[1:])
    with pytest.raises(UserError, match=f"^{folders[1]}/config.json: {said}"):
        TOOL["_check_one_model"](folders[0], folders[1:])


def test_an_iteration_is_that_of_one_checkpoint(tmp_path):
    alone, several = ([*[str(tmp_path)] * number, "rows.jsonl"] for number in (1, 2))
    TOOL["_check"](TOOL["_parser"]().parse_args(alone), ["--ckpt-step", "5"])
    with pytest.raises(UserError, match=r"--ckpt-step: of which of several .* as RUN/iter_0000100"):
        TOOL["_check"](TOOL["_parser"]().parse_args(several), ["--ckpt-step=5"])
