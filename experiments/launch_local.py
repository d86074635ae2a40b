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
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, NoReturn

from train.config import PREEMPTED

# Once one has left, the others have saved with it, or cannot save any more (that takes all of them).
SECONDS_AFTER_A_CRASH = 10.0
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_SECONDS = 0.05


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]], grace_seconds: float) -> int:
    """Runs all commands at once, their output line by line behind `[index] `, until all have ended.

    SIGTERM, Ctrl-C and a lost terminal reach each as SIGTERM, and all have `grace_seconds` to save and end. When one ends
    badly, of a crash or because another hangs or is gone, the others are asked to end and have SECONDS_AFTER_A_CRASH.

    Returns:
      The exit status of the first that ended badly, 128 + n for signal n, or 0.
    """
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    status, kill_at, forwarded = 0, float("inf"), 0
    with noted_stops() as stops:
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
                time.sleep(POLL_SECONDS)
            status = status or next((process.returncode for process in processes if process.returncode), 0)
        finally:
            _signal(processes, signal.SIGKILL)
            for process in processes:
                process.wait()
    for reader in readers:
        reader.join(timeout=5)
    return exit_status(status)


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> list[int]:
    """Runs commands that do not need each other at once, their output line by line behind `[name] `, until all have ended.

    SIGTERM, Ctrl-C and a lost terminal end all, with what they have started.

    Returns:
      The exit status of each, 128 + n for signal n.
    """
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    with noted_stops() as stops:
        try:
            for name, command in commands.items():
                _start(command, f"[{name}] ", processes, readers)
            while None in [process.poll() for process in processes] and not stops:
                time.sleep(POLL_SECONDS)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
            statuses = [exit_status(process.wait()) for process in processes]
    if stops:
        end_by(stops[0])
    for reader in readers:
        reader.join(timeout=5)
    return statuses


@contextlib.contextmanager
def noted_stops() -> Iterator[list[int]]:
    """The signals of STOPS that have arrived within; they do nothing else, so that no process is lost while it is started.
    What is ignored, as a lost terminal under nohup, stays so."""
    stops: list[int] = []
    heeded = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *received: stops.append(received[0])) for number in heeded}
    try:
        yield stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_by(stop: int) -> NoReturn:
    """Ends this process as the signal would have, once what it must not leave behind is gone."""
    if stop == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(PREEMPTED)


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
