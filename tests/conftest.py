"""Tests run on the CPU, split into eight devices, so that the same process can lay arrays out over any small mesh."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # inherited by the processes that tests start

import jax

jax.config.update("jax_num_cpu_devices", 8)
