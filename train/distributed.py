"""Many processes, one run: how they find each other, agree, and leave together when one of them is gone.

  find_place   which process this is: from flags, or from what TPU VMs, GKE, Slurm and Open MPI tell (JAX detects them)
  join         all meet at the coordinator's port; whoever does not come is named; only then JAX starts there
  Group        values and barriers between the processes, each with a deadline that names who is missing; the step at which
               all stop; a thread that watches this process and hears from the others

All this goes through the key-value store of JAX's coordination service, never through a collective: a collective that lacks a
process cannot be given up. When a process ends, by whatever it raises or by its watchdog, it leaves its reason there, and the
others leave with its status within seconds. One that was killed or stopped cannot say so; it is named when it has been silent
for SILENT_SECONDS, and JAX's own heartbeats end all others after HEARTBEAT_SECONDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding

from train.config import PREEMPTED, DeadlineConfig
from train.watchdog import BEAT_SECONDS, Watchdog, dump_stacks

HEARTBEAT_SECONDS = 15
SILENT_SECONDS = 3.0
WAITING_SECONDS = 10.0  # more than a wait itself may take
AGREE_SECONDS = 15.0  # for threads that do nothing else

T = TypeVar("T")


class MissingProcesses(RuntimeError):
    """Processes did not come, or stayed away, until a deadline. Starting all of them again may help."""

    exit_status = PREEMPTED


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a job.

    Attributes:
      coordinator: host:port at which process 0 serves the others.
      local_devices: indices of the GPUs that are this process's; None is all.
    """

    coordinator: str = ""
    processes: int = 1
    process_id: int = 0
    local_devices: tuple[int, ...] | None = None


def find_place(coordinator: str | None, processes: int | None, process_id: int | None, start_seconds: float) -> Place:
    """The place that the flags describe; without any, the one that the environment describes.

    Raises:
      ValueError: flags are missing or contradict each other.
      RuntimeError: the environment is that of a cluster, and does not tell enough.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        return _detect(start_seconds)
    if processes == 1 and process_id in (None, 0):
        return Place()
    if coordinator is None or processes is None or process_id is None:
        missing = [name for name in flags if name not in given]
        raise ValueError(
            f"{', '.join(given)} without {', '.join(missing)}: give each process --coordinator=HOST:PORT (of process 0), "
            "--processes=N and --process-id=I"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"--coordinator={coordinator!r} is not HOST:PORT, such as 10.0.0.2:8476")
    if processes < 1 or not 0 <= process_id < processes:
        raise ValueError(f"--process-id={process_id} must lie in 0..{processes - 1}, below --processes={processes}")
    return Place(coordinator, processes, process_id)


def _detect(start_seconds: float) -> Place:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() does first, and does not tell

    try:
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        found = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, int(start_seconds))
    except Exception as error:
        raise RuntimeError(
            f"this looks like a cluster, but not which processes take part: {error}. Give --coordinator=HOST:PORT, "
            "--processes=N and --process-id=I to each of them, or --processes=1 to run alone."
        ) from error
    coordinator, processes, process_id, devices = found
    if processes == 1 or (coordinator, processes, process_id) == (None, None, None):
        return Place()
    if coordinator is None or processes is None or process_id is None:
        known = {"the coordinator": coordinator, "how many processes there are": processes, "which this one is": process_id}
        missing = " and ".join(name for name, value in known.items() if value is None)
        raise RuntimeError(
            f"the environment describes a cluster (JAX_COORDINATOR_ADDRESS={address or ''}), but does not say {missing}: "
            "alone, each process would train by itself into one run_dir. Give --coordinator=HOST:PORT, --processes=N and "
            "--process-id=I to each of them, or --processes=1 to run alone."
        )
    return Place(coordinator, processes, process_id, _own_devices(devices))


def _own_devices(guessed: Sequence[int] | None) -> tuple[int, ...] | None:
    """The GPUs of this process. JAX guesses the one that has the number of the process on its host, which is right where a host
    has several processes and each sees all GPUs. `JAX_LOCAL_DEVICE_IDS`, which JAX reads by itself, says otherwise."""
    if guessed is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    bound = seen is not None and len(seen.split(",")) <= max(guessed)  # by the scheduler, to its own
    return None if bound or _processes_of_host() == 1 else tuple(guessed)


def _processes_of_host() -> int | None:
    """How many processes of the job this host has, if Open MPI or Slurm says so."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(size)
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 2(x3),1
    hosts = [int(count) for count, times in counts for _ in range(int(times or 1))]
    return hosts[int(os.environ.get("SLURM_NODEID", 0))] if hosts else None


# --- Meeting ------------------------------------------------------------------------------------------------------------


def join(place: Place, deadlines: DeadlineConfig) -> Group:
    """The group of all processes, once they are all there. To be called before JAX touches a device.

    Raises:
      OSError: the coordinator's port is in use (on process 0).
      MissingProcesses: process 0, or any other, did not come within `deadlines.start_seconds`.
      ValueError: the processes were started with flags that contradict each other.
    """
    if place.processes == 1:
        return Group(deadlines=deadlines)
    meet(place, deadlines.start_seconds)
    faulthandler.enable()  # Where this process was when JAX ended it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM away; see `Group.stops_after`.
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process_id,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    from jax._src.distributed import global_state  # the only way to its key-value store

    return Group(place.process_id, place.processes, global_state.client, deadlines)


def meet(place: Place, seconds: float) -> None:
    """Returns when every process has come to the coordinator's port, and that is free again.

    JAX's own way of joining aborts where a process is missing, without a word about which. Raises as `join` does.
    """
    if place.process_id == 0:
        _host_meeting(place, seconds)
    else:
        _attend_meeting(place, seconds)


def _host_meeting(place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen on port {port} of --coordinator={place.coordinator} ({error.strerror}): stop the program "
            f"that has it (`ss -ltnp 'sport = :{port}'` names it; an earlier start of this job?), or choose another port"
        ) from error
    with server, contextlib.ExitStack() as stack:
        guests: dict[int, socket.socket] = {}
        while len(guests) < place.processes - 1:
            server.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                guest = stack.enter_context(server.accept()[0])
            except OSError:
                missing = [i for i in range(1, place.processes) if i not in guests]
                problem = (
                    f"waited {seconds:g} s at {place.coordinator} for process {', '.join(map(str, missing))} of "
                    f"{place.processes}: see whether each was started, with the same --coordinator and its own --process-id, "
                    "and what it says"
                )
                for other in guests.values():
                    _send(other, {"missing": problem})
                raise MissingProcesses(problem) from None
            hello = _receive(guest, 5.0)
            if hello.get("loam") == "here" and hello["processes"] != place.processes:
                problem = (
                    f"process {hello['process_id']} was started with --processes={hello['processes']}, process 0 with "
                    f"--processes={place.processes}: all must be told the same number"
                )
                for other in (guest, *guests.values()):
                    _send(other, {"wrong": problem})
                raise ValueError(problem)
            if hello.get("loam") == "here":
                process_id = hello["process_id"]
                if process_id in guests:
                    _send(guests[process_id], {"wrong": f"another process came with --process-id={process_id} too"})
                guests[process_id] = guest
        for guest in guests.values():
            _send(guest, {"all": "here"})


def _attend_meeting(place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    host, _, port = place.coordinator.rpartition(":")
    problem = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5.0)) as connection:
                _send(connection, {"loam": "here", "process_id": place.process_id, "processes": place.processes})
                # Somewhat longer than process 0 waits, which knows who is missing.
                answer = _receive(connection, left + 5.0)
        except OSError as error:
            answer, problem = {}, str(error)
        if "all" in answer:
            return
        if "wrong" in answer:
            raise ValueError(answer["wrong"])
        if "missing" in answer:
            raise MissingProcesses(answer["missing"])
        time.sleep(0.2)
    raise MissingProcesses(
        f"process {place.process_id} did not find process 0 at --coordinator={place.coordinator} within {seconds:g} s "
        f"({problem}): see whether process 0 was started there, correct the address, or open the port"
    )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # Who has gone needs no answer.
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """One message; {} from whom does not speak like this, or not in time."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(1 << 16))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


# --- Together -----------------------------------------------------------------------------------------------------------


class Group:
    """The processes of a run, seen from one of them; by default it is the only one.

    A context, entered once: what is raised inside ends every process of a group of several.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, deadlines: DeadlineConfig | None = None):
        self.index, self.count, self.deadlines = index, count, deadlines or DeadlineConfig()
        self.watchdog = Watchdog()
        self._client = client
        self._calls: Counter[str] = Counter()
        self._name = f"process {index} ({socket.gethostname()}, pid {os.getpid()})"
        self._run_dir = pathlib.Path()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._agreeing = threading.Lock()
        self._step, self._stop_at, self._stop_wanted = -1, -1, False
        self._beats: dict[int, str] = {}
        self._silence: Counter[int] = Counter()  # beats of this process since the last one of another
        self._gone = ""
        if self.count > 1:
            self._beat()

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def __enter__(self) -> Group:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.count > 1:
            try:
                if error is not None:
                    raise error
                with self.phase("waiting for the others to finish"):
                    self.barrier("the end")
            except BaseException as problem:
                self._fail(problem)
        self._closed.set()
        self._thread.join()
        if self.count > 1:
            jax.distributed.shutdown()

    @contextlib.contextmanager
    def phase(self, doing: str, seconds: float = 0.0) -> Iterator[None]:
        """What may take `seconds`, by default `deadlines.phase_seconds`."""
        with self.watchdog.phase(doing, seconds or self.deadlines.phase_seconds):
            yield

    # --- Values ---------------------------------------------------------------------------------------------------

    def gather(self, name: str, value: str, seconds: float = 0.0) -> list[str]:
        """The value of every process, by index. All call it, as often as each other.

        Raises:
          MissingProcesses: some did not within `seconds` (default `deadlines.phase_seconds`); they are named.
        """
        if self.count == 1:
            return [value]
        seconds = seconds or self.deadlines.phase_seconds
        key, before = self._key(name)
        self._client.key_value_set(f"{key}/of/{self.index}", value)
        deadline = time.monotonic() + seconds
        with self._waiting(name, seconds):
            if self.is_first:
                pause = 0.001
                while len(values := self._read(f"{key}/of")) < self.count and time.monotonic() < deadline:
                    time.sleep(pause)
                    pause = min(2 * pause, 0.1)
                if len(values) == self.count:
                    self._client.key_value_set(f"{key}/all", json.dumps([values[i] for i in range(self.count)]))
                    self._client.key_value_delete(before)  # Whoever is here has read what came before.
            told = self._wait_for(f"{key}/all", deadline)
        if told is None:
            missing = sorted(set(range(self.count)) - self._read(f"{key}/of").keys()) or [0]
            raise MissingProcesses(f"waited {seconds:g} s at {name!r} for {self._described(missing)}")
        return json.loads(told)

    def barrier(self, name: str, seconds: float = 0.0) -> None:
        """Returns when all have called it. Raises as `gather` does."""
        self.gather(name, "", seconds)

    def from_first(self, name: str, value: Callable[[], T], seconds: float = 0.0) -> T:
        """What `value` returns on process 0, where alone it is called, having gone through JSON. Raises as `gather` does."""
        if self.count == 1:
            return value()
        seconds = seconds or self.deadlines.phase_seconds
        key, _ = self._key(name)
        if self.is_first:
            self._client.key_value_set(key, json.dumps(value()))
        with self._waiting(name, seconds):
            told = self._wait_for(key, time.monotonic() + seconds)
        if told is None:
            raise MissingProcesses(f"waited {seconds:g} s at {name!r} for {self._described([0])}")
        return json.loads(told)

    def compare(self, facts: dict[str, str]) -> None:
        """Raises ValueError, on all processes, where one has other facts than process 0; it and they are named."""
        first = self.from_first("facts", lambda: facts)
        differing = [f"{key} ({facts[key]} instead of {first[key]})" for key in facts if facts[key] != first[key]]
        problems = self.gather("comparing facts", f"{self._name}: {', '.join(differing)}" if differing else "")
        for problem in filter(None, problems):
            raise ValueError(
                f"{problem}: that is not what process 0 has. Give all processes the same code, packages, config and data, and "
                "a run_dir that they share"
            )

    def _key(self, name: str) -> tuple[str, str]:
        """Where the next and the last call of this name keep their values."""
        self._calls[name] += 1
        return f"loam/{name}/{self._calls[name]}", f"loam/{name}/{self._calls[name] - 1}"

    @contextlib.contextmanager
    def _waiting(self, name: str, seconds: float) -> Iterator[None]:
        """Whoever waits for others is not stuck: the watchdog leaves it time to say for whom. It watches the main thread."""
        if threading.current_thread() is threading.main_thread():
            with self.watchdog.phase(f"waiting at {name!r}", seconds + WAITING_SECONDS):
                yield
        else:
            yield

    def _wait_for(self, key: str, deadline: float) -> str | None:
        """The value of a key, None if there is none at the deadline."""
        while True:
            left = deadline - time.monotonic()
            try:
                # A short while at a time, so that signals are heard.
                return self._client.blocking_key_value_get(key, int(1000 * min(max(left, 0.1), BEAT_SECONDS)))
            except jax.errors.JaxRuntimeError:
                if left <= 0:
                    return None

    def _read(self, directory: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{directory}/")}

    def _described(self, processes: list[int]) -> str:
        beats = self._read("loam/beat")
        return "; ".join(beats[i].partition(" ")[2] if i in beats else f"process {i}" for i in processes)

    # --- Stopping -------------------------------------------------------------------------------------------------

    def stops_after(self, step: int, wanted: bool) -> bool:
        """Whether the run stops after `step`, because a signal came to this process (`wanted`) or another. For every step.

        All must stop after the same one, and they are not at the same one now. So each tells the last step that it has
        asked about here, and waits here until all have; the first that nobody has asked about is the last.
        """
        if self.count == 1:
            return wanted
        if wanted and not self._stop_wanted:
            self._stop_wanted = True
            self._client.key_value_set("loam/news/stop", self._name, allow_overwrite=True)
        with self._agreeing:
            self._step = step
            return 0 <= self._stop_at <= step

    def _agree_to_stop(self, who: str) -> None:
        with self._agreeing:
            steps = self.gather("the last step", str(self._step), AGREE_SECONDS)
            self._stop_at = max(map(int, steps)) + 1
        self._say(f"{who} was asked to stop: all save and stop after step {max(1, self._stop_at)}")

    # --- Watching and leaving -------------------------------------------------------------------------------------

    def watch_into(self, run_dir: pathlib.Path) -> None:
        """Names the directory for the stacks of a process that is stuck."""
        self._run_dir = run_dir

    def _watch(self) -> None:
        try:
            while not self._closed.wait(BEAT_SECONDS):
                self._look()
        except Exception as error:
            # Nobody would see it hang any more.
            traceback.print_exception(error)
            self._leave(f"{self._name}: the thread that watches it failed: {error!r}", 1)

    def _look(self) -> None:
        overdue = self.watchdog.overdue()
        if overdue:
            dump_stacks(self._run_dir, self.index)
            where = f"where it is stuck is in {self._run_dir}/stacks-{self.index}.txt"
            self._leave(f"{self._name}: {overdue}; {where}", PREEMPTED, stuck=True)
        if self.count == 1:
            return
        try:
            self._hear()
        except (MissingProcesses, jax.errors.JaxRuntimeError) as error:
            if self._closed.is_set():
                return
            if isinstance(error, MissingProcesses):
                self._leave(str(error), PREEMPTED)
            self._gone = "process 0, the coordinator"
            self._say(f"{self._gone}, has not answered for {SILENT_SECONDS:g} s")

    def _beat(self) -> None:
        self._calls["beat"] += 1
        beat = f"{self._calls['beat']} {self._name}, {self.watchdog.doing}"
        self._client.key_value_set(f"loam/beat/{self.index}", beat, allow_overwrite=True)

    def _hear(self) -> None:
        # A call that can be told how long to wait: process 0 may live, and not answer.
        self._client.blocking_key_value_get("loam/beat/0", int(1000 * SILENT_SECONDS))
        self._beat()
        news = {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get("loam/news/")}
        end = json.loads(news.get("end", "{}"))
        if end and end["process"] != self.index:
            self._say(f"leaving, because process {end['process']} left: {end['reason']}")
            if end["stuck"]:
                dump_stacks(self._run_dir, self.index)
            self._exit(end["status"])
        if (gone := news.get("gone", "")) != self._gone:  # It may have told nothing yet.
            self._gone = gone
            if self._gone:
                self._say(f"for {SILENT_SECONDS:g} s nothing was heard from {self._gone}")
        if "stop" in news and self._stop_at < 0:
            self._agree_to_stop(news["stop"])
        if self.is_first:
            for i, beat in self._read("loam/beat").items():
                self._silence[i] = self._silence[i] + 1 if beat == self._beats.get(i) else 0
                self._beats[i] = beat
            gone = [i for i in self._silence if self._silence[i] >= SILENT_SECONDS / BEAT_SECONDS]
            self._client.key_value_set("loam/news/gone", self._described(gone), allow_overwrite=True)

    def _fail(self, error: BaseException) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # This process is leaving already, and says why.
        if os.environ.get("LOAM_DEBUG"):
            traceback.print_exception(error)
        status, reason = getattr(error, "exit_status", 1), f"{self._name}: error: {error or type(error).__name__}"
        if isinstance(error, SystemExit):
            status, reason = error.code if isinstance(error.code, int) else 1, f"{self._name} was asked to stop"
        elif isinstance(error, KeyboardInterrupt):
            status, reason = 130, f"{self._name} was interrupted"
        elif _through_collectives(error):
            # A consequence, most likely, of what happened elsewhere: that is what the log should say.
            self._say(f"{reason}; waiting to hear whether a process is gone")
            for _ in range(HEARTBEAT_SECONDS + 2):
                time.sleep(BEAT_SECONDS)
                if self._gone:
                    self._leave(f"gone is {self._gone}", PREEMPTED)
        self._leave(reason, status)

    def _leave(self, reason: str, status: int, stuck: bool = False) -> NoReturn:
        self._say(reason)
        if self.count > 1:
            end = {"process": self.index, "reason": reason, "status": status, "stuck": stuck}
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another was first, or process 0 is gone.
                self._client.key_value_set("loam/news/end", json.dumps(end))
        self._exit(status)

    def _exit(self, status: int) -> NoReturn:
        if self.count > 1 and self.is_first:  # With it goes the coordinator: the others shall have read why.
            time.sleep(2 * BEAT_SECONDS)
        sys.stdout.flush()
        # Not an orderly exit: that would wait for what cannot end any more.
        os._exit(status)

    def _say(self, text: str) -> None:
        print(f"loam [{self.index}/{self.count}]: {text}", file=sys.stderr, flush=True)


ALONE = Group()  # for what only asks it, and does not need it to be watched


def _through_collectives(error: BaseException | None) -> bool:
    """Whether an error came out of jax or Orbax, as it does where another process is gone."""
    while error is not None:
        files = [pathlib.Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        if any({"jax", "orbax"} & set(parts) for parts in files):
            return True
        error = error.__cause__
    return False


# --- Batches ------------------------------------------------------------------------------------------------------------


def local_rows(sharding: Sharding, shape: tuple[int, int]) -> np.ndarray:
    """The rows of a global [rows, seq_len] array that live, in part at least, on devices of this process; int64, ascending."""
    slices = [index[0] for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    return np.unique(np.concatenate([np.arange(shape[0])[rows] for rows in slices]))


def global_batch(batch: dict[str, np.ndarray], rows: np.ndarray, sharding: Sharding, num_rows: int) -> dict[str, jax.Array]:
    """Global arrays [num_rows, seq_len] from the `local_rows` of each process."""

    def place(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = np.arange(num_rows)[index[0]]
            return local[np.searchsorted(rows, wanted)][:, *index[1:]]

        return jax.make_array_from_callback((num_rows, *local.shape[1:]), sharding, part)

    return {name: place(local) for name, local in batch.items()}
