"""Writing a file so that a reader, or a restart after a crash, sees the old content or the new one and nothing between."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def named_disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises what the disk refuses as an OSError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to {path} ({error.strerror or error}): see that the disk has room and may be written to, and start "
            "the same command again"
        ) from error


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to a neighbour of `path`, waits until the disk has it, and renames it into place."""
    path = pathlib.Path(path)
    with named_disk_errors(path):
        _replace(path, content)


def _replace(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json_atomic(path: str | os.PathLike[str], value: object) -> None:
    """`write_atomic` of `value` as indented JSON; floats round-trip exactly."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def only_process_in(directory: pathlib.Path) -> Iterator[None]:
    """Creates `directory` and holds a lock on it that ends with the process, however it ends.

    A directory that was created here and has got no file by the end, because the run was refused, is removed.

    Raises:
      OSError: it cannot be created or written to.
      RuntimeError: another process holds it.
    """
    lock, is_new = directory / ".lock", not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"cannot write to {directory} ({error.strerror}): choose another --config.run_dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"another process is running in {directory}: wait for its end, stop it, or choose another --config.run_dir"
            ) from error
        try:
            yield
        finally:
            # Under the lock, so that nobody else has begun here.
            if is_new and not any(path.is_file() for path in directory.rglob("*") if path != lock):
                shutil.rmtree(directory)
