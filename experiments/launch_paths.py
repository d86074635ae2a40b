"""What becomes of the paths of a config on other machines.

A job there sees the checkout of its image, as its working directory, and `--storage` at MOUNT; nothing else of this machine.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from model.config import check

if TYPE_CHECKING:
    from train.config import TrainConfig

MOUNT = PurePosixPath("/mnt/loam")


def paths_there(config: TrainConfig, is_in_checkout: Callable[[str], bool]) -> dict[str, str]:
    """Keys of the config that name files, and what they name there: what is relative, and not of the repository, below MOUNT.

    Args:
      is_in_checkout: whether the image's checkout has such a file, directory or match of a glob.

    Raises:
      ValueError: the job would not see the path, or it would be lost with the machine.
    """
    from train.config import paths_of

    found = {}
    for key, (kind, path) in paths_of(config).items():
        if kind == "model" and (base := base_of(path)):
            check(
                is_in_checkout(base) or PurePosixPath(base).is_relative_to(MOUNT),
                f"{key}={path} adapts {base}, which is not there for the job: name what `loam convert {path} DIR` writes, a "
                "model of its own",
            )
        if kind == "written":
            problem, fix = "would be lost with the machine", "choose one"
        elif is_in_checkout(path):
            found[key] = path
            continue
        else:
            problem, fix = "is not there for the job", "copy it to --storage, and name it"
            check(
                kind == "read" or "/" in path or path.endswith(".gguf"),
                f"{key}={path} is a name of `loam models`, and the job has no such store: {fix} by its path, such as "
                f"{MOUNT}/models/{path}",
            )
        there = MOUNT / path
        check(
            there.is_relative_to(MOUNT) and ".." not in there.parts and "://" not in path and not path.startswith("~"),
            f"{key}={path} {problem}: {fix} below {MOUNT}, where --storage is mounted",
        )
        found[key] = str(there)
    return found


def base_of(path: str) -> str:
    """The model that the adapters of a run, or of a directory as peft has it, are for; "" where none are here."""
    for name, key in (("config.json", "initial_weights"), ("adapter_config.json", "base_model_name_or_path")):
        try:
            described = json.loads((Path(path) / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(described, dict) and (described.get("lora") or name == "adapter_config.json"):
            return str(described.get(key) or "")
    return ""


def is_in_checkout(path: str) -> bool:
    """Whether git knows of a file at this path, below it, or of this glob, seen from the working directory.

    What it does not know of is not in the image. Without git, or outside of a repository, nothing is known.

    Raises:
      ValueError: it knows of some of the files, and a job would read those alone.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:  # The checkout may lie elsewhere there.
        return False
    command = ["git", "--glob-pathspecs", "ls-files"]
    try:
        known = subprocess.run([*command, "--", path], capture_output=True, timeout=10).stdout
        others = subprocess.run([*command, "--others", "--", path], capture_output=True, timeout=10).stdout if known else b""
    except (OSError, subprocess.TimeoutExpired):
        return False
    check(
        not others,
        f"git knows only some of the files of {path}, and the job would read those alone: add the others, such as "
        f"{others.decode(errors='replace').splitlines()[:1]}, or copy all to --storage",
    )
    return bool(known)
