"""The parts of a run's time add up to its wall time, whatever interrupted it, and redone work counts as lost."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import report
from experiments.cli import main
from experiments.goodput import PARTS, goodput
from tests.tiny import write_tiny_job
from train.metrics import read_jsonl


class Clock:
    """Writes a time line as the loop does, and keeps its own account of where the time went."""

    def __init__(self):
        self.now, self.began, self.records = 1_000_000.0, 1_000_000.0, []
        self.account = dict.fromkeys(PARTS, 0.0)
        self.kept = []  # (step, seconds) of the steps that count so far

    def spend(self, seconds, part):
        self.now += seconds
        self.account[part] += seconds

    def start(self, down, startup):
        if self.records:
            self.spend(down, "down")
        else:
            self.began = self.now
        self.spend(startup, "other")
        self.base = max((record["seconds"] for record in self.records), default=0.0)
        self.zero = self.now
        self.write("start", startup, unix_time=self.now)

    def write(self, event, seconds, **more):
        self.records.append({"event": event, "seconds": self.base + self.now - self.zero, "event_seconds": seconds, **more})

    def event(self, name, seconds, part, **more):
        self.spend(seconds, part)
        self.write(name, seconds, **more)

    def restore(self, seconds, step):
        self.event("restore", seconds, "restore", restored_step=step)
        lost = sum(spent for number, spent in self.kept if number > step)
        self.kept = [item for item in self.kept if item[0] <= step]
        self.account["lost steps"] += lost
        self.account["step"] -= lost

    def step(self, number, seconds, stall):
        self.spend(stall, "data stall")
        self.spend(seconds, "step")
        self.kept.append((number, seconds))
        self.records.append({"step": number, "seconds": self.base + self.now - self.zero, "data_seconds": stall})


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_those_of_a_run_with_kills_and_roll_backs(seed):
    rng = random.Random(seed)
    clock = Clock()
    saved = 0
    for _ in range(rng.randint(1, 4)):
        clock.start(down=rng.uniform(1, 100), startup=rng.uniform(0, 9))
        clock.event("compile", rng.uniform(1, 20), "compile")
        clock.restore(rng.uniform(0, 3), saved)
        step = saved
        for _ in range(rng.randint(0, 40)):
            step += 1
            clock.step(step, rng.uniform(0.1, 2), stall=rng.choice((0.0, 0.3)))
            if rng.random() < 0.2:
                clock.event("eval", rng.uniform(1, 5), "evaluation")
            if rng.random() < 0.2:
                clock.event("checkpoint", rng.uniform(0, 2), "checkpoint")
                saved = step
            if rng.random() < 0.05:
                step = saved
                clock.restore(rng.uniform(0, 3), saved)
    parts = goodput(clock.records)
    assert parts == pytest.approx(clock.account, abs=1e-6)
    assert sum(parts.values()) == pytest.approx(clock.now - clock.began, abs=1e-6)


def test_of_steps_recorded_together_the_share_after_the_checkpoint_is_lost():
    clock = Clock()
    clock.start(0, 0)
    clock.restore(1, 0)
    clock.step(10, 20.0, stall=0.0)
    clock.restore(1, 4)
    clock.step(10, 12.0, stall=0.0)
    parts = goodput(clock.records)
    assert parts["lost steps"] == pytest.approx(12.0)
    assert parts["step"] == pytest.approx(8.0 + 12.0)


@pytest.mark.parametrize("log_every", [1, 3, 100])
@pytest.mark.parametrize("seed", range(10))
def test_steps_between_two_records_are_lost_where_they_are_done_again(seed, log_every):
    """Steps of one length with checkpoints after any of them, some of which do not commit; each kill is after a record."""
    rng = random.Random(seed)
    clock = Clock()
    saved = 0
    for _ in range(4):
        clock.start(down=9.0, startup=1.0)
        clock.restore(0.5, saved)
        for number in range(saved + 1, saved + rng.randint(2, 9)):
            clock.step(number, 1.5, stall=0.0)
            if rng.random() < 0.3:
                clock.event("eval", 5.0, "evaluation", at_step=number)
            if rng.random() < 0.3:
                clock.event("checkpoint", 0.2, "checkpoint", at_step=number)
                saved = rng.choice((saved, number))
        clock.event("checkpoint", 0.2, "checkpoint", at_step=number)
    records = [record for record in clock.records if "event" in record or record["step"] % log_every == 0]
    assert goodput(records) == pytest.approx(clock.account, abs=1e-6)


def test_steps_up_to_a_checkpoint_that_never_committed_are_lost():
    clock = Clock()
    clock.start(0, 0)
    clock.restore(1, 0)
    clock.step(100, 200.0, stall=10.0)
    clock.event("checkpoint", 1.0, "checkpoint", at_step=100)
    clock.spend(40.0, "step")
    clock.event("checkpoint", 1.0, "checkpoint", at_step=120)
    clock.start(60, 2)
    clock.restore(1, 100)
    parts = goodput(clock.records)
    assert parts["step"] == pytest.approx(200.0)
    assert parts["lost steps"] == pytest.approx(40.0)


def test_steps_since_the_last_record_are_lost_in_a_roll_back_to_it():
    clock = Clock()
    clock.start(0, 0)
    clock.restore(1, 0)
    clock.step(100, 200.0, stall=0.0)
    clock.event("checkpoint", 1.0, "checkpoint", at_step=100)
    clock.spend(30.0, "step")
    clock.restore(1, 100)
    parts = goodput(clock.records)
    assert parts["step"] == pytest.approx(200.0)
    assert parts["lost steps"] == pytest.approx(30.0)


def test_waiting_for_batches_is_taken_from_both_sides_of_a_checkpoint_between_two_step_records():
    clock = Clock()
    clock.start(0, 0)
    clock.restore(1, 0)
    clock.step(100, 100.0, stall=0.0)
    clock.spend(60.0, "step")  # of which 20 are waiting for batches
    clock.event("checkpoint", 1.0, "checkpoint", at_step=140)
    clock.spend(90.0, "step")  # of which 30
    clock.records.append({"step": 200, "seconds": clock.base + clock.now - clock.zero, "data_seconds": 50.0})
    clock.restore(1, 140)
    parts = goodput(clock.records)
    assert {name: parts[name] for name in ("step", "data stall", "lost steps")} == pytest.approx(
        {"step": 140.0, "data stall": 50.0, "lost steps": 60.0}
    )


def test_time_lines_of_older_runs_have_no_starts_and_no_stalls():
    records = [
        {"event": "compile", "seconds": 9.0, "event_seconds": 9.0},
        {"event": "restore", "seconds": 9.5, "event_seconds": 0.5},
        {"step": 1, "seconds": 11.0, "step_seconds": 1.5},
    ]
    parts = {part: seconds for part, seconds in goodput(records).items() if seconds}
    assert parts == {"compile": 9.0, "restore": 0.5, "step": 1.5}
    assert sum(goodput([]).values()) == 0


def test_a_killed_run_accounts_for_its_wall_time(tmp_path, capsys):
    config_file = write_tiny_job(tmp_path)
    command = [sys.executable, "-m", "experiments.cli", "run", f"--config={config_file}", "--config.writers=()"]
    command += ["--config.model.num_layers=1", "--config.model.window_pattern=(8,)", "--config.eval.sample_prompts=()"]
    run_dir, root = tmp_path / "run", Path(__file__).parents[2]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--config.checkpoint.every=10"], cwd=root, stdout=log, stderr=log)
        while not any(record.get("step", 0) >= 13 for record in read_jsonl(run_dir / "timing.jsonl")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*command, "--config.checkpoint.every=10"], cwd=root, stdout=log, stderr=log, check=True)
    timing = read_jsonl(run_dir / "timing.jsonl")
    parts = goodput(timing)
    # The file system's clock: when the last record was written, less when the first start began.
    first = timing[0]["unix_time"] - timing[0]["event_seconds"]
    assert sum(parts.values()) == pytest.approx((run_dir / "timing.jsonl").stat().st_mtime - first, abs=1.0)
    restored = [record["restored_step"] for record in timing if "restored_step" in record]
    assert restored in ([0, 0], [0, 10])
    assert all(parts[part] > 0 for part in ("step", "compile", "restore", "checkpoint", "evaluation", "lost steps", "down"))
    assert main(["goodput", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"{sum(parts.values()):.1f} s" in printed.splitlines()[-1]
    page = report.write_report(run_dir).read_text()
    assert "lost steps" in page
    assert "down" in page


def test_a_directory_without_a_time_line_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert main(["goodput", str(tmp_path)]) == 1
    assert "has no timing.jsonl" in capsys.readouterr().err
