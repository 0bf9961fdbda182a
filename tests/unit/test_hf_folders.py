"""A model in this process becomes a Hugging Face folder, whole or not at all; what a run does about a folder that
cannot be written.
"""

import argparse
import contextlib
import json

import pytest
from single_process import build

from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.live_folder import save_hf_folder
from hymeg.checkpoint.mapping import num_parameters
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.training import hf_folders

NOT_THE_SAME = {"conversion.json", "checksums.sfv"}  # where each comes from, and its checksum


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    write_tiny_checkpoint(folder / "hf", dtype="bf16", num_mtp_layers=1)
    hf_to_dist(folder / "hf", folder / "dist")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return HyConfig.from_dir(folder / "hf")


@pytest.fixture(scope="module")
def model(folder):
    return build(folder / "hf", "--bf16")


@pytest.mark.parametrize(("layout", "max_shard_bytes"), [("hub", 100_000), ("fused", 5_000_000_000)])
def test_a_folder_is_that_of_the_file_converter_to_the_byte(folder, config, model, tmp_path, layout, max_shard_bytes):
    how = {"layout": layout, "max_shard_bytes": max_shard_bytes}
    dist_to_hf(folder / "dist", tmp_path / "converted", **how)
    save_hf_folder([model], config, tmp_path / "live", companions=folder / "hf", **how)
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert {path.name for path in (tmp_path / "live").iterdir()} == names
    assert ("model.safetensors.index.json" in names) == (layout == "hub")
    for name in names - NOT_THE_SAME:
        assert (tmp_path / "live" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name


def test_only_what_a_conversion_wrote_is_replaced(config, model, tmp_path):
    save_hf_folder([model], config, tmp_path / "new", record={"iteration": 1})
    with pytest.raises(UserError, match="not empty"):
        save_hf_folder([model], config, tmp_path / "new")
    save_hf_folder([model], config, tmp_path / "new", overwrite=True, record={"iteration": 2})
    assert json.loads((tmp_path / "new/conversion.json").read_bytes())["iteration"] == 2
    (tmp_path / "new/notes.txt").touch()
    with pytest.raises(UserError, match=r"would lose notes\.txt"):
        save_hf_folder([model], config, tmp_path / "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_disk_that_fills_up_leaves_nothing_and_every_rank_comes_to_the_end(config, model, tmp_path, monkeypatch):
    from hymeg.checkpoint import live_folder
    from hymeg.checkpoint.sources import live_model

    def full(folder, files, pieces):
        (folder / "model.safetensors").touch()
        next(pieces)
        raise UserError("no space left")

    given = []

    def noted(*args, **kwargs):
        for block in blocks(*args, **kwargs):
            given.append(block.rows.numel())
            yield block

    blocks = live_model.LiveModel.blocks
    monkeypatch.setattr(live_model, "BATCH_BYTES", 50_000)
    monkeypatch.setattr(live_folder, "write_in_order", full)
    monkeypatch.setattr(live_model.LiveModel, "blocks", noted)
    with pytest.raises(UserError, match="no space left"):
        save_hf_folder([model], config, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    assert sum(given) == num_parameters(config, include_expert_bias=True)


@pytest.fixture
def steps(folder, config, model, tmp_path, monkeypatch):
    """Five steps of a run, without its training: what was said, and which folders were written."""

    def run(*interval: int, before=lambda iteration: None) -> tuple[list[str], list[str]]:
        said, acts = [], []
        monkeypatch.setattr(hf_folders.megatron, "after_steps", lambda act: contextlib.nullcontext(acts.append(act)))
        monkeypatch.setattr(hf_folders.megatron, "not_in_interval_time", contextlib.nullcontext)
        monkeypatch.setattr(hf_folders.megatron, "gather_weights", lambda *_: None)
        args = argparse.Namespace(save_hf=str(tmp_path / "out"), train_iters=5, hf_model=str(folder / "hf"))
        args.save_hf_interval = next(iter(interval), None)
        try:
            with hf_folders.saving_hf(args, config, said.append):
                for iteration in range(1, 6):
                    before(iteration)
                    acts[0](iteration, [model], None)
        except UserError as error:
            said.append(f"error: {error}")
        return said, sorted(path.name for path in (tmp_path / "out").glob("*"))

    return run


def test_folders_are_written_at_every_interval_and_after_the_last_step(steps):
    assert steps(2)[1] == ["iter_0000002", "iter_0000004", "iter_0000005"]


def test_without_an_interval_only_the_last_step_is_written(steps):
    assert steps()[1] == ["iter_0000005"]


def test_a_folder_that_cannot_be_written_ends_the_run_only_when_it_is_over(steps, tmp_path):
    def in_the_way(iteration):
        if iteration == 2:
            (tmp_path / "out/iter_0000002").mkdir(parents=True)
            (tmp_path / "out/iter_0000002/notes.txt").touch()

    said, written = steps(2, before=in_the_way)
    assert written == ["iter_0000002", "iter_0000004", "iter_0000005"]
    assert [path.name for path in (tmp_path / "out/iter_0000002").iterdir()] == ["notes.txt"]
    assert "iteration 2 is not written, training goes on" in said[0] and "iter_0000002" in said[0]
    assert said[-1].startswith("error: --save-hf: 1 folders were not written: ") and "iter_0000002" in said[-1]


def test_a_run_without_a_step_says_that_it_wrote_nothing(folder, config, tmp_path):
    said = []
    args = argparse.Namespace(save_hf=str(tmp_path / "out"))
    with hf_folders.saving_hf(args, config, said.append):
        pass
    assert len(said) == 1 and "no step was made" in said[0]
