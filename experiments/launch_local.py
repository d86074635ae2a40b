"""Several processes on this machine: those of one job, which live and die together, and others, which do not."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
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
            _start(command, f"[{index}] ", processes, readers)
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
    return exit_status(status)


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> list[int]:
    """Runs commands that do not need each other at once, their output line by line behind `[name] `, until all have ended.

    SIGTERM and Ctrl-C end all, with what they have started.

    Returns:
      The exit status of each, 128 + n for signal n.
    """
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    try:
        for name, command in commands.items():
            _start(command, f"[{name}] ", processes, readers)
        statuses = [exit_status(process.wait()) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        signal.signal(signal.SIGTERM, handler)
    for reader in readers:
        reader.join(timeout=5)
    return statuses


def exit_status(returncode: int) -> int:
    """As a shell has it: 128 + n for signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def _start(
    command: Sequence[str], prefix: str, processes: list[subprocess.Popen[str]], readers: list[threading.Thread]
) -> None:
    """Adds the running command and the thread that copies its output; it has a session of its own, so that Ctrl-C in the
    terminal comes through us, once."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    processes.append(process)
    readers.append(threading.Thread(target=_copy, args=(process.stdout, prefix), daemon=True))
    readers[-1].start()


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
