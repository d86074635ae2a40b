"""What `data/sandbox.py` starts: confines its own process, for good, and then runs the program that it was sent.

Imports the standard library only, and runs without site-packages. Numbers are those of Linux on x86-64
(`asm/unistd_64.h`, `linux/seccomp.h`, `linux/landlock.h`, `linux/filter.h`).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
_X32 = 0x40000000  # the bit that names calls of the 32-bit-pointer interface

# What an interpreter with threads needs to compute, to import, to read files and to print.
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19,
    "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
    "dup2": 33, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "dup3": 292, "pipe2": 293, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
    "faccessat2": 439,
}  # fmt: skip
_OPEN, _IOCTL, _CLONE, _FCNTL, _OPENAT, _PRLIMIT64, _CLONE3, _OPENAT2 = 2, 16, 56, 72, 257, 302, 435, 437
_OPEN_TO_WRITE = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
_CLONE_THREAD = 0x00010000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. Not F_SETFL and F_SETOWN, by which a pipe can signal another process.
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data; arguments are 8 bytes each, from 16 on, low half first


def _argument(index: int, high: bool = False) -> int:
    return 16 + 8 * index + 4 * high


def _fail(error: int) -> int:
    return 0x00050000 | error


def build_filter() -> bytes:
    """The seccomp program, as an array of struct sock_filter."""
    code: list[tuple[int, int, int, int]] = []

    def emit(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append((operation, if_true, if_false, value & 0xFFFFFFFF))

    emit(_LOAD, _ARCH)
    emit(_JUMP_EQUAL, _ARCHITECTURE, 1, 0)
    emit(_RETURN, _KILL)
    emit(_LOAD, _NUMBER)
    emit(_JUMP_AT_LEAST, _X32, 0, 1)
    emit(_RETURN, _KILL)
    for number in ALLOWED.values():
        emit(_JUMP_EQUAL, number, 0, 1)
        emit(_RETURN, _ALLOW)
    for number, flags in ((_OPEN, 1), (_OPENAT, 2)):
        emit(_JUMP_EQUAL, number, 0, 4)
        emit(_LOAD, _argument(flags))
        emit(_JUMP_ANY_BIT, _OPEN_TO_WRITE, 0, 1)
        emit(_RETURN, _fail(errno.EROFS))
        emit(_RETURN, _ALLOW)
    emit(_JUMP_EQUAL, _CLONE, 0, 4)  # a thread, not a process
    emit(_LOAD, _argument(0))
    emit(_JUMP_ANY_BIT, _CLONE_THREAD, 0, 1)
    emit(_RETURN, _ALLOW)
    emit(_RETURN, _fail(errno.EPERM))
    emit(_JUMP_EQUAL, _FCNTL, 0, 2 * len(_FCNTL_COMMANDS) + 2)
    emit(_LOAD, _argument(1))
    for command in _FCNTL_COMMANDS:
        emit(_JUMP_EQUAL, command, 0, 1)
        emit(_RETURN, _ALLOW)
    emit(_RETURN, _fail(errno.EPERM))
    emit(_JUMP_EQUAL, _PRLIMIT64, 0, 6)  # reading limits, not setting them: the new ones are a null pointer
    emit(_LOAD, _argument(2))
    emit(_JUMP_EQUAL, 0, 0, 3)
    emit(_LOAD, _argument(2, high=True))
    emit(_JUMP_EQUAL, 0, 0, 1)
    emit(_RETURN, _ALLOW)
    emit(_RETURN, _fail(errno.EPERM))
    for number, error in ((_IOCTL, errno.ENOTTY), (_CLONE3, errno.ENOSYS), (_OPENAT2, errno.ENOSYS)):
        emit(_JUMP_EQUAL, number, 0, 1)  # the C library takes the older call when there is no newer one
        emit(_RETURN, _fail(error))
    emit(_RETURN, _fail(errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _checked(what: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _let_read(libc: ctypes.CDLL, paths: list[str]) -> None:
    """Landlock: of the file system, only what lies beneath `paths` can be read, and nothing executed, written or removed."""
    read_file, read_dir, all_access = 1 << 2, 1 << 3, (1 << 13) - 1  # version 1 of the interface, Linux 5.13
    handled = struct.pack("=Q", all_access)
    ruleset = _checked(
        "landlock, needed to close the file system, is not to be had", libc.syscall(444, handled, len(handled), 0)
    )
    for path in paths:
        if not os.path.exists(path):
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = read_file | read_dir if os.path.isdir(path) else read_file
        rule = struct.pack("=Qi", access, descriptor)
        _checked(f"landlock_add_rule for {path}", libc.syscall(445, ruleset, 1, rule, 0))
        os.close(descriptor)
    _checked("landlock_restrict_self", libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def _filter_calls(libc: ctypes.CDLL) -> None:
    code = build_filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _checked("a seccomp filter, needed to close the network, is not to be had", libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0))


def _limit(limit: int, soft: int, hard: int) -> None:
    """Sets a limit, or leaves a stricter one that was there."""
    there = resource.getrlimit(limit)[1]
    if there != resource.RLIM_INFINITY:
        soft, hard = min(soft, there), min(hard, there)
    resource.setrlimit(limit, (soft, hard))


def _confine(cpu_seconds: int, memory_bytes: int, parent: int) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError(f"the filter of system calls is written for Linux on x86_64, not {sys.platform} on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    _checked("PR_SET_PDEATHSIG", libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        raise OSError("who asked has gone")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, 1 << 16)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _limit(limit, value, value)
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)  # SIGXCPU tells; SIGKILL cannot be caught
    _checked("PR_SET_NO_NEW_PRIVS", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    python = [os.path.dirname(os.__file__), *(path for path in sys.path if "lib-dynload" in path), sys.base_prefix + "/lib"]
    _let_read(libc, libraries + python)
    _filter_calls(libc)


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    program = order.pop("program")
    try:
        _confine(**order)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)
    os.write(1, b"\0")
    sys.argv, sys.path[:] = [""], sys.path[1:]  # without this file's directory
    main_module = type(sys)("__main__")
    sys.modules["__main__"] = main_module
    exec(compile(program, "<program>", "exec", dont_inherit=True), main_module.__dict__)


if __name__ == "__main__":
    main()
