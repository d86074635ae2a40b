"""Several processes of one job on this machine, which live and die together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from train.config import PREEMPTED

# Once one has left, the others have saved with it, or cannot save any more (that takes all of them).
SECONDS_AFTER_A_CRASH = 10.0
STOPS = (signal.SIGTERM, signal.SIGINT)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]], grace_seconds: float) -> int:
    """Runs all commands at once, their output line by line behind `[index] `, until all have ended.

    SIGTERM and Ctrl-C reach each as SIGTERM, and all have `grace_seconds` to save and end. When one ends badly, of a crash or
    because another hangs or is gone, the others are asked to end and have SECONDS_AFTER_A_CRASH.

    Returns:
      The exit status of the first that ended badly, 128 + n for signal n, or 0.
    """
    stops: list[int] = []
    handlers = {number: signal.signal(number, lambda *received: stops.append(received[0])) for number in STOPS}
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    status, kill_at, forwarded = 0, float("inf"), 0
    try:
        for index, command in enumerate(commands):
            # A session of its own: Ctrl-C in the terminal comes through us, once.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
            )
            processes.append(process)
            readers.append(threading.Thread(target=_copy, args=(process.stdout, f"[{index}] "), daemon=True))
            readers[-1].start()
        while None in [process.poll() for process in processes]:
            failed = next((process.returncode for process in processes if process.returncode), 0)
            if len(stops) > forwarded or (failed and not status):
                saving = len(stops) > 0 and failed in (0, PREEMPTED)
                patience = grace_seconds if saving else min(grace_seconds, SECONDS_AFTER_A_CRASH)
                status, forwarded = status or failed, len(stops)
                _signal(processes, signal.SIGTERM)
                kill_at = min(kill_at, time.monotonic() + patience)
            if time.monotonic() > kill_at:
                _signal(processes, signal.SIGKILL)
            time.sleep(0.05)
        status = status or next((process.returncode for process in processes if process.returncode), 0)
    finally:
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for reader in readers:
        reader.join(timeout=5)
    return status if status >= 0 else 128 - status


def _signal(processes: Sequence[subprocess.Popen[str]], number: int) -> None:
    """To those that still run; SIGKILL to what they have started, too."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)


def _copy(stream: IO[str], prefix: str) -> None:
    for line in stream:
        sys.stdout.write(prefix + line.removesuffix("\n") + "\n")
        sys.stdout.flush()
