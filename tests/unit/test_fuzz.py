"""What is nearly right ends in a run or in one line, never in a traceback: random changes to good command lines,
recipes, config.json files, rows, safetensors headers and `.metadata`. Some in every run of the tests, 1,000 in
`make soak`.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invocations import NEEDED
from megatron.training.arguments import validate_args
from places import make_places

from hymeg.checkpoint.options import Options
from hymeg.checkpoint.reading import read_dist, read_hf
from hymeg.checkpoint.verification import verify_folder
from hymeg.checksums import MANIFEST
from hymeg.data.chat import ChatEncoder
from hymeg.data.rows import RowReader
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig
from hymeg.training.arguments import _parser, parse
from hymeg.training.preflight import preflight
from hymeg.training.run import megatron_refusals

ROOT = Path(__file__).parents[2]
JUNK = (
    "",
    "-1",
    "0",
    "1",
    "2",
    "7",
    "1e400",
    "nan",
    "-inf",
    "1e-5",
    "99999999999999999999",
    "true",
    "none",
    "\u0661",
    "/",
    "a b",
    "{}",
    "[]",
)
VALUES = (None, True, False, 0, -1, 1, 3, 2**63, 1e308, float("nan"), "", "8", "a", [], [0], [[1]], {}, {"a": 1})
LINES = (
    "",
    "--tensor-model-parallel-size 1 --micro-batch-size 2 --global-batch-size 4 --use-distributed-optimizer --bf16",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --clip-grad 0.5",
    "--lr-decay-style cosine --lr-warmup-fraction 0.1 --min-lr 1e-6 --weight-decay 0.1 --adam-beta2 0.95",
    "--no-mock-data --sft --data-path {rows} --eval-iters 0 --moe-router-bias-update-rate 1e-3",
    "--save {tmp}/new --save-interval 2 --log-interval 1 --exit-duration-in-mins 5 --keep-last 2",
    "--lora-rank 4 --lora-alpha 8 --lora-targets q_proj v_proj --no-init-from-scratch --load {hf}",
)


def fuzzed(count: int, check: Callable[[random.Random], None]) -> None:
    """`check` with so many sources of chance, none of which may raise anything but a UserError of one line, and some
    must.
    """
    refused = 0

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def once(seed: int) -> None:
        nonlocal refused
        try:
            check(random.Random(seed))
        except UserError as error:
            refused += 1
            said = " ".join(str(error).split())
            assert said and len(said) < 3000, said

    once()
    assert refused


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to three places of it."""
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(data) + 1), chance.choice((0, 1, 1, 8))
        new = chance.choice((b"", chance.randbytes(1), chance.randbytes(8), b"\x00", b"\xff", b'"', b"9" * 30, b"\n"))
        data = data[:at] + new + data[at + length :]
    return data


def changed_value(value, chance: random.Random):
    """A value of JSON in which one place is another, gone, or there twice."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key, value = chance.choice(list(value)), dict(value)
        if (what := chance.random()) < 0.1:
            del value[key]
        elif what < 0.2:
            value[chance.choice(("x", key + "s", key.upper(), key[1:]))] = value.pop(key)
        else:
            value[key] = changed_value(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.9:
        at, value = chance.randrange(len(value)), list(value)
        if (what := chance.random()) < 0.1:
            del value[at]
        elif what < 0.2:
            value.insert(at, value[at])
        else:
            value[at] = changed_value(value[at], chance)
        return value
    return chance.choice(VALUES)


def changed_words(words: list[str], chance: random.Random, flags: list[str]) -> list[str]:
    words = list(words)
    for _ in range(chance.randint(1, 3)):
        at, word = chance.randrange(len(words)), chance.choice(flags)
        match chance.randrange(7):
            case 0:
                del words[at]
            case 1:
                words.insert(at, words[chance.randrange(len(words))])
            case 2:
                words[at] = chance.choice(JUNK)
            case 3:
                words += [word, chance.choice(JUNK)]
            case 4:
                words.append(word)
            case 5:
                place = chance.randrange(len(words[at]) + 1)
                words[at] = words[at][:place] + chance.choice("-=_xé0. ") + words[at][place + 1 :]
            case 6:
                words[at:] = words[at:][::-1]
    return words


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("fuzz"))


SOAK = pytest.param(200, marks=pytest.mark.soak)
FEW, MANY = (pytest.mark.parametrize("count", [number, SOAK]) for number in (10, 25))  # by what one takes


@FEW
def test_command_lines(places, monkeypatch, count):
    """As far as a run knows them: Megatron's own validation included."""
    flags = sorted(name for action in _parser()._actions if action.dest != "help" for name in action.option_strings)

    def once(chance: random.Random) -> None:
        line = f"{NEEDED} {chance.choice(LINES)}".format(**places)
        monkeypatch.setenv("WORLD_SIZE", str(chance.choice((1, 2, 3, 8))))
        args, config = parse(changed_words(line.split(), chance, flags))
        preflight(args, config, lambda note: None)
        with megatron_refusals():
            validate_args(args)

    monkeypatch.setenv("RANK", "0")
    fuzzed(count, once)


@FEW
def test_recipes(places, tmp_path, count):
    recipes = sorted(ROOT.glob("examples/*/*.yaml"))

    def once(chance: random.Random) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(changed_bytes(chance.choice(recipes).read_bytes(), chance))
        parse(["--config", str(path), "--hf-model", places["hf"], "--mock-data"])

    fuzzed(count, once)


@MANY
def test_configs(hf_checkpoint, tmp_path, monkeypatch, count):
    """Some of those that are read also as a run checks them."""
    model = Path(shutil.copytree(hf_checkpoint, tmp_path / "model"))
    intact = (model / "config.json").read_bytes()
    monkeypatch.setenv("RANK", "0")

    def once(chance: random.Random) -> None:
        is_text = chance.random() < 0.3
        changed = changed_value(json.loads(intact), chance)
        data = changed_bytes(intact, chance) if is_text else json.dumps(changed).encode()
        (model / "config.json").write_bytes(data)
        HyConfig.from_dir(model)
        if chance.random() < 0.3:
            args, config = parse(NEEDED.format(hf=model).split())
            preflight(args, config, lambda note: None)

    fuzzed(count, once)


@MANY
def test_rows(tokenizer_dir, count):
    paths = sorted(ROOT.glob("examples/data/*.jsonl"))
    rows = [line for path in paths for line in path.read_bytes().splitlines()]
    reader, encoder = RowReader(), ChatEncoder(str(tokenizer_dir))

    def once(chance: random.Random) -> None:
        row = chance.choice(rows)
        is_text = chance.random() < 0.3
        row = changed_bytes(row, chance) if is_text else json.dumps(changed_value(json.loads(row), chance)).encode()
        encoder.encode(reader.parse("rows.jsonl", 1, row))

    fuzzed(count, once)


@MANY
def test_safetensors_headers(hf_checkpoint, tmp_path, count):
    model = Path(shutil.copytree(hf_checkpoint, tmp_path / "model"))
    path = model / "model-00001-of-00004.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = data[8 : 8 + length], data[8 + length :]

    def once(chance: random.Random) -> None:
        is_text = chance.random() < 0.5
        changed = changed_value(json.loads(header), chance)
        new = changed_bytes(header, chance) if is_text else json.dumps(changed).encode()
        told = chance.choice((len(new), len(new), len(new), len(header), chance.getrandbits(64), 0))
        path.write_bytes(struct.pack("<Q", told) + new + tensors)
        read_hf(model, Options())

    fuzzed(count, once)


@FEW
def test_metadata(dist_checkpoint, tmp_path, count):
    """Without checksums, which would find each of these."""
    folder = Path(shutil.copytree(dist_checkpoint, tmp_path / "dist"))
    for manifest in folder.rglob(MANIFEST):
        manifest.unlink()
    path = folder / "release" / ".metadata"
    intact = path.read_bytes()

    def once(chance: random.Random) -> None:
        path.write_bytes(changed_bytes(intact, chance))
        if chance.random() < 0.2:
            verify_folder(folder, workers=1)
        read_dist(folder, Options())

    fuzzed(count, once)
