"""How XLA is set up: flags, devices and compilation cache.  Call `configure` before jax first touches a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# For the CPU backend only; what each one gains is measured by `make bench` and noted in experiments/LOG.md.
_CPU_FLAGS = (
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)
# Eigen's matmuls are up to 1.2 times faster than YNNPACK's for the many rows of a batch. For the few that are decoded at once
# they are half as fast, and slower still with transposed or int8 matrices. YNNPACK's maximum of NaNs, moreover, is -inf, so it
# gets nothing but matmuls. Float32 weights that are rounded to bfloat16 where they are used, it takes unrounded for two rows or
# more (experiments/LOG.md); with `--dtype=bfloat16` they are rounded beforehand.
_EIGEN = "--xla_cpu_experimental_ynn_fusion_type="
_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"

# For libtpu, which reads LIBTPU_INIT_ARGS when it is loaded; any other backend leaves them alone. `loam compile` compiles with
# the same, and shows what becomes of the collectives; which of them matter is noted in experiments/LOG.md.
TPU_FLAGS = (
    # Collectives begin early, and go on beside the matmuls that do not need them yet.
    "--xla_enable_async_all_gather=true",
    "--xla_enable_async_all_reduce=true",
    "--xla_enable_async_collective_permute=true",
    # Where fsdp is the whole slice, shards would be padded with zeros and added up instead of gathered, at twice the bytes.
    "--xla_tpu_prefer_async_allgather_to_allreduce=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    # Gradients of sharded parameters may be reduced and scattered in one, whatever the size of the shards. Over a whole
    # slice of v5e or v5p they are not, for all that; with data 2 and half the fsdp they are.
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
    "--xla_tpu_assign_all_reduce_scatter_layout=true",
    # On v5p, v6e and tpu7x SparseCores carry them, and the TensorCore goes on; v4 and v5e leave these alone. The continuation
    # fusion did as much for it, but newer libtpu calls it unsafe ("incorrect results, hang") on all but v5e.
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "--xla_tpu_use_tc_device_shape_on_sc=true",
    "--xla_sc_disable_megacore_partitioning=true",
    "--xla_sc_enable_instruction_fusion=false",
    "--xla_sc_disjoint_spmem=false",
)

# XLA allocates the buffer of a step anew each time. On pages of 2 MiB that costs a hundred times fewer page faults, which take
# a tenth of the time of a step of the quickstart. glibc reads this when a process starts.
MALLOC_SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages() -> None:
    """Replaces this process by itself with `MALLOC_SETTINGS` in its environment, on Linux and unless they are set already."""
    if sys.platform == "linux" and not MALLOC_SETTINGS.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MALLOC_SETTINGS)


def with_flags(given: str, flags: tuple[str, ...]) -> str:
    """`given` and those of `flags` that it does not set."""
    names = {flag.split("=")[0] for flag in given.split()}
    return " ".join([given, *(flag for flag in flags if flag.split("=")[0] not in names)]).strip()


def cpu_flags(decoding: bool) -> tuple[str, ...]:
    """Flags of the CPU backend, for a process that decodes or one that trains."""
    return (*_CPU_FLAGS, _YNNPACK if decoding else _EIGEN)


def configure(cpu_devices: int, *, decoding: bool = False) -> None:
    """Sets the flags, splits the CPU into `cpu_devices` devices, and keeps compiled programs between processes.

    Programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default under the user's cache directory. Flags that the caller
    has put into `XLA_FLAGS` and `LIBTPU_INIT_ARGS` win.

    Args:
      decoding: the process decodes, and trains little or nothing.

    Raises:
      RuntimeError: jax has already started its backends.
    """
    os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), cpu_flags(decoding))
    os.environ["LIBTPU_INIT_ARGS"] = with_flags(os.environ.get("LIBTPU_INIT_ARGS", ""), TPU_FLAGS)

    import jax

    jax.config.update("jax_num_cpu_devices", cpu_devices)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loam" / "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    # Small programs too: a start compiles some fifteen of them, of a tenth of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_devices_for(rows: int) -> int:
    """As many CPU devices as there are cores for this process, and as divide `rows`: each runs its own share of a batch."""
    return max(n for n in range(1, num_cores() + 1) if rows % n == 0)
