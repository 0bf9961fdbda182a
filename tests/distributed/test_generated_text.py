"""Every layout generates what one process does, token for token: greedy, with prompts of several lengths dealt out to
data-parallel and context-parallel ranks; drawn, with the same prompts on all of them.
"""

import json
import sys
from pathlib import Path

import pytest
from test_layouts import CP2, EP2, PP2, TP2, VPP2

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapters import merge
from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.hf.config import HyConfig

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from adapter_files import random_adapter, save_adapter

LAYOUTS = {
    2: {
        "TP2 SP": (TP2, "mtp"),
        "PP2": (PP2, "mtp"),
        "PP2 VPP2": (f"{PP2} {VPP2}", "mtp"),
        "PP2 layout string": (f"{PP2} --pipeline-model-parallel-layout Et|tttmL", "mtp"),
        "EP2 allgather": (f"{EP2} --moe-token-dispatcher-type allgather", "mtp"),
        "ETP2": ("--expert-tensor-parallel-size 2", "mtp"),
        "TP2 ETP1": (f"{TP2} --expert-tensor-parallel-size 1", "mtp"),
        "CP2": (CP2, "mtp"),
        "DP2": ("", "mtp"),
    },
    4: {"TP2 PP2 EP2 ETP1": (f"{TP2} {PP2} {EP2} --expert-tensor-parallel-size 1", "mtp")},
    8: {"TP2 PP2 CP2 EP2": (f"{TP2} {PP2} {CP2} {EP2}", "mtp")},
}


@pytest.fixture(scope="module")
def one(worlds, command):
    return worlds.run(1, command(checkpoint="mtp"), "generation")


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of_size in LAYOUTS.items() for name in of_size])
def test_same_text_as_one_process(worlds, command, one, size, name):
    flags, checkpoint = LAYOUTS[size][name]
    assert worlds.run(size, command(flags, checkpoint=checkpoint), "generation") == one


def test_answers_differ_in_length_and_end(one):
    """Otherwise nothing would be seen of slots that are taken anew."""
    assert one["greedy"][:3] != one["drawn"]
    assert {ended for _, ended in one["greedy"]} == {True, False}
    assert len({len(tokens) for tokens, _ in one["greedy"]}) > 2


def test_the_command_says_the_same_of_a_hugging_face_folder_and_of_a_distributed_checkpoint_in_another_layout(
    worlds, folder, tmp_path
):
    hf_to_dist(folder / "trunk", tmp_path / "dist")
    asked = ["--to", "German", "--text", "Good day", "--text", "Bye", "--max-new-tokens", "5", "--temperature", "0.9"]
    alone = worlds.run(1, [str(folder / "trunk"), *asked, "--out", str(tmp_path / "alone.jsonl")], "spoken")
    said = alone["said"]
    rows = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Good day", "Bye"] and all(row["response"] for row in rows)
    assert said == "".join(f"[{i}] {row['prompt']}\n{row['response']}\n\n" for i, row in enumerate(rows, start=1))
    place = [str(tmp_path / "dist"), "--hf-model", str(folder / "trunk"), "--tensor-model-parallel-size", "2"]
    assert worlds.run(2, [*place, *asked], "spoken")["said"] == said


def test_the_command_takes_what_a_run_has_saved(worlds, command, folder, tmp_path):
    """Whatever its optimizer, which is not read."""
    asked = ["--hf-model", str(folder / "trunk"), "--raw", "--prompt", "Good day", "--max-new-tokens", "3", "--greedy"]
    for name, flags in (("distributed", "--use-distributed-optimizer"), ("none", "--no-save-optim")):
        worlds.run(1, command(flags, "--save", str(tmp_path / name), steps=1))
    said = [worlds.run(1, [str(tmp_path / name), *asked], "spoken")["said"] for name in ("distributed", "none")]
    assert said[0] == said[1] != ""


def test_ckpt_step_says_which_iteration_speaks(worlds, folder, tmp_path):
    write_tiny_checkpoint(tmp_path / "other", HyConfig.from_dir(folder / "trunk"), seed=5)
    (tmp_path / "run").mkdir()
    for iteration, source in ((5, folder / "trunk"), (10, tmp_path / "other")):
        hf_to_dist(source, tmp_path / f"{iteration}")
        (tmp_path / f"{iteration}/release").rename(tmp_path / f"run/iter_{iteration:07d}")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("10")
    asked = ["--raw", "--prompt", "Good day", "--max-new-tokens", "8", "--greedy"]
    of_run = [str(tmp_path / "run"), "--hf-model", str(folder / "trunk"), *asked]
    old, new = worlds.run(1, [*of_run, "--ckpt-step", "5"], "spoken"), worlds.run(1, of_run, "spoken")
    assert old == worlds.run(1, [str(folder / "trunk"), *asked], "spoken") != new


def test_an_adapter_beside_its_base_says_what_the_merged_weights_say(worlds, folder, tmp_path):
    config = HyConfig.from_dir(folder / "trunk")
    settings = AdapterSettings(4, 8.0, "lora", 0.0, ("q_proj", "o_proj", "experts.gate_proj", "shared_mlp.down_proj"))
    save_adapter(tmp_path / "adapter", config, settings, random_adapter(config, settings))
    merge(folder / "trunk", tmp_path / "adapter", tmp_path / "merged")
    asked = ["--raw", "--prompt", "Good day", "--max-new-tokens", "8", "--greedy"]
    base, merged = (worlds.run(1, [str(place), *asked], "spoken") for place in (folder / "trunk", tmp_path / "merged"))
    layout = ["--tensor-model-parallel-size", "2", "--adapter", str(tmp_path / "adapter")]
    assert worlds.run(2, [str(folder / "trunk"), *asked, *layout], "spoken") == merged != base
