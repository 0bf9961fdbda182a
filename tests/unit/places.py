"""Files that a command line can name, right ones and wrong ones."""

import json
import shutil
from pathlib import Path

import numpy as np

from hymeg import platform

platform.install()

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from hymeg.checkpoint.mapping import distributed_shapes  # noqa: E402
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402


def make_places(folder: Path) -> dict[str, str]:
    """Write the files; name -> path, for `str.format`."""
    write_tiny_checkpoint(folder / "hf")
    write_tiny_checkpoint(folder / "mtp", num_mtp_layers=1)
    other = write_tiny_checkpoint(
        folder / "other", HyConfig.from_dict(TINY_CONFIG | {"num_hidden_layers": 3, "hidden_size": 32})
    )
    write_tiny_checkpoint(folder / "sharded", max_shard_bytes=100_000)
    next((folder / "sharded").glob("model-00002-*")).unlink()
    _copy(
        folder,
        "truncated",
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100]),
    )
    _copy(
        folder, "bad_json", lambda path: (path / "config.json").write_text('{"vocab_size": 1024,\n "hidden_size" 64}')
    )
    _copy(folder, "bad_field", lambda path: _change_config(path, num_experts="eight"))
    _copy(folder, "other_family", lambda path: _change_config(path, model_type="qwen3_moe"))
    _copy(
        folder,
        "small_vocabulary",
        lambda path: _change_config(path, vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=2),
    )
    _copy(folder, "no_tokenizer", lambda path: (path / "tokenizer.json").unlink())
    _copy(folder, "bad_tokenizer", lambda path: (path / "tokenizer.json").write_text("{}"))

    _write_data(folder / "text", 1000)
    _write_data(folder / "corpus_text_document", 1000)
    _write_data(folder / "twenty", 1000, (30,) * 20)
    _write_data(folder / "many", 1000, (2,) * 2000)
    _write_data(folder / "other_vocabulary", 60000)
    _write_data(folder / "cut", 1000)
    (folder / "cut.bin").write_bytes((folder / "cut.bin").read_bytes()[:-10])
    _write_data(folder / "index_cut", 1000)
    (folder / "index_cut.idx").write_bytes((folder / "index_cut.idx").read_bytes()[:60])
    _write_data(folder / "no_index", 1000)
    (folder / "no_index.idx").unlink()
    _write_data(folder / "in_folder" / "text", 1000)
    _write_data(folder / "in_the_way", 1000)
    (folder / "in_the_way").mkdir()
    (folder / "in_the_way" / "cache").write_text("")
    for name in ("garbage.idx", "garbage.bin"):
        (folder / name).write_text("not an index of Megatron's, though long enough to hold a header")
    (folder / "blend.txt").write_text(f"0.5 {folder}/text 0.5 {folder}/nowhere")
    (folder / "per_split.json").write_text(json.dumps({"train": [f"{folder}/text"], "valid": None}))

    (folder / "rows.jsonl").write_text(
        '{"source_lang": "en", "target_lang": "fr", "source": "yes", "target": "oui"}\n' * 40
    )
    (folder / "plain.txt").write_text("words\n")
    (folder / "empty.jsonl").touch()

    config = HyConfig.from_dir(folder / "hf")
    _write_checkpoint(folder / "ckpt", config, (10, 20), "20")
    _write_checkpoint(folder / "ckpt_unfinished", config, (10,), "20")
    _write_checkpoint(folder / "ckpt_empty_tracker", config, (10,), "")
    _write_checkpoint(folder / "ckpt_bad_tracker", config, (10,), "latest")
    _write_checkpoint(folder / "ckpt_release", config, (10,), "release")
    _write_checkpoint(folder / "ckpt_other", other, (10,), "10")
    _write_checkpoint(folder / "ckpt_unreadable", config, (10,), "10")
    (folder / "ckpt_unreadable/iter_0000010/.metadata").write_bytes(b"cut off")
    _write_checkpoint(folder / "ckpt_hostile", config, (10,), "10")
    hostile = f"cposix\nsystem\n(S'touch {folder}/hostile-was-here'\ntR."
    (folder / "ckpt_hostile/iter_0000010/.metadata").write_text(hostile)
    _write_checkpoint(folder / "ckpt_distributed", config, (5,), "5", ("param", "exp_avg"))
    _write_checkpoint(folder / "ckpt_bf16", config, (5,), "5", ("fp32_param", "exp_avg"))
    _write_checkpoint(folder / "ckpt_no_optimizer", config, (5,), "5", ())
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file")
    (folder / "interval.yaml").write_text("save-interval: 7\n")
    return {path.stem if path.is_file() else path.name: str(path.with_suffix("")) for path in folder.iterdir()} | {
        "tmp": str(folder),
        "blend": str(folder / "blend.txt"),
        "per_split": str(folder / "per_split.json"),
        "rows": str(folder / "rows.jsonl"),
        "interval": str(folder / "interval.yaml"),
    }


def _copy(folder: Path, name: str, change) -> None:
    shutil.copytree(folder / "hf", folder / name)
    change(folder / name)


def _change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _write_data(prefix: Path, vocab_size: int, lengths: tuple[int, ...] = (40, 50, 60)) -> None:
    prefix.parent.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.random.default_rng(length).integers(vocab_size - 100, vocab_size, length), [length])
    builder.finalize(f"{prefix}.idx")


def _write_checkpoint(
    folder: Path, config: HyConfig, iterations: tuple[int, ...], tracker: str, optimizer: tuple[str, ...] = ("exp_avg",)
) -> None:
    """A distributed checkpoint as Megatron's torch_dist lays it out, with as much of an optimizer as tells its form."""
    for iteration in iterations:
        path = folder / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        tensors = {key: torch.zeros(shape) for key, shape in distributed_shapes(config).items()}
        trained = [key for key in tensors if not key.endswith("expert_bias")]
        tensors |= {f"optimizer.state.{name}.{key}": torch.zeros(1) for name in optimizer for key in trained}
        dcp.save(tensors, checkpoint_id=path, no_dist=True)
        (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
