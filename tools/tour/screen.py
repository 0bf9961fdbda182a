"""Runs a command line of the demo: shown before, followed on the screen, kept in a log."""

import itertools
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
SECONDS_OF_SILENCE = 5
NUM_TAIL_LINES = 25


class Screen:
    """What a running command shows: its lines, and a sign of life where it is silent."""

    def __init__(self, doing: str = "at work"):
        self.start = self.last_shown = time.monotonic()
        self.doing = doing
        self.last_line = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def show(self, text: str) -> None:
        print(f"  {text}", flush=True)
        self.last_shown = time.monotonic()

    def line(self, line: str) -> None:
        """A line of the command's output."""
        self.show(line)
        self.last_line = line or self.last_line

    def idle(self) -> None:
        """Called at least every second."""
        if time.monotonic() - self.last_shown > SECONDS_OF_SILENCE:
            self.show(f"{self.seconds:4.0f} s  {self.doing} ...")


class TrainingScreen(Screen):
    """A training, which says a lot: of that, what it does before the first step and after the last, and a line for each
    step.
    """

    MILESTONES = (
        (r"^hymeg: (.*)", "{}"),
        (r"^> initialized pipeline model parallel", "the processes have found each other"),
        (r"loading distributed checkpoint from (.+) at iteration (\d+)", "loading step {1} from {0}"),
        (r"^> building train, validation", "building the index of the text"),
        (
            r"validation loss at iteration \d+ on validation set \| lm loss value: ([\d.E+-]+)",
            "loss on all validation data: {}",
        ),
        (r"translations at iteration \d+ \| chrF: ([\d.]+)", "chrF of held-out translations: {}"),
        (r"successfully saved checkpoint from iteration +(\d+) to (.+) \[", "step {0} is saved in {1}"),
    )
    STEP = re.compile(
        r" iteration +(\d+)/ *(\d+) \|.* lm loss: ([\d.E+-]+) .* grad norm: ([\d.]+) .* tokens/s: ([\d,]+) .* expert "
        r"load max/mean: ([\d.]+)"
    )

    def __init__(self):
        super().__init__("starting")
        self.in_steps = False

    def line(self, line: str) -> None:
        if found := self.STEP.search(line):
            step, of, loss, grad_norm, speed, load = found.groups()
            if not self.in_steps:
                self.show("\n       step    loss  grad norm  tokens/s  busiest expert / mean")
            self.in_steps = True
            self.show(
                f"{step:>5} / {of:<3} {float(loss):6.3f} {float(grad_norm):10.2f} {speed:>9} {load:>11}  "
                f"{'█' * round(5 * float(loss))}"
            )
            return
        for pattern, text in self.MILESTONES:
            if found := re.search(pattern, line):
                said = text.format(*found.groups())
                self.last_line = f"{self.last_line}; {said}" if said.startswith("chrF") else said
                self.show(f"{self.seconds:4.0f} s  {said}")
                self.doing = "at work"


def run(command: str, log: Path, screen: Screen) -> None:
    """Print `command`, run it in the repository's root, follow it on the screen, keep what it says in `log`. Ends the
    demo if it fails.
    """
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
    for line in (
        f"\nthe end of {shown(log)}:",
        *lines[-NUM_TAIL_LINES:],
        "",
        *errors[:1],
        f"demo: {what}; all it said is in {shown(log)}",
    ):
        print(line, file=sys.stderr)
    sys.exit(1)


def shown(path: Path) -> str:
    """As commands name it: relative to the repository, where it lies in it."""
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))
