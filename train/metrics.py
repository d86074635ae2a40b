"""Where a run's numbers go: `metrics.jsonl` always, and TensorBoard, Weights & Biases or trackio if asked.

The JSONL file is the source of truth: one record per write, exact floats, and after a kill and a restart the same bytes as
without. The other writers are conveniences; their packages are imported when one is opened.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import time
import types
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from train.files import named_disk_errors, write_atomic

SYNC_SECONDS = 10.0


class Writer(Protocol):
    """Takes the scalars of one step after another. `close` flushes."""

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends records to a file, one JSON object per line; floats round-trip exactly.

    A record is in the kernel's hands, whole, when `write` returns, so killing the process loses nothing; the disk has it at
    most `SYNC_SECONDS` of writing later, and after `flush`. A line that an earlier crash tore is dropped at the start.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = pathlib.Path(path)
        if path.exists() and not _ends_with_newline(path):
            write_atomic(path, b"".join(_complete_lines(path)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._synced = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        with named_disk_errors(self._file.name):
            if self._file.write(line) != len(line):
                raise OSError("disk full")
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when the disk has every record."""
        with named_disk_errors(self._file.name):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()

    def write_and_close(self, record: dict[str, Any]) -> None:
        self.write(record)
        self.close()


class NoWriter:
    """That of a process which is not the first: nothing is written."""

    def write(self, *_: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def write_and_close(self, _: dict[str, Any]) -> None: ...


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file, without a torn last line; a file that does not exist has none."""
    path = pathlib.Path(path)
    return [record for _, record in _records(path)] if path.exists() else []


def truncate_jsonl(path: str | os.PathLike[str], first_step: int) -> None:
    """Drops the records from `first_step` on, and a torn last line; the lines that stay keep their bytes.

    The file is replaced as a whole, or left as it is.
    """
    path = pathlib.Path(path)
    if path.exists():
        write_atomic(path, b"".join(line for line, record in _records(path) if record["step"] < first_step))


def _records(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    records = []
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            records.append((line, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): remove the line, or move the run away") from error
    return records


def _complete_lines(path: pathlib.Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _ends_with_newline(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


class MetricWriter:
    """`metrics.jsonl` of a run, and whatever else was asked for."""

    def __init__(self, run_dir: pathlib.Path, others: Sequence[Writer]):
        self._jsonl = JsonlWriter(run_dir / "metrics.jsonl")
        self._others = others

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._jsonl.write({"step": step, **scalars})
        for writer in self._others:
            writer.write(step, scalars)

    def flush(self) -> None:
        self._jsonl.flush()
        for writer in self._others:
            writer.flush()

    def close(self) -> None:
        others, self._others = self._others, ()  # Closing twice does no harm.
        with contextlib.ExitStack() as stack:  # All of them, whatever one of them raises.
            for writer in (*others, self._jsonl):
                stack.callback(writer.close)


class TensorBoardWriter:
    """Event files in `<run_dir>/tensorboard`; a reader drops what an earlier start wrote from `first_step` on.

    tensorboardX's SummaryWriter is not used: it hands events to a thread that dies of a full disk, and the run would wait for
    it for ever.
    """

    def __init__(self, run_dir: pathlib.Path, run_name: str, first_step: int):
        _import("tensorboard")
        self._pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary_pb2 = importlib.import_module("tensorboardX.proto.summary_pb2")
        events = importlib.import_module("tensorboardX.event_file_writer").EventsWriter
        # Its file names tell seconds only: a run that goes back to a checkpoint at once would overwrite its own file.
        suffix = f".{first_step:09d}.{os.getpid()}"
        self._path = run_dir / "tensorboard"
        with named_disk_errors(self._path):
            self._path.mkdir(exist_ok=True)
            self._events = events(str(self._path / "events"), suffix)
        self._write(session_log=self._pb2.SessionLog(status=self._pb2.SessionLog.START), step=first_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        value = self._summary_pb2.Summary.Value
        summary = self._summary_pb2.Summary(value=[value(tag=name, simple_value=x) for name, x in scalars.items()])
        self._write(summary=summary, step=step)

    def _write(self, **fields: Any) -> None:
        with named_disk_errors(self._path):
            self._events.write_event(self._pb2.Event(wall_time=time.time(), **fields))

    def flush(self) -> None:
        with named_disk_errors(self._path):
            self._events.flush()

    def close(self) -> None:
        with named_disk_errors(self._path):
            self._events.close()


class WandbWriter:
    """Weights & Biases. Key, host and mode come from its own environment variables; with none of them set it stays offline,
    and `wandb sync` uploads the directory later. A restarted job continues the same run."""

    def __init__(self, run_dir: pathlib.Path, run_name: str, first_step: int):
        wandb = _import("wandb")
        connected = any(name in os.environ for name in ("WANDB_MODE", "WANDB_API_KEY"))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "loam"),
            name=run_name,
            id=_identity(run_dir, "wandb"),
            resume="allow",
            dir=str(run_dir),
            mode=None if connected else "offline",
        )
        # Its own counter only goes up; a run that went back to a checkpoint needs an axis of its own.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Its background process writes by itself."""

    def close(self) -> None:
        self._run.finish()


class TrackioWriter:
    """trackio: a local database under its own cache directory (TRACKIO_DIR), shown by `trackio show`."""

    def __init__(self, run_dir: pathlib.Path, run_name: str, first_step: int):
        trackio = _import("trackio")
        # It knows runs by their names: those of one config in two directories must differ.
        name = f"{run_name}-{_identity(run_dir, 'trackio')[:8]}"
        self._run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", "loam"), name=name, resume="allow")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def flush(self) -> None:
        """Its background thread writes by itself."""

    def close(self) -> None:
        self._run.finish()


def _identity(run_dir: pathlib.Path, writer: str) -> str:
    """A random name of the directory's run, the same after a restart."""
    path = run_dir / f"{writer}_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex.encode())
    return path.read_text()


WRITERS = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter, "trackio": TrackioWriter}

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_writers(names: Sequence[str]) -> None:
    """Raises ModuleNotFoundError if the package of a writer is not installed."""
    for name in names:
        _import(name)


def make_writers(names: Sequence[str], run_dir: str | os.PathLike[str], run_name: str, first_step: int) -> MetricWriter:
    """Opens `metrics.jsonl` and the named writers for a job whose next record is of `first_step`.

    Raises:
      ModuleNotFoundError: the package of a writer is not installed.
    """
    run_dir = pathlib.Path(run_dir)
    return MetricWriter(run_dir, [WRITERS[name](run_dir, run_name, first_step) for name in names])


def _import(name: str) -> types.ModuleType:
    module = PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"metric writer {name!r} needs the package {module}: `pip install {module}`, or leave it out of --config.writers"
        ) from error
