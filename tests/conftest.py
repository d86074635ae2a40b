"""Tests run on the CPU, split into eight devices, so that the same process can lay arrays out over any small mesh."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # inherited by the processes that tests start, as is what `configure` sets
# Programs that tests compile are kept between tests and between runs of the suite.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent / ".xla_cache")

# LLVM's optimiser takes nearly half of the suite's time, for programs that run for milliseconds, so it is off; XLA's own passes
# all run. `LOAM_TEST_OPTIMISED=1` compiles as users do: for tests marked `optimised`, whose bounds leave no room for products
# that are rounded before they are added, and for the slow ones.
if not os.environ.get("LOAM_TEST_OPTIMISED"):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    ).strip()

import jax
import pytest

from model.xla import configure

configure(cpu_devices=8)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
pytest.register_assert_rewrite("tests.inference.engine_reference")
