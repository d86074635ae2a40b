"""How XLA is set up: flags, devices and compilation cache.  Call `configure` before jax first touches a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# For the CPU backend only; what each one gains is measured by `make bench` and noted in experiments/LOG.md.
CPU_FLAGS = (
    # None: Eigen's matmuls are up to 1.2 times faster than YNNPACK's, whose maximum of NaNs, moreover, is -inf.
    "--xla_cpu_experimental_ynn_fusion_type=",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)

# XLA allocates the buffer of a step anew each time. On pages of 2 MiB that costs a hundred times fewer page faults, which take
# a tenth of the time of a step of the quickstart. glibc reads this when a process starts.
MALLOC_SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages() -> None:
    """Replaces this process by itself with `MALLOC_SETTINGS` in its environment, on Linux and unless they are set already."""
    if sys.platform == "linux" and not MALLOC_SETTINGS.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MALLOC_SETTINGS)


def configure(cpu_devices: int) -> None:
    """Sets the flags, splits the CPU into `cpu_devices` devices, and keeps compiled programs between processes.

    Programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default under the user's cache directory. Flags that the caller
    has put into `XLA_FLAGS` win.

    Raises:
      RuntimeError: jax has already started its backends.
    """
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.split("=")[0] for flag in given.split()}
    os.environ["XLA_FLAGS"] = " ".join([given, *(flag for flag in CPU_FLAGS if flag.split("=")[0] not in names)]).strip()

    import jax

    jax.config.update("jax_num_cpu_devices", cpu_devices)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loam" / "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    # Small programs too: a start compiles some fifteen of them, of a tenth of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cpu_devices_for(rows: int) -> int:
    """As many CPU devices as there are cores for this process, and as divide `rows`: each runs its own share of a batch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n for n in range(1, cores + 1) if rows % n == 0)
