"""The collectives of a scheduled TPU program: their bytes, which axes of the mesh they lie along, and what work covers them.

Pure functions over a module that experiments/hlo.py has read. The compiler gives no estimate of a collective's cycles: theirs
come from the bytes and the links.

An asynchronous collective comes in two forms: `…-start` and `…-done` with other operations scheduled between them, and a chain
of fusions, of which the first contains `AsyncCollectiveStart`, the last `AsyncCollectiveDone`, and those between (the *steps*)
a piece of the collective beside a computation. What the work between its ends is too short to cover is *exposed*: the device
waits for it. Work covers one collective at a time, the first begun, because all of them use the same links. A step before which
no start was recognised looks like a fusion with a synchronous collective, and counts as one: too much, never too little.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.hlo import (
    STARTS,
    Computation,
    Content,
    Instruction,
    Module,
    collective_kind,
    contents,
    cycles_in,
    numbers,
    runs,
    shape_bytes,
    total_cycles,
)
from model.chips import Topology

Groups = list[tuple[int, ...]]
# An all-reduce of shards, each padded with zeros to the whole: an all-gather at twice the bytes. libtpu makes one where a group
# is the whole slice, unless it is told to prefer the other (`model.xla.TPU_FLAGS`).
GATHER_BY_ALL_REDUCE = "all-gather by all-reduce"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      operand_bytes: what a device puts in, each time.
      groups: positions in the mesh that communicate; for a permutation the pairs of source and target. Empty is all.
      times: how often it runs in a step.
      is_async: something may be scheduled between its beginning and its end.
      cycles: that it takes on the links, each time; exposed_cycles are those that no work covers.
    """

    kind: str
    name: str
    operand_bytes: int
    groups: Groups
    times: float
    is_async: bool = False
    cycles: float = 0.0
    exposed_cycles: float = 0.0

    def moved_bytes(self, num_devices: int) -> float:
        """What a device receives each time, by the usual ring algorithms."""
        n = len(self.groups[0]) if self.groups else num_devices
        if self.kind == "collective-permute":
            return self.operand_bytes if any(source != target for source, target in self.groups) else 0
        both = 2 * (n - 1) / n
        share = {"all-gather": n - 1, "all-reduce": both, GATHER_BY_ALL_REDUCE: both, "collective-broadcast": 1}
        return self.operand_bytes * share.get(self.kind, (n - 1) / n)


def find(
    module: Module, cycles_of: Callable[[Collective], float], kernels: Mapping[str, float] | None = None
) -> list[Collective]:
    """Every collective, in the order of the schedule of each computation.

    Args:
      cycles_of: that a collective takes on the links, each time.
      kernels: cycles of each call of a Pallas kernel, by the name of its instruction.
    """
    times, _ = runs(module)
    schedule = _Schedule(module, contents(module), total_cycles(module, times, kernels or {}), kernels or {}, cycles_of, {})
    return [one for name, count in times.items() for one in schedule.collectives(module.computations[name], count)]


@dataclasses.dataclass
class _Open:
    """Collectives that have begun and not ended; `left` are the cycles that no work has covered yet."""

    begun: list[Collective]
    left: float

    def cover(self, work: float) -> float:
        """What remains of so many cycles of work for other collectives."""
        used = min(work, self.left)
        self.left -= used
        return work - used

    def end(self) -> list[Collective]:
        """The last of several waits for what is left."""
        shares = [0.0] * (len(self.begun) - 1) + [self.left]
        return [
            dataclasses.replace(one, is_async=True, exposed_cycles=share) for one, share in zip(self.begun, shares, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What it takes to walk over the operations of a computation in order."""

    module: Module
    content: Mapping[str, Content]
    total: Mapping[str, float]
    kernels: Mapping[str, float]
    cycles_of: Callable[[Collective], float]
    known: dict[tuple[str, tuple[tuple[int, ...], ...], int], float]

    def describe(self, kind: str, scope: Scope, instruction: Instruction, count: float) -> Collective:
        """A synchronous collective."""
        if kind == "all-reduce" and any(_is_padded(self.module, scope, operand) for operand in instruction.operands):
            kind = GATHER_BY_ALL_REDUCE
        one = _describe(kind, scope[-1][0], instruction, count)
        key = (one.kind, tuple(one.groups), one.operand_bytes)
        if key not in self.known:
            self.known[key] = self.cycles_of(one)
        return dataclasses.replace(one, cycles=self.known[key], exposed_cycles=self.known[key])

    def collectives(self, computation: Computation, count: float) -> Iterator[Collective]:
        pairs: dict[str, _Open] = {}  # by the name of the start
        chains: dict[str, _Open] = {}  # by channel
        for instruction in computation.values():
            work = cycles_in(self.module, self.total, self.kernels, computation, instruction)
            opcode = instruction.opcode
            if kind := collective_kind(opcode):
                one = self.describe(kind, ((computation, None),), instruction, count)
                if opcode.endswith("-start"):
                    pairs[instruction.name] = _Open([one], one.cycles)
                else:
                    yield one
            elif opcode in STARTS:  # What holds no collective is one of hlo.work's asides.
                if inner := list(self._begun(((computation, None),), instruction, count)):
                    pairs[instruction.name] = _Open(inner, sum(one.cycles for one in inner))
            elif opcode == "async-update" and instruction.operands[0] in pairs:
                pairs[instruction.name] = pairs.pop(instruction.operands[0])
            elif opcode.endswith("-done") and instruction.operands and instruction.operands[0] in pairs:
                yield from pairs.pop(instruction.operands[0]).end()
            elif opcode == "fusion":
                # A step of a chain carries on its own collective first.
                for channel, one, targets in self._fused(computation, instruction, count):
                    if "AsyncCollectiveStart" in targets:
                        chains[channel] = _Open([one], one.cycles)
                    elif channel not in chains:
                        yield one
                    elif "AsyncCollectiveDone" in targets:
                        yield from chains.pop(channel).end()
                    else:
                        work = chains[channel].cover(work)
            for pair in pairs.values():
                work = pair.cover(work)
        if pairs or chains:
            names = ", ".join(one.name for pair in (*pairs.values(), *chains.values()) for one in pair.begun)
            raise ValueError(
                f"collectives without an end: {names}. The compiler's format has changed, mend experiments/collectives.py"
            )

    def _begun(self, scope: Scope, start: Instruction, count: float) -> Iterator[Collective]:
        """Collectives in what runs beside; a program of a SparseCore may start others."""
        for called in start.called:
            inner = (*scope, (self.module.computations[called], start))
            for i in self.module.computations[called].values():
                if kind := collective_kind(i.opcode):
                    yield self.describe(kind, inner, i, count)
                elif i.opcode in STARTS:
                    yield from self._begun(inner, i, count)

    def _fused(
        self, computation: Computation, instruction: Instruction, count: float
    ) -> Iterator[tuple[str, Collective, frozenset[str]]]:
        """Channel, collective and targets of the custom calls beside it, of each collective in a fusion."""
        for called in instruction.called:
            if called not in self.content or not any(collective_kind(c) for c in self.content[called].opcodes):
                continue
            inner = self.module.computations[called]
            for i in inner.values():
                if kind := collective_kind(i.opcode):
                    # An all-reduce of which each device keeps its share is a reduce-scatter under another name.
                    kind = "reduce-scatter" if called.startswith("all-reduce-scatter") else kind
                    scope = ((computation, None), (inner, instruction))
                    yield i.attribute("channel_id"), self.describe(kind, scope, i, count), self.content[called].targets


def _describe(kind: str, computation: Computation, instruction: Instruction, count: float) -> Collective:
    sizes = [shape_bytes(computation[name].shape) for name in instruction.operands]
    # Of rows and the room for them, one has just as many as an even router sends; the rest are offsets.
    operand_bytes = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
    groups = replica_groups(instruction.attributes)
    return Collective(kind, instruction.name, operand_bytes, groups, count)


# Computations around an operation, the outermost first, each with the instruction of the one before that calls it.
Scope = tuple[tuple[Computation, Instruction | None], ...]
_SAME_NUMBERS = {"bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "transpose"}


def _source(module: Module, scope: Scope, name: str) -> tuple[Scope, Instruction]:
    """The operation that a name's numbers come from, through copies and into and out of fusions, and where it stands."""
    while True:
        computation, caller = scope[-1]
        instruction = computation[name]
        if instruction.opcode in _SAME_NUMBERS:
            name = instruction.operands[0]
        elif instruction.opcode == "parameter" and caller is not None:
            scope, name = scope[:-1], caller.operands[int(instruction.inside)]
        elif instruction.opcode == "fusion":
            inner = module.computations[instruction.called[0]]
            scope, name = (*scope, (inner, instruction)), next(i.name for i in inner.values() if i.is_root)
        else:
            return scope, instruction


def _is_padded(module: Module, scope: Scope, name: str) -> bool:
    """Whether it is an array of one number throughout, 0, but for a slice written into it."""
    scope, written = _source(module, scope, name)
    return written.opcode == "dynamic-update-slice" and _source(module, scope, written.operands[0])[1].opcode == "broadcast"


def replica_groups(attributes: str) -> Groups:
    """Groups, or pairs, in any of XLA's notations: lists, iota [2,4]<=[4,2]T(1,0), or axes of a mesh ['a'=2,'b'=4] {'b'}."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])]
    if match := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", attributes):
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return [tuple(group) for group in _iota(match[2]).reshape(numbers(match[1])).tolist()]
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", attributes)
    if match is None:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    if match[2] is None:
        ids = np.arange(math.prod(sizes.values()))
    elif match[2].startswith("["):
        ids = _iota(match[2])
    else:
        ids = np.array(numbers(match[2]))
    # A part of an axis, 'a':(before)size, is an axis of its own.
    shape, taken = [], []
    parts = {name: (int(before or 1), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", match[3])}
    whole = set(re.findall(r"'([^']+)'", match[3])) - set(parts)
    for name, size in sizes.items():
        before, part = parts.get(name, (1, size))
        shape += [before, part, size // before // part]
        taken += [False, name in whole or name in parts, False]
    grouped = [axis for axis, inside in enumerate(taken) if inside]
    others = [axis for axis, inside in enumerate(taken) if not inside]
    members = math.prod(shape[axis] for axis in grouped)
    return [tuple(group) for group in ids.reshape(shape).transpose(others + grouped).reshape(-1, members).tolist()]


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): numbers in order, in this shape, transposed, flattened."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    ids = np.arange(math.prod(numbers(match[1]))).reshape(numbers(match[1]))
    return (ids.transpose(numbers(match[2])) if match[2] else ids).reshape(-1)


def mesh_axes(one: Collective, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which those that communicate differ, such as "data+fsdp"; "part of …" if some are left out.

    Args:
      mesh: axis -> size, the last one varying fastest over positions.
    """
    groups = np.array(one.groups or [range(math.prod(mesh.values()))])
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)  # [group, member, axis]
    differs = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
    axes = [axis for axis, differ in zip(mesh, differs, strict=True) if differ]
    if not axes:
        return "none"
    is_whole = one.kind == "collective-permute" or math.prod(mesh[axis] for axis in axes) == groups.shape[1]
    return ("" if is_whole else "part of ") + "+".join(axes)


def seconds(one: Collective, topology: Topology, places: Sequence[Sequence[int]]) -> float:
    """How long it takes each time if nothing else uses the links, by its bytes alone: latency is not in it.

    Args:
      places: coordinates on the torus of every position of the mesh.
    """
    groups = one.groups or [tuple(range(len(places)))]
    members = [places[i] for i in groups[0]]
    if one.kind == "collective-permute":
        return one.moved_bytes(len(places)) / topology.chip.link_bandwidth
    rings = topology.rings(members)
    if not rings:  # Two cores of a chip, between which there are six times as many lanes as along a dimension of the torus.
        return one.moved_bytes(len(places)) / (6 * topology.chip.link_bandwidth)
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        # Half of everything crosses the middle of the longest ring or line.
        return max(one.operand_bytes * chips / (4 * links) for chips, links in rings) / topology.chip.link_bandwidth
    return one.moved_bytes(len(places)) / (sum(links for _, links in rings) * topology.chip.link_bandwidth)


class Traffic(NamedTuple):
    """Collectives of one kind over the same axes, added up over a step.

    Attributes:
      bytes: that a device receives.
      seconds: on the links; `exposed_seconds` is what the work between start and done does not cover.
      asynchronous: how many of `count` have a start and a done, with whatever stands between; `covered`, how many have work
        there that covers them at least in part.
    """

    kind: str
    axes: str
    count: float
    asynchronous: float
    covered: float
    bytes: float
    seconds: float
    exposed_seconds: float


def traffic(found: Sequence[Collective], mesh: Mapping[str, int], topology: Topology) -> list[Traffic]:
    """The table of collectives, the longest exposed first."""
    rows: dict[tuple[str, str], list[float]] = {}
    axes: dict[tuple[str, tuple[tuple[int, ...], ...]], str] = {}
    for one in found:
        key = (one.kind, tuple(one.groups))
        if key not in axes:
            axes[key] = mesh_axes(one, mesh)
        row = rows.setdefault((one.kind, axes[key]), [0.0] * 6)
        seconds = (cycles / topology.chip.clock for cycles in (one.cycles, one.exposed_cycles))
        values = (1, one.is_async, one.exposed_cycles < one.cycles, one.moved_bytes(topology.num_devices), *seconds)
        row[:] = [old + one.times * value for old, value in zip(row, values, strict=True)]
    return sorted((Traffic(*key, *row) for key, row in rows.items()), key=lambda t: -t.exposed_seconds)
