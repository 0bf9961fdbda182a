#!/usr/bin/env python3
"""A tour of hymeg on CPU, in a few minutes: a tiny Hy-MT2 trains on real text over four processes, and goes on in another layout.

Every step is a command line, printed before it runs, for you to type yourself. Here is only what shows it: the screen, a picture, a table.
"""

import argparse
import itertools
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
TINY = "examples/tiny_cpu"
TEXTS = [f"examples/data/udhr/{language}.jsonl" for language in ("de", "en", "es", "fr", "zh")]

FIRST, SECOND = "TP2 x PP2, EP2", "CP2 x DP2, EP2"
LAYOUTS = {
    # Unsaid, the experts' tensor-parallel size is TP's, and they would want EP2 x ETP2 x PP2 = 8 processes.
    FIRST: "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
    SECOND: "--context-parallel-size 2 --expert-model-parallel-size 2",
}
NUM_STEPS_TWICE = 4  # trained under both layouts: their losses must agree
LARGEST_DIFFERENCE = 1e-3  # of those losses: 1e-6 by rounding, 1e-4 where it decides between two experts; a step of training moves them by 1e-1
SECONDS_OF_SILENCE = 5
NUM_TAIL_LINES = 25


class Row(NamedTuple):
    """A line of the table at the end."""

    what: str
    layout: str
    seconds: float
    result: str


class Screen:
    """What a running command shows: its lines, and a sign of life where it is silent."""

    def __init__(self, doing: str = "at work"):
        self.start = self.last_shown = time.monotonic()
        self.doing = doing
        self.first_line = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def show(self, text: str) -> None:
        print(f"  {text}", flush=True)
        self.last_shown = time.monotonic()

    def line(self, line: str) -> None:
        """A line of the command's output."""
        self.show(line)
        self.first_line = self.first_line or line

    def idle(self) -> None:
        """Called at least every second."""
        if time.monotonic() - self.last_shown > SECONDS_OF_SILENCE:
            self.show(f"{self.seconds:4.0f} s  {self.doing} ...")


class TrainingScreen(Screen):
    """A training, which says a lot: of that, what it does before the first step and after the last, and a line for each step."""

    MILESTONES = (
        (r"^hymeg: (.*)", "{}"),
        (r"^> initialized pipeline model parallel", "the processes have found each other"),
        (r"loading distributed checkpoint from (.+) at iteration (\d+)", "loading step {1} from {0}"),
        (r"^> building train, validation", "building the index of the text"),
        (r"successfully saved checkpoint from iteration +(\d+) to (.+) \[", "step {0} is saved in {1}"),
    )
    STEP = re.compile(
        r" iteration +(\d+)/ *(\d+) \|.* lm loss: ([\d.E+-]+) .* grad norm: ([\d.]+) .* tokens/s: ([\d,]+) .* expert load max/mean: ([\d.]+)"
    )

    def __init__(self):
        super().__init__("starting four processes")
        self.in_steps = False

    def line(self, line: str) -> None:
        if found := self.STEP.search(line):
            step, of, loss, grad_norm, speed, load = found.groups()
            if not self.in_steps:
                self.show("\n       step    loss  grad norm  tokens/s  busiest expert / mean")
            self.in_steps = True
            self.show(f"{step:>5} / {of:<3} {float(loss):6.3f} {float(grad_norm):10.2f} {speed:>9} {load:>11}  {'█' * round(5 * float(loss))}")
            return
        for pattern, text in self.MILESTONES:
            if found := re.search(pattern, line):
                self.show(f"{self.seconds:4.0f} s  {text.format(*found.groups())}")
                self.doing = "at work"


def run(command: str, log: Path, screen: Screen) -> None:
    """Print `command`, run it in the repository's root, follow it on the screen, keep what it says in `log`. Ends the demo if it fails."""
    print(f"\n$ {wrapped(command)}\n", flush=True)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines: queue.Queue[str | None] = queue.Queue()
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(shlex.split(command), cwd=ROOT, encoding="utf-8", errors="replace", **pipes) as process,
    ):
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            while (line := _next(lines, screen)) is not None:
                file.write(line)
                file.flush()
                screen.line(line.rstrip())
        except BaseException:
            process.terminate()  # torchrun ends its processes
            reader.join()
            raise
    if process.returncode != 0:
        fail(f"the command failed with exit code {process.returncode}", log)


def _read(output: Iterable[str], lines: queue.Queue) -> None:
    for line in itertools.chain(output, [None]):
        lines.put(line)


def _next(lines: queue.Queue, screen: Screen) -> str | None:
    """The next line; None after the last."""
    while True:
        screen.idle()
        try:
            return lines.get(timeout=1)
        except queue.Empty:
            continue


def wrapped(command: str, width: int = 130) -> str:
    """Lines of at most `width`, broken before an option."""
    lines = [""]
    for piece in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(piece) >= width:
            lines.append("   ")
        lines[-1] += f" {piece}"
    return " \\\n".join(lines).strip()


def fail(what: str, log: Path) -> NoReturn:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if " ...." not in line]
    errors = [line for line in lines if line.startswith("error: ")]
    for line in (f"\nthe end of {shown(log)}:", *lines[-NUM_TAIL_LINES:], "", *errors[:1], f"demo: {what}; all it said is in {shown(log)}"):
        print(line, file=sys.stderr)
    sys.exit(1)


def shown(path: Path) -> str:
    """As commands name it: relative to the repository, where it lies in it."""
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


def read_losses(folder: Path) -> dict[int, float]:
    """Step -> loss, unrounded, as the trainer wrote it for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("lm loss")}


def draw(first: dict[int, float], second: dict[int, float], saved: int, path: Path) -> None:
    """The loss against the step, and the hand-over under a magnifying glass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 11, "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(10, 6), dpi=150, layout="constrained")
    inset = axes.inset_axes((0.57, 0.57, 0.42, 0.36))
    rings = {"marker": "o", "markerfacecolor": "none", "markeredgewidth": 1.5}
    for place, size, height in ((axes, 6, 0.45), (inset, 9, 1)):
        place.axvline(saved, ymax=height, color="#888888", linestyle="--", linewidth=1)
        place.plot(first.keys(), first.values(), color="#1f6fb4", linewidth=2, marker="o", markersize=size / 2, label=FIRST)
        place.plot(second.keys(), second.values(), color="#e6671e", linewidth=1.2, markersize=size, label=SECOND, **rings)
        place.grid(color="#e8e8e8")
        place.set_axisbelow(True)
    near = [loss for losses in (first, second) for step, loss in losses.items() if abs(step - saved) <= NUM_STEPS_TWICE + 1]
    margin = 0.15 * (max(near) - min(near))
    inset.set(xlim=(saved - NUM_STEPS_TWICE - 1.5, saved + NUM_STEPS_TWICE + 1.5), ylim=(min(near) - margin, max(near) + margin))
    inset.set_title(f"steps {saved + 1} to {saved + NUM_STEPS_TWICE}, trained under both", fontsize=10)
    inset.tick_params(labelsize=8)
    axes.indicate_inset_zoom(inset, edgecolor="#888888")
    axes.annotate(f"saved at step {saved}, resumed ", (saved, 0.02), xycoords=("data", "axes fraction"), ha="right", color="#666666", fontsize=10)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title("A tiny Hy-MT2 on four processes: one training, two layouts", fontsize=14, pad=12)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path)


def compare(first: dict[int, float], second: dict[int, float], log: Path) -> float:
    """Print the steps that both layouts trained. Returns the largest difference of their losses; ends the demo if it is more than rounding."""
    both = sorted(first.keys() & second.keys())
    if len(both) != NUM_STEPS_TWICE:
        fail(f"{NUM_STEPS_TWICE} steps should be trained under both layouts, and {both} were", log)
    print(f"\n  step  loss under {FIRST}  under {SECOND}  difference")
    for step in both:
        print(f"  {step:>4} {first[step]:26.6f} {second[step]:21.6f} {abs(first[step] - second[step]):11.1e}")
    difference = max(abs(first[step] - second[step]) for step in both)
    if not difference <= LARGEST_DIFFERENCE:
        fail(f"the loss jumps by {difference:.1e} from one layout to the other", log)
    return difference


class Tour:
    """The steps, and the folder in which all that they make lies."""

    def __init__(self, out: Path, num_steps: int):
        self.out, self.num_steps = out, num_steps
        self.last_step = num_steps + max(NUM_STEPS_TWICE, num_steps // 3)
        self.model, self.saves, self.curves, self.picture = (shown(out / name) for name in ("model", "checkpoints", "tensorboard", "loss.png"))
        self.python, self.torchrun = shown(Path(sys.executable)), shown(Path(sysconfig.get_path("scripts")) / "torchrun")
        data = shown(out / "udhr")
        self.settings = f"--config {TINY}/pretrain_fp32.yaml --hf-model {self.model} --data-path {data}_text_document"
        self.make_model = f"{self.python} tools/make_tiny_checkpoint.py {self.model} --config {TINY}/config.json --dtype fp32"
        self.make_data = f"{self.python} tools/preprocess_data.py --input {' '.join(TEXTS)} --output {data} --tokenizer {self.model} --append-eod"
        self.rows: list[Row] = []

    def __call__(self) -> None:
        print(f"A tiny Hy-MT2 trains on real text over four processes on this machine's CPU, two to four minutes. All it makes: {shown(self.out)}")
        print("Layouts: TP tensor, PP pipeline, EP expert, CP context, DP data parallel; a number says over how many processes.")
        self.step("make a tiny Hy-MT2 of random weights", "", "model", self.make_model, Screen())
        self.step("turn text in five languages into tokens", "", "data", self.make_data, Screen())
        stop = f"--save-interval {self.num_steps} --exit-interval {self.num_steps + NUM_STEPS_TWICE}"
        first = self.train(f"train, save at step {self.num_steps}", FIRST, "first", f"--load {self.model} {stop}")
        second = self.train(f"resume from step {self.num_steps}", SECOND, "second", f"--load {self.saves} --ckpt-step {self.num_steps}")
        print(f"\n=== 5 of 5: compare the steps trained under both layouts, draw {self.picture}", flush=True)
        start = time.monotonic()
        difference = compare(first, second, self.out / "second.log")
        draw(first, second, self.num_steps, self.out / "loss.png")
        self.rows.append(Row("compare", "", time.monotonic() - start, f"the same steps, two layouts: losses differ by {difference:.0e} at most"))
        self.finish()

    def step(self, what: str, layout: str, name: str, command: str, screen: Screen) -> None:
        print(f"\n=== {len(self.rows) + 1} of 5: {what}{f', layout {layout}' if layout else ''}", flush=True)
        run(command, self.out / f"{name}.log", screen)
        self.rows.append(Row(what, layout, screen.seconds, screen.first_line))

    def train(self, what: str, layout: str, name: str, load: str) -> dict[int, float]:
        """Returns step -> loss."""
        launch = f"env HYMEG_PLATFORM=cpu {self.torchrun} --standalone --nproc-per-node 4 pretrain_hy.py"
        save = f"--train-iters {self.last_step} --save {self.saves} --tensorboard-dir {shown(self.out / 'tensorboard' / name)}"
        self.step(what, layout, name, f"{launch} {self.settings} {load} {save} {LAYOUTS[layout]}", TrainingScreen())
        losses = read_losses(self.out / "tensorboard" / name)
        begin, end = min(losses), max(losses)
        self.rows[-1] = self.rows[-1]._replace(result=f"steps {begin} to {end}: loss {losses[begin]:.2f} to {losses[end]:.2f}")
        return losses

    def finish(self) -> None:
        """The table, where things lie, what to try next."""
        print(f"\n{'':4}{'what':42}{'layout':18}{'seconds':>7}   result")
        for number, row in enumerate(self.rows, 1):
            print(f"{number:>3} {row.what:42}{row.layout:18}{row.seconds:>7.0f}   {row.result}")
        print(f"{'':4}{'in all':42}{'':18}{sum(row.seconds for row in self.rows):>7.0f}\n")
        places = {"loss curve": self.picture, "checkpoints": self.saves, "TensorBoard": self.curves, "model, logs": shown(self.out)}
        for what, where in places.items():
            print(f"{what:12} {where}")
        alone = f"env HYMEG_PLATFORM=cpu {self.python} pretrain_hy.py {self.settings} --load {self.saves} --train-iters {self.last_step + 20}"
        print(f"\nSee all figures:\n\n  {shown(Path(sysconfig.get_path('scripts')) / 'tensorboard')} --logdir {self.curves}")
        print(f"\nGo on from the last checkpoint with one process:\n\n  {wrapped(alone)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=ROOT / "out" / "demo", type=Path, metavar="DIR", help="where all goes (default: out/demo, which is emptied)")
    parser.add_argument("--steps", default=60, type=int, metavar="N", help="steps before the change of layout (default: 60)")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.steps < 10:
        parser.error(f"--steps {args.steps}: at least 10, of which the learning rate takes 5 to rise")
    if out == ROOT / "out" / "demo":
        shutil.rmtree(out, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: not an empty folder; give another, so that nothing of yours is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    try:
        Tour(out, args.steps)()
    except KeyboardInterrupt:
        sys.exit(f"demo: interrupted; what it made so far is in {shown(out)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
