"""Progress off a terminal: how often, and what it says."""

import io
import itertools
import re
import sys

import pytest

from train.progress import Progress, rate


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_come_at_the_ends_and_every_ten_seconds():
    clock, lines = Clock(), []
    progress = Progress(100, 0, lines.append, clock)
    for step in range(1, 101):
        clock.now += 0.7
        progress.update(step, f"{rate(12_345.0)} tokens/s")
    progress.close()
    steps = [int(re.match(r"step (\d+)/100", line)[1]) for line in lines]
    assert (steps[0], steps[-1]) == (1, 100)
    gaps = [0.7 * (b - a) for a, b in itertools.pairwise(steps)]
    assert all(10 <= gap < 10.8 for gap in gaps[:-1])
    assert lines[0] == "step 1/100: 12.3k tokens/s, 1:09 left"
    assert lines[-1].endswith("0:00 left")


@pytest.mark.parametrize("first_step", [0, 7_000])
def test_time_left_after_a_restart_and_after_a_roll_back(first_step):
    clock, lines = Clock(), []
    progress = Progress(10_000, first_step, lines.append, clock)
    for step in range(first_step + 1, first_step + 51):
        clock.now += 2
        progress.update(step, f"{rate(2e6)} tokens/s")
    back = max(first_step - 100, 20)
    clock.now += 2
    progress.update(back, f"{rate(2e6)} tokens/s")
    assert "2M tokens/s" in lines[-1]
    hours, minutes, seconds = re.search(r"(\d+):(\d+):(\d+) left", lines[-1]).groups()
    assert int(hours) * 3600 + int(minutes) * 60 + int(seconds) == 2 * (10_000 - back)


def test_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, lines = Terminal(), []
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(3, 0, lines.append)
    for step in (1, 2, 3):
        progress.update(step, "loss 2.5")
    progress.say("val_loss 2.0")
    progress.close()
    text = terminal.getvalue()
    assert "3/3" in text
    assert "loss 2.5, 0:00 left" in text
    assert "val_loss 2.0" in text
    assert lines == []
