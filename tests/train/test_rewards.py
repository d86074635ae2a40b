"""Composition against arithmetic by hand; verifiers that misbehave in every way are named, counted and left out."""

import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.tasks.reverse import Reverse
from data.tasks.task import Example, Score
from train.rewards import Part, Verifiers, check_parts, compose

ROOT = Path(__file__).parents[2]
EXAMPLE = Example("prompt", "answer", "problem")


def right(completion, example):
    return Score(float(completion == example.answer), "right" if completion == example.answer else "wrong answer")


def hostile(completion, example):
    """Does what the completion says."""
    print("a verifier may print")
    match completion:
        case "raise":
            raise ZeroDivisionError("of my own")
        case "hang":
            while True:
                time.sleep(1)
        case "exit":
            os._exit(7)
        case "sys.exit":
            sys.exit(0)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "nan":
            return Score(math.nan, "odd")
        case "1.5":
            return Score(1.5, "odd")
        case "-0.1":
            return Score(-0.1, "odd")
        case "none":
            return None
        case "float":
            return 1.0
        case "true":
            return Score(True, "odd")
        case "array":
            return Score(np.ones(3), "odd")
    return Score(0.5, "fine")


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers((Part("hostile", hostile), Part("right", right)), workers=2, timeout_seconds=3.0) as verify:
        yield verify


def test_verifiers_that_misbehave_are_named_counted_and_no_zero(verifiers):
    completions = [
        "raise",
        "answer",
        "hang",
        "exit",
        "sys.exit",
        "segfault",
        "nan",
        "1.5",
        "-0.1",
        "none",
        "float",
        "true",
        "array",
        "x",
    ]
    verdicts = verifiers(completions, [EXAMPLE] * len(completions))
    assert np.isfinite(verdicts.values["hostile"]).tolist() == [c in ("answer", "x") for c in completions]
    assert verdicts.values["right"].tolist() == [float(c == "answer") for c in completions]
    kinds = dict.fromkeys(completions, "returned") | {"raise": "raised", "hang": "hung"}
    kinds |= dict.fromkeys(["exit", "sys.exit", "segfault"], "died")
    assert [(f.part, f.index, f.kind) for f in verdicts.failures] == [
        ("hostile", i, kinds[c]) for i, c in enumerate(completions) if c not in ("answer", "x")
    ][:10]
    messages = {completions[f.index]: f.message for f in verdicts.failures}
    assert messages["raise"] == "ZeroDivisionError: of my own"
    assert "3.0 s" in messages["hang"]
    assert "status 7" in messages["exit"]
    assert "nan" in messages["nan"]
    expected = {"failed": 12, "raised": 1, "hung": 1, "died": 3, "returned": 7, "reason/fine": 2 / 14}
    assert {k.removeprefix("reward/hostile/"): v for k, v in verdicts.metrics.items() if "hostile" in k} == expected

    rewards = compose([Part("hostile"), Part("right")], verdicts.values)
    assert rewards.valid.tolist() == [c in ("answer", "x") for c in completions]
    assert rewards.total.tolist() == [1.5 if c == "answer" else 0.5 if c == "x" else 0.0 for c in completions]
    assert rewards.metrics["reward/total"] == 1.0  # not diluted by those that were not judged
    assert rewards.metrics["reward/valid_fraction"] == 2 / 14


def test_verdicts_do_not_depend_on_the_workers(verifiers):
    completions = ["x", "answer", "raise"] * 10
    with Verifiers((Part("hostile", hostile), Part("right", right))) as one:
        alone, together = (v(completions, [EXAMPLE] * 30) for v in (one, verifiers))
    for name in alone.values:
        np.testing.assert_array_equal(alone.values[name], together.values[name])
    assert alone.failures == together.failures
    assert alone.metrics == together.metrics


def test_a_task_is_a_verifier(verifiers):
    task = Reverse()
    examples = [task.example(i, 0) for i in range(8)]
    completions = [task.solution(e) if i % 2 else "no" for i, e in enumerate(examples)]
    with Verifiers([Part("reverse", task.score)]) as verify:
        verdicts = verify(completions, examples)
    assert verdicts.values["reverse"].tolist() == [0, 1] * 4
    assert verdicts.metrics["reward/reverse/reason/right"] == 0.5
    assert verifiers([], []).values["right"].shape == (0,)
    with pytest.raises(ValueError, match="1 completions for 0 examples"):
        verifiers(["x"], [])


def test_what_cannot_be_sent_or_loaded_is_named_at_once():
    with pytest.raises(ValueError, match=r"reward 'local'.*a function of a module"):
        Verifiers([Part("local", lambda completion, example: Score(1.0, "right"))])
    with pytest.raises(ValueError, match="timeout_seconds=0"):
        Verifiers([Part("right", right)], timeout_seconds=0)


def test_a_verifier_whose_module_is_not_there_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "gone.py").write_text("def verify(completion, example): ...")
    monkeypatch.syspath_prepend(tmp_path)
    import gone  # pyright: ignore[reportMissingImports]

    (tmp_path / "gone.py").unlink()
    with pytest.raises(RuntimeError, match="No module named 'gone'"):
        Verifiers([Part("gone", gone.verify)])


def signals_all(completion, example):
    """Ctrl-C and SIGTERM for the group of whoever asked, then for the process itself, in the midst of its judgement."""
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(os.getpgid(os.getppid()), number)
        os.kill(os.getpid(), number)
    return Score(1.0, "right")


CALLER = """
import os, signal, sys
from tests.train import test_rewards as here
from train.rewards import Part, Verifiers
verifier, hangs = sys.argv[1:]
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))
verify = Verifiers([Part("right", getattr(here, verifier))], workers=2, timeout_seconds=60.0 if not hangs else 0.1)
print(*(worker._process.pid for worker in verify._workers), flush=True)
if hangs:
    for worker in verify._workers:
        worker.ask(0, 0, hangs, here.EXAMPLE, 0.0)
    print("asked", flush=True)
    signal.pause()
print(verify(["x"] * 6, [here.EXAMPLE] * 6).values["right"].tolist(), len(received) > 0, flush=True)
signal.pause()
"""


def caller_of(verifier, hangs=""):
    """A process in a group of its own, and descriptors of its workers that can be read when they have ended."""
    command = [sys.executable, "-c", CALLER, verifier, hangs]
    caller = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return caller, [os.pidfd_open(int(pid)) for pid in caller.stdout.readline().split()]


def ends_with(caller, workers):
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    for worker in workers:
        assert select.select([worker], [], [], 30)[0], "a worker outlived who asked"
        os.close(worker)


def test_a_signal_to_stop_costs_no_verdict():
    """And workers that wait end when the group of who asked is killed, though it is not theirs."""
    caller, workers = caller_of("signals_all")
    assert caller.stdout.readline() == f"{[1.0] * 6} True\n"
    ends_with(caller, workers)


@pytest.mark.slow
def test_workers_that_hang_end_with_who_asked():
    """The kernel ends them, some five seconds later."""
    caller, workers = caller_of("hostile", "hang")
    assert caller.stdout.readline() == "asked\n"
    ends_with(caller, workers)


def starts_others(completion, example):
    """A child that tells its number into the file that the example names and stays; then what the completion says."""
    command = [sys.executable, "-c", "import os, signal; print(os.getpid(), flush=True); signal.pause()"]
    with Path(example.answer).open("w") as file:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file)
    while not Path(example.answer).read_text().endswith("\n"):
        os.sched_yield()
    return hostile(completion, example)


@pytest.mark.parametrize("completion", ["hang", "exit", "segfault", "x"])
def test_what_a_verifier_started_ends_with_its_worker(tmp_path, completion):
    said = tmp_path / "pid"
    with Verifiers((Part("right", starts_others),), timeout_seconds=3.0) as verify:
        (judged,) = verify([completion], [Example("prompt", str(said), "problem")]).values["right"]
    assert np.isnan(judged) == (completion != "x")
    try:
        child = os.pidfd_open(int(said.read_text()))
    except ProcessLookupError:
        return
    assert select.select([child], [], [], 10)[0], "a child outlived its worker"
    os.close(child)


# Composition


def test_composition_by_hand():
    parts = [
        Part("right", weight=2.0),
        Part("style", weight=-0.5),
        Part("short", judges="form", only_if="right", weight=0.25),
        Part("json", judges="form", gate=True),
    ]
    values = {
        "right": [1, 1, 0, 1, 0.5, 1],
        "style": [0, 1, 1, 0, 0, np.nan],
        "short": [1, 0, 1, 1, 1, 1],
        "json": [1, 1, 1, 0, 0.5, 1],
    }
    rewards = compose(parts, {name: np.array(v) for name, v in values.items()})
    # 2 + .25; 2 - .5; -.5, and no pay for being short; gate closed; (1 + .125) / 2; not judged
    np.testing.assert_allclose(rewards.total, [2.25, 1.5, -0.5, 0.0, 0.5625, 0.0], rtol=0, atol=1e-15)
    assert rewards.valid.tolist() == [True] * 5 + [False]
    assert rewards.metrics["reward/total"] == pytest.approx((2.25 + 1.5 - 0.5 + 0.5625) / 5)
    assert rewards.metrics["reward/total_std"] == pytest.approx(np.std([2.25, 1.5, -0.5, 0.0, 0.5625]))
    assert rewards.metrics["reward/right"] == pytest.approx(4.5 / 6)
    assert rewards.metrics["reward/style"] == pytest.approx(2 / 5)


def test_form_cannot_be_farmed():
    """Whatever the values, a completion whose answer is wrong earns nothing by its form."""
    rng = np.random.default_rng(0)
    parts = [Part("right"), Part("tags", judges="form", only_if="right"), Part("json", judges="form", gate=True)]
    rewards = compose(parts, {"right": np.zeros(50), "tags": rng.random(50), "json": rng.random(50)})
    assert not rewards.total.any()


def test_a_closed_gate_does_not_hide_that_a_part_failed():
    rewards = compose([Part("right"), Part("json", gate=True)], {"right": np.array([np.nan, np.inf]), "json": np.zeros(2)})
    assert not rewards.valid.any()
    assert np.isfinite(rewards.total).all()
    assert rewards.metrics == {"reward/valid_fraction": 0.0, "reward/json": 0.0}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts with different names"),
        ([Part("a"), Part("a")], "parts with different names"),
        ([Part("right"), Part("tags", judges="form")], "'tags' pays for form whatever the answer; make it a gate"),
        ([Part("right"), Part("tags", judges="form", only_if="wright")], "only_if='wright' is not one of"),
        ([Part("right"), Part("a", judges="form", only_if="b"), Part("b", judges="form", gate=True)], "must judge the answer"),
        ([Part("a", only_if="a")], "must judge the answer by itself"),
        ([Part("right"), Part("json", gate=True, only_if="right")], "a gate counts for all parts"),
        ([Part("right"), Part("json", gate=True, weight=2.0)], "a gate multiplies"),
        ([Part("right", weight=0.0)], "weight=0.0"),
        ([Part("right", weight=math.nan)], "weight=nan"),
        ([Part("json", gate=True)], "all gates"),
        ([Part("right", judges="format")], "judges='format'"),
    ],
)  # fmt: skip
def test_compositions_that_reward_the_wrong_thing_are_refused(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_parts(parts)


def test_values_must_fit_the_parts():
    with pytest.raises(ValueError, match=r"values for \['b'\] do not match the parts \['a'\]"):
        compose([Part("a")], {"b": np.zeros(3)})
    with pytest.raises(ValueError, match="vectors of one length"):
        compose([Part("a"), Part("b")], {"a": np.zeros(3), "b": np.zeros(2)})
