"""Processes that are started together live and die together. Small programs stand in for `loam run`."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import launch_local
from experiments.cli import main
from experiments.launch_local import free_port, run_side_by_side, run_together

ROOT = Path(__file__).parents[2]


def program(text):
    return [sys.executable, "-c", text]


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def is_alive(pid):
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Writes its pid to a file, and on SIGTERM "saves" and exits with a status.
SAVES = """
import os, pathlib, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit({status})
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
WAIT_FOR_FILE = """
import pathlib, sys, time
while not (pathlib.Path(sys.argv[1]).exists() and pathlib.Path(sys.argv[1]).read_text()):
    time.sleep(0.01)
"""


def test_each_line_says_who_wrote_it(capsys):
    commands = [program("print('one'); print(); print('two')"), program("import sys; print('oops', file=sys.stderr, end='')")]
    assert run_together(commands, grace_seconds=1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[0]")] == ["[0] one", "[0] ", "[0] two"]
    assert [line for line in lines if line.startswith("[1]")] == ["[1] oops"]
    assert len(lines) == 4


def test_when_one_fails_all_end_and_its_status_is_the_result(tmp_path):
    waits = [*program(SAVES.format(status=42)), str(tmp_path / "pid")]
    fails = [*program(f"{WAIT_FOR_FILE}\nsys.exit(3)"), str(tmp_path / "pid")]
    assert run_together([waits, fails], grace_seconds=1) == 3
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_one_that_does_not_listen_is_killed_with_its_children(tmp_path, monkeypatch):
    """Nobody asked for a stop, so nothing is being saved: the time for that is not waited for."""
    monkeypatch.setattr(launch_local, "SECONDS_AFTER_A_CRASH", 0.5)
    deaf = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child}")
time.sleep(4)
pathlib.Path(f"{sys.argv[1]}.survivor{child}").touch()
"""
    stops = f"{WAIT_FOR_FILE}\nsys.exit(42)"
    commands = [[*program(text), str(tmp_path / "pids")] for text in (deaf, stops)]
    assert run_together(commands, grace_seconds=300) == 42
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: not any(map(is_alive, pids)))
    assert [path.name for path in tmp_path.iterdir()] == ["pids"]


def test_a_signal_is_reported_as_a_shell_would():
    assert run_together([program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], grace_seconds=1) == 137


# What a suite ignores that runs in the background or under nohup, its programs would ignore too.
HEEDS = (
    "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_all(tmp_path, number):
    commands = [[*program(SAVES.format(status=42)), str(tmp_path / f"pid{index}")] for index in range(2)]
    code = f"{HEEDS}import sys\nfrom experiments.launch_local import run_together\nsys.exit(run_together({commands!r}, 20))"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    files = [tmp_path / f"pid{index}" for index in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 42
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
    assert not any(is_alive(int(file.read_text())) for file in files)


def test_a_program_that_cannot_be_started_leaves_none_behind(tmp_path):
    first = [*program(SAVES.format(status=0)), str(tmp_path / "pid")]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        run_together([first, [str(tmp_path / "nothing")]], grace_seconds=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_side_by_side_the_failure_of_one_is_its_own(tmp_path, capsys):
    """Each waits for what the other writes, so they run at once; the one that fails ends first and stops none."""
    meets = f"import sys\nopen(sys.argv[2], 'w').write('here')\n{WAIT_FOR_FILE}\n"
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    commands = {
        "a": [*program(f"{meets}sys.exit(3)"), *files],
        "b": [*program(f"{meets}print('done')"), *reversed(files)],
        "c": program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    }
    assert run_side_by_side(commands) == [3, 0, 137]
    assert capsys.readouterr().out == "[b] done\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 42), (signal.SIGHUP, 42), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_all_that_run_side_by_side(tmp_path, number, status):
    scripts = {name: ["bash", "-c", f"echo $$ > {tmp_path}/{name}; sleep 60; touch {tmp_path}/survivor"] for name in "ab"}
    code = f"{HEEDS}import sys\nfrom experiments.launch_local import run_side_by_side\nsys.exit(run_side_by_side({scripts!r}))"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    files = [tmp_path / name for name in "ab"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == status
    assert not any(is_alive(int(file.read_text())) for file in files)
    assert not (tmp_path / "survivor").exists()


def test_a_lost_terminal_ends_nothing_under_nohup(tmp_path):
    scripts = {"a": [*program(f"{WAIT_FOR_FILE}\nprint('done')"), str(tmp_path / "go")]}
    scripts["b"] = program(f"import pathlib; pathlib.Path({str(tmp_path / 'began')!r}).write_text('x')")
    code = (
        "import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        f"from experiments.launch_local import run_side_by_side\nsys.exit(sum(run_side_by_side({scripts!r})))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for((tmp_path / "began").exists)
    launcher.send_signal(signal.SIGHUP)
    (tmp_path / "go").write_text("x")
    out, _ = launcher.communicate(timeout=20)
    assert (launcher.returncode, out) == (0, "[a] done\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_compiler(tmp_path, number):
    script = ["bash", "-c", f"echo $$ > {tmp_path}/pid; sleep 60"]
    code = f"{HEEDS}from experiments.compile import run_alone\nimport os\nrun_alone({script!r}, os.environ, None)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.send_signal(number)
    assert parent.wait(timeout=20) == 42
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_a_free_port_can_be_listened_on():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()


def test_the_command_lines_of_local_processes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["launch", "--config=configs/quickstart.py", "--on=local", "--processes=3", "--dry-run"]
    command += ["--config.steps=7", "--config.batch_size=6"]
    assert main(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert [line[-1] for line in lines] == ["--process-id=0", "--process-id=1", "--process-id=2"]
    assert {line[-2] for line in lines} == {"--processes=3"}
    assert len({line[-3] for line in lines}) == 1
    assert lines[0][-3].startswith("--coordinator=127.0.0.1:")
    assert {"run", "--config=configs/quickstart.py", "--config.steps=7"} < set(lines[0])
