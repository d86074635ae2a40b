"""Hostile programs find every way out closed, and the one who asked goes on."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data.sandbox import Limits, SandboxUnavailable, run
from data.sandbox_child import ALLOWED, build_filter

ROOT = Path(__file__).parents[2]
QUICK = Limits(wall_seconds=20, cpu_seconds=2)


def available() -> bool:
    try:
        return run("").outcome == "passed"
    except SandboxUnavailable:
        return False


pytestmark = pytest.mark.skipif(not available(), reason="this machine has no seccomp or no Landlock: programs are refused")


def attempts(*expressions):
    """Runs each statement in one sandbox; the exception's class and errno of each, or "done"."""
    program = "import ctypes, errno, json, os, resource, signal, socket, subprocess, sys, threading\noutcomes = []\n"
    for expression in expressions:
        program += f"try:\n    {expression}\n    outcomes.append('done')\n"
        program += (
            "except Exception as e:\n    outcomes.append(errno.errorcode.get(getattr(e, 'errno', None), type(e).__name__))\n"
        )
    result = run(program + "print(json.dumps(outcomes))", QUICK)
    assert result.outcome == "passed", result
    return json.loads(result.stdout)


def test_what_a_program_needs_it_has():
    program = """
import bisect, collections, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math, random, re
import statistics, threading, concurrent.futures, time
with concurrent.futures.ThreadPoolExecutor(3) as pool:
    print(sum(pool.map(abs, range(-3, 1))))
print(hashlib.sha256(b"").hexdigest()[:8], __name__, math.comb(5, 2))
"""
    result = run(program, QUICK)
    assert (result.outcome, result.stdout) == ("passed", "6\ne3b0c442 __main__ 10\n"), result


@pytest.mark.parametrize(
    ("program", "outcome", "reason"),
    [
        ("raise ValueError('no')", "failed", "ValueError: no"),
        ("assert 1 == 2", "failed", "AssertionError"),
        ("raise SystemExit(3)", "failed", "status 3"),
        ("import os; os._exit(4)", "failed", "status 4"),
        ("def f(:", "failed", "SyntaxError: invalid syntax"),
        ("\udc80", "failed", "UnicodeEncodeError"),
        ("x = 1\0", "failed", "source code string cannot contain null bytes"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("import data.sandbox", "failed", "ModuleNotFoundError"),
        ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
        ("x = [0] * 10**10", "failed", "MemoryError"),
        ("x = [bytes(100 << 20) for _ in range(9)]", "failed", "MemoryError"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "killed", "wrote more than 1048576 bytes to stdout"),
        ("import sys\nwhile True: sys.stderr.write('x' * 65536)", "killed", "wrote more than 1048576 bytes to stderr"),
    ],
)
def test_the_result_says_what_happened(program, outcome, reason):
    result = run(program, QUICK)
    assert result.outcome == outcome
    assert reason in result.reason
    assert len(result.stdout) <= QUICK.output_bytes
    assert len(result.stderr) <= QUICK.output_bytes


def test_processor_time_is_limited_over_all_threads():
    spread = "import threading\ndef f():\n    while True: pass\nfor _ in range(4): threading.Thread(target=f).start()"
    result = run(spread, Limits(wall_seconds=60, cpu_seconds=1))
    assert (result.outcome, result.reason) == ("timed_out", "used more than 1 s of processor time")


@pytest.mark.slow
def test_processor_time_is_limited_even_if_the_signal_is_ignored():
    ignoring = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(ignoring, Limits(wall_seconds=60, cpu_seconds=1)).reason == "ended by SIGKILL"


@pytest.mark.parametrize("closing", ["", "import os; os.close(1); os.close(2)\n"])
def test_wall_time_is_limited_though_nothing_is_read_or_written(closing):
    result = run(closing + "import time; time.sleep(1000)", Limits(wall_seconds=0.7))
    assert result.outcome == "timed_out"


def test_no_process_is_made_and_none_is_signalled():
    outcomes = attempts(
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        "os.setsid()",
        "os.setpgid(0, 0)",
        "os.nice(-5)",
        "os.setuid(0)",
        "os.chroot('/')",
    )
    assert outcomes == ["EPERM"] * len(outcomes)


def test_calls_past_the_library_are_refused_too():
    numbers = {
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "kill": 62,
        "ptrace": 101,
        "unshare": 272,
        "io_uring_setup": 425,
        "clone": 56,
    }
    numbers |= {
        "socket": 41,
        "socketpair": 53,
        "mount": 165,
        "memfd_create": 319,
        "bpf": 321,
        "userfaultfd": 323,
        "tgkill": 234,
    }
    numbers |= {"process_vm_readv": 310, "pidfd_open": 434, "setrlimit": 160, "prctl": 157, "keyctl": 250, "shmget": 29}
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor n in {list(numbers.values())}:\n"
    program += "    print(libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno())\n"
    result = run(program, QUICK)
    assert result.stdout.splitlines() == ["-1 1"] * len(numbers), result


def test_another_interface_of_the_kernel_kills():
    x32_getpid = 0x40000000 + 39
    result = run(f"import ctypes; ctypes.CDLL(None).syscall({x32_getpid})", QUICK)
    assert result.reason == "ended by SIGSYS"


def test_no_socket():
    outcomes = attempts(
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair()",
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.getaddrinfo('localhost', 80) and socket.create_server(('', 0))",
    )
    assert outcomes == ["EPERM"] * 4 + [outcomes[4]]
    assert outcomes[4] in ("EPERM", "gaierror")


def test_nothing_is_written_and_only_the_library_is_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("expected answer")
    before = set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))
    reading = [
        f"open({str(path)!r}).read()" for path in (secret, ROOT / "README.md", "/etc/passwd", f"/proc/{os.getpid()}/environ")
    ]
    reading += ["open('/proc/self/mem', 'rb')", f"os.listdir({str(tmp_path)!r})", "open('/dev/zero', 'rb')"]
    assert attempts(*reading) == ["EACCES"] * len(reading)
    # On this file, on new ones in directories that anyone may write to, and on the library itself.
    library = os.__file__
    writing = [f"open({str(path)!r}, 'w')" for path in (secret, "/tmp/loam_x", "/dev/shm/loam_x", "loam_x", library)]
    writing += [f"os.open({str(secret)!r}, os.O_RDWR)", "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)"]
    assert attempts(*writing) == ["EROFS"] * len(writing)
    changing = [f"os.unlink({str(secret)!r})", "os.mkdir('/tmp/loam_x')", f"os.truncate({str(secret)!r}, 0)"]
    changing += [
        f"os.rename({str(secret)!r}, '/tmp/loam_x')",
        "os.symlink('/', '/tmp/loam_x')",
        f"os.chmod({str(secret)!r}, 0)",
    ]
    changing += ["import tempfile; tempfile.mkdtemp(dir='/tmp')", "os.mkfifo('/tmp/loam_x')"]
    assert attempts(*changing) == ["EPERM"] * len(changing)
    assert secret.read_text() == "expected answer"
    assert "loam_x" not in (set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))) - before


def test_no_limit_is_raised_even_by_root():
    outcomes = attempts(
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
        "resource.prlimit(0, resource.RLIMIT_CPU, (100, 100))",
    )
    assert "done" not in outcomes
    assert run("import resource; print(resource.getrlimit(resource.RLIMIT_AS))", QUICK).stdout == f"{(512 << 20, 512 << 20)}\n"


def test_descriptors_and_threads_run_out_before_the_machine_does():
    assert attempts("[os.pipe() for _ in range(100)]") == ["EMFILE"]
    bomb = "import threading, time\nfor _ in range(100000): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"
    assert "can't start new thread" in run(bomb, Limits(cpu_seconds=5)).reason


def test_a_pipe_signals_nobody():
    assert attempts(
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "fcntl.fcntl(1, fcntl.F_SETFL, os.O_ASYNC)"
    ) == [
        "EPERM",
        "EPERM",
    ]


def test_environment_input_and_descriptors_are_clean(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    readable, writable = os.pipe()
    os.set_inheritable(readable, True)
    program = (
        "import os, sys\n"
        "print(repr(sys.stdin.read()), dict(os.environ), [p for p in sys.path if 'site-packages' in p or not p])\n"
        "for fd in range(3, 64):\n    try: os.fstat(fd); print('open', fd)\n    except OSError: pass\n"
    )
    stdout = run(program, QUICK).stdout
    os.close(readable), os.close(writable)
    assert "SECRET" not in stdout
    assert re.fullmatch(r"'' \{'PYTHONHASHSEED': '0'(, 'LC_CTYPE': '[\w.-]+')?\} \[\]\n", stdout), stdout


def test_the_same_program_prints_the_same():
    program = "print(list({str(i) for i in range(50)}))"
    assert run(program, QUICK) == run(program, QUICK)


def test_a_program_cannot_claim_that_the_sandbox_failed():
    result = run("import os, sys; sys.stderr.write('seccomp is not to be had'); sys.stderr.flush(); os._exit(1)", QUICK)
    assert result.outcome == "failed"


def test_it_dies_with_who_asked():
    """SIGKILL to the process that runs a program ends the program."""
    readable, writable = os.pipe()
    caller = (
        f"import os, threading\nfrom data import sandbox\n"
        f"popen = sandbox.subprocess.Popen\n"
        f"def spy(*a, **k):\n    p = popen(*a, **k); os.write({writable}, b'%d\\n' % p.pid); return p\n"
        f"sandbox.subprocess.Popen = spy\n"
        "sandbox.run('import time, sys\\nsys.stdout.write(chr(1)); time.sleep(1000)', sandbox.Limits(wall_seconds=900))"
    )
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT, pass_fds=[writable])
    pid = int(os.read(readable, 100))
    watched = os.pidfd_open(pid)
    while "Seccomp:\t2" not in Path(f"/proc/{pid}/status").read_text():
        pass  # until it is confined, it may not have asked the kernel to be killed yet
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert select.select([watched], [], [], 30)[0], "the program outlived who asked"
    for descriptor in (readable, writable, watched):
        os.close(descriptor)


def test_many_at_once():
    results = [None] * 6

    def work(i):
        results[i] = run(f"print({i})", QUICK)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(6)]


def test_a_large_program_arrives_whole():
    assert run(f"x = {'a' * 3_000_000!r}\nprint(len(x))", QUICK).stdout == "3000000\n"


def test_where_it_cannot_be_confined_nothing_runs(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text((ROOT / "data/sandbox_child.py").read_text().replace("libc.syscall(444,", "libc.syscall(9999,"))
    monkeypatch.setattr("data.sandbox._CHILD", broken)
    with pytest.raises(SandboxUnavailable, match="landlock, needed to close the file system"):
        run("print(1)", QUICK)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"wall_seconds": 0}, "wall_seconds=0"),
        ({"wall_seconds": float("nan")}, "wall_seconds=nan"),
        ({"cpu_seconds": 0.5}, "cpu_seconds=0.5 must be a whole number"),
        ({"memory_bytes": 1000}, "memory_bytes=1000"),
        ({"output_bytes": 0}, "output_bytes=0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_numbers_of_calls_are_those_of_the_kernel():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    assert {name: int(numbers[name]) for name in ALLOWED} == ALLOWED
    assert len(build_filter()) // 8 < 4096  # the kernel's limit
