"""Where the time of a run went: `timing.jsonl`, which `experiments/goodput.py` reads."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from train.distributed import Group
from train.metrics import JsonlWriter, NoWriter, read_jsonl


class Timing:
    """Writes the time line of a run: a start, steps, and the events that interrupt them. Process 0 writes.

    Attributes:
      interrupted: when the last event ended, by `time.perf_counter()`; 0 before the first.
    """

    def __init__(self, run_dir: pathlib.Path, group: Group, began: float):
        """
        Args:
          began: when this start of the run began, by `time.perf_counter()`.
        """
        path = run_dir / "timing.jsonl"
        earlier = max((record["seconds"] for record in read_jsonl(path)), default=0.0)
        self._group, self._started, self.interrupted = group, time.perf_counter() - earlier, 0.0
        self._writer = JsonlWriter(path) if group.is_first else NoWriter()
        self._event("start", time.perf_counter() - began, unix_time=time.time())

    def seconds(self) -> float:
        """Since the run's first start, not counting the time between a kill and a restart."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def timed(self, event: str, step: int, **more: Any) -> Iterator[dict[str, Any]]:
        """Records an event, under the watch of the group; the yielded dict takes what else is to be recorded."""
        begin = time.perf_counter()
        with self._group.phase(f"{event} at step {step}"):
            yield more
        self._event(event, time.perf_counter() - begin, **more)
        self.interrupted = time.perf_counter()

    def step(self, number: int, **measured: float) -> None:
        self._writer.write({"step": number, "seconds": self.seconds(), **measured})

    def _event(self, event: str, seconds: float, **more: Any) -> None:
        self._writer.write({"event": event, "seconds": self.seconds(), "event_seconds": seconds, **more})

    def close(self) -> None:
        self._writer.close()


class Phases:
    """Seconds of the parts of a step, which may run side by side."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
