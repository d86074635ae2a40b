"""A process that is stuck says where, and ends, so that whoever started it can start it again."""

from __future__ import annotations

import contextlib
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

BEAT_SECONDS = 1.0  # between two looks at the clock


class Watchdog:
    """Knows what the main thread is doing, and for how long it may.

    Only time in which this process runs is counted: a laptop that slept, or a process that was stopped with Ctrl-Z and
    continued, was not stuck.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begin("starting", float("inf"))

    def begin(self, doing: str, seconds: float) -> None:
        """The main thread begins what must end, or give way to something else, within `seconds`."""
        with self._lock:
            self.doing, self._allowed, self._spent = doing, seconds, 0.0
            self._looked = time.monotonic()

    @contextlib.contextmanager
    def phase(self, doing: str, seconds: float) -> Iterator[None]:
        """For what interrupts something else, whose time then begins anew."""
        before = self.doing, self._allowed
        self.begin(doing, seconds)
        yield
        self.begin(*before)

    def overdue(self) -> str:
        """To be called every BEAT_SECONDS: what takes too long, or ""."""
        now = time.monotonic()
        with self._lock:
            self._spent += min(now - self._looked, 2 * BEAT_SECONDS)
            self._looked = now
            return f"{self.doing} took longer than {self._allowed:g} s" if self._spent > self._allowed else ""


def dump_stacks(run_dir: pathlib.Path, process: int) -> None:
    """Writes the stacks of all threads to stderr and to `stacks-<process>.txt` of the run."""
    faulthandler.dump_traceback(sys.stderr)
    with contextlib.suppress(OSError), open(run_dir / f"stacks-{process}.txt", "w") as file:
        faulthandler.dump_traceback(file)
