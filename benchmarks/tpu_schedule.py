"""Reads what libtpu's compiler writes about a kernel: its VLIW bundles, basic blocks and the units they keep busy.

One bundle is one cycle where nothing stalls, so bundles are a lower bound and an estimate, not a measurement.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

UNITS: tuple[str, ...] = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
# Chip generation -> smallest topology that libtpu compiles for.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiler_environment(dump: Path) -> dict[str, str]:
    """Environment of a process that compiles for TPUs on a machine without one and leaves its schedules in `dump`."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    }


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Attributes:
    depth: of loops around it.
    starts: LB (loop body), PF, CT, ... where control flow arrives; empty elsewhere.
    branches: whether it branches.
    units: slots used, by the order of UNITS.
    """

    depth: int
    starts: str
    branches: bool
    units: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final bundles of one kernel, and how many slots of each unit a bundle has."""

    bundles: list[Bundle]
    capacity: dict[str, int]

    def loops(self) -> list[list[Bundle]]:
        """Every loop's bundles, its inner loops among them, in program order."""
        found = []
        for begin, bundle in enumerate(self.bundles):
            if bundle.starts == "LB":
                end = begin + 1
                while end < len(self.bundles) and self.bundles[end].depth >= bundle.depth:
                    if self.bundles[end].starts == "LB" and self.bundles[end].depth == bundle.depth:
                        break
                    end += 1
                found.append(self.bundles[begin:end])
        return found

    def blocks(self) -> list[list[Bundle]]:
        """Basic blocks: bundles between places where control flow arrives or leaves."""
        blocks: list[list[Bundle]] = [[]]
        for bundle in self.bundles:
            if bundle.starts:
                blocks.append([])
            blocks[-1].append(bundle)
            if bundle.branches:
                blocks.append([])
        return [block for block in blocks if block]


def used(bundles: list[Bundle], unit: str) -> int:
    """Slots of a unit that the bundles use."""
    return sum(bundle.units[UNITS.index(unit)] for bundle in bundles)


def read_schedule(dump: Path, kernel: str) -> Schedule:
    """The schedule of the newest kernel in `dump` whose name contains `kernel`.

    Raises:
      FileNotFoundError: there is none.
    """

    def newest(suffix: str) -> Path:
        files = sorted(path for path in dump.glob(f"*{kernel}*{suffix}") if "schedule-analysis" not in path.name)
        if not files:
            raise FileNotFoundError(f"no *{kernel}*{suffix} in {dump}: was the kernel compiled, with LIBTPU_INIT_ARGS set?")
        return files[-1]

    header, _, table = newest("final_hlo-static-per-bundle-utilization.txt").read_text().partition("== UTILIZATION:")
    units = [tuple(int(n) for n in line.split()) for line in table.strip().splitlines()]
    capacity = dict(zip(UNITS, (int(n) for n in header.strip().splitlines()[-1].split()), strict=True))
    bundles, depth = [], 0
    for line in newest("final_bundles.txt").read_text().splitlines():
        match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*) ?(.*)", line)
        if match:
            starts, arrows, text = match.groups()
            depth = depth if text.startswith("{}") and not arrows else len(arrows)  # Empty bundles lack the arrows.
            bundles.append(Bundle(depth, starts or "", "sbr.rel" in text, units[len(bundles)]))
    if len(bundles) != len(units):
        raise ValueError(
            f"{dump}: {kernel} has {len(bundles)} bundles, but the use of {len(units)}: libtpu's format has changed"
        )
    return Schedule(bundles, capacity)
