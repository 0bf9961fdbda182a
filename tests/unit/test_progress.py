"""What a long job says of itself: a bar on a terminal, elsewhere a line now and then."""

import io

import pytest

from hymeg import progress
from hymeg.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """What the clock shows is `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    return stream


def shown(clock, stream, counts=None, seconds=(0, 5, 10, 11, 20, 25)):
    clock[0] = 100
    bar = Progress("converting", 40_000_000_000, stream)
    for second in seconds:
        clock[0] = 100 + second
        bar.show(second * 1_000_000_000, counts=counts)
    return bar, stream.getvalue()


def test_elsewhere_a_line_comes_each_ten_seconds(clock):
    bar, text = shown(clock, io.StringIO())
    assert text == (
        "converting:  25% of 40.00 GB, 1.00 GB/s, 30 s left\nconverting:  50% of 40.00 GB, 1.00 GB/s, 20 s left\n"
    )
    bar.show(40_000_000_000, at_end=True)
    assert bar.stream.getvalue() == text


def test_on_a_terminal_a_bar_is_drawn_over_and_left_standing_at_the_end(clock):
    bar, text = shown(clock, terminal(), seconds=(0.1, 20, 20.1))
    assert text == f"\r[{'#' * 10}{'.' * 10}] converting:  50% of 40.00 GB, 1.00 GB/s, 20 s left\x1b[K"
    clock[0] = 140
    bar.show(40_000_000_000, at_end=True)
    assert bar.stream.getvalue().endswith(f"\r[{'#' * 20}] converting: 100% of 40.00 GB, 1.00 GB/s, 0 s left\x1b[K\n")


def test_an_error_after_a_bar_begins_a_line_of_its_own(clock):
    bar, text = shown(clock, terminal(), seconds=(20,))
    bar.close()
    bar.close()
    assert bar.stream.getvalue() == text + "\n"
    bar, _ = shown(clock, io.StringIO(), seconds=(20,))
    bar.close()
    assert bar.stream.getvalue().endswith("20 s left\n")
    untouched = Progress("x", 1, terminal())
    untouched.close()
    assert untouched.stream.getvalue() == ""


def test_counts_stand_in_place_of_bytes(clock):
    _, text = shown(clock, io.StringIO(), lambda seconds: f"{seconds:.0f} rows", seconds=(10,))
    assert text == "converting:  25% of 40.00 GB, 10 rows, 30 s left\n"


@pytest.mark.parametrize(
    ("done", "num_bytes", "said"),
    [
        (0, 1000, "x:   0% of 0.00 GB, 0.00 GB/s, remaining time unknown\n"),
        (0, 0, "x: 100% of 0.00 GB, 0.00 GB/s, 0 s left\n"),
        (2000, 1000, "x: 100% of 0.00 GB, 0.00 GB/s, 0 s left\n"),
    ],
)
def test_nothing_done_and_nothing_to_do_are_no_division(clock, done, num_bytes, said):
    stream = io.StringIO()
    bar = Progress("x", num_bytes, stream)
    clock[0] += 10
    bar.show(done)
    assert stream.getvalue() == said
