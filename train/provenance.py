"""What a result depends on besides its config: code, packages, machine, data.  No environment dump, no secrets."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax

from train.files import write_json_atomic

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece", "tokenizers")


def provenance(mesh: jax.sharding.Mesh, manifest_hash: str, peak_flops: float) -> dict[str, Any]:
    """A JSON-ready record.

    Args:
      mesh: the devices that do the work.
      manifest_hash: of the prepared data.
      peak_flops: FLOP/s of all devices together, which MFU is measured against.
    """
    device = mesh.devices.flat[0]
    return {
        "git": git_state(pathlib.Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": mesh.devices.size,
            "hosts": jax.process_count(),
            "mesh": dict(mesh.shape),
            "peak_flops": peak_flops,
        },
        "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES")},
        "command": sys.argv,
        "data_manifest_hash": manifest_hash,
    }


def write_provenance(run_dir: pathlib.Path, mesh: jax.sharding.Mesh, manifest_hash: str, peak_flops: float) -> None:
    """`provenance.json` of this start, with those of earlier starts, which may have been of other code or another machine."""
    path = run_dir / "provenance.json"
    info = provenance(mesh, manifest_hash, peak_flops)
    if path.exists():
        last = json.loads(path.read_text())
        info["earlier_starts"] = [*last.pop("earlier_starts", []), last]
    write_json_atomic(path, info)


def git_state(directory: pathlib.Path) -> dict[str, Any]:
    """Commit, whether the tree differs from it, and the hash of the difference ("" if none; of new files, only the names).

    The commit is "" outside of a repository or without git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=10).stdout.strip()

    try:
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
        difference = hashlib.sha256((status + git("diff", "HEAD")).encode()).hexdigest() if status else ""
        return {"commit": commit, "dirty": bool(status), "diff_sha256": difference}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "", "dirty": False, "diff_sha256": ""}
