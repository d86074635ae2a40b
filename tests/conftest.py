"""Tests run on the CPU, split into eight devices, so that the same process can lay arrays out over any small mesh."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # inherited by the processes that tests start

import jax

jax.config.update("jax_num_cpu_devices", 8)

# Programs that tests compile are kept between tests and between runs of the suite.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent / ".xla_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
