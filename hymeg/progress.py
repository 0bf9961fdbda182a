"""How far a long job is, on stderr."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

Say = Callable[[str], None]
"""Given a line for the user."""
_SECONDS_BETWEEN_LINES = 10
_SECONDS_BETWEEN_REDRAWS = 0.2
_BAR_WIDTH = 20


class Progress:
    """Share done, rate and remaining time: a bar on a terminal, elsewhere a line each ten seconds.

    Args:
        what: begins each line.
        num_bytes: of the whole job.
    """

    def __init__(self, what: str, num_bytes: int, stream: TextIO | None = None):
        self.what, self.num_bytes, self.stream = what, num_bytes, stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.has_open_line = False
        self.started = self.shown = time.monotonic()

    def show(self, done: int, at_end: bool = False, counts: Callable[[float], str] | None = None) -> None:
        """`done` bytes are done. `at_end` a bar is drawn whatever the time, and left standing.

        Args:
            counts: what has been done after so many seconds, in place of bytes a second.
        """
        now = time.monotonic()
        if not at_end and now - self.shown < (_SECONDS_BETWEEN_REDRAWS if self.is_terminal else _SECONDS_BETWEEN_LINES):
            return
        if at_end and not self.is_terminal:
            return
        self.shown = now
        seconds = max(now - self.started, 1e-6)
        share = min(done / self.num_bytes, 1.0) if self.num_bytes else 1.0
        left = f"{seconds / share * (1 - share):,.0f} s left" if share > 0 else "remaining time unknown"
        rate = counts(seconds) if counts else f"{done / seconds / 1e9:.2f} GB/s"
        text = f"{self.what}: {share:4.0%} of {self.num_bytes / 1e9:,.2f} GB, {rate}, {left}"
        if self.is_terminal:
            filled = round(share * _BAR_WIDTH)
            bar = "#" * filled + "." * (_BAR_WIDTH - filled)
            text = f"\r[{bar}] {text}\x1b[K"
        print(text, end="" if self.is_terminal else "\n", file=self.stream, flush=True)
        self.has_open_line = self.is_terminal
        if at_end:
            self.close()

    def close(self) -> None:
        """What is printed next, an error perhaps, begins a line."""
        if self.has_open_line:
            print(file=self.stream, flush=True)
        self.has_open_line = False
