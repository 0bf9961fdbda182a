"""Single bits that flip, anywhere in what hymeg writes, are found: some in every run of the tests, 1,000 in
`make soak`."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from corpora import udhr_texts
from single_process import ensure_world

from hymeg.checkpoint.convert import dist_to_hf
from hymeg.checkpoint.verification import _is_broken, verify_folder
from hymeg.checksums import MANIFEST
from hymeg.data.corpus import preprocess
from hymeg.data.index_building import build_missing
from hymeg.data.row_index import RowIndex
from hymeg.errors import UserError

KINDS = ("trained", "converted", "hugging_face", "index", "text")


@pytest.fixture(scope="module")
def written(tmp_path_factory, dist_checkpoint, tokenizer_dir) -> dict[str, Path]:
    """A folder of each kind, by kind."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    ensure_world()
    place = tmp_path_factory.mktemp("flips")
    kinds = {kind: place / kind for kind in KINDS}
    kinds["trained"].mkdir()
    tensor = ShardedTensor.from_rank_offsets("decoder.weight", torch.randn(700_000))
    dist_checkpointing.save({"weight": tensor, "step": 3}, str(kinds["trained"]))
    shutil.copytree(dist_checkpoint, kinds["converted"])
    dist_to_hf(dist_checkpoint, kinds["hugging_face"], max_shard_bytes=300_000)
    rows = place / "rows.jsonl"
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in udhr_texts("en")]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    rows.with_name("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in udhr_texts("en")))
    build_missing({str(rows): kinds["index"]}, (str(tokenizer_dir),), io.StringIO())
    preprocess([rows.with_name("text.jsonl")], kinds["text"] / "corpus", tokenizer_dir)
    return kinds


def flip_one(folder: Path, chance: random.Random) -> tuple[Path, bytes]:
    """Of a file that counts in `folder`, each as likely; the file and what it was. (Files of no bytes cannot flip; what
    a folder's times are kept in makes an index be compared anew, and no more.)
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "seen")
    path = chance.choice([path for path in files if path.stat().st_size])
    intact = path.read_bytes()
    data, bit = bytearray(intact), chance.randrange(8 * len(intact))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return path, intact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_every_flipped_bit_is_found(written, kind, count):
    chance, missed = random.Random(f"{kind} {count}"), []
    assert not verify_folder(written[kind], workers=1).damaged
    for _ in range(count):
        path, intact = flip_one(written[kind], chance)
        found = verify_folder(written[kind], workers=1).damaged
        if path not in [finding.path for finding in found]:
            missed.append(path)
        path.write_bytes(intact)
    assert not missed


def test_a_bit_that_flips_in_what_describes_a_stored_tensor_ends_in_an_answer(tmp_path):
    """Offsets and lengths then lead anywhere: before the beginning, behind the end."""
    buffer = io.BytesIO()
    torch.save(torch.arange(20.0), buffer)
    stored, path, answers = buffer.getvalue(), tmp_path / "__0_0.distcp", []
    for bit in range(8 * stored.rindex(b"PK\1\2"), 8 * len(stored)):
        data = bytearray(stored)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        answers.append(_is_broken(path, 0, len(stored)))
    assert len(answers) > 1000 and sum(answers) > 300
    path.write_bytes(stored)
    assert not _is_broken(path, 0, len(stored))


def test_a_damaged_index_is_not_read(written, tmp_path):
    chance = random.Random(9)
    for name in ("tokens.bin", "starts.npy", "lines.npy", "index.json", MANIFEST):
        folder = Path(shutil.copytree(written["index"], tmp_path / name))
        data = bytearray((folder / name).read_bytes())
        data[chance.randrange(len(data))] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            index = RowIndex(folder, "rows.jsonl")
            [index[row] for row in range(len(index))]
