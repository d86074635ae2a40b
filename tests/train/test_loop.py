"""The loop: exact continuation after an end at any moment, roll-back, and the errors that come before any work."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from data.config import MixtureConfig, TokenizerConfig
from experiments.cli import load_train_config
from experiments.goodput import goodput
from tests.tiny import write_tiny_job
from train import loop
from train.checkpoint import Checkpoints
from train.config import PREEMPTED
from train.files import only_process_in
from train.loop import train
from train.metrics import read_jsonl


def terminate_at(beginning):
    """A log that sends SIGTERM to this process at the first line that begins so."""
    return lambda text: os.kill(os.getpid(), signal.SIGTERM) if text.startswith(beginning) else None


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The tiny job's config file, and its config after an uninterrupted run."""
    path = write_tiny_job(tmp_path_factory.mktemp("job"))
    config = load_train_config(str(path), [])
    assert train(config, log=lambda _: None) == 0
    return config


def files_of(config):
    """What must be the same bits however a run was interrupted."""
    checkpoints = Checkpoints(f"{config.run_dir}/checkpoints", keep=None)
    abstract = loop.make_trainer(config).abstract_state
    state, metadata = checkpoints.restore(config.steps, abstract)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    run_dir = pathlib.Path(config.run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    for timing in ("tokens_per_second", "train_seconds"):
        del result[timing]
    texts = [(run_dir / f"{name}.jsonl").read_bytes() for name in ("metrics", "samples")]
    return leaves, metadata, result, texts


def assert_same(config, other):
    leaves, *rest = files_of(config)
    other_leaves, *other_rest = files_of(other)
    assert len(leaves) == len(other_leaves)
    for a, b in zip(leaves, other_leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    assert rest == other_rest


def test_steps_are_updates_and_every_step_is_recorded_once(job):
    records = [record for record in read_jsonl(f"{job.run_dir}/metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, job.steps + 1))
    leaves, _, result, _ = files_of(job)
    assert any(leaf.shape == () and leaf == job.steps for leaf in leaves)
    assert result["tokens"] == job.steps * job.batch_size * job.data.seq_len
    assert records[-1]["loss"] < records[0]["loss"]


def test_two_runs_of_a_config_are_bitwise_equal(job, tmp_path):
    again = dataclasses.replace(job, run_dir=str(tmp_path / "again"))
    train(again, log=lambda _: None)
    assert_same(job, again)


def test_checkpoints_and_evaluations_tell_after_which_step_they_were_made(job):
    told = [(record["event"], record["at_step"]) for record in read_jsonl(f"{job.run_dir}/timing.jsonl") if "at_step" in record]
    assert [step for event, step in told if event == "checkpoint"] == [5, 10, 15, 20]
    assert [step for event, step in told if event == "eval"] == [8, 16, 20]


def test_what_came_before_the_loop_counts_as_its_start(job, tmp_path):
    config = dataclasses.replace(job, run_dir=shutil.copytree(job.run_dir, str(tmp_path / "run")))
    assert train(config, log=lambda _: None, began=time.perf_counter() - 1000) == 0
    timing = read_jsonl(f"{config.run_dir}/timing.jsonl")
    assert [record["event_seconds"] > 1000 for record in timing if record.get("event") == "start"] == [False, True]
    assert goodput(timing)["other"] > 1000


def test_a_run_that_dies_and_is_stopped_continues_to_the_same_bits(job, tmp_path):
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))

    def die(text):
        if text.startswith("step 8:"):
            raise Killed

    with pytest.raises(Killed):
        train(config, log=die)
    # Goes on, and is asked to stop after the evaluation of step 16, between two checkpoints.
    assert train(config, log=terminate_at("step 16:")) == PREEMPTED
    said = []
    assert train(config, log=said.append) == 0
    assert "continuing from the checkpoint of step 17" in said
    assert_same(job, config)


@pytest.mark.parametrize("axis", ["fsdp", pytest.param("tensor", marks=pytest.mark.slow)])
def test_a_sharded_run_survives_its_checkpoints_with_a_thread_for_each_device(tmp_path, axis):
    """In a process of its own, because this one has eight devices, and as many threads for them."""
    path = write_tiny_job(tmp_path)
    mesh = ["--config.cpu_devices=2", "--config.mesh.data=1", f"--config.mesh.{axis}=2"]
    command = [sys.executable, "-m", "experiments.cli", "run", f"--config={path}", *mesh, "--config.steps=6"]
    command += ["--config.checkpoint.every=3", "--config.writers=()"]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Checkpoints(str(tmp_path / "run" / "checkpoints"), keep=None).steps() == [3, 6]


def test_a_vocabulary_larger_than_the_tokenizers_is_never_drawn_from(job, tmp_path):
    model = dataclasses.replace(job.model, vocab_size=4096)
    wide = dataclasses.replace(job, model=model, run_dir=str(tmp_path / "wide"), steps=3)
    assert train(wide, log=lambda _: None) == 0
    samples = read_jsonl(f"{wide.run_dir}/samples.jsonl")
    assert len(samples) == 1


def test_ctrl_c_saves_and_stops(job, tmp_path):
    """A first one; the same command then continues."""
    config = dataclasses.replace(job, run_dir=str(tmp_path / "stopped"))
    stop = lambda text: os.kill(os.getpid(), signal.SIGINT) if text.startswith("step 8:") else None  # noqa: E731
    assert train(config, log=stop) == PREEMPTED
    assert 8 <= Checkpoints(f"{config.run_dir}/checkpoints", keep=None).steps()[-1] < config.steps
    assert train(config, log=lambda _: None) == 0
    assert_same(job, config)


@pytest.mark.parametrize(
    ("log", "status"), [(terminate_at("step 8:"), PREEMPTED), (lambda _: None, 0)], ids=["stopped", "last"]
)
def test_a_slow_write_counts_as_a_checkpoint_and_not_as_a_step(job, tmp_path, monkeypatch, log, status):
    """For the watchdog, which would end it after `step_seconds`, and for goodput; by a clock that only these tests move."""
    waits, clock = [], itertools.count(0, 0.02)

    class Slow(Checkpoints):
        def _finish_save(self):
            if self._saving is not None:
                waits.append(self._group.watchdog.doing)
                super()._finish_save()

    monkeypatch.setattr(loop, "Checkpoints", Slow)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock) + 1e6 * len(waits))
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    assert train(config, log=log) == status
    assert waits
    assert {doing.rpartition(" at step ")[0] for doing in waits} == {"checkpoint"}
    parts = goodput(read_jsonl(f"{config.run_dir}/timing.jsonl"))
    assert parts["checkpoint"] >= 1e6 * len(waits)


def test_a_torn_record_and_records_after_the_checkpoint_are_dropped(job, tmp_path):
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    train(config, log=terminate_at("step 8:"))
    with open(f"{config.run_dir}/metrics.jsonl", "a") as file:
        file.write('{"step": 999, "loss": 1.0}\n{"step": 1000, "lo')
    train(config, log=lambda _: None)
    assert_same(job, config)


def not_a_number(batch):
    return {**batch, "weights": batch["weights"] * np.float32(np.nan)}


def in_disorder(batch):
    """What follows a token has nothing to do with it, as in a corrupted shard."""
    return {**batch, "targets": np.random.default_rng(0).permutation(batch["targets"], axis=1)}


def poison(monkeypatch, bad_data_step, spoil=not_a_number):
    """Spoils one data step's batch, as bad records would."""
    real = loop.Batches.__getitem__

    def getitem(self, step):
        batch = real(self, step)
        return spoil(batch) if self.data_step(step) == bad_data_step else batch

    monkeypatch.setattr(loop.Batches, "__getitem__", getitem)


def test_a_bad_loss_rolls_back_skips_the_data_and_is_logged(job, tmp_path, monkeypatch):
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    poison(monkeypatch, bad_data_step=12)
    assert train(config, log=lambda _: None) == 0
    (incident,) = read_jsonl(f"{config.run_dir}/incidents.jsonl")
    # Step 13 read data step 12; the checkpoint of step 10 had seen data steps 0 to 9.
    assert incident["step"] == 13
    assert (incident["first_skipped"], incident["last_skipped"]) == (10, 12)
    records = [record for record in read_jsonl(f"{config.run_dir}/metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, job.steps + 1))
    healthy = [record for record in read_jsonl(f"{job.run_dir}/metrics.jsonl") if "loss" in record]
    assert records[:10] == healthy[:10]
    assert records[10]["loss"] != healthy[10]["loss"]
    assert np.isfinite([record["loss"] for record in records]).all()


@pytest.mark.slow
def test_an_incident_after_a_stop_skips_what_it_skips_without_one(job, tmp_path, monkeypatch):
    """SIGTERM saves steps 11 and 12; the bad loss of step 13 still goes back to the scheduled checkpoint of step 10."""
    poison(monkeypatch, bad_data_step=12)
    straight = dataclasses.replace(job, run_dir=str(tmp_path / "straight"))
    assert train(straight, log=lambda _: None) == 0
    stopped = dataclasses.replace(job, run_dir=str(tmp_path / "stopped"))
    settle = loop.Loop._settle
    for last in (10, 11):
        with monkeypatch.context() as patched:

            def stop_after(self, last=last):
                settle(self)
                if self.step == last:
                    os.kill(os.getpid(), signal.SIGTERM)

            patched.setattr(loop.Loop, "_settle", stop_after)
            assert train(stopped, log=lambda _: None) == PREEMPTED
    checkpoints = Checkpoints(f"{stopped.run_dir}/checkpoints", keep=None)
    assert checkpoints.steps()[-1] in (11, 12)
    assert train(stopped, log=lambda _: None) == 0
    assert_same(straight, stopped)
    assert checkpoints.steps() == Checkpoints(f"{straight.run_dir}/checkpoints", keep=None).steps() == [10, 15, 20]


@pytest.mark.parametrize("every", [7, pytest.param(200, marks=pytest.mark.slow)])
def test_an_incident_after_the_schedule_changed_does_not_begin_anew(job, tmp_path, monkeypatch, every):
    """Checkpoints of every fifth step and of a stop; none of them is one of every seventh."""
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    assert train(config, log=terminate_at("step 8:")) == PREEMPTED
    assert Checkpoints(f"{config.run_dir}/checkpoints", keep=None).steps()[-1] in (8, 9)
    poison(monkeypatch, bad_data_step=12)
    changed = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=every))
    assert train(changed, log=lambda _: None) == 0
    (incident,) = read_jsonl(f"{config.run_dir}/incidents.jsonl")
    assert (incident["first_skipped"], incident["last_skipped"]) == (5, 12)


@pytest.mark.slow
def test_an_incident_behind_a_damaged_scheduled_checkpoint_takes_the_newest_sound_one(job, tmp_path, monkeypatch):
    """Nothing is deleted before what replaces it has been read."""
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"), checkpoint=dataclasses.replace(job.checkpoint, every=10))
    stop = lambda self: (settle(self), self.step == 11 and os.kill(os.getpid(), signal.SIGTERM))[0]  # noqa: E731
    settle = loop.Loop._settle
    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "_settle", stop)
        assert train(config, log=lambda _: None) == PREEMPTED
    directory = pathlib.Path(config.run_dir) / "checkpoints"
    stopped = Checkpoints(str(directory), keep=None).steps()[-1]
    assert stopped in (11, 12)
    array = directory / "10/state/params/embedding/0.0"
    array.write_bytes(bytes([array.read_bytes()[0] ^ 1]) + array.read_bytes()[1:])
    poison(monkeypatch, bad_data_step=12)
    assert train(config, log=lambda _: None) == 0
    (incident,) = read_jsonl(f"{config.run_dir}/incidents.jsonl")
    assert (incident["first_skipped"], incident["last_skipped"]) == (stopped, 12)


def test_it_gives_up_after_the_set_number_of_incidents(job, tmp_path, monkeypatch):
    rollback = dataclasses.replace(job.rollback, max_incidents=1)
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"), rollback=rollback)
    real = loop.Batches.__getitem__

    def always_bad(self, step):
        return {**real(self, step), "weights": np.full((job.batch_size, job.data.seq_len), np.inf, np.float32)}

    monkeypatch.setattr(loop.Batches, "__getitem__", always_bad)
    with pytest.raises(RuntimeError, match="rollback.max_incidents=1"):
        train(config, log=lambda _: None)
    records = read_jsonl(f"{config.run_dir}/incidents.jsonl")
    assert [record.get("gave_up", False) for record in records] == [False, True]


def test_a_spike_rolls_back_and_a_healthy_run_does_not(job, tmp_path, monkeypatch):
    """By default, and at three times the usual learning rate."""
    optimizer = dataclasses.replace(job.optimizer, learning_rate=1e-2)
    checkpoints = dataclasses.replace(job.checkpoint, every=40)
    settings = dataclasses.replace(job.eval, every=1000, sample_prompts=())
    config = dataclasses.replace(job, steps=120, optimizer=optimizer, checkpoint=checkpoints, eval=settings, writers=())
    config = dataclasses.replace(config, run_dir=str(tmp_path / "healthy"))
    assert train(config, log=lambda _: None) == 0
    assert read_jsonl(f"{config.run_dir}/incidents.jsonl") == []
    healthy = [record["loss"] for record in read_jsonl(f"{config.run_dir}/metrics.jsonl") if "loss" in record]

    poison(monkeypatch, bad_data_step=99, spoil=in_disorder)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "spoilt"))
    assert train(config, log=lambda _: None) == 0
    (incident,) = read_jsonl(f"{config.run_dir}/incidents.jsonl")
    assert (incident["step"], incident["first_skipped"], incident["last_skipped"]) == (100, 80, 99)
    loss, median = map(float, re.fullmatch(r"loss (.*) is above 2.0 x the recent median (.*)", incident["reason"]).groups())
    assert median == pytest.approx(np.median(healthy[49:99]), rel=1e-3)
    assert loss > 2 * median
    spoilt = [record["loss"] for record in read_jsonl(f"{config.run_dir}/metrics.jsonl") if "loss" in record]
    assert spoilt[:80] == healthy[:80]
    assert max(spoilt[80:]) < median * 1.2


class Losses(loop.Loop):
    """What a loop knows of the losses so far; data steps 5 and 6 were skipped."""

    def __init__(self, config, **rollback):
        self.config = dataclasses.replace(config, rollback=dataclasses.replace(config.rollback, **rollback))
        self.losses = collections.deque(maxlen=self.config.rollback.window)

    def data_step(self, step):
        return step if step < 5 else step + 2

    def check(self, *losses, first_step):
        for step, loss in enumerate(losses, start=first_step):
            self._check_loss(step, {"loss": loss, "grad_norm": 1.0, "param_norm": 1.0})


def test_a_spike_is_measured_by_the_median_of_the_window(job):
    losses = Losses(job, spike_factor=2.0, window=3)
    losses.check(1.0, 9.0, 1.0, 1.1, 1.9, first_step=10)  # the first three are no measure yet, whatever they are
    with pytest.raises(loop.Incident, match="step 15: loss 2.3 is above 2.0 x the recent median 1.1"):
        losses.check(2.3, first_step=15)
    Losses(job, spike_factor=0.0, window=3).check(1.0, 1.0, 1.0, 99.0, first_step=10)


def test_losses_below_a_nat_are_no_spikes(job):
    losses = Losses(job, window=3)
    losses.check(0.1, 0.1, 0.1, 0.3, 0.02, 1.9, first_step=10)
    with pytest.raises(loop.Incident, match="step 16: loss 2.1 is above 2.0 x the recent median 0.3"):
        losses.check(2.1, first_step=16)


def test_another_mixture_has_other_losses(job):
    """That of the tiny job's second one, from data step 7 on, which is that of step 6."""
    losses = Losses(job, window=3)
    losses.check(1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.1, 4.2, first_step=1)
    with pytest.raises(loop.Incident, match="step 9: loss 9 is above 2.0 x the recent median 4.1"):
        losses.check(9.0, first_step=9)
    with pytest.raises(loop.Incident, match="step 5: loss 4 "):
        Losses(job, window=3).check(1.0, 1.0, 1.0, 1.0, 4.0, first_step=1)


def test_the_directory_of_another_config_is_refused_before_any_work(job, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda *_, **__: pytest.fail("data was prepared"))
    other = dataclasses.replace(job, steps=21, seed=5)
    with pytest.raises(ValueError, match=r"(?s)another config.*seed \(there 0, here 5\), steps \(there 20, here 21\)"):
        train(other, log=lambda _: None)


def test_a_mixture_may_change_at_a_step_that_is_still_to_come(job, tmp_path):
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    assert train(config, log=terminate_at("step 8:")) == PREEMPTED

    def with_mixture(start_step):
        mixtures = (*job.data.mixtures, MixtureConfig(start_step, (("a", 1),)))
        return dataclasses.replace(config, data=dataclasses.replace(job.data, mixtures=mixtures))

    with pytest.raises(ValueError, match="data.mixtures"):
        train(with_mixture(8), log=lambda _: None)
    assert train(with_mixture(12), log=lambda _: None) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["mixtures"][-1]["start_step"] == 12
    changed, unchanged = (read_jsonl(f"{run_dir}/metrics.jsonl") for run_dir in (config.run_dir, job.run_dir))
    assert [a == b for a, b in zip(changed, unchanged, strict=True) if a["step"] <= 12] == [True] * 13
    assert changed[13]["loss"] != unchanged[13]["loss"]


def test_skipped_data_counts_where_a_mixture_may_change(job, tmp_path, monkeypatch):
    """Rolled back from step 13 to 10 and stopped after step 15, a run has seen data steps 0 to 17."""
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    poison(monkeypatch, bad_data_step=12)
    settle = loop.Loop._settle
    with monkeypatch.context() as patched:
        patched.setattr(
            loop.Loop, "_settle", lambda self: (settle(self), self.step == 14 and os.kill(os.getpid(), signal.SIGTERM))[0]
        )
        assert train(config, log=lambda _: None) == PREEMPTED
    (incident,) = read_jsonl(f"{config.run_dir}/incidents.jsonl")
    seen = Checkpoints(f"{config.run_dir}/checkpoints", keep=None).steps()[-1] + 3
    assert (incident["first_skipped"], incident["last_skipped"]) == (10, 12)
    assert seen in (17, 18)

    def with_mixture(start_step):
        mixtures = (*job.data.mixtures, MixtureConfig(start_step, (("a", 1),)))
        return dataclasses.replace(config, data=dataclasses.replace(job.data, mixtures=mixtures))

    monkeypatch.setattr(loop, "prepare", lambda *_, **__: pytest.fail("the config was accepted"))
    for start_step in (seen - 3, seen - 1):
        with pytest.raises(ValueError, match="data.mixtures"):
            train(with_mixture(start_step), log=lambda _: None)
    with pytest.raises(pytest.fail.Exception, match="the config was accepted"):
        train(with_mixture(seen), log=lambda _: None)


def test_a_refused_start_does_not_claim_the_directory(job, tmp_path):
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"), steps=3)
    missing = dataclasses.replace(job.data.sources[0], path=str(tmp_path / "nowhere.txt"))
    refused = dataclasses.replace(config, data=dataclasses.replace(job.data, sources=(missing, job.data.sources[1])))
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt"):
        train(refused, log=lambda _: None)
    assert train(config, log=lambda _: None) == 0


def test_a_run_is_not_continued_on_other_data(job, tmp_path):
    corpus = tmp_path / "text"
    shutil.copytree(job.data.sources[0].path, corpus)
    source = dataclasses.replace(job.data.sources[0], path=str(corpus))
    data = dataclasses.replace(job.data, sources=(source,), mixtures=(), cache_dir=str(tmp_path / "cache"))
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"), data=data)
    assert train(config, log=terminate_at("step 8:")) == PREEMPTED
    (corpus / "0.txt").write_text("another text " * 50)
    with pytest.raises(ValueError, match=r"data of .* has changed since the run began \(.*content_hash"):
        train(config, log=lambda _: None)


@pytest.mark.slow
def test_the_text_may_have_moved(tmp_path):
    """It is compared by content, and may lie elsewhere when a run is continued."""
    path = write_tiny_job(tmp_path)
    config = load_train_config(str(path), ["--config.writers=()"])
    assert train(config, log=terminate_at("step 8:")) == PREEMPTED
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    moved = load_train_config(str(path), ["--config.writers=()", f"--config.data.sources.0.path={tmp_path / 'elsewhere'}"])
    assert train(moved, log=lambda _: None) == 0


def test_prompts_that_cannot_be_continued_are_refused_before_the_model_is_compiled(job, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Loop", lambda *_: pytest.fail("the model was compiled"))
    evaluation = dataclasses.replace(job.eval, sample_tokens=job.model.max_seq_len)
    with pytest.raises(ValueError, match=r"eval.sample_tokens=128 that exceeds model.max_seq_len=128"):
        train(dataclasses.replace(job, run_dir=str(tmp_path / "run"), eval=evaluation), log=lambda _: None)


def test_windows_of_incidents_that_overlap_are_one(job):
    records = [{"first_skipped": first, "last_skipped": last} for first, last in ((37, 38), (60, 61), (20, 40), (62, 63))]
    windows = loop.skipped_windows(records)
    assert windows == ((20, 40), (60, 63))
    batches = object.__new__(loop.Batches)
    batches._skipped = windows
    served = [batches.data_step(step) for step in range(60)]
    assert served == [step for step in range(85) if not (20 <= step <= 40 or 60 <= step <= 63)]


def test_an_incident_behind_a_damaged_checkpoint_and_a_kill(job, tmp_path, monkeypatch):
    """Incident after checkpoint 15; then checkpoint 15 is damaged, and an incident at the same data comes again."""
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    poison(monkeypatch, bad_data_step=16)
    assert train(config, log=terminate_at("went back to step 15")) == PREEMPTED
    for path in (tmp_path / "run" / "checkpoints").glob("1[5-9]/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    poison(monkeypatch, bad_data_step=12)
    assert train(config, log=lambda _: None) == 0
    assert loop.skipped_windows(read_jsonl(f"{config.run_dir}/incidents.jsonl")) == ((10, 12), (15, 16))
    records = [record for record in read_jsonl(f"{config.run_dir}/metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, job.steps + 1))


def test_a_second_process_in_the_same_directory_is_refused(job):
    with only_process_in(pathlib.Path(job.run_dir)), pytest.raises(RuntimeError, match="another process is running"):
        train(job, log=lambda _: None)


def test_a_directory_that_cannot_be_written_is_refused(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"choose another --config.run_dir"):
        train(dataclasses.replace(job, run_dir=str(tmp_path / "file" / "run")), log=lambda _: None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.tensor=3", "does not fit 8 devices"),
        ("mesh.tensor=8", "heads = 4 does not divide over tensor=8"),
        ("mesh.expert=8", "expert=8 has nothing to split"),
        ("model.attention_backend=flash", "flash"),
        ("optimizer.schedule.warmup=21 steps", "more than the 20 of the run"),
        ("writers=('wandb',)", "needs the package wandb"),
    ],
)
def test_a_refused_run_leaves_nothing_behind(job, tmp_path, monkeypatch, override, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    overrides = [f"--config.run_dir={tmp_path / 'run'}", f"--config.{override}"]
    config = load_train_config(f"{pathlib.Path(job.run_dir).parent}/tiny.py", overrides)
    with pytest.raises((ValueError, ModuleNotFoundError), match=message):
        train(config, log=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_any_work(job, tmp_path, monkeypatch):
    """The parameters, their moving average and Adam's two moments, for the three kept and one that is being written."""
    sizes = [path.stat().st_size for path in pathlib.Path(job.run_dir, "checkpoints/20/state").rglob("0*") if path.is_file()]
    state_bytes = sum(sizes)
    disk = {"free": 4 * state_bytes - 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(**disk))
    monkeypatch.setattr(loop, "prepare", lambda *_, **__: pytest.fail("data was prepared"))
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    mebibytes = [f"{size / 2**20:.1f} MiB" for size in (state_bytes, disk["free"])]
    message = rf"for 4 more checkpoints of {mebibytes[0]}, .*disk has {mebibytes[1]} free.* lower checkpoint\.keep"
    with pytest.raises(OSError, match=message):
        train(config, log=lambda _: None)
    # A run that saves once, at its end, and perhaps once more on SIGTERM.
    short = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=20))
    disk["free"] = 2 * state_bytes - 1
    with pytest.raises(OSError, match="need room for 2 more checkpoints"):
        train(short, log=lambda _: None)
    for enough, of in ((2, short), (4, config), (1, job)):  # three of the job's are there
        disk["free"] = enough * state_bytes
        with pytest.raises(pytest.fail.Exception, match="data was prepared"):
            train(of, log=lambda _: None)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(job, tmp_path, monkeypatch):
    model = dataclasses.replace(job.model, vocab_size=299)
    with pytest.raises(ValueError, match="set model.vocab_size to 300 or more"):
        dataclasses.replace(job, model=model)
    # How many characters a text has is known when it has been read.
    data = dataclasses.replace(job.data, tokenizer=TokenizerConfig(kind="chars", document_boundaries=False))
    model = dataclasses.replace(job.model, vocab_size=2)
    config = dataclasses.replace(job, model=model, data=data, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(loop, "Loop", lambda *_: pytest.fail("the model was compiled"))
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, but model.vocab_size=2"):
        train(config, log=lambda _: None)
    assert not pathlib.Path(config.run_dir).exists()


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(job, tmp_path):
    config = dataclasses.replace(job, run_dir=str(tmp_path / "run"))
    shutil.copytree(job.run_dir, config.run_dir)
    array = max((tmp_path / "run" / "checkpoints" / "20").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    said = []
    train(config, log=said.append)
    assert any("checkpoint 20 is damaged" in text for text in said)
    assert "continuing from the checkpoint of step 15" in said
    assert_same(job, config)
