"""Checkpoints written anew: another layout, other files, without optimizer state, the mean of several; vocabularies
that training extended."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fp8_folders import quantised_folder, weights
from safetensors.torch import save_file

from hymeg.checkpoint.adapters import adapter_to_peft, merge
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import average, dist_to_dist, dist_to_hf, hf_to_dist, hf_to_hf
from hymeg.checkpoint.sources import open_dist
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.safetensors_files import files_by_tensor

CONVERT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
SMALL = HyConfig.from_dict(TINY_CONFIG | {"num_hidden_layers": 2, "num_experts": 4})


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2, 3):
        write_tiny_checkpoint(folder / f"hf{seed}", SMALL, seed=seed, num_mtp_layers=1)
        hf_to_dist(folder / f"hf{seed}", folder / f"dist{seed}")
    run = folder / "run"
    run.mkdir()
    shutil.copy(folder / "hf1" / "config.json", run)
    for seed, number in ((1, 10), (2, 20), (3, 30)):
        shutil.copytree(folder / f"dist{seed}" / "release", run / f"iter_{number:07d}")
    (run / "latest_checkpointed_iteration.txt").write_text("30")
    return [folder / f"hf{seed}" for seed in (1, 2, 3)]


def test_a_folder_is_written_anew_in_the_other_layout_and_back(models, tmp_path):
    hf_to_hf(models[0], tmp_path / "fused", layout="fused", verify=True)
    assert compare_checkpoints(models[0], tmp_path / "fused") == []
    assert "model.layers.1.mlp.experts.gate_up_proj" in weights(tmp_path / "fused")
    hf_to_hf(tmp_path / "fused", tmp_path / "hub", max_shard_bytes=200_000)
    found, expected = weights(tmp_path / "hub"), weights(models[0])
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2
    assert (tmp_path / "hub" / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()
    record = json.loads((tmp_path / "hub" / "conversion.json").read_text())
    assert record["command"] == "hf-to-hf" and record["from"] == str(tmp_path / "fused")
    hf_to_hf(models[0], tmp_path / "fp32", dtype="fp32", drop_mtp=True)
    assert (
        config_of(tmp_path / "fp32")["dtype"] == "float32"
        and not config_of(tmp_path / "fp32")["num_nextn_predict_layers"]
    )


def test_fp8_is_written_anew_in_bf16(models, tmp_path):
    meant = quantised_folder(models[0], tmp_path / "fp8")
    hf_to_hf(tmp_path / "fp8", tmp_path / "bf16")
    found = weights(tmp_path / "bf16")
    assert all(torch.equal(found[name], meant[name]) for name in meant)
    assert "quantization_config" not in config_of(tmp_path / "bf16")


def test_a_base_in_fp8_lends_a_distributed_checkpoint_its_config_without_that(models, tmp_path):
    quantised_folder(models[0], tmp_path / "fp8")
    shutil.copytree(models[0].parent / "dist1", tmp_path / "dist")
    (tmp_path / "dist" / "config.json").unlink()
    dist_to_dist(tmp_path / "dist", tmp_path / "out", base_hf=tmp_path / "fp8", verify=True)
    assert config_of(tmp_path / "out") == config_of(models[0])


def test_the_files_of_the_original_are_kept(models, hf_checkpoint, dist_checkpoint, tmp_path):
    dist_to_hf(dist_checkpoint, tmp_path / "out", shards_like=hf_checkpoint)
    assert files_by_tensor(tmp_path / "out") == files_by_tensor(hf_checkpoint)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == {
        path.name: path.read_bytes() for path in hf_checkpoint.glob("*.safetensors")
    }
    with pytest.raises(UserError, match="is in no file of the folder whose files were asked for"):
        hf_to_hf(hf_checkpoint, tmp_path / "no", shards_like=models[0])


def test_a_mean_is_that_of_fp32_rounded_once(models, tmp_path):
    average(models, hf=tmp_path / "hf", verify=True)
    run = models[0].parent / "run"
    average([run], iterations=[10, 20, 30], dist=tmp_path / "dist", workers=1)
    average([models[0], models[0].parent / "dist2"], hf=tmp_path / "mixed", dtype="fp32")
    a, b, c = map(weights, models)
    found, mixed = weights(tmp_path / "hf"), weights(tmp_path / "mixed")
    assert found.keys() == mixed.keys() == a.keys()
    for name, tensor in found.items():
        mean = (a[name].float() + b[name].float() + c[name].float()) / 3
        assert torch.equal(tensor, mean.to(a[name].dtype)), name
        assert torch.equal(mixed[name], (a[name].float() + b[name].float()) / 2), name
    assert compare_checkpoints(tmp_path / "hf", tmp_path / "dist") == []
    record = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert record["from"] == [str(model) for model in models] and record["base_hf"] is None


def test_a_mean_does_not_mind_padding(models, tmp_path):
    """Rows of zeros, as a layout with tensor parallelism has them; wherever they come from, they are cut off."""
    shutil.copytree(models[1], tmp_path / "long")
    longer = weights(models[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = torch.cat([longer[name], torch.zeros(128, longer[name].shape[1], dtype=longer[name].dtype)])
    save_file(longer, tmp_path / "long" / "model.safetensors", metadata={"format": "pt"})
    hf_to_dist(tmp_path / "long", tmp_path / "padded")
    shutil.copy(models[1] / "config.json", tmp_path / "padded")
    average(models[:2], hf=tmp_path / "hf")
    for number, folders in enumerate(([models[0], tmp_path / "padded"], [tmp_path / "padded", models[0]])):
        average(folders, hf=tmp_path / str(number))
        average(folders, dist=tmp_path / f"dist{number}")
        assert compare_checkpoints(tmp_path / "hf", tmp_path / str(number)) == []
        assert compare_checkpoints(tmp_path / "hf", tmp_path / f"dist{number}") == []


def test_what_has_no_mean_is_refused(models, hf_checkpoint, tmp_path):
    run = models[0].parent / "run"
    for message, folders, options in (
        ("1 checkpoint: two or more are needed", models[:1], {}),
        ("another model than .*num_hidden_layers is 4 and 2", [hf_checkpoint, models[0]], {}),
        ("--iterations are those of one folder; 2 are", models[:2], {"iterations": [10, 20]}),
        ("is a Hugging Face folder, which has none", models[:1], {"iterations": [10, 20]}),
        ("iter_0000040 is missing", [run], {"iterations": [10, 40]}),
        ("goes to --hf FOLDER or to --dist", models, {"dist": tmp_path / "b"}),
    ):
        with pytest.raises(UserError, match=message):
            average(folders, hf=tmp_path / "a", **options)
    with pytest.raises(UserError, match="is, holds or lies in"):
        average(models, hf=models[1], overwrite=True)
    for of_hf in ({"layout": "fused"}, {"max_shard_bytes": 1000}):
        with pytest.raises(UserError, match="--layout and --shard-size are of Hugging Face folders"):
            average(models, dist=tmp_path / "a", **of_hf)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (hf_to_dist, "layout"),
        (hf_to_dist, "cut_vocabulary"),
        (dist_to_hf, "from_base"),
        (hf_to_hf, "keep_vocabulary"),
        (dist_to_dist, "quantize"),
        (merge, "shards_like"),
        (merge, "quantize"),
        (adapter_to_peft, "verify"),
    ],
)
def test_what_a_command_cannot_do_is_no_argument_of_its(command, option, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")][: 3 if command is merge else 2]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        command(*folders, **{option: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'quantize'"):
        average(folders, hf=tmp_path / "mean", quantize="fp8")


def test_optimizer_state_is_left_behind(models, tmp_path):
    from dcp_files import save_in_chunks

    source = open_dist(models[0].parent / "dist1")
    tensors = {key: (torch.zeros(tensor.shape), 0) for key, tensor in source.tensors.items()}
    tensors["optimizer.state.exp_avg.output_layer.weight"] = (torch.ones(1024, 64), 0)
    tensors["output_layer.weight"] = (torch.zeros(1024 + 128, 64), 0)  # padded, as under tensor parallelism
    save_in_chunks(tmp_path / "run" / "iter_0000005", tensors)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    dist_to_dist(tmp_path / "run", tmp_path / "out", base_hf=models[0], verify=True, dtype="bf16")
    made = open_dist(tmp_path / "out")
    assert open_dist(tmp_path / "run").has_optimizer and not made.has_optimizer and made.iteration is None
    assert made.tensors["output_layer.weight"].shape == (1024, 64)
    assert {tensor.dtype for key, tensor in made.tensors.items() if "expert_bias" not in key} == {"BF16"}
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["iteration"] == 5
    dist_to_dist(tmp_path / "run", tmp_path / "kept", base_hf=models[0])
    assert {tensor.dtype for tensor in open_dist(tmp_path / "kept").tensors.values()} == {"F32"}


@pytest.fixture
def extended(models, tmp_path) -> Path:
    """64 more tokens than config.json counts."""
    shutil.copytree(models[0], tmp_path / "extended")
    tensors = weights(models[0])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((64, 64), 0.5, dtype=torch.bfloat16)])
    save_file(tensors, tmp_path / "extended" / "model.safetensors")
    return tmp_path / "extended"


def test_an_extended_vocabulary_is_kept_and_config_corrected(models, extended, tmp_path):
    said = []
    hf_to_dist(extended, tmp_path / "dist", say=said.append)
    extension = "the vocabulary was extended to 1088: all rows are kept, and config.json, which says 1024, is corrected"
    assert said.count(extension) == 1
    assert config_of(tmp_path / "dist")["vocab_size"] == 1088
    shutil.copy(models[0] / "config.json", tmp_path / "dist")
    with pytest.raises(UserError, match=r"is not zero: .*--keep-vocabulary; .*--cut-vocabulary"):
        dist_to_hf(tmp_path / "dist", tmp_path / "out")
    with pytest.raises(UserError, match="contradict"):
        dist_to_hf(tmp_path / "dist", tmp_path / "out", keep_vocabulary=True, cut_vocabulary=True)
    dist_to_hf(tmp_path / "dist", tmp_path / "out", keep_vocabulary=True, say=said.append)
    assert said.count(extension) == 2
    assert config_of(tmp_path / "out")["vocab_size"] == 1088
    found, expected = weights(tmp_path / "out"), weights(extended)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tensors = weights(extended)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:1024].clone()
    save_file(tensors, extended / "model.safetensors")
    with pytest.raises(UserError, match=r"1 misshapen \(model\.embed_tokens\.weight is \[1088, 64\]"):
        hf_to_dist(extended, tmp_path / "no")


def test_the_commands(models, tmp_path):
    def run(*words):
        done = subprocess.run([sys.executable, CONVERT, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("average", *models[:2], "--hf", tmp_path / "mean", "--layout", "fused")
    found = json.loads(run("inspect", models[0].parent / "run", "--json", "--tensors"))
    assert found["iterations"] == "iter_0000010, iter_0000020, iter_0000030" and found["iteration"] == "30"
    assert found["list of tensors"]["mtp.layers.0.enorm.weight"] == ["BF16", [64]]
    listed = run("inspect", tmp_path / "mean", "--tensors").splitlines()
    assert "format: Hugging Face, fused layout" in listed
    assert "model.layers.1.mlp.experts.gate_up_proj BF16 [4, 64, 64]" in listed
    run("gather", models[0].parent / "dist1", "--dist", tmp_path / "gathered")
    assert compare_checkpoints(models[0], tmp_path / "gathered") == []
