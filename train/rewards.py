"""Rewards of completions: parts by name, run where they can fail, and composed into one number per completion.

    parts = (Part("right", task.score), Part("short", is_short, judges="form", only_if="right", weight=0.1))
    with Verifiers(parts, workers=2, timeout_seconds=60) as verify:
        verdicts = verify(completions, examples)
    rewards = compose(parts, verdicts.values)        # rewards.total, rewards.valid, both [n]
    metrics = rewards.metrics | verdicts.metrics

A part that judges the form of an answer and not whether it is right must be a gate or be conditional on another part. A form
that pays by itself, whatever the answer, is what a policy learns first, and it learns nothing else.

A verifier that raises, hangs, dies, or returns what is no number in [0, 1] has not judged. Its value is NaN, the part is
counted and named in the metrics and the first failures are kept with their text; the completion's total is 0 and `valid` is
False. Such a completion must be left out of the loss, of the mean and of the deviation of its group: its 0 is no reward.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data.tasks.task import Example, Score

Verifier = Callable[[str, Example], Score]
_KEPT_FAILURES = 10  # per call, with their text
_LENGTH = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Part:
    """One named reward.

    Attributes:
      name: in metrics: `reward/<name>`.
      verifier: a module-level function, or a method of a task, from (completion, example) to a Score in [0, 1]; it runs in
        another process. None where the values come from elsewhere (a reward model) and are given to `compose`.
      weight: what a value of 1 adds to the total; unused by a gate.
      judges: `answer`, or `form` (layout, length, language), which must be a gate or have `only_if`.
      gate: multiplies the sum of the others instead of adding to it.
      only_if: name of another part; this one counts times that part's value.
    """

    name: str
    verifier: Verifier | None = None
    weight: float = 1.0
    judges: Literal["answer", "form"] = "answer"
    gate: bool = False
    only_if: str = ""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A verifier that did not judge: of which part, which completion of the batch, how (`kind`) and what it said."""

    part: str
    index: int
    kind: Literal["raised", "hung", "died", "returned"]
    message: str


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Attributes:
    values: by part, float64 [n]; NaN where the verifier did not judge.
    failures: the first of them, in order of (completion, part).
    metrics: `reward/<part>/failed` and `reward/<part>/<kind>` counts, `reward/<part>/reason/<reason>` fractions of n.
    """

    values: Mapping[str, np.ndarray]
    failures: tuple[Failure, ...]
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Attributes:
    total: float64 [n]; 0 where not valid.
    valid: bool [n]; False where a part has no value: leave these completions out of the loss and of their group's statistics.
    parts: by name, float64 [n], as given.
    metrics: `reward/total` (mean over the valid), `reward/total_std`, `reward/valid_fraction`, `reward/<part>` (mean over those
      that have a value). A mean over nothing is left out.
    """

    total: np.ndarray
    valid: np.ndarray
    parts: Mapping[str, np.ndarray]
    metrics: Mapping[str, float]


def counts_failures(name: str) -> bool:
    """Whether a metric is a number of completions that were not judged, such as `reward/<part>/failed`."""
    endings = ("_failed", "/failed", "/raised", "/hung", "/died", "/returned")
    return name.startswith("reward/") and name.endswith(endings) and "/reason/" not in name


def check_parts(parts: Sequence[Part]) -> None:
    """Raises ValueError, naming the part and the fix, where the composition rewards the wrong thing or makes no sense."""
    names = [part.name for part in parts]
    if not names or len(set(names)) < len(names) or "" in names:
        raise ValueError(f"rewards need parts with different names, got {names}")
    for part in parts:
        if not math.isfinite(part.weight) or part.weight == 0:
            raise ValueError(
                f"reward {part.name!r}: weight={part.weight} must be finite and not 0; a part can be left out instead"
            )
        if part.judges not in ("answer", "form"):
            raise ValueError(f"reward {part.name!r}: judges={part.judges!r} is neither 'answer' nor 'form'")
        if part.gate and part.only_if:
            raise ValueError(f"reward {part.name!r}: a gate counts for all parts; leave out only_if={part.only_if!r}")
        if part.gate and part.weight != 1.0:
            raise ValueError(f"reward {part.name!r}: a gate multiplies, so weight={part.weight} would do nothing; leave it out")
        if part.judges == "form" and not part.gate and not part.only_if:
            raise ValueError(
                f"reward {part.name!r} pays for form whatever the answer; make it a gate (gate=True) or conditional on "
                "the part that judges the answer (only_if=...)"
            )
        if part.only_if:
            condition = next((other for other in parts if other.name == part.only_if), None)
            if condition is None:
                raise ValueError(f"reward {part.name!r}: only_if={part.only_if!r} is not one of {names}")
            if condition.judges != "answer" or condition.only_if or condition.gate:
                raise ValueError(f"reward {part.name!r}: only_if={part.only_if!r} must judge the answer by itself")
    if all(part.gate for part in parts):
        raise ValueError(f"rewards {names} are all gates: there is nothing to let through")


def compose(parts: Sequence[Part], values: Mapping[str, np.ndarray]) -> Rewards:
    """(sum of weight * value, conditional parts times their condition's value) * (product of gates), per completion.

    Args:
      values: by name of part, floating [n]; a value that is not finite is none.

    Raises:
      ValueError: the parts, or the names or lengths of values, do not fit.
    """
    check_parts(parts)
    if values.keys() != {part.name for part in parts}:
        raise ValueError(f"values for {sorted(values)} do not match the parts {sorted(part.name for part in parts)}")
    arrays = {part.name: np.asarray(values[part.name], np.float64) for part in parts}
    if len({array.shape for array in arrays.values()}) != 1 or next(iter(arrays.values())).ndim != 1:
        raise ValueError(f"values must be vectors of one length, got { {name: a.shape for name, a in arrays.items()} }")
    finite = {name: np.isfinite(array) for name, array in arrays.items()}
    valid = np.logical_and.reduce(list(finite.values()))
    safe = {name: np.where(valid, array, 0.0) for name, array in arrays.items()}
    total, gate = np.zeros(valid.shape), np.ones(valid.shape)
    for part in parts:
        if part.gate:
            gate = gate * safe[part.name]
        else:
            total = total + part.weight * safe[part.name] * (safe[part.only_if] if part.only_if else 1.0)
    total = total * gate
    metrics = {}
    if valid.size:
        metrics["reward/valid_fraction"] = float(valid.mean())
    if valid.any():
        metrics |= {"reward/total": float(total[valid].mean()), "reward/total_std": float(total[valid].std())}
    metrics |= {f"reward/{name}": float(a[finite[name]].mean()) for name, a in arrays.items() if finite[name].any()}
    return Rewards(total, valid, arrays, metrics)


class Verifiers:
    """Runs the parts' verifiers in processes of their own, which are killed when they hang and replaced when they die.

    A signal to stop (SIGINT, SIGTERM) is none to them: they end with `close`, or when whoever opened this is gone.

    Close it, or use it in a `with` statement. The same completions and examples get the same verdicts, whatever the number of
    workers, but for time: a verifier that comes close to `timeout_seconds` may hang on one machine and not on another.
    """

    def __init__(self, parts: Sequence[Part], workers: int = 1, timeout_seconds: float = 60.0):
        """
        Args:
          timeout_seconds: of one verifier on one completion; above the wall-clock limit of a sandbox that it uses.

        Raises:
          ValueError: parts that do not fit together, or a verifier that cannot be sent to another process.
          RuntimeError: a worker cannot load them.
        """
        check_parts(parts)
        if workers < 1 or not 0 < timeout_seconds < float("inf"):
            raise ValueError(f"verifiers: workers={workers} and timeout_seconds={timeout_seconds} must be positive and finite")
        self._names = [part.name for part in parts if part.verifier is not None]
        self._verifiers: list[bytes] = []
        for part in parts:
            if part.verifier is None:
                continue
            try:
                self._verifiers.append(pickle.dumps(part.verifier))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"reward {part.name!r}: its verifier runs in another process and cannot be sent there ({error}); use a "
                    "function of a module or a method of a task"
                ) from None
        self._timeout = timeout_seconds
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._verifiers, timeout_seconds))
        except RuntimeError:
            self.close()
            raise

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.kill()

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> Verdicts:
        """Every verifier on every completion: `completions[i]` answers `examples[i]`.

        Raises:
          ValueError: not as many completions as examples.
        """
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
        jobs = collections.deque((i, p) for i in range(len(completions)) for p in range(len(self._names)))
        values = {name: np.full(len(completions), np.nan) for name in self._names}
        reasons: collections.Counter[tuple[str, str]] = collections.Counter()
        failures: list[Failure] = []
        with selectors.DefaultSelector() as selector:
            busy: dict[int, _Worker] = {}
            while jobs or busy:
                for slot, worker in enumerate(self._workers):
                    if not jobs or slot in busy:
                        continue
                    index, part = jobs.popleft()
                    worker.ask(index, part, completions[index], examples[index], time.monotonic() + self._timeout)
                    busy[slot] = worker
                    selector.register(worker.replies, selectors.EVENT_READ, slot)
                soonest = min(worker.deadline for worker in busy.values())
                ready = {key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))}
                for slot, worker in list(busy.items()):
                    index, name = worker.index, self._names[worker.part]
                    if slot in ready:
                        reply = worker.reply()
                    elif time.monotonic() >= worker.deadline:
                        reply = ("hung", f"no answer within {self._timeout} s")
                    else:
                        continue
                    selector.unregister(worker.replies)
                    del busy[slot]
                    if isinstance(reply, Score):
                        values[name][index] = reply.reward
                        reasons[name, reply.reason] += 1
                        continue
                    kind, message = reply
                    failures.append(Failure(name, index, kind, message))
                    if kind in ("hung", "died"):
                        worker.kill()
                        self._workers[slot] = _Worker(self._verifiers, self._timeout)
        kinds = collections.Counter((failure.part, failure.kind) for failure in failures)
        metrics = {f"reward/{name}/failed": float(np.isnan(value).sum()) for name, value in values.items()}
        metrics |= {f"reward/{name}/{kind}": float(count) for (name, kind), count in sorted(kinds.items())}
        metrics |= {f"reward/{name}/reason/{why}": count / len(completions) for (name, why), count in sorted(reasons.items())}
        failures.sort(key=lambda failure: (failure.index, self._names.index(failure.part)))
        return Verdicts(values, tuple(failures[:_KEPT_FAILURES]), metrics)


class _Worker:
    """A process that judges one completion at a time. Its only message at a time is complete, or the process is ended."""

    def __init__(self, verifiers: Sequence[bytes], timeout_seconds: float):
        start = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from train.rewards import _serve; _serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C, or a signal to the process group, is for who asked, who finishes the step, and needs verdicts for it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.replies, self._requests = self._process.stdout, self._process.stdin
        self.index, self.part, self.deadline = 0, 0, 0.0
        self._send((list(verifiers), timeout_seconds))
        # Importing a verifier's module may take long, and is not the fault of the first completion.
        ready = self._receive()
        if ready != "ready":
            self.kill()
            raise RuntimeError(
                f"verifiers cannot be loaded in a process of their own: {ready or 'it ended; its error is above'}"
            )

    def ask(self, index: int, part: int, completion: str, example: Example, deadline: float) -> None:
        self.index, self.part, self.deadline = index, part, deadline
        self._send((part, completion, example))

    def reply(self) -> Score | tuple[Literal["raised", "hung", "died", "returned"], str]:
        answer = self._receive()
        if answer is None:
            # Not waited for: `kill` needs its number, which then cannot be another's.
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            return "died", f"its process ended with status {status}"
        return answer

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        with contextlib.suppress(BrokenPipeError):  # the next reply says that it died
            self._requests.write(_LENGTH.pack(len(data)) + data)
            self._requests.flush()

    def _receive(self) -> Any:
        return _read_message(self.replies)

    def kill(self) -> None:
        """Ends it, and what a verifier has started in its process group."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


def _read_message(stream: Any) -> Any:
    """The next object, or None at the end of the stream."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    data = stream.read(length)
    return pickle.loads(data) if len(data) == length else None


def _serve() -> None:
    """The worker's side: judges until its input ends. What a verifier prints goes to standard error."""
    # A manager of jobs may signal every process, not the group alone. Not SIG_IGN, which a verifier's programs would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: Any) -> None:
        data = pickle.dumps(message)
        replies.write(_LENGTH.pack(len(data)) + data)
        replies.flush()

    try:
        pickled, timeout_seconds = _read_message(requests)
        verifiers = [pickle.loads(data) for data in pickled]
    except Exception as error:
        send(f"{type(error).__name__}: {error}")
        return
    send("ready")
    while (request := _read_message(requests)) is not None:
        part, completion, example = request
        # Whoever asked ends a worker that hangs. If that process is gone, the kernel does, a little later.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + 5)
        verdict = judge(verifiers[part], completion, example)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(verdict)


def judge(verifier: Verifier, completion: str, example: Example) -> Score | tuple[Literal["raised", "returned"], str]:
    """The verifier's score, checked; or how it failed to judge, and what it said."""
    try:
        score = verifier(completion, example)
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"[:500]
    if not isinstance(score, Score) or isinstance(score.reward, bool) or not isinstance(score.reward, int | float):
        return "returned", f"{score!r}, which is not a Score of a number"[:500]
    if not 0 <= score.reward <= 1:
        return "returned", f"reward {score.reward!r}, which is not in [0, 1]"
    return Score(float(score.reward), str(score.reason))
