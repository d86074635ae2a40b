"""Runs a Python program nobody has read: in a fresh interpreter that can compute, read Python's own library and print.

    result = run("print(2 + 2)")
    result.outcome, result.stdout      # "passed", "4\n"

What holds, for an unprivileged user and for root alike (`data/sandbox_child.py` is what the child does to itself, before it
reads the first line of the program):

  system calls   a seccomp filter allows some sixty; all others fail with EPERM in the program. So there are no sockets, no
                 other processes (no fork, hence no fork bomb and nothing that outlives the program; threads may be started),
                 no signals to anyone, nothing is executed, no limit can be raised, no file can be opened for writing,
                 created, renamed or removed: the disk cannot be filled, and no directory is needed that would have to be.
  files          Landlock lets it read Python's standard library and the system's shared libraries and nothing else; not the
                 tests, not /proc, not this process's environment.
  resources      rlimits on address space, processor seconds and open files; the output is bounded; a wall clock.
  the way in     no site-packages, an environment of one variable (PYTHONHASHSEED=0, so that a reward is the same each time),
                 an empty standard input, no descriptor but the three.
  the way out    the process group is killed, always; and the kernel kills it when the thread that called `run` dies.

What does not hold: this is one kernel, so a bug in the calls that are allowed is a way out, and a program can measure time and
heat a core. Run what you would not run next to your data in a virtual machine. Where seccomp and Landlock cannot be had (not
Linux on x86-64, before 5.13, or a container that forbids them) `run` refuses.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from typing import Literal

Outcome = Literal["passed", "failed", "timed_out", "killed"]
_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
_READY = b"\0"  # the child writes it when it is confined; what follows is the program's own


class SandboxUnavailable(RuntimeError):
    """This machine cannot confine a program, so none is run."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Attributes:
    wall_seconds: from start to end, whatever it does; generous, because a loaded machine is no fault of the program.
    cpu_seconds: of all its threads; whole seconds, which is how the kernel counts them.
    memory_bytes: of address space; an interpreter alone takes about 30 MB.
    output_bytes: of standard output and of standard error, each.
    """

    wall_seconds: float = 30.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if not 0 < self.wall_seconds < float("inf"):
            raise ValueError(f"sandbox: wall_seconds={self.wall_seconds} must be positive and finite")
        if not (isinstance(self.cpu_seconds, int) and self.cpu_seconds >= 1):
            raise ValueError(f"sandbox: cpu_seconds={self.cpu_seconds} must be a whole number, at least 1")
        if self.memory_bytes < 64 << 20:
            raise ValueError(f"sandbox: memory_bytes={self.memory_bytes} must be at least 64 MiB: Python itself needs about 30")
        if self.output_bytes < 1:
            raise ValueError(f"sandbox: output_bytes={self.output_bytes} must be at least 1")


@dataclasses.dataclass(frozen=True)
class SandboxResult:
    """Attributes:
    outcome: `passed`: ended by itself with status 0, which any program can do at any moment, so that no answer is right by
      this alone; `failed`: an exception or another status; `timed_out`: too long, by the wall or by the processor;
      `killed`: by a signal, or because it wrote too much.
    reason: one line for people; empty when it passed.
    stdout, stderr: what it wrote, at most `Limits.output_bytes` of each; not UTF-8 is replaced.
    """

    outcome: Outcome
    reason: str
    stdout: str
    stderr: str


def run(program: str, limits: Limits = Limits()) -> SandboxResult:
    """Runs `program` as `__main__` and waits for it. Some 50 ms for an empty one.

    Raises:
      SandboxUnavailable: the program was not started; the message says what this machine lacks.
    """
    deadline = time.monotonic() + limits.wall_seconds
    command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", str(_CHILD)]  # -I, but for the one variable that we set
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,
    )
    try:
        order = {
            "program": program,
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "parent": os.getpid(),
        }
        outputs, cut = _communicate(process, json.dumps(order).encode(), limits.output_bytes, deadline)
        if not cut:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                cut = "wall"
    finally:
        # Before it is waited for, while its number cannot be another's.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
    stdout, stderr = (output.decode("utf-8", errors="replace") for output in outputs)
    if not outputs[0].startswith(_READY):
        if cut == "wall":
            return SandboxResult("timed_out", f"did not start within {limits.wall_seconds} s", "", "")
        raise SandboxUnavailable(
            f"programs of others cannot be run here: {_last_line(stderr) or 'the interpreter did not start'}"
        )
    return _result(status, cut, stdout[1:], stderr, limits)


def _result(status: int, cut: str, stdout: str, stderr: str, limits: Limits) -> SandboxResult:
    if cut == "wall":
        return SandboxResult("timed_out", f"ran longer than {limits.wall_seconds} s", stdout, stderr)
    if cut:
        return SandboxResult("killed", f"wrote more than {limits.output_bytes} bytes to {cut}", stdout, stderr)
    if status == -signal.SIGXCPU:
        return SandboxResult("timed_out", f"used more than {limits.cpu_seconds} s of processor time", stdout, stderr)
    if status < 0:
        return SandboxResult("killed", f"ended by {signal.Signals(-status).name}", stdout, stderr)
    if status:
        return SandboxResult("failed", _last_line(stderr) or f"status {status}", stdout, stderr)
    return SandboxResult("passed", "", stdout, stderr)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def _communicate(
    process: subprocess.Popen[bytes], order: bytes, output_bytes: int, deadline: float
) -> tuple[tuple[bytes, bytes], str]:
    """Sends `order`, reads both outputs to their end. The second value says what cut it short: "", wall, stdout or stderr."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    outputs = {"stdout": bytearray(), "stderr": bytearray()}
    sent, cut = 0, ""
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        while selector.get_map() and not cut:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                cut = "wall"
                break
            for key, _ in selector.select(remaining):
                if key.data == "stdin":
                    try:
                        sent += os.write(key.fd, order[sent : sent + 65536])
                    except BrokenPipeError:
                        sent = len(order)  # it ended before it began; its error output says why
                    if sent == len(order):
                        selector.unregister(key.fileobj)
                        process.stdin.close()
                    continue
                chunk, output = os.read(key.fd, 65536), outputs[key.data]
                if not chunk:
                    selector.unregister(key.fileobj)
                room = output_bytes + (key.data == "stdout") - len(output)  # one more for _READY
                output += chunk[:room]
                if len(chunk) > room:
                    cut = key.data
    return (bytes(outputs["stdout"]), bytes(outputs["stderr"])), cut
