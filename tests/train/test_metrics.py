"""Metric files survive crashes and restarts byte by byte; the other writers get the same numbers."""

import json
import math
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from train import metrics
from train.metrics import JsonlWriter, make_writers, read_jsonl, truncate_jsonl

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(metrics.__file__))}


def record(step: int) -> dict:
    generator = np.random.default_rng(step)
    return {"step": step, "loss": float(generator.standard_normal()) / 3, "grad_norm": float(np.float32(generator.random()))}


def write(path, steps) -> None:
    writer = JsonlWriter(path)
    for step in steps:
        writer.write(record(step))
    writer.close()


def test_floats_come_back_exactly(tmp_path):
    values = [0.1, 1 / 3, float(np.float32(0.1)), 5e-324, 1.7976931348623157e308, -0.0, math.inf]
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for value in values:
        writer.write({"value": value})
    writer.close()
    back = [line["value"] for line in read_jsonl(tmp_path / "m.jsonl")]
    assert [struct.pack("d", value) for value in back] == [struct.pack("d", value) for value in values]


@pytest.mark.parametrize("torn", [b"", b'{"step": 8', b'{"step": 8, "loss": 0.5}', b"\xff"])
@pytest.mark.parametrize("checkpoint", [0, 4, 7])
def test_a_restarted_file_has_the_bytes_of_an_uninterrupted_one(tmp_path, torn, checkpoint):
    write(tmp_path / "straight.jsonl", range(1, 12))
    path = tmp_path / "restarted.jsonl"
    write(path, range(1, 8))
    with path.open("ab") as file:
        file.write(torn)
    truncate_jsonl(path, checkpoint + 1)
    write(path, range(checkpoint + 1, 12))
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_appending_after_a_torn_line_drops_it(tmp_path):
    path = tmp_path / "timing.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    assert read_jsonl(path) == [{"step": 1}]
    JsonlWriter(path).write_and_close({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_names_the_file(tmp_path):
    """As a quota has it: writing fails part of the way through a record."""
    path = tmp_path / "metrics.jsonl"
    code = f"""
import resource, signal
from train.metrics import JsonlWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
writer = JsonlWriter({str(path)!r})
for step in range(1000, 1010):
    writer.write({{"step": step}})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1
    assert f"OSError: cannot write to {path} (disk full): see that the disk has room" in result.stderr
    assert [record["step"] for record in read_jsonl(path)] == [1000, 1001, 1002]


def test_a_full_disk_stops_tensorboard_with_an_error_and_not_a_wait(tmp_path):
    code = f"""
import pathlib, resource, signal
from train.metrics import TensorBoardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writer = TensorBoardWriter(pathlib.Path({str(tmp_path)!r}), "run", 1)
for step in range(1000):
    writer.write(step, {{"loss": 1.0, "grad_norm": 2.0}})
writer.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=100)
    assert result.returncode == 1
    assert f"OSError: cannot write to {tmp_path / 'tensorboard'} (File too large): see that the disk has room" in result.stderr


def test_a_file_that_does_not_exist_is_empty(tmp_path):
    truncate_jsonl(tmp_path / "absent.jsonl", 3)
    assert read_jsonl(tmp_path / "absent.jsonl") == []
    assert list(tmp_path.iterdir()) == []


def test_a_kill_loses_no_record(tmp_path):
    code = f"""
import os, signal
from train.metrics import JsonlWriter
writer = JsonlWriter({str(tmp_path / "m.jsonl")!r})
for step in range(1000):
    writer.write({{"step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": step} for step in range(1000)]


def read_events(directory):
    """TFRecord framing by hand: length, checksum, payload, checksum."""
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_jsonl_and_tensorboard_get_the_same_numbers(tmp_path):
    for first_step, last_step in ((1, 3), (3, 4)):
        truncate_jsonl(tmp_path / "metrics.jsonl", first_step)
        writer = make_writers(("tensorboard",), tmp_path, "run", first_step)
        for step in range(first_step, last_step + 1):
            scalars = record(step)
            del scalars["step"]
            writer.write(step, scalars)
        writer.flush()
        writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [record(step) for step in range(1, 5)]
    seen: dict[int, dict] = {}
    for event in read_events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):  # What a reader does on a restart.
            seen = {step: values for step, values in seen.items() if step < event.step}
        for value in event.summary.value:
            seen.setdefault(event.step, {})[value.tag] = value.simple_value
    assert sorted(seen) == [1, 2, 3, 4]
    for step, values in seen.items():
        assert values == {name: np.float32(value) for name, value in record(step).items() if name != "step"}


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    module = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {module}"):
        make_writers((name,), tmp_path, "run", 1)


def test_wandb_offline_run_goes_on_after_a_restart(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    for first_step in (1, 2):
        writer = make_writers(("wandb",), tmp_path, "run", first_step)
        writer.write(first_step, {"loss": 0.5})
        writer.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    identity = (tmp_path / "wandb_id").read_text()
    assert all(path.name.endswith(identity) for path in (tmp_path / "wandb").glob("offline-run-*"))


class FakeService:
    """Stands for wandb and trackio, which are large: records the calls that are made."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: (self.calls.append((name, args, kwargs)), self)[1]


@pytest.mark.parametrize(("name", "argument"), [("wandb", "id"), ("trackio", "name")])
def test_a_service_knows_the_run_of_a_directory_again_and_no_other(tmp_path, monkeypatch, name, argument):
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    for directory, step in (("a", 1), ("a", 2), ("b", 1)):
        (tmp_path / directory).mkdir(exist_ok=True)
        writer = make_writers((name,), tmp_path / directory, "run", step)
        writer.write(step, {"loss": 0.5})
        writer.close()
        writer.close()
    first, again, other = (kwargs[argument] for call, _, kwargs in service.calls if call == "init")
    assert first == again != other
    assert [call for call, _, _ in service.calls].count("log") == 3
    assert [call for call, _, _ in service.calls].count("finish") == 3


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path / "m.jsonl", range(3))
    lines = (tmp_path / "m.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "m.jsonl").write_bytes(b"".join([lines[0], b"\0" * 20 + b"\n", lines[2]]))
    for read in (read_jsonl, lambda path: truncate_jsonl(path, 2)):
        with pytest.raises(ValueError, match=r"m\.jsonl, line 2 is damaged"):
            read(tmp_path / "m.jsonl")


def test_trackio_runs_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    writer = make_writers(("trackio",), tmp_path, "run", 1)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert list((tmp_path / "trackio").rglob("loam*"))


def test_records_are_strict_lines(tmp_path):
    write(tmp_path / "m.jsonl", range(3))
    lines = (tmp_path / "m.jsonl").read_text().split("\n")
    assert lines[-1] == ""
    assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 1, 2]
