"""Writing a file so that a reader, or a restart after a crash, sees the old content or the new one and nothing between."""

from __future__ import annotations

import json
import os
import pathlib


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to a neighbour of `path`, waits until the disk has it, and renames it into place."""
    path = pathlib.Path(path)
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
