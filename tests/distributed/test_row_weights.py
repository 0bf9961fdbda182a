"""Rows and turns with weights, in a blend of two files: loss, gradient and the loss of each file are transformers', in
any layout.
"""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoModelForCausalLM
from worlds import assert_same_training, largest_difference

from hymeg.data.chat import ChatEncoder
from hymeg.data.rows import RowReader
from hymeg.reporting.reading import read_run

SEQ_LENGTH, BATCH = 256, 4  # so many sequences of that length are all rows, whatever their alignment
TP2, PP2, CP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "context"))
APART = "--no-sft-packing --micro-batch-size 4 --seq-length 100"
LAYOUTS = {  # world size -> name -> flags, checkpoint
    2: {
        "PP2 VPP2": (f"{PP2} --num-virtual-stages-per-pipeline-rank 2", "trunk"),
        "DP2": ("--use-distributed-optimizer", "mtp"),
        "CP2 apart": (f"{APART} {CP2}", "mtp"),
    },
    4: {"DP2 CP2": (CP2, "mtp"), "TP2 PP2": (f"{TP2} --sequence-parallel {PP2}", "mtp")},
}
WORDS = ["the", "sea", "wind", "house", "bright", "river", "stone", "while", "under", "letter", "green", "quiet"]
WEIGHTS = {"some": (0.1, 1, 2.5, 0, 0.3, 7), "half": (0.5,), "none": (1,)}


def rows_of(seed: int, weights: tuple[float, ...]) -> list[dict]:
    """Six rows, of two turns each, and the weights of the turns in "turns"."""
    choose = random.Random(seed)
    say = lambda: " ".join(choose.choices(WORDS, k=choose.randint(2, 6)))  # noqa: E731
    rows = []
    for _ in range(6):
        turns = choose.choices(weights, k=2)
        turns = [1, turns[1]] if turns == [0, 0] else turns
        messages = [
            {"role": role, "content": say()} | ({"weight": turn} if role == "assistant" and turn != 1 else {})
            for turn in turns
            for role in ("user", "assistant")
        ]
        of_row = choose.choice(weights) or 1
        row = {"messages": messages} | ({} if of_row == 1 else {"weight": of_row})
        rows.append({"row": row, "turns": [turn * of_row for turn in turns]})
    return rows


@pytest.fixture(scope="module")
def sets(folder, tmp_path_factory):
    """Kind of weights -> the paths of two files, and their rows."""
    made = {}
    at = tmp_path_factory.mktemp("row-weights")
    for kind, weights in WEIGHTS.items():
        both = [rows_of(seed, weights) for seed in (1, 2)]
        paths = [at / f"{kind}{number}.jsonl" for number in range(2)]
        for path, rows in zip(paths, both, strict=True):
            path.write_text("".join(json.dumps(row["row"]) + "\n" for row in rows))
        made[kind] = paths, both
    return made


@pytest.fixture(scope="module")
def trained(folder, sets, worlds, tmp_path_factory):
    """Of a training of one step, which takes every row once: the step, and its losses by name."""
    record = tmp_path_factory.mktemp("row-weights-records")

    def train(kind="some", size=1, flags="", checkpoint="mtp"):
        paths, _ = sets[kind]
        at = str(record / f"{kind} {size} {flags} {checkpoint}".replace("/", "").replace(" ", "_"))
        fixed = f"--sft --seq-length {SEQ_LENGTH} --micro-batch-size 1 --train-iters 1 --num-workers 0 --log-interval 1"
        fixed += " --lr 1e-3 --lr-decay-style constant --clip-grad 0 --split 100,0,0"
        model = ["--hf-model", str(folder / checkpoint), "--load", str(folder / checkpoint)]
        data = ["--data-path", *map(str, paths), "--data-cache-path", str(record / "index"), "--tensorboard-dir", at]
        batch = 12 if APART in flags else BATCH
        argv = [*model, *data, *fixed.split(), "--global-batch-size", str(batch), *flags.split()]
        return worlds.run(size, argv)["steps"], read_run(at).losses

    return train


@pytest.fixture(scope="module")
def reference(folder, sets):
    """What transformers computes of all rows, each alone: the loss, the norm of its gradient, the loss of each file."""
    model = AutoModelForCausalLM.from_pretrained(folder / "trunk", dtype=torch.float32, attn_implementation="eager")
    reader, encoder = RowReader(), ChatEncoder(str(folder / "trunk"))
    sums, counts = [], []
    for rows in sets["some"][1]:
        losses, count = [], 0
        for entry in rows:
            plain = [{key: message[key] for key in ("role", "content")} for message in entry["row"]["messages"]]
            tokens = encoder.encode(reader.parse("", 1, {"messages": plain}))
            weights, turn = [], -1
            for before, trained in zip([False, *tokens.trained[:-1]], tokens.trained, strict=True):
                turn += trained and not before
                weights.append(entry["turns"][turn] if trained else 0.0)
            weights = torch.tensor(weights)[1:]
            ids = torch.from_numpy(tokens.token_ids).long()
            losses.append((F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none") * weights).sum())
            count += int((weights > 0).sum())
        sums.append(sum(losses))
        counts.append(count)
    loss = sum(sums) / sum(counts)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item(), [of.item() / count for of, count in zip(sums, counts, strict=True)]


def test_it_is_what_transformers_computes(trained, reference):
    steps, losses = trained(checkpoint="trunk")
    loss, norm, by_set = reference
    assert steps[0]["loss"] == pytest.approx(loss, rel=1e-5) and steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert [losses[f"lm loss, {number}-some{number}"][0][1] for number in range(2)] == pytest.approx(by_set, rel=1e-5)
    assert abs(by_set[0] - by_set[1]) > 1e-2


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of_size in LAYOUTS.items() for name in of_size])
def test_it_is_the_same_in_every_layout(trained, size, name):
    flags, checkpoint = LAYOUTS[size][name]
    steps, losses = trained(size=size, flags=flags, checkpoint=checkpoint)
    alone, expected = trained(flags=APART if "apart" in name else "", checkpoint=checkpoint)
    assert_same_training(steps, alone)
    assert losses.keys() == expected.keys() and len(losses) == (4 if checkpoint == "mtp" else 3)
    for key, series in expected.items():
        if key == "mtp_1 loss" and name == "DP2 CP2":
            continue  # Megatron logs the mean of the micro-batches', whose rows are others where they are padded
        assert losses[key] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in series], key


def test_a_weight_that_all_have_scales_loss_and_gradient(trained):
    """Turns of half a weight in rows of half a weight; multi-token prediction's too."""
    (steps, losses), (plain, expected) = trained("half"), trained("none")
    scaled = [{key: 0.25 * step[key] for key in ("loss", "grad_norm")} for step in plain[:1]]
    assert_same_training(steps[:1], scaled, 1e-6)
    for (name, series), (plain_name, plain_series) in zip(losses.items(), expected.items(), strict=True):
        assert name.replace("half", "none") == plain_name
        assert series[0][1] == pytest.approx(0.25 * plain_series[0][1], rel=1e-6)
    assert largest_difference(trained(checkpoint="trunk")[0], trained()[0], "grad_norm") > 1e-3


@pytest.mark.parametrize(("size", "flags"), [(1, ""), (2, TP2)])
def test_text_has_a_loss_for_each_data_set_too(command, worlds, tmp_path, size, flags):
    """Two samples of each in a step of four, and no padding in them: the loss is the mean of both."""
    for name, highest in (("few", 20), ("many", 900)):
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=np.uint16)
        builder.add_document(np.random.default_rng(0).integers(1, highest, 2000), [2000])
        builder.finalize(f"{tmp_path / name}.idx")
    data = f"--data-path 0.5 {tmp_path}/few 0.5 {tmp_path}/many --data-cache-path {tmp_path}/cache"
    log = f"--log-interval 1 --tensorboard-dir {tmp_path}/log"
    steps = worlds.run(size, command(data, log, flags, steps=2))["steps"]
    losses = read_run(tmp_path / "log").losses
    for number, step in enumerate(steps):
        few, many = (losses[f"lm loss, {name}"][number][1] for name in ("0-few", "1-many"))
        assert (few + many) / 2 == pytest.approx(step["loss"], rel=1e-5) and abs(few - many) > 1e-2
