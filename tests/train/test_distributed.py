"""Real processes on loopback: they train like one, agree where to stop, and leave together when one of them is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.distributed
from data.loader import Batches
from data.prepare import prepare
from experiments.cli import load_train_config, parse
from experiments.sampling import sample
from tests.tiny import write_tiny_job
from train.checkpoint import Checkpoints, digests
from train.config import PREEMPTED, DeadlineConfig
from train.distributed import Group, MissingProcesses, Place, find_place, meet
from train.metrics import read_jsonl
from train.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
STEPS = 100
# Little to compile, and long enough to be interrupted.
OVERRIDES = ["--config.model.num_layers=1", "--config.model.window_pattern=(8,)", "--config.optimizer.ema_decay=0"]
OVERRIDES += [
    f"--config.steps={STEPS}",
    "--config.batch_size=64",
    "--config.eval.every=70",
    "--config.eval.sample_prompts=()",
    "--config.writers=()",
]
# Sums over rows are added up in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(config_file):
    """The directory of a run of one process that nothing interrupted."""
    (process,) = start(config_file, config_file.parent / "whole", 1)
    assert end([process]) == [0], said(process)
    return config_file.parent / "whole"


@pytest.fixture(scope="module")
def sampled(whole):
    """What one process continues the prompt with, by the weights of that run."""
    ((_, text),) = sample(parse(["sample", str(whole), "--prompt=the", "--temperature=0", "--max-tokens=5"]))
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(command: list[str], log: Path) -> subprocess.Popen:
    """In a file, so that nobody waits for a reader; `said` reads it."""
    with log.open("w") as out:
        env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
    process.log = log
    return process


def start(config_file: Path, run_dir: Path, processes: int, *more: str) -> list[subprocess.Popen]:
    command = ["-m", "experiments.cli", "run", f"--config={config_file}", f"--config.run_dir={run_dir}", *OVERRIDES, *more]
    address = f"127.0.0.1:{free_port()}"
    flags = [[f"--coordinator={address}", f"--processes={processes}", f"--process-id={i}"] for i in range(processes)]
    if processes == 1:
        flags = [[]]
    return [spawn([*command, *place], run_dir.with_name(f"{run_dir.name}-{i}.log")) for i, place in enumerate(flags)]


def end(processes: list[subprocess.Popen], seconds: float = 300.0) -> list[int]:
    """The exit statuses, once all have ended; they are killed and the test fails after so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(process: subprocess.Popen) -> str:
    return process.log.read_text(errors="replace")


def wait_for_step(processes: list[subprocess.Popen], run_dir: Path, step: int) -> None:
    while not any(record["step"] >= step for record in read_jsonl(run_dir / "metrics.jsonl")):
        assert all(process.poll() is None for process in processes), "".join(map(said, processes))
        time.sleep(0.05)


def assert_like(run_dir: Path, whole: Path) -> None:
    """The same records with the same numbers but for rounding, and no trace of an interruption."""
    records, expected = (read_jsonl(path / "metrics.jsonl") for path in (run_dir, whole))
    assert [record.keys() for record in records] == [record.keys() for record in expected]
    for record, other in zip(records, expected, strict=True):
        assert record["step"] == other["step"]
        for key, value in record.items():
            # A token more or less is predicted right where two are as likely but for rounding.
            atol = 1e-3 if key == "accuracy" else 0.0
            np.testing.assert_allclose(value, other[key], rtol=TOLERANCE, atol=atol, err_msg=f"{key} of step {record['step']}")
    states = []
    for path in (run_dir, whole):
        checkpoints = Checkpoints(str(path / "checkpoints"), keep=None)
        assert not checkpoints.verify_step(STEPS).problem
        saved = json.loads((path / f"checkpoints/{STEPS}/manifest/metadata").read_text())["leaves"]
        abstract = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in saved.items()}
        states.append(checkpoints.restore(STEPS, abstract)[0])
    for name, leaf in states[0].items():
        # By norm: Adam makes a step of full size out of a gradient that is nothing but rounding.
        difference = np.linalg.norm(np.subtract(leaf, states[1][name], dtype=np.float64))
        assert difference <= 1e-3 * np.linalg.norm(states[1][name]), name


# --- Training ---------------------------------------------------------------------------------------------------------


def test_a_run_of_two_processes_that_one_is_asked_to_stop_ends_on_one_process_as_if_nothing_had_been(config_file, whole):
    run_dir = config_file.parent / "stopped"
    processes = start(config_file, run_dir, 2)
    wait_for_step(processes, run_dir, 3)
    processes[1].send_signal(signal.SIGTERM)
    assert end(processes, 60) == [PREEMPTED, PREEMPTED], "".join(map(said, processes))
    for process in processes:
        assert f"process 1 ({socket.gethostname()}, pid {processes[1].pid}) was asked to stop" in said(process)
    (last,) = start(config_file, run_dir, 1)
    assert end([last]) == [0], said(last)
    assert "continuing from the checkpoint of step" in said(last)
    assert_like(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh"), [(2, {}), (4, {}), (4, {"data": 2, "tensor": 2}), (4, {"data": 1, "fsdp": 2, "context": 2})]
)
def test_processes_train_and_sample_like_one(config_file, whole, sampled, processes, mesh):
    run_dir = config_file.parent / f"{processes}-{'-'.join(mesh)}"
    more = ["--config.eval.sample_prompts=('the',)", "--config.eval.sample_temperature=0"]
    more += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    job = start(config_file, run_dir, processes, *more)
    assert end(job) == [0] * processes, "".join(map(said, job))
    # All of them sample, one writes.
    samples = read_jsonl(run_dir / "samples.jsonl")
    assert [record["step"] for record in samples] == [70, STEPS]
    assert samples[-1] == {"step": STEPS, "prompt": "the", "text": sampled}
    assert_like(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "victim", "then"), [(2, 0, 4), (4, 1, 2)])
@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_when_one_is_gone_all_leave_and_another_number_goes_on(config_file, whole, processes, victim, then, which):
    run_dir = config_file.parent / f"{which.name}-{victim}-of-{processes}"
    job = start(config_file, run_dir, processes)
    wait_for_step(job, run_dir, 10)
    job[victim].send_signal(which)
    others = [process for i, process in enumerate(job) if i != victim]
    statuses = end(job if which == signal.SIGTERM else others, 30)
    job[victim].kill()
    job[victim].wait()
    # 42, or a signal: both ask for a restart.
    assert all(status == PREEMPTED or status < 0 for status in statuses), statuses
    for process in others:
        words = said(process)
        named = f"process {victim} ({socket.gethostname()}, pid {job[victim].pid})"
        if which == signal.SIGTERM:
            assert f"{named} was asked to stop" in words
        elif victim == 0:  # JAX may end a process at once when the coordinator is gone.
            assert "process 0, the coordinator, has not answered" in words or "the leader task" in words, words
        else:
            heard = f"nothing was heard from {named}" in words or f"gone is {named}" in words
            assert heard or f"(stopped sending heartbeats):\n{victim}" in words, words
    again = start(config_file, run_dir, then)
    assert end(again) == [0] * then, "".join(map(said, again))
    assert_like(run_dir, whole)


POISONED = """
import sys
import numpy as np
from experiments.cli import load_train_config
from model.xla import configure
from train import loop
from train.distributed import find_place, join

config = load_train_config(sys.argv[1], sys.argv[5:])
configure(cpu_devices=1)
group = join(find_place(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), 60.0), config.deadlines)
real = loop.Batches.__getitem__

def getitem(self, step):
    batch = real(self, step)
    # Row 5 of the batch, on whichever process it lives.
    batch["weights"][(self._host_rows == 5) & (self.data_step(step) == 12)] = np.nan
    return batch

loop.Batches.__getitem__ = getitem
sys.exit(loop.train(config, lambda line: print(line, flush=True), group))
"""


@pytest.mark.slow
def test_a_bad_loss_of_one_rolls_all_back_to_where_one_process_would_go(config_file):
    def incidents(processes):
        run_dir = config_file.parent / f"poisoned-{processes}"
        more = [*OVERRIDES, f"--config.run_dir={run_dir}"]
        address = f"127.0.0.1:{free_port()}"
        command = ["-c", POISONED, str(config_file), address, str(processes)]
        logs = [run_dir.with_name(f"{run_dir.name}-{i}.log") for i in range(processes)]
        job = [spawn([*command, str(i), *more], log) for i, log in enumerate(logs)]
        assert end(job) == [0] * processes, "".join(map(said, job))
        (incident,) = read_jsonl(run_dir / "incidents.jsonl")
        return run_dir, {key: value for key, value in incident.items() if key != "seconds"}

    (alone, expected), (run_dir, incident) = incidents(1), incidents(2)
    assert incident == expected
    assert (incident["step"], incident["first_skipped"], incident["last_skipped"]) == (13, 10, 12)
    assert_like(run_dir, alone)


@pytest.mark.slow
def test_what_is_killed_and_goes_on_with_as_many_has_the_same_bits(config_file):
    straight, broken = (config_file.parent / name for name in ("straight", "broken"))
    job = start(config_file, straight, 2)
    assert end(job) == [0, 0], "".join(map(said, job))
    job = start(config_file, broken, 2)
    wait_for_step(job, broken, 12)
    job[1].kill()
    end(job, 30)
    job = start(config_file, broken, 2)
    assert end(job) == [0, 0], "".join(map(said, job))
    assert (broken / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    manifests = [json.loads((path / f"checkpoints/{STEPS}/manifest/metadata").read_text()) for path in (straight, broken)]
    assert manifests[0] == manifests[1]


TALK = """
import json, sys, time
import jax
from data.loader import Batches
from data.prepare import prepare
from experiments.cli import load_train_config
from model.xla import configure
from train.checkpoint import digests
from train.distributed import MissingProcesses, Place, global_batch, join, local_rows
from train.step import make_trainer

config = load_train_config(sys.argv[1], sys.argv[5:])
processes, index = int(sys.argv[3]), int(sys.argv[4])
configure(cpu_devices=1)
group = join(Place(sys.argv[2], processes, index), config.deadlines)
sharding = make_trainer(config).batch_sharding
shape = (config.batch_size, config.data.seq_len)
rows = local_rows(sharding, shape)
batches = Batches(prepare(config.data, log=str), config.data, batch_size=shape[0], seed=0, rows=rows)
seen = [digests(global_batch(batches[step], rows, sharding, shape[0])) for step in range(12)]
problem = missing = ""
try:
    group.compare({"colour": "green" if index == 0 else "blue", "taste": "good"})
except ValueError as error:
    problem = str(error)
if index == 0:
    try:
        group.barrier("nobody else comes", 1.0)
    except MissingProcesses as error:
        missing = str(error)
print(json.dumps({"rows": rows.tolist(), "digests": seen, "problem": problem, "missing": missing}))
group.barrier("end", 30)
jax.distributed.shutdown()
"""


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, {}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(2, {"data": 1, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"data": 1, "context": 2, "fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_batches_are_the_same_bits_and_who_differs_or_is_missing_is_named(config_file, tmp_path, processes, mesh):
    overrides = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    address = f"127.0.0.1:{free_port()}"
    config = load_train_config(str(config_file), overrides)
    batches = Batches(prepare(config.data, log=lambda _: None), config.data, batch_size=config.batch_size, seed=0)
    job = [
        spawn(["-c", TALK, str(config_file), address, str(processes), str(i), *overrides], tmp_path / f"{i}.log")
        for i in range(processes)
    ]
    expected = [digests({name: jnp.asarray(value) for name, value in batches[step].items()}) for step in range(12)]
    assert end(job, 120) == [0] * processes, "".join(map(said, job))
    told = [json.loads(said(process).splitlines()[-1]) for process in job]
    assert all(record["digests"] == expected for record in told)
    assert set().union(*(record["rows"] for record in told)) == set(range(config.batch_size))
    if not mesh:
        assert sum(len(record["rows"]) for record in told) == config.batch_size
    for record in told:
        assert (
            f"process 1 ({socket.gethostname()}, pid {job[1].pid}): colour (blue instead of green): that" in record["problem"]
        )
    for i in range(1, processes):
        assert f"process {i} ({socket.gethostname()}, pid {job[i].pid})" in told[0]["missing"]
    assert "'nobody else comes'" in told[0]["missing"]


# --- Coming together ----------------------------------------------------------------------------------------------------


def meetings(places: list[Place], seconds: float) -> list[Exception | None]:
    """What each of the places raises when they meet."""
    outcomes: list[Exception | None] = [None] * len(places)

    def attend(number: int) -> None:
        try:
            meet(places[number], seconds)
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=attend, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def places(*ids: int, processes: int) -> list[Place]:
    address = f"127.0.0.1:{free_port()}"
    return [Place(address, processes, i) for i in ids]


def test_all_come_and_the_port_is_free_again():
    there = places(2, 0, 1, 3, processes=4)
    assert meetings(there, 20.0) == [None] * 4
    assert meetings(there, 20.0) == [None] * 4


def test_who_does_not_come_is_named_to_all_who_did():
    for error in meetings(places(0, 2, 4, processes=5), 1.0):
        assert isinstance(error, MissingProcesses)
        assert "for process 1, 3 of 5" in str(error)


def test_contradicting_flags_are_told():
    there = places(0, 1, processes=2)
    outcomes = meetings([there[0], Place(there[0].coordinator, 3, 1)], 10.0)
    assert [str(error) for error in outcomes] == [str(outcomes[0])] * 2
    assert "process 1 was started with --processes=3, process 0 with --processes=2" in str(outcomes[0])
    outcomes = meetings(places(0, 1, 1, processes=3), 1.0)
    assert any("--process-id=1 too" in str(error) for error in outcomes[1:])


def test_who_speaks_another_language_at_the_port_is_not_counted():
    host, guest = places(0, 1, processes=2)

    def shout():
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", int(host.coordinator.rpartition(":")[2]))) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.01)

    stranger = threading.Thread(target=shout)
    stranger.start()
    late = threading.Timer(0.5, lambda: meet(guest, 10.0))
    late.start()
    meet(host, 10.0)
    late.join()
    stranger.join()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 2, None), "--processes without --coordinator, --process-id"),
        (("host:1234", None, 0), "--coordinator, --process-id without --processes"),
        (("host", 2, 0), "'host' is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        (("host:1234", 2, 2), "--process-id=2 must lie in 0..1"),
    ],
)
def test_flags_that_do_not_describe_a_place_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        find_place(*flags, start_seconds=1.0)


def test_flags_win_over_the_environment_and_without_either_a_process_is_alone(monkeypatch):
    assert find_place(None, None, None, 1.0) == Place()
    slurm = {"JOB_ID": "17", "STEP_NODELIST": "node[003-004]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_place(None, None, None, 1.0) == Place(f"node003:{65535 - 4096 + 1 + 17}", 2, 1, (0,))
    assert find_place("10.0.0.2:8476", 4, 3, 1.0) == Place("10.0.0.2:8476", 4, 3)
    assert find_place(None, 1, None, 1.0) == Place()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place(None, None, None, 1.0) == Place()


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),  # alone on its host, it has all
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8,1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "5"}, None),  # all that it was bound to
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "JAX_LOCAL_DEVICE_IDS": "6,7"}, None),  # JAX reads it where nothing is told
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (3,)),
    ],
)
def test_gpus_of_a_host_are_shared_only_by_several_processes(monkeypatch, environment, devices):
    slurm = {"JOB_ID": "17", "STEP_NODELIST": "node[003-004]", "NTASKS": "16", "PROCID": "11", "LOCALID": "3", "NODEID": "1"}
    for name, value in ({f"SLURM_{name}": value for name, value in slurm.items()} | environment).items():
        monkeypatch.setenv(name, value)
    assert find_place(None, None, None, 1.0).local_devices == devices


def test_an_environment_that_tells_half_of_a_place_is_refused(monkeypatch):
    """Each process would train alone."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.2:8476")
    with pytest.raises(RuntimeError, match="does not say how many processes there are and which this one is: alone, each"):
        find_place(None, None, None, 1.0)
    assert find_place(None, 1, None, 1.0) == Place()
    assert find_place("10.0.0.2:8476", 4, 3, 1.0) == Place("10.0.0.2:8476", 4, 3)


def test_a_tpu_worker_on_gke_is_found(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"):
        monkeypatch.setenv(f"MEGASCALE_{name}", "")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other-0.job,other-1.job")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert find_place(None, None, None, 1.0) == Place("localhost:8482", 3, 2)


class Left(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize("gone", ["process 0, the coordinator", ""])
def test_whoever_hears_that_another_is_gone_leaves_to_be_restarted(monkeypatch, gone):
    """Not only process 0, which may be busy with something else than collectives; without such news an error is an error."""

    class Client:
        def key_value_set(self, *_, **__):
            pass

    def leave(self, status):
        raise Left(status)

    monkeypatch.setattr(train.distributed, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(Group, "_exit", leave)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    group = Group(1, 2, Client())
    group._gone = gone
    try:
        jnp.zeros(2) + jnp.zeros(3)  # an error out of jax
    except TypeError as error:
        with pytest.raises(Left) as left:
            group._fail(error)
    assert left.value.args == (PREEMPTED if gone else 1,)


def test_a_coordinator_that_is_silent_before_its_first_news_is_heard_again(monkeypatch):
    class Client:
        asked = 0

        def key_value_set(self, *_, **__):
            pass

        def blocking_key_value_get(self, *_):
            self.asked += 1
            if self.asked == 1:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            if self.asked == 3:
                group._closed.set()

        def key_value_dir_get(self, *_):
            return []

    monkeypatch.setattr(train.distributed, "BEAT_SECONDS", 0.0)
    group = Group(1, 2, Client())
    group._watch()
    assert group._gone == ""
    assert group._client.asked == 3


class Memory:
    """A key-value store that one process has for itself."""

    def __init__(self, **values):
        self.values = values

    def key_value_set(self, key, value, **_):
        self.values[key] = value

    def key_value_dir_get(self, directory):
        return [(key, value) for key, value in self.values.items() if key.startswith(directory)]

    def blocking_key_value_get(self, key, milliseconds):
        time.sleep(milliseconds / 1000)
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.mark.parametrize("wait", ["gather", "from_first"])
def test_who_waits_within_a_phase_names_the_missing_and_is_not_called_stuck(wait, monkeypatch):
    """Though less is left of the phase than the wait may take."""
    monkeypatch.setattr(train.watchdog, "BEAT_SECONDS", 100.0)  # Whatever passes between two looks counts.
    client = Memory(**{f"loam/beat/{i}": f"1 process {i} (other, pid 7), restore at step 0" for i in range(2)})
    group = Group(int(wait == "from_first"), 2, client, DeadlineConfig(phase_seconds=1.0))
    looked, late = [], threading.Event()

    def look():
        while not late.wait(0.02):
            looked.append(group.watchdog.overdue())

    watching = threading.Thread(target=look)
    with group.phase("restore at step 0", 0.5):
        watching.start()
        with pytest.raises(MissingProcesses, match=r"waited 1 s at 'all' for process [01] \(other, pid 7\), restore"):
            group.gather("all", "") if wait == "gather" else group.from_first("all", dict)
        late.set()
        watching.join()
    assert len(looked) > 10
    assert not any(looked)


def test_a_process_whose_watch_thread_fails_leaves(monkeypatch, capfd):
    def leave(self, status):
        raise Left(status)

    def overdue():
        raise RuntimeError("a clock that stands")

    monkeypatch.setattr(train.distributed, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(Group, "_exit", leave)
    group = Group()
    monkeypatch.setattr(group.watchdog, "overdue", overdue)
    with pytest.raises(Left) as left:
        group._watch()
    assert left.value.args == (1,)
    assert "the thread that watches it failed: RuntimeError('a clock that stands')" in capfd.readouterr().err


def test_a_missing_coordinator_and_a_port_in_use_are_told_before_any_work(config_file, tmp_path):
    run = ["-m", "experiments.cli", "run", f"--config={config_file}", f"--config.run_dir={tmp_path / 'run'}"]
    run += ["--processes=2", "--config.deadlines.start_seconds=1"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        job = [
            spawn([*run, f"--coordinator=127.0.0.1:{free_port()}", "--process-id=1"], tmp_path / "1.log"),
            spawn([*run, f"--coordinator=127.0.0.1:{taken}", "--process-id=0"], tmp_path / "0.log"),
        ]
        # The first may come right with a restart, as where process 0 was late; the second may not.
        assert end(job, 60) == [PREEMPTED, 1]
    assert "loam: error: process 1 did not find process 0 at --coordinator=127.0.0.1:" in said(job[0])
    assert f"loam: error: process 0 cannot listen on port {taken} of --coordinator=127.0.0.1:{taken}" in said(job[1])
    assert not (tmp_path / "run").exists()


# --- Watching -----------------------------------------------------------------------------------------------------------


def test_a_process_that_is_stuck_says_where_and_asks_for_a_restart(tmp_path):
    code = f"""
import pathlib, time
from train.config import DeadlineConfig
from train.distributed import Group

def the_place_of_the_hang():
    time.sleep(100)

with Group(deadlines=DeadlineConfig(step_seconds=1.5)) as group:
    group.watch_into(pathlib.Path({str(tmp_path)!r}))
    with group.phase("a phase of its own", 10):
        time.sleep(3)
    group.watchdog.begin("step 7", group.deadlines.step_seconds)
    the_place_of_the_hang()
"""
    process = spawn(["-c", code], tmp_path / "log")
    assert end([process], 60) == [PREEMPTED]
    assert "step 7 took longer than 1.5 s" in said(process)
    assert "the_place_of_the_hang" in said(process)
    assert "the_place_of_the_hang" in (tmp_path / "stacks-0.txt").read_text()


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.watchdog.time.monotonic", lambda: now[0])
    watchdog = Watchdog()
    watchdog.begin("step 1", 10.0)
    now[0] += 1000.0
    assert watchdog.overdue() == ""
    for _ in range(8):
        now[0] += 1.0
        assert watchdog.overdue() == ""
    now[0] += 1.0
    assert "step 1 took longer than 10 s" in watchdog.overdue()
    watchdog.begin("step 2", 10.0)
    assert watchdog.overdue() == ""


def test_deadlines_are_positive():
    with pytest.raises(ValueError, match="deadlines.step_seconds=0 must be positive"):
        DeadlineConfig(step_seconds=0)
