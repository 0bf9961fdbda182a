"""Conversion both ways, without Megatron: nothing lost, nothing left behind, nothing believed that a file says of
itself.
"""

import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dcp_files import save_in_chunks
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from hymeg.checkpoint import row_tensors
from hymeg.checkpoint.adapter import HyStateDictAdapter
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.dist_files import TRACKER
from hymeg.checkpoint.inspection import describe
from hymeg.checkpoint.metadata_file import stored_shapes
from hymeg.checkpoint.sinks import dist_folder
from hymeg.checkpoint.sources.dist_folder import open_dist
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.checksums import MANIFEST
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.dtypes import ITEM_SIZES
from hymeg.hf.safetensors_files import open_checkpoint

TOOLS = Path(__file__).parents[2] / "tools"


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---- there and back


@pytest.mark.parametrize("out_layout", ["hub", "fused"])
@pytest.mark.parametrize(
    ("layout", "dtype", "changes", "num_mtp", "shard", "out_shard", "workers"),
    [
        ("hub", "bf16", {}, 1, 300_000, 10**9, 2),
        ("fused", "fp32", {"vocab_size": 1501}, 0, 10**9, 200_000, 3),
        ("hub", "fp32", {"num_key_value_heads": 8, "first_k_dense_replace": 0}, 2, 10**9, 10**9, 1),
        ("fused", "bf16", {"first_k_dense_replace": 4, "moe_router_enable_expert_bias": False}, 0, 100_000, 100_000, 2),
    ],
)
def test_back_from_distributed_every_bit_is_the_same(
    tmp_path, monkeypatch, layout, dtype, changes, num_mtp, shard, out_shard, workers, out_layout
):
    """With chunks and blocks of some rows, as tensors of hundreds of megabytes have them."""
    monkeypatch.setattr(dist_folder, "MAX_CHUNK_BYTES", 3000)
    monkeypatch.setattr(row_tensors, "BLOCK_BYTES", 500)
    config = HyConfig.from_dict(TINY_CONFIG | changes)
    config = write_tiny_checkpoint(
        tmp_path / "hf", config, layout=layout, dtype=dtype, max_shard_bytes=shard, num_mtp_layers=num_mtp
    )
    hf_to_dist(tmp_path / "hf", tmp_path / "dist", workers=workers, verify=True)
    dist_to_hf(
        tmp_path / "dist", tmp_path / "out", layout=out_layout, max_shard_bytes=out_shard, workers=workers, verify=True
    )
    for key, tensor in open_dist(tmp_path / "dist").tensors.items():
        pieces = [piece for band in tensor.bands for piece in band.pieces]
        largest = max(math.prod(piece.shape) for piece in pieces) * ITEM_SIZES[tensor.dtype]
        assert largest <= 3000 or "linear_qkv.weight" in key  # a KV group is never cut
        if key == "embedding.word_embeddings.weight":
            assert len(pieces) > 40 and len({piece.shape for piece in pieces}) == 2  # the last one is what is left
    adapter = HyStateDictAdapter(config)  # the other implementation of the table, on tensors in memory
    assert_same_tensors(
        state_dict(tmp_path / "out"), adapter.to_hf(adapter.from_hf(state_dict(tmp_path / "hf")), layout=out_layout)
    )
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        for target in ("out", "dist"):
            assert json_or_text(tmp_path / target / name) == json_or_text(tmp_path / "hf" / name)
    assert compare_checkpoints(tmp_path / "hf", tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path)) == ["dist", "hf", "out"]


def json_or_text(path: Path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_the_reader_of_torch_reads_the_same_tensors(hf_checkpoint, dist_checkpoint):
    expected = HyStateDictAdapter(HyConfig.from_dir(hf_checkpoint)).from_hf(state_dict(hf_checkpoint))
    entries = FileSystemReader(dist_checkpoint / "release").read_metadata().state_dict_metadata
    found = {key: torch.empty(expected[key].shape, dtype=entries[key].properties.dtype) for key in expected}
    torch.distributed.checkpoint.load(found, storage_reader=FileSystemReader(dist_checkpoint / "release"), no_dist=True)
    assert_same_tensors(found, expected)
    assert set(entries) - set(expected) == {"common_state/shard_0_1"}


def test_every_stored_tensor_is_a_whole_zip(dist_checkpoint):
    pieces = [
        piece
        for tensor in open_dist(dist_checkpoint).tensors.values()
        for band in tensor.bands
        for piece in band.pieces
    ]
    assert len(pieces) > 150
    for piece in pieces:
        data = Path(piece.file).read_bytes()[piece.position : piece.position + piece.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None  # the CRCs too


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_grid_of_chunks_that_torch_saves_can_be_read(hf_checkpoint, tmp_path, axis):
    """Every tensor cut in two along an axis, as tensor parallelism cuts them; padding rows below the vocabulary."""
    config = HyConfig.from_dir(hf_checkpoint)
    adapter = HyStateDictAdapter(config)
    tensors = adapter.from_hf(state_dict(hf_checkpoint), padded_vocab_size=config.vocab_size + 6)
    folder = tmp_path / "dist" / "iter_0000007"
    save_in_chunks(folder, {key: (tensor, min(axis, tensor.dim() - 1)) for key, tensor in tensors.items()})
    (tmp_path / "dist" / TRACKER).write_text("7")
    with pytest.raises(UserError, match=r"no config\.json in it; give --base-hf"):
        dist_to_hf(tmp_path / "dist", tmp_path / "out")
    for layout in ("hub", "fused"):
        dist_to_hf(tmp_path / "dist", tmp_path / layout, base_hf=hf_checkpoint, layout=layout, verify=True)
        assert_same_tensors(state_dict(tmp_path / layout), adapter.to_hf(tensors, layout=layout))


def test_objects_beside_the_tensors_are_passed_over(hf_checkpoint, dist_checkpoint, tmp_path):
    """Transformer Engine stores `_extra_state` objects under the model's own keys; Megatron random states and the
    optimizer's step.
    """
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    shutil.copytree(dist_checkpoint, tmp_path / "dist", ignore=shutil.ignore_patterns(MANIFEST))
    path = tmp_path / "dist" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    keys = [
        f"decoder.layers.{layer}.self_attention.{part}._extra_state/shard_0_1"
        for layer in range(4)
        for part in ("linear_qkv", "core_attention")
    ]
    with open(tmp_path / "dist" / "release" / "__0_0.distcp", "r+b") as file:
        for key in [
            *keys,
            "decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_3_8",
            "rng_state/shard_0.0_1.1",
        ]:
            position = file.seek(0, os.SEEK_END)
            torch.save({"recipe": "fp8", "scale": torch.ones(3)}, file)
            metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()
            metadata.storage_data[dcp.MetadataIndex(key)] = _StorageInfo(
                "__0_0.distcp", position, file.tell() - position
            )
    path.write_bytes(pickle.dumps(metadata))
    shapes = stored_shapes(tmp_path / "dist" / "release")
    read = FileSystemReader(tmp_path / "dist" / "release").read_metadata().state_dict_metadata
    assert shapes == {key: tuple(entry.size) if hasattr(entry, "size") else None for key, entry in read.items()}
    assert sum(shape is None for shape in shapes.values()) == 11
    dist_to_hf(tmp_path / "dist", tmp_path / "out", verify=True)
    assert_same_tensors(state_dict(tmp_path / "out"), state_dict(hf_checkpoint))
    assert compare_checkpoints(dist_checkpoint, tmp_path / "dist") == []


def test_an_expert_bias_in_bf16_becomes_fp32(tmp_path):
    from safetensors.torch import save_file

    config = write_tiny_checkpoint(tmp_path / "hf")
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "hf" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    hf_to_dist(tmp_path / "hf", tmp_path / "dist", verify=True)
    dist_to_hf(tmp_path / "dist", tmp_path / "out", verify=True)
    adapter = HyStateDictAdapter(config)
    assert_same_tensors(state_dict(tmp_path / "out"), adapter.to_hf(adapter.from_hf(tensors)))


def test_transformers_computes_the_same_from_the_export(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_checkpoint(tmp_path / "hf", dtype="fp32")
    with open(tmp_path / "hf" / "config.json") as file:
        raw = json.load(file)
    raw["mlp_layer_types"] = ["dense", "sparse", "sparse", "sparse"]  # transformers does not read first_k_dense_replace
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    hf_to_dist(tmp_path / "hf", tmp_path / "dist")
    logits = []
    for layout in ("hf", "hub", "fused"):
        if layout != "hf":
            dist_to_hf(tmp_path / "dist", tmp_path / layout, layout=layout)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / layout, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(tmp_path / layout)("The sun rises in the east.", return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_mtp_layers_that_training_did_not_hold_come_from_the_base(hf_checkpoint, tmp_path):
    write_tiny_checkpoint(tmp_path / "trunk", seed=5)
    hf_to_dist(tmp_path / "trunk", tmp_path / "dist")
    shutil.copy(hf_checkpoint / "config.json", tmp_path / "dist")
    with pytest.raises(UserError, match=r"all tensors of MTP layers are missing.*--base-hf.*--drop-mtp"):
        dist_to_hf(tmp_path / "dist", tmp_path / "out")
    said = []
    dist_to_hf(tmp_path / "dist", tmp_path / "out", base_hf=hf_checkpoint, verify=True, say=said.append)
    found, trunk, base = (state_dict(folder) for folder in (tmp_path / "out", tmp_path / "trunk", hf_checkpoint))
    assert_same_tensors(found, {name: trunk.get(name, base[name]) for name in base})
    assert any("16 tensors" in line for line in said)
    write_tiny_checkpoint(tmp_path / "other", HyConfig.from_dict(TINY_CONFIG | {"hidden_size": 128}), num_mtp_layers=1)
    with pytest.raises(UserError, match=r"another model than .* is \(.*128"):
        dist_to_hf(tmp_path / "dist", tmp_path / "other-out", base_hf=tmp_path / "other")


# ---- comparison


def test_comparison_says_what_differs_where_and_by_how_much(hf_checkpoint, dist_checkpoint, tmp_path):
    shutil.copytree(hf_checkpoint, tmp_path / "b")
    entry = open_checkpoint(tmp_path / "b")["model.layers.1.self_attn.k_proj.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset + 2 * 70)
        old = np.frombuffer(file.read(2), "<u2")
        file.seek(-2, os.SEEK_CUR)
        file.write((old ^ 0x8000).tobytes())
    for a in (hf_checkpoint, dist_checkpoint):
        (difference,) = compare_checkpoints(a, tmp_path / "b")
        assert difference.name == "model.layers.1.self_attn.k_proj.weight"
        assert re.match(
            r"1 of 2048 elements, first at element 70: (-?[\d.]+) and -?\1, by [\d.]+ at most",
            difference.what.replace("-", ""),
        )
        assert compare_checkpoints(a, tmp_path / "b", tolerance=10) == []


def test_the_tools_say_it_and_exit_with_it(hf_checkpoint, dist_checkpoint, tmp_path):
    def run(*command):
        return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)

    done = run(
        TOOLS / "convert_checkpoint.py",
        "dist-to-hf",
        "--dist",
        dist_checkpoint,
        "--hf",
        tmp_path / "out",
        "--shard-size",
        "300KB",
        "--verify",
    )
    assert (
        done.returncode == 0
        and "166 tensors, 981,184 bytes" in done.stdout
        and done.stdout.strip().endswith("verified")
    )
    assert run(TOOLS / "compare_checkpoints.py", hf_checkpoint, tmp_path / "out").returncode == 0
    shutil.rmtree(tmp_path / "out")
    write_tiny_checkpoint(tmp_path / "out", num_mtp_layers=1, seed=7)
    assert run(TOOLS / "compare_checkpoints.py", hf_checkpoint, tmp_path / "out").returncode == 1
    failed = run(TOOLS / "convert_checkpoint.py", "hf-to-dist", "--hf", tmp_path / "nothing", "--dist", tmp_path / "x")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert "optimizer state: no" in run(TOOLS / "convert_checkpoint.py", "inspect", dist_checkpoint).stdout
    assert describe(hf_checkpoint)["MTP layers"] == "1, held"


def test_a_system_that_takes_a_part_of_what_is_written_is_given_the_rest(
    hf_checkpoint, dist_checkpoint, tmp_path, monkeypatch
):
    """As one does on some network file systems, and when a signal comes."""
    whole = os.pwrite
    short = []

    def pwrite(descriptor, data, position):
        short.append(position)
        return whole(descriptor, bytes(data)[: max(1, len(data) // 3)], position)

    monkeypatch.setattr(os, "pwritev", lambda descriptor, buffers, at: pwrite(descriptor, b"".join(buffers), at))
    monkeypatch.setattr(os, "pwrite", pwrite)
    dist_to_hf(dist_checkpoint, tmp_path / "hf", verify=True)
    assert_same_tensors(state_dict(tmp_path / "hf"), state_dict(hf_checkpoint))


def test_a_list_of_tensors_is_that_of_the_files(hf_checkpoint, dist_checkpoint):
    def listed(folder: Path) -> dict[str, list]:
        return {name: shape for name, (_, shape) in describe(folder, tensors=True)["list of tensors"].items()}

    assert listed(hf_checkpoint) == {name: list(tensor.shape) for name, tensor in state_dict(hf_checkpoint).items()}
    held = open_dist(dist_checkpoint).tensors
    assert listed(dist_checkpoint) == {key: list(tensor.shape) for key, tensor in held.items()}
    assert len(listed(hf_checkpoint)) > len(held) > 10
