"""Runs code in a process of its own that may load libtpu, the TPU compiler, which reads its flags but once."""

import importlib.util
import os
import subprocess
import sys

import pytest


def require_libtpu() -> None:
    """Skips the test where libtpu is not installed; where it must be, as in CI, fails it."""
    if importlib.util.find_spec("libtpu") is None:
        if os.environ.get("LOAM_REQUIRE_LIBTPU"):
            pytest.fail("libtpu is not installed: `make env EXTRAS=tpu` installs it")
        pytest.skip("libtpu, the TPU compiler, is not installed")


def run_with_libtpu(code: str, *arguments: object) -> str:
    """What the code prints. As `require_libtpu` where there is none."""
    require_libtpu()
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
