"""Held-out rows are answered at every evaluation, in any layout alike, and the training is what it is without."""

import json
from pathlib import Path

import pytest
from test_layouts import EP2, PP2, TP2

from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.reporting.page import page
from hymeg.reporting.reading import read_run

EVALUATED = "--split 50,50,0 --eval-iters 1 --eval-interval 1"
LAYOUT = f"{TP2} {PP2} {EP2} --expert-tensor-parallel-size 1 --valid-generate 5"
HELD_OUT = Path(__file__).parents[2] / "examples" / "data" / "translations_heldout.jsonl"


@pytest.fixture(scope="module")
def rows(folder):
    """Seven, with short answers: they are cut off at twice the longest."""
    path = folder / "held_out.jsonl"
    rows = _lines(HELD_OUT)[:7]
    path.write_text(
        "".join(
            json.dumps(row | {"target": row["target"][:6].strip(), "md5": str(number)}) + "\n"
            for number, row in enumerate(rows)
        )
    )
    return path


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(place: Path, iteration: int) -> list[dict]:
    return _lines(place / f"records/translations/iter_{iteration:07d}.jsonl")


@pytest.fixture(scope="module")
def alone(worlds, command, folder, rows):
    place = folder / "judged-alone"
    flags = f"{EVALUATED} --valid-translations {rows} --valid-generate 5 --tensorboard-dir {place}"
    return place, worlds.run(1, command(flags, "--lr 0", checkpoint="mtp", steps=2))


def test_every_layout_says_the_same(worlds, command, folder, rows, alone):
    place = folder / "judged-4"
    flags = f"{EVALUATED} --valid-translations {rows} {LAYOUT} --tensorboard-dir {place}"
    worlds.run(4, command(flags, "--lr 0", checkpoint="mtp", steps=2))
    assert texts(place, 1) == texts(place, 2) == texts(alone[0], 1)
    assert len(texts(place, 1)) == 5 and any(row["hypothesis"] for row in texts(place, 1))


def test_the_record_has_figures_of_each_evaluation(alone):
    run = read_run(alone[0])
    assert [one["iteration"] for one in run.translations] == [1, 2]  # the last is evaluated twice
    assert run.examples == {iteration: texts(alone[0], iteration) for iteration in (1, 2)}
    assert {row["pair"] for row in texts(alone[0], 1)} == run.translations[0]["pairs"].keys()
    assert texts(alone[0], 2)[0]["source"][:20] in page([run])


def test_training_goes_on_as_without(worlds, command, folder, rows):
    words = ["--valid-translations", str(rows), "--valid-generate", "2", "--save", str(folder / "judged-saved")]
    without, judged = (worlds.run(1, [*command(EVALUATED, steps=3), *more]) for more in ([], words))
    assert judged["steps"] == without["steps"] and judged["evaluations"] == without["evaluations"]
    assert len(texts(folder / "judged-saved", 3)) == 2
    assert texts(folder / "judged-saved", 1) != texts(folder / "judged-saved", 3)


def test_the_command_judges_checkpoints_of_both_kinds_as_the_training_does(worlds, folder, rows, alone):
    """Of the same weights, beside others."""
    hf_to_dist(folder / "mtp", folder / "mtp-judged")
    write_tiny_checkpoint(folder / "other", dtype="fp32", num_mtp_layers=1, seed=5)
    places = [str(folder / name) for name in ("mtp-judged", "other", "mtp")]
    out = folder / "judged"
    asked = [*places, str(rows), "--hf-model", places[2], "--rows", "5", "--out", str(out)]
    said = worlds.run(2, [*asked, "--tensor-model-parallel-size", "2"], "evaluated")["said"]
    found = {name: _lines(out / f"{name}.jsonl") for name in ("mtp-judged", "other", "mtp")}
    assert found["mtp-judged"] == found["mtp"] == texts(alone[0], 1) != found["other"]
    [head, chrf, *_] = said.splitlines()
    assert head.split() == ["mtp-judged", "other", "mtp"] and chrf.startswith("chrF all")
    scores = json.loads((out / "scores.json").read_text())
    assert chrf.split()[2:] == [f"{of['overall']['chrF']:.2f}" for of in scores.values()]
    responses = [{"md5": md5, "response": row["hypothesis"]} for md5, row in zip("01245", found["mtp"], strict=True)]
    assert _lines(out / "mtp.responses.jsonl") == responses
