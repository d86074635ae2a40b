"""How XLA is set up, in processes of its own: jax reads flags once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import xla

ROOT = Path(__file__).parents[2]


def flags_after_configure(given: str) -> str:
    code = "import os; from model.xla import configure; configure(1); print(os.environ['XLA_FLAGS'])"
    environment = {**os.environ, "XLA_FLAGS": given}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True).strip()


def test_flags_are_added_and_those_of_the_user_win():
    name, value = xla.cpu_flags(decoding=False)[0].split("=")
    other = "--xla_dump_to=/nowhere"
    flags = flags_after_configure(f"{other} {name}=256").split()
    assert value != "256"
    assert flags == [other, f"{name}=256", *xla.cpu_flags(decoding=False)[1:]]


def test_the_users_flags_for_libtpu_win_too():
    name, value = xla.TPU_FLAGS[0].split("=")
    code = "import os; from model.xla import configure; configure(1); print(os.environ['LIBTPU_INIT_ARGS'])"
    environment = {**os.environ, "LIBTPU_INIT_ARGS": f"{name}=false --xla_other=1"}
    flags = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True).split()
    assert value != "false"
    assert flags == [f"{name}=false", "--xla_other=1", *xla.TPU_FLAGS[1:]]


def test_devices_flags_and_the_cache_of_programs_take_effect(tmp_path):
    code = (
        "import json, os; from model.xla import configure; configure(3)\n"
        "import jax; jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4))); print(json.dumps([len(jax.devices()), "
        "os.environ['XLA_FLAGS']]))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True)
    assert json.loads(output) == [3, " ".join(xla.cpu_flags(decoding=False))]
    assert any((tmp_path / "loam" / "xla").iterdir())


def test_a_maximum_keeps_nans():
    """By JAX 0.10.2's (and 0.12's) own flags it is -inf, and a network of NaNs looks sound."""
    assert np.all(np.isnan(jax.jit(lambda x: jnp.max(x, axis=1))(np.full((128, 128), np.nan, np.float32))))


def test_a_maximum_keeps_nans_where_one_decodes():
    code = (
        "from model.xla import configure; configure(1, decoding=True)\n"
        "import jax, jax.numpy as jnp; print(jax.jit(lambda x: jnp.max(x))(jnp.full((128, 128), jnp.nan)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True).strip() == "nan"


@pytest.mark.parametrize(("cores", "rows", "devices"), [(1, 12, 1), (2, 12, 2), (2, 7, 1), (8, 12, 6), (8, 4, 4), (6, 25, 5)])
def test_cpu_devices_divide_the_rows(monkeypatch, cores, rows, devices):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert xla.cpu_devices_for(rows) == devices
