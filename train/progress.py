"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Shows the step, what was measured of it, and the time left.

    Args:
      steps: of the whole run.
      first_step: steps already done; the time left is reckoned from those done since.
      log: takes the lines that are not part of a bar.
    """

    def __init__(self, steps: int, first_step: int, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._steps, self._first_step, self._log, self._clock = steps, first_step, log, clock
        self._step, self._started = first_step, clock()
        self._updated = self._last_line = self._started
        self._bar = None
        if sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=steps, initial=first_step, bar_format=layout, dynamic_ncols=True, desc="training")

    def update(self, step: int, measured: str) -> None:
        """Reports that `step` steps are done; call it at each step. After a roll-back there are fewer than before."""
        now = self._clock()
        if step <= self._step:
            self._first_step, self._started = step - 1, self._updated
        self._step, self._updated = step, now
        left = (now - self._started) / (step - self._first_step) * (self._steps - step)
        status = f"{measured}, {_duration(left)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=step == self._steps)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= LINE_SECONDS or step in (self._first_step + 1, self._steps):
            self._last_line = now
            self._log(f"step {step}/{self._steps}: {status}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            self._log(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def rate(per_second: float) -> str:
    """Three digits and a unit: 12.3k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if per_second >= size:
            return f"{per_second / size:.3g}{unit}"
    return f"{per_second:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
