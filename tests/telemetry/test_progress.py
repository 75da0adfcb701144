"""The progress line's arithmetic and manners, with a clock that the test moves."""

import io

import pytest

from refractor_core.telemetry.progress import WINDOW, Progress, clock_time


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_eta_is_tokens_left_over_speed():
    clock = Clock()
    progress = Progress(10, 1000, stream=io.StringIO(), clock=clock)
    assert progress.eta_seconds is None
    for step in (1, 2):
        clock.now += 4.0
        progress.update(step, 50 * step, 1.0)
    assert progress.tokens_per_second == 12.5
    assert progress.eta_seconds == (1000 - 100) / 12.5
    clock.now += 4.0
    progress.update(10, 1000, 1.0)
    assert progress.eta_seconds == 0


def test_the_speed_forgets_what_is_older_than_the_window():
    clock = Clock()
    progress = Progress(1000, 10**6, stream=io.StringIO(), clock=clock)
    clock.now += 1000.0
    progress.update(1, 10, 1.0)
    for step in range(2, WINDOW + 3):
        clock.now += 1.0
        progress.update(step, 10 * step, 1.0)
    assert progress.tokens_per_second == 10.0


def test_a_resumed_run_counts_only_its_own_tokens():
    clock = Clock()
    progress = Progress(100, 10_000, done=9_000, stream=io.StringIO(), clock=clock)
    clock.now += 10.0
    progress.update(91, 9_100, 1.0)
    assert progress.eta_seconds == 90.0


def test_outside_a_terminal_a_line_every_interval_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, 1000, interval=5.0, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += 1.0
        progress.update(step, 10 * step, 2.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [*range(1, 100, 5), 100]
    assert lines[0] == "step   1/100  loss 2.0000  10 tokens/s  ETA 1:39"


def test_in_a_terminal_one_line_is_rewritten_and_notes_stand_alone():
    clock, stream = Clock(), Terminal()
    progress = Progress(3, 3_000_000, stream=stream, clock=clock)
    for step, loss in ((1, 12.0), (2, None)):
        clock.now += 1.0
        progress.update(step, 1_000_000 * step, loss)
    progress.note("checkpoint saved")
    progress.close()
    first, second, *_ = stream.getvalue().split("\r")[1:]
    assert "1.00M tokens/s" in first and "--" in second and "\n" not in first + second
    assert len(second) >= len(first)
    assert stream.getvalue().endswith("\rcheckpoint saved\n")


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.5, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1d 01:01:01")])
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text
