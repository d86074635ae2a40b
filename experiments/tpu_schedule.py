"""Reads what libtpu's compiler writes about a kernel: its VLIW bundles, basic blocks and the units they keep busy.

One bundle is one cycle where nothing stalls, so bundles are a lower bound and an estimate, not a measurement.
`AttentionCode` adds them up over the tiles that our attention kernels visit, `grouped_matmul_cycles` over those of experts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

UNITS: tuple[str, ...] = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
# Chip generation -> smallest topology that libtpu compiles for.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

KERNELS_PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"


def compiler_environment(dump: Path | None = None) -> dict[str, str]:
    """Environment of a process that compiles for TPUs on a machine without one, and leaves its final schedules in `dump`."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if dump:
        flags += f" --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": flags.strip(),
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

    def tile_loops(self) -> list[list[Bundle]]:
        """Loops that use the MXU and hold no other that does."""
        working = [loop for loop in self.loops() if used(loop, "MXU")]
        starts = {id(loop[0]) for loop in working}
        return [loop for loop in working if not any(id(bundle) in starts for bundle in loop[1:])]

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


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How much of an attention pattern a kernel computes, of all heads and rows or a share of them.

    Attributes:
      full: tiles in which every pair is allowed, computed whole.
      masked: other tiles that hold an allowed pair.
      parts: of the masked tiles that hold one; the rest of a masked tile is left out.
      rows: steps of the kernel's grid, one for each row of tiles.
    """

    full: float
    masked: float
    parts: float
    rows: float

    def __add__(self, other: Tiles) -> Tiles:
        return Tiles(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> Tiles:
        return Tiles(*(n * times for n in dataclasses.astuple(self)))


def causal_tiles(length: int, window: int, block: tuple[int, int], part: tuple[int, int], of_keys: bool) -> Tiles:
    """Of one causal document of `length` tokens, in tiles and parts of queries x keys; window 0 is no limit.

    Args:
      of_keys: whether a step of the grid is a block of keys (the backward kernel), not of queries.
    """

    def count(block: tuple[int, int]) -> tuple[int, int]:
        some = full = 0
        for first_query in range(0, length, block[0]):
            last_query = min(first_query + block[0], length) - 1
            for first_key in range(0, last_query + 1, block[1]):
                last_key = first_key + block[1] - 1
                if window and first_query - last_key >= window:
                    continue
                whole = last_key <= first_query and first_query + block[0] <= length
                whole &= not window or last_query - first_key < window
                full, some = full + whole, some + 1
        return some, full

    some, full = count(block)
    parts = count(part)[0] - full * (block[0] // part[0]) * (block[1] // part[1])
    return Tiles(full, some - full, parts, math.ceil(length / block[of_keys]))


@dataclasses.dataclass(frozen=True)
class AttentionCode:
    """Bundles of one of our attention kernels that run once for each full tile, masked tile, part of one, and row of tiles."""

    full: int
    masked: int
    part: int
    row: int

    @classmethod
    def of(cls, schedule: Schedule, parts_of_block: int) -> AttentionCode:
        """Args:
          parts_of_block: of a block of the side that the grid walks over: in so many rounds the parts of a tile are visited.

        Raises:
          ValueError: its code is not what it was when this was written.
        """
        loops = schedule.tile_loops()
        if len(loops) != 3:
            raise ValueError(
                f"{len(loops)} inner loops of our kernel use the MXU, not 3: its code has changed, mend this count"
            )
        masked, around = [], 0
        for part in (loops[0], loops[2]):
            outer = sorted((x for x in schedule.loops() if any(bundle is part[0] for bundle in x[1:])), key=len)
            tile = outer[parts_of_block > 1]
            rounds = len(outer[0]) - len(part) if parts_of_block > 1 else 0
            masked.append(len(tile) - len(part) + (parts_of_block - 1) * rounds)
            around += len(tile)
        inside = sum(1 for bundle in schedule.bundles if bundle.depth)
        return cls(len(loops[1]), max(masked), max(len(loops[0]), len(loops[2])), inside - around - len(loops[1]))

    def cycles(self, tiles: Tiles, least_full: float = 0, least_part: float = 0) -> float:
        """Cycles that the kernel takes at least: bundles, or what the MXUs need for the products if they are more."""
        computed = tiles.full * max(self.full, least_full) + tiles.parts * max(self.part, least_part)
        return computed + tiles.masked * self.masked + tiles.rows * self.row


def grouped_matmul_steps(rows: int, groups: int, inner: int, outer: int, tile: tuple[int, int, int]) -> int:
    """Steps of the grid of a grouped matmul: groups do not end with tiles, so that two share one."""
    return (math.ceil(rows / tile[0]) + groups - 1) * math.ceil(inner / tile[1]) * math.ceil(outer / tile[2])


def grouped_matmul_cycles(schedule: Schedule, steps: float, least: float) -> float:
    """Cycles that a grouped matmul takes at least: of a step its bundles, or `least` if they are fewer.

    Of the branches that use the MXUs each step runs one, the longer of which is counted, and all that does not use them.
    """
    blocks = [block for block in schedule.blocks() if block[0].depth]
    work = [len(block) for block in blocks if used(block, "MXU")]
    return steps * max(max(work) + sum(map(len, blocks)) - sum(work), least)


def page_sections() -> dict[str, str]:
    """Title -> text of the sections of docs/kernels.md."""
    page = KERNELS_PAGE.read_text() if KERNELS_PAGE.exists() else ""
    return dict(re.findall(r"^# (.*)\n\n((?:(?!# ).*\n)*)", page, flags=re.MULTILINE))


def write_section(title: str, text: str) -> None:
    """Puts a section of that title into docs/kernels.md, in place of the one that was there."""
    sections = page_sections()
    sections[title] = text
    KERNELS_PAGE.write_text("\n".join(f"# {name}\n\n{body.strip()}\n" for name, body in sections.items()))


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
