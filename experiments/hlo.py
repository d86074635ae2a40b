"""What a scheduled TPU program costs, read from its text (`compiled.as_text()`): cycles, FLOPs and collectives.

Pure functions over text. The compiler writes its estimate of an operation's cycles beside it (`estimated_cycles`); a loop's
body is counted as often as it runs. Collectives have no such estimate: theirs comes from the bytes and the links. All of it is
an estimate, made without a TPU.

An asynchronous collective comes in two forms: `…-start` and `…-done` with other operations scheduled between them, and a chain
of fusions, of which the first contains `AsyncCollectiveStart`, the last `AsyncCollectiveDone`, and those between (the *steps*)
a piece of the collective beside a computation. What the work between its ends is too short to cover is *exposed*: the device
waits for it. Work covers one collective at a time, the first begun, because all of them use the same links.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from model.chips import Topology

COLLECTIVES = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# In this order: an operation belongs to the first that it contains.
CLASSES = ("matmul", "kernel", "collective", "reduction", "slice", "copy", "other")
SLICES = {"dynamic-slice", "dynamic-update-slice", "slice", "gather", "scatter", "pad", "concatenate"}
COPIES = {"copy", "transpose", "reshape", "copy-start", "slice-start"}
DTYPE_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0}
KERNEL = "tpu_custom_call"

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^ ]+) = (\(.*?\)|[^ ]+) ([a-z][a-z0-9-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^ ]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_OPERAND = re.compile(r"%([^ ,()]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([^ ,}]+)|(?:branch_computations|called_computations)=\{([^}]*)\}")


# --- Parsing ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """Attributes:
    shape: its type, such as "f32[8,128]{1,0}" or a tuple of them.
    operands: names.
    inside: the text of its parentheses, which is the value of a constant.
    attributes: the rest of the line.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match else 0

    @property
    def called(self) -> list[str]:
        found = []
        for one, several in _CALLED.findall(self.attributes):
            found += [one] if one else [name.strip().lstrip("%") for name in several.split(",") if name.strip()]
        return found

    def attribute(self, name: str) -> str:
        """The text after `name=`, up to the next space or comma outside brackets; empty if there is none."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if not match:
            return ""
        depth = 0
        for end in range(match.end(), len(self.attributes)):
            character = self.attributes[end]
            depth += (character in "{[(") - (character in "}])")
            if depth < 0 or (depth == 0 and character in ", "):
                return self.attributes[match.end() : end]
        return self.attributes[match.end() :]


Computation = dict[str, Instruction]  # in the order in which they are scheduled


@dataclasses.dataclass(frozen=True)
class Module:
    """Attributes:
    unknown_trips: how often a loop runs whose text does not tell.
    """

    computations: dict[str, Computation]
    entry: str
    unknown_trips: float = 1.0


def parse(text: str, unknown_trips: float = 1.0) -> Module:
    """Reads a module in time linear in its length.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            match = _INSTRUCTION.match(line)
            if match:
                root, name, shape, opcode, rest = match.groups()
                inside, _, attributes = rest.partition(")")
                operands = tuple(_OPERAND.findall(inside))
                current[name] = Instruction(name, shape, opcode, operands, inside, attributes, bool(root))
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return Module(computations, entry, unknown_trips)


def shape_bytes(shape: str) -> int:
    """Bytes of an array type or of a tuple of them, without padding."""
    total = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        digits = re.search(r"\d+", dtype)
        bits = DTYPE_BITS.get(dtype, int(digits[0]) if digits else 0)
        total += math.ceil(math.prod(_dimensions(dimensions)) * bits / 8)
    return total


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def first_shape(shape: str) -> tuple[int, ...]:
    """Dimensions of an array type, or of the first of a tuple."""
    match = _ARRAY.search(shape)
    return _dimensions(match[2]) if match else ()


# --- How often things run -----------------------------------------------------------------------------------------------------


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None if its text does not tell.

    Known from the compiler's note, or from a condition `i < constant` with the counter's first value and its step.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.attribute("condition").lstrip("%")]
    body = module.computations[loop.attribute("body").lstrip("%")]
    compare = next((i for i in condition.values() if i.is_root), None)
    if compare is None or compare.opcode != "compare" or len(compare.operands) != 2:
        return None
    counter, bound = (condition[name] for name in compare.operands)
    direction = compare.attribute("direction")
    last = _constant(condition, bound)
    index = counter.attribute("index")
    if last is None or not index or direction not in ("LT", "LE", "NE"):
        return None
    first = _constant(computation, _element(computation, computation[loop.operands[0]], int(index))) or 0
    root = next(i for i in body.values() if i.is_root)
    step_of = _element(body, root, int(index))
    steps = [_constant(body, body[name]) for name in step_of.operands if name in body] if step_of.opcode == "add" else []
    step = next((value for value in steps if value), 1)
    return max(0, math.ceil((last + (direction == "LE") - first) / step))


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done") and instruction.operands:
        instruction = computation[instruction.operands[0]]
    literal = re.fullmatch(r"-?\d+", instruction.inside) if instruction.opcode == "constant" else None
    return int(literal[0]) if literal else None


def _element(computation: Computation, instruction: Instruction, index: int) -> Instruction:
    return computation[instruction.operands[index]] if instruction.opcode == "tuple" else instruction


def runs(module: Module) -> tuple[dict[str, float], list[str]]:
    """How often each computation is executed, those of fusions excepted; and the loops whose trip count is not known.

    Of a conditional all branches are counted.
    """
    order: list[str] = []
    edges: dict[str, list[tuple[str, float]]] = {}
    unknown: list[str] = []
    stack = [(module.entry, False)]
    while stack:  # Callers after what they call, without recursion.
        name, done = stack.pop()
        if done:
            order.append(name)
            continue
        if name in edges:
            continue
        edges[name] = []
        stack.append((name, True))
        computation = module.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = trip_count(module, computation, instruction)
                if trips is None:
                    unknown.append(instruction.name)
                    trips = module.unknown_trips
                body, condition = (instruction.attribute(key).lstrip("%") for key in ("body", "condition"))
                edges[name] += [(body, trips), (condition, trips + 1)]
            elif instruction.opcode in ("call", "conditional"):
                edges[name] += [(called, 1) for called in instruction.called]
        stack += [(called, False) for called, _ in edges[name]]
    times: dict[str, float] = defaultdict(float)
    times[module.entry] = 1.0
    for name in reversed(order):
        for called, count in edges[name]:
            times[called] += times[name] * count
    return dict(times), unknown


# --- What operations are ------------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What a computation contains, fusions within it included."""

    opcodes: frozenset[str]
    targets: frozenset[str]  # of custom calls
    flops: float  # of matmuls


def contents(module: Module) -> dict[str, Content]:
    """Of every computation. XLA prints a computation before those that call it."""
    found: dict[str, Content] = {}
    for name, computation in module.computations.items():
        opcodes: set[str] = set()
        targets: set[str] = set()
        flops = 0.0
        for instruction in computation.values():
            opcodes.add(instruction.opcode)
            flops += matmul_flops(computation, instruction)
            if instruction.opcode == "custom-call":
                targets.add(instruction.attribute("custom_call_target").strip('"'))
            if instruction.opcode in ("fusion", "call"):
                for called in instruction.called:
                    inner = found.get(called, Content(frozenset(), frozenset(), 0.0))
                    opcodes |= inner.opcodes
                    targets |= inner.targets
                    flops += inner.flops
        found[name] = Content(frozenset(opcodes), frozenset(targets), flops)
    return found


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """2 per multiplication of a `dot` or `convolution`; positions that are padding or holes are not counted; else 0."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    outputs = first_shape(instruction.shape)
    left, right = (first_shape(computation[name].shape) for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = _dimensions(instruction.attribute("lhs_contracting_dims").strip("{}"))
        return 2.0 * math.prod(outputs) * math.prod(left[axis] for axis in contracted)
    labels, _, output_labels = instruction.attribute("dim_labels").partition("->")
    left_labels, _, right_labels = labels.partition("_")
    flops = 2.0 * outputs[output_labels.index("b")] * outputs[output_labels.index("f")] * right[right_labels.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute("window")))
    for axis in range(sum(label.isdigit() for label in right_labels)):

        def of_axis(key: str, default: str, axis: int = axis) -> str:
            return window[key].split("x")[axis] if key in window else default

        low = int(of_axis("pad", "0_0").split("_")[0])
        flops *= _valid_products(
            left[left_labels.index(str(axis))],
            right[right_labels.index(str(axis))],
            outputs[output_labels.index(str(axis))],
            (low, int(of_axis("stride", "1")), int(of_axis("lhs_dilate", "1")), int(of_axis("rhs_dilate", "1"))),
        )
    return flops


def _valid_products(inputs: int, kernel: int, outputs: int, geometry: tuple[int, int, int, int]) -> int:
    """Pairs of an output and a kernel position that meet an input, along one spatial dimension."""
    low, stride, input_dilation, kernel_dilation = geometry
    if kernel == 1 and low == 0 and input_dilation == 1:
        return outputs
    places = np.arange(outputs)[:, None] * stride - low + np.arange(kernel)[None, :] * kernel_dilation
    inside = (places >= 0) & (places <= (inputs - 1) * input_dilation) & (places % input_dilation == 0)
    return int(np.count_nonzero(inside))


def class_of(instruction: Instruction, content: Mapping[str, Content]) -> str:
    """Which of CLASSES an operation that is executed belongs to."""
    inner = [content[name] for name in instruction.called if name in content] if instruction.opcode == "fusion" else []
    opcodes = {instruction.opcode}.union(*(c.opcodes for c in inner))
    targets = {target for c in inner for target in c.targets} | {instruction.attribute("custom_call_target").strip('"')}
    if opcodes & {"convolution", "dot"}:
        return "matmul"
    if KERNEL in targets:
        return "kernel"
    if any(_collective_kind(opcode) for opcode in opcodes):
        return "collective"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    if opcodes & SLICES:
        return "slice"
    if instruction.opcode in COPIES:
        return "copy"
    return "other"


# --- Cycles -------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a Pallas kernel.

    Attributes:
      name: of its instruction, by which the compiler dumps its schedule.
      times: how often it runs.
      operands: their types.
      code: the kernel itself; of calls of equal code only one is compiled, and dumped.
      flops: that its author says one call does; 0 if nothing.
    """

    name: str
    times: float
    operands: tuple[str, ...]
    code: str = ""
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """Attributes:
    cycles: per class of operation, the compiler's estimate; kernels have none there.
    flops: of matmuls outside kernels.
    """

    cycles: dict[str, float]
    flops: float
    kernels: tuple[Kernel, ...]
    unknown_loops: tuple[str, ...]


def work(module: Module) -> Work:
    """Everything that one device executes, loops included."""
    times, unknown = runs(module)
    content = contents(module)
    cycles: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    flops, kernels = 0.0, []
    for name, count in times.items():
        computation = module.computations[name]
        for instruction in computation.values():
            estimate = instruction.cycles
            if estimate:
                cycles[class_of(instruction, content)] += count * estimate
            flops += count * matmul_flops(computation, instruction)
            if instruction.opcode == "fusion":
                flops += count * sum(content[called].flops for called in instruction.called if called in content)
            if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target").strip('"') == KERNEL:
                types = tuple(computation[operand].shape for operand in instruction.operands if operand in computation)
                code, said = (re.search(rf'"{key}":"([^"]*)"', instruction.attributes) for key in ("body", "flops"))
                kernels.append(Kernel(instruction.name, count, types, code[1] if code else "", float(said[1]) if said else 0.0))
    return Work(cycles, flops, tuple(kernels), tuple(unknown))


# --- Collectives --------------------------------------------------------------------------------------------------------------

Groups = list[tuple[int, ...]]


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
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-broadcast": 1}
        return self.operand_bytes * share.get(self.kind, (n - 1) / n)


def collectives(
    module: Module, cycles_of: Callable[[Collective], float], kernels: Mapping[str, float] | None = None
) -> list[Collective]:
    """Every collective, in the order of the schedule of each computation.

    Args:
      cycles_of: that a collective takes on the links, each time.
      kernels: cycles of each call of a Pallas kernel, by the name of its instruction.
    """
    times, _ = runs(module)
    schedule = _Schedule(module, contents(module), _total_cycles(module, times, kernels or {}), kernels or {}, cycles_of, {})
    return [one for name, count in times.items() for one in schedule.collectives(module.computations[name], count)]


def _total_cycles(module: Module, times: Mapping[str, float], kernels: Mapping[str, float]) -> dict[str, float]:
    """Cycles of one execution of each computation, loops within it included, over the compiler's estimates."""
    total: dict[str, float] = {}
    for name, computation in module.computations.items():  # Callees come first.
        if name in times:
            total[name] = sum(_cycles(module, total, kernels, computation, one) for one in computation.values())
    return total


def _cycles(
    module: Module, total: Mapping[str, float], kernels: Mapping[str, float], computation: Computation, instruction: Instruction
) -> float:
    if instruction.opcode == "while":
        trips = trip_count(module, computation, instruction)
        body = instruction.attribute("body").lstrip("%")
        return total.get(body, 0.0) * (module.unknown_trips if trips is None else trips)
    if instruction.opcode in ("call", "conditional"):
        return sum(total.get(called, 0.0) for called in instruction.called)
    return kernels.get(instruction.name, float(instruction.cycles))


def _collective_kind(opcode: str) -> str:
    """ "all-gather" of "all-gather" and "all-gather-start"; else empty."""
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else ""


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

    def describe(self, kind: str, computation: Computation, instruction: Instruction, count: float) -> Collective:
        """A synchronous collective."""
        one = _describe(kind, computation, instruction, count)
        key = (one.kind, tuple(one.groups), one.operand_bytes)
        if key not in self.known:
            self.known[key] = self.cycles_of(one)
        return dataclasses.replace(one, cycles=self.known[key], exposed_cycles=self.known[key])

    def collectives(self, computation: Computation, count: float) -> Iterator[Collective]:
        pairs: dict[str, _Open] = {}  # by the name of the start
        chains: dict[str, _Open] = {}  # by channel
        for instruction in computation.values():
            work = _cycles(self.module, self.total, self.kernels, computation, instruction)
            opcode = instruction.opcode
            if kind := _collective_kind(opcode):
                one = self.describe(kind, computation, instruction, count)
                if opcode.endswith("-start"):
                    pairs[instruction.name] = _Open([one], one.cycles)
                else:
                    yield one
            elif opcode in ("async-start", "call-start"):  # the latter on a SparseCore
                inner = [
                    self.describe(kind, self.module.computations[called], i, count)
                    for called in instruction.called
                    for i in self.module.computations[called].values()
                    if (kind := _collective_kind(i.opcode))
                ]
                if inner:
                    pairs[instruction.name] = _Open(inner, sum(one.cycles for one in inner))
            elif opcode == "async-update" and instruction.operands[0] in pairs:
                pairs[instruction.name] = pairs.pop(instruction.operands[0])
            elif opcode.endswith("-done") and instruction.operands and instruction.operands[0] in pairs:
                yield from pairs.pop(instruction.operands[0]).end()
            elif opcode == "fusion":
                # A step of a chain carries on its own collective first.
                for channel, one, targets in self._fused(instruction, count):
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
            raise ValueError(f"collectives without an end: {names}. The compiler's format has changed, mend experiments/hlo.py")

    def _fused(self, instruction: Instruction, count: float) -> Iterator[tuple[str, Collective, frozenset[str]]]:
        """Channel, collective and targets of the custom calls beside it, of each collective in a fusion."""
        for called in instruction.called:
            if called not in self.content or not any(_collective_kind(c) for c in self.content[called].opcodes):
                continue
            inner = self.module.computations[called]
            for i in inner.values():
                if kind := _collective_kind(i.opcode):
                    # An all-reduce of which each device keeps its share is a reduce-scatter under another name.
                    kind = "reduce-scatter" if called.startswith("all-reduce-scatter") else kind
                    yield i.attribute("channel_id"), self.describe(kind, inner, i, count), self.content[called].targets


def _describe(kind: str, computation: Computation, instruction: Instruction, count: float) -> Collective:
    sizes = [shape_bytes(computation[name].shape) for name in instruction.operands]
    # Of rows and the room for them, one has just as many as an even router sends; the rest are offsets.
    operand_bytes = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
    groups = replica_groups(instruction.attributes)
    return Collective(kind, instruction.name, operand_bytes, groups, count)


def replica_groups(attributes: str) -> Groups:
    """Groups, or pairs, in any of XLA's notations: lists, iota [2,4]<=[4,2]T(1,0), or axes of a mesh ['a'=2,'b'=4] {'b'}."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])]
    if match := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", attributes):
        return [_dimensions(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return [tuple(group) for group in _iota(match[2]).reshape(_dimensions(match[1])).tolist()]
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", attributes)
    if match is None:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    if match[2] is None:
        ids = np.arange(math.prod(sizes.values()))
    elif match[2].startswith("["):
        ids = _iota(match[2])
    else:
        ids = np.array(_dimensions(match[2]))
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
    numbers = np.arange(math.prod(_dimensions(match[1]))).reshape(_dimensions(match[1]))
    return (numbers.transpose(_dimensions(match[2])) if match[2] else numbers).reshape(-1)


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
      asynchronous: how many of `count` are covered at least in part.
    """

    kind: str
    axes: str
    count: float
    asynchronous: float
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
        row = rows.setdefault((one.kind, axes[key]), [0.0] * 5)
        overlapped = one.exposed_cycles < one.cycles
        seconds = (cycles / topology.chip.clock for cycles in (one.cycles, one.exposed_cycles))
        values = (1, overlapped, one.moved_bytes(topology.num_devices), *seconds)
        row[:] = [old + one.times * value for old, value in zip(row, values, strict=True)]
    return sorted((Traffic(*key, *row) for key, row in rows.items()), key=lambda t: -t.exposed_seconds)
