"""tools/demo.py as a user runs it, but shorter: the loss falls, the layout changes without a jump, what it names is
there, failures are said.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.reporting.reading import read_run

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"
NUM_STEPS, LAST_STEP = 10, 14


def demo(*arguments, timeout=500):
    """Run the demo in a session of its own, so that a timeout leaves none of its processes behind."""
    command = [sys.executable, DEMO, *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "with a blank"


@pytest.fixture(scope="module")
def screen(out):
    done = demo("--out", out, "--steps", NUM_STEPS)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def losses(screen, out):
    """Of both trainings, step -> loss, from TensorBoard's files."""
    curves = []
    for name in ("first", "second"):
        events = EventAccumulator(str(out / "tensorboard" / name), size_guidance={"scalars": 0})
        events.Reload()
        curves.append({event.step: event.value for event in events.Scalars("lm loss")})
    return curves


def test_loss_falls(losses):
    first = losses[0]
    assert list(first) == list(range(1, LAST_STEP + 1))
    assert 7 < first[1] < 8.5  # log(2048) = 7.6: it begins by guessing
    assert first[LAST_STEP] < first[1] - 0.8


def test_no_jump_from_one_layout_to_the_other(losses):
    first, second = losses
    assert list(second) == list(range(NUM_STEPS + 1, LAST_STEP + 1))
    assert max(abs(second[step] - first[step]) for step in second) < 1e-3  # a lost optimizer state: 1e-2 and more


def test_screen_shows_every_step_and_the_loss_of_that_step(screen, losses):
    """Also of the second step after a start, where Megatron itself shows the mean of two."""
    pretraining = screen.partition("=== 8 of 11")[0]
    shown = [
        (int(step), float(loss))
        for step, loss in re.findall(r"^ +(\d+) / \d+ +(\d\.\d{3}) .*█$", pretraining, re.MULTILINE)
    ]
    expected = [(step, loss) for curve in losses for step, loss in curve.items()]
    assert [step for step, _ in shown] == [step for step, _ in expected]
    assert [loss for _, loss in shown] == pytest.approx([loss for _, loss in expected], abs=6e-4)


def test_the_loss_on_held_out_translations_falls_with_fine_tuning(screen, out):
    """Shown in the table: before, after; with chrF, and the texts below."""
    result = r"loss on all validation data: (\S+); chrF of held-out translations: (\S+)"
    rows = re.findall(rf"^ +[89] (?:its loss|fine-tune it) on .*{result}$", screen, re.MULTILINE)
    (before, chrf_before), (after, chrf_after) = rows
    assert float(after) < float(before) - 0.1
    for name, chrf in (("untuned", chrf_before), ("tuned", chrf_after)):
        [scores] = read_run(out / name).translations
        assert f"{scores['overall']['chrF']:.2f}" == chrf
    assert len(re.findall(r"^(?:source|reference|before|after) +\S", screen, re.MULTILINE)) >= 4


def test_what_it_made_is_there(screen, out):
    saves = out / "checkpoints"
    assert {path.name for path in saves.glob("iter_*")} == {f"iter_{step:07d}" for step in (NUM_STEPS, LAST_STEP)}
    assert (saves / "latest_checkpointed_iteration.txt").read_text() == str(LAST_STEP)
    for name in (
        "model",
        "to-distributed",
        "back",
        "compare",
        "data",
        "first",
        "second",
        "untuned",
        "tuned",
        "export",
        "losses",
    ):
        assert (out / f"{name}.log").stat().st_size > 0
    for path in (out / "loss.png", saves, out / "tensorboard", out / "export"):
        assert str(path) in screen


def test_there_and_back_nothing_changes(screen, out):
    assert (out / "compare.log").read_text() == "no difference\n"
    assert compare_checkpoints(out / "model", out / "back") == []
    changed = compare_checkpoints(out / "model", out / "export")
    assert "lm_head.weight" in {difference.name for difference in changed}  # it has been trained


def test_transformers_finds_the_loss_that_hymeg_finds(screen, losses):
    ours, theirs, apart = map(
        float,
        re.search(r"loss of 8 x 128 tokens: ([\d.]+) by hymeg, ([\d.]+) by transformers, (\S+) apart", screen).groups(),
    )
    assert ours == pytest.approx(theirs, abs=2e-5) and apart <= 1e-5
    assert ours == pytest.approx(losses[0][LAST_STEP], abs=0.5) and ours < losses[0][1] - 0.5


def test_picture_shows_two_curves(screen, out):
    pixels = matplotlib.image.imread(out / "loss.png")[..., :3]
    assert pixels.shape == (900, 1500, 3)
    for colour in ("1f6fb4", "e6671e"):
        distance = np.abs(pixels - np.frombuffer(bytes.fromhex(colour), np.uint8) / 255).max(axis=-1)
        assert (distance < 0.02).sum() > 500


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = demo("--out", tmp_path)
    assert done.returncode == 2
    assert "not an empty folder" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_command_that_fails_ends_the_demo_with_the_end_of_its_log(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("screen", DEMO.parent / "tour" / "screen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "failing.py").write_text(
        "print('error: no such flag')\nfor n in range(100): print(f'word {n}')\nexit(3)\n"
    )
    with pytest.raises(SystemExit) as exit:
        module.run(f"{sys.executable} {tmp_path}/failing.py", tmp_path / "failing.log", module.Screen())
    assert exit.value.code == 1
    said = capsys.readouterr().err
    assert "word 99" in said and "word 10\n" not in said and "error: no such flag" in said and "exit code 3" in said
    assert (tmp_path / "failing.log").read_text().count("\n") == 101
