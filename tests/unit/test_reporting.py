"""A run's record holds what it was told, whatever interrupted it; a page and its JSON show just that."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from hymeg.errors import UserError
from hymeg.reporting.page import page
from hymeg.reporting.pictures import expert_rank_of, rank_of
from hymeg.reporting.reading import read_run
from hymeg.reporting.record import COUNTS, LINES, RunRecord

REPORT = Path(__file__).parents[2] / "tools" / "report.py"
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "data_parallel_size": 2,
}
FACTS = {
    "command": "pretrain_hy.py --lr 1 <&>",
    "host": "here",
    "device": "cpu",
    "world_size": 8,
    "train_iters": 8,
    "layout": LAYOUT,
    "model": {"folder": "m"},
    "data": {"seed": 1},
    "versions": {"torch": "2"},
    "expert_counts": [3, 4],
}
COUNTS_OF_STEP = np.array([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 0, 10]])


def life(folder: Path, start: int, end: int, loss: float, facts: dict = FACTS) -> RunRecord:
    record = RunRecord(folder / "records", facts, pytest.fail)
    for iteration in range(start + 1, end + 1):
        record.begin(iteration - 1)
        figures = {"losses": {"lm loss": loss / iteration, "mtp_1 loss": float("nan")}, "grad_norm": 0.5 * iteration}
        record.add_step(iteration, iteration * COUNTS_OF_STEP, learning_rate=1e-3, mfu=None, **figures)
    record.add("evaluation", end, set="validation", losses={"lm loss": 2 * loss})
    record.add("save", end, seconds=1.0)
    return record


def translated(record: RunRecord, iteration: int, hypothesis: str, chrf: float) -> None:
    scores = {"texts": 1, "chrF": chrf, "chrF++": 2.0, "BLEU": 3.0}
    row = {"row": 0, "pair": "en-de", "source": "A < b", "reference": "r", "hypothesis": hypothesis, "alarms": ["copy"]}
    figures = {"pairs": {"en-de": scores}, "signatures": {"chrF": "s"}, "alarms": {"copy": 1.0, "empty": 0.0}}
    record.add_translations(iteration, [row], overall=scores, **figures)


@pytest.fixture
def folder(tmp_path):
    """Ended after 6 steps, gone on from 4, in which it wrote half a line; ended after 8."""
    translated(life(tmp_path, 0, 4, 8.0), 4, "before <b>", 10.0)
    life(tmp_path, 4, 6, 80.0, FACTS | {"world_size": 1})
    with open(tmp_path / "records" / LINES, "a") as file:
        file.write('{"kind": "step", "iterat')
    translated(life(tmp_path, 4, 8, 4.0), 8, "behind", 20.0)
    return tmp_path


def test_a_run_whose_length_is_in_samples_has_a_page(tmp_path):
    life(tmp_path, 0, 4, 8.0, FACTS | {"train_iters": None})
    assert "step 4, loss 2.0000" in page([read_run(tmp_path)])


def test_what_was_told_is_read_and_of_steps_made_twice_the_later(folder):
    run = read_run(folder)
    assert run.losses["lm loss"] == [(i, (8.0 if i <= 4 else 4.0) / i) for i in range(1, 9)]
    assert run.losses["lm loss, validation"] == [(4, 16.0), (8, 8.0)] and "mtp_1 loss" not in run.losses
    assert run.curves["gradient norm"] == [(i, 0.5 * i) for i in range(1, 9)] and "MFU" not in run.curves
    assert (run.saves, run.resumes, run.unread) == ([4, 8], [4, 4], 1)
    assert run.load_iterations == list(range(1, 9))
    assert np.array_equal(run.counts, np.arange(1, 9)[:, None, None] * COUNTS_OF_STEP)
    assert np.array_equal(run.load[0, 1:], [[0.4, 0.8, 1.2, 1.6], [0, 0, 0, 4]]) and np.isnan(run.load[0, 0]).all()
    assert [rows[0]["hypothesis"] for rows in run.examples.values()] == ["before <b>", "behind"]


def test_json_has_the_same_numbers_and_is_json(folder):
    numbers = json.loads(json.dumps(read_run(folder).numbers(), allow_nan=False))
    assert numbers["losses"]["lm loss"][-1] == [8, 0.5] and numbers["resumes"] == [4, 4]
    assert numbers["expert load"]["busiest over mean, by layer"][0] == [None, 1.6, 4.0]
    assert numbers["expert load"]["tokens of the whole run, by layer and expert"][1] == [36, 72, 108, 144]
    assert numbers["translations"][1]["overall"]["chrF"] == 20.0


def test_counts_that_were_cut_off_are_left_out(folder):
    counts = folder / "records" / COUNTS
    counts.write_bytes(counts.read_bytes()[:-1])
    assert read_run(folder).load_iterations == list(range(1, 8))


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    """U+2028 and U+0085, which JSON leaves as they are and str.splitlines() takes for ends of lines."""
    record = life(tmp_path, 0, 2, 8.0, FACTS | {"command": "pretrain_hy.py \u2028"})
    translated(record, 2, "one\u0085two\u2028three", 10.0)
    run = read_run(tmp_path)
    assert run.unread == 0 and run.starts[0]["command"] == "pretrain_hy.py \u2028"
    assert [row["hypothesis"] for row in run.examples[2]] == ["one\u0085two\u2028three"]


def test_a_record_that_cannot_be_written_is_said_once(tmp_path):
    said = []
    (tmp_path / "records").write_text("a file")
    record = RunRecord(tmp_path / "records", FACTS, said.append)
    for iteration in (1, 2):
        record.add_step(iteration, COUNTS_OF_STEP, losses={})
    assert len(said) == 1 and "cannot be written" in said[0] and "records" in said[0]


def test_no_record_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no record of a run \(records/run.jsonl\).*give the --save"):
        read_run(tmp_path)
    (tmp_path / LINES).write_text("{}\n[]\n")
    with pytest.raises(UserError, match="no run has begun"):
        read_run(tmp_path)


def test_page_stands_alone_and_shows_text_as_text(folder):
    text = page([read_run(folder)])
    assert not re.search(r"<script|<link|@import|src=|href=\"(?!#|data:)|url\((?!#)", text)
    for shown in ("pretrain_hy.py --lr 1 &lt;&amp;&gt;", "before &lt;b&gt;", "A &lt; b", "step 8 of 8, loss 0.5000"):
        assert shown in text
    assert "chrF 20.0" in text and "held out 8.0000" in text and "resumed at 4, 4" in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 8
    ids = [name for picture in pictures for name in re.findall(r'\bid="([^"]+)"', picture)]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert "width" not in root.attrib and "viewBox" in root.attrib  # as wide as the page has room
        assert "currentColor" in picture and "#010203" not in picture and "#000000" not in picture
        used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', picture))
        assert used <= set(re.findall(r'\bid="([^"]+)"', picture))


def test_runs_lie_over_each_other_with_names_of_their_own(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    life(other, 0, 3, 9.0)
    out, numbers = other / "both.html", other / "both.json"
    code = (
        "import runpy, sys; sys.argv[0] = 'report'; runpy.run_path(sys.argv.pop(1), run_name='__main__'); "
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, REPORT, folder, other, "--out", out, "--json", numbers]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    text = out.read_text()
    for name in (folder.name, other.name):
        assert f"■ {name}" in text and f"{name}: lm loss, validation" in text
    assert [run["name"] for run in json.loads(numbers.read_text())] == [folder.name, other.name]


def test_dollars_in_a_name_are_no_mathematics(folder):
    text = page([read_run(folder, "lr$_$"), read_run(folder, "other")])
    assert ">lr$_$: lm loss<" in text


def test_ranks_of_the_picture_are_megatrons():
    """By its own generator of groups."""
    from megatron.core.parallel_state import RankGenerator

    for tp, cp, dp, pp, ep, etp in ((2, 1, 2, 2, 2, 1), (1, 2, 4, 2, 4, 2), (2, 2, 2, 1, 4, 1)):
        layout = dict(zip(LAYOUT, (tp, pp, cp, ep, etp, dp), strict=True))
        groups = RankGenerator(tp=etp, ep=ep, dp=tp * cp * dp // etp // ep, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        samples = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp").get_ranks("tp-cp")
        places = [(stage, row, part) for stage in range(pp) for row in range(dp) for part in range(tp * cp)]
        assert [rank_of(layout, *place) for place in places] == [rank for ranks in samples for rank in ranks]
        shares = {rank_of(layout, *place): expert_rank_of(layout, *place[1:]) for place in places}
        for ranks in groups.get_ranks("ep"):
            assert [shares[rank] for rank in ranks] == list(range(ep))
