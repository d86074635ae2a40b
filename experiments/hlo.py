"""What a scheduled TPU program costs, read from its text (`compiled.as_text()`): cycles and FLOPs.

Pure functions over text. The compiler writes its estimate of an operation's cycles beside it (`estimated_cycles`); a loop's
body is counted as often as it runs. All of it is an estimate, made without a TPU. Collectives are
read in experiments/collectives.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# In this order: an operation belongs to the first that it contains.
CLASSES = ("matmul", "kernel", "collective", "reduction", "slice", "copy", "other")
SLICES = {"dynamic-slice", "dynamic-update-slice", "slice", "gather", "scatter", "pad", "concatenate"}
COPIES = {"copy", "transpose", "reshape", "copy-start", "slice-start"}
# What stands around the work of a program.
PLUMBING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "fusion", "call-start", "call-done"}
DTYPE_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0}
KERNEL = "tpu_custom_call"
STARTS = ("async-start", "call-start")  # the latter on a SparseCore

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
    for dtype, sizes in _ARRAY.findall(shape):
        digits = re.search(r"\d+", dtype)
        bits = DTYPE_BITS.get(dtype, int(digits[0]) if digits else 0)
        total += math.ceil(math.prod(numbers(sizes)) * bits / 8)
    return total


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def first_shape(shape: str) -> tuple[int, ...]:
    """Dimensions of an array type, or of the first of a tuple."""
    match = _ARRAY.search(shape)
    return numbers(match[2]) if match else ()


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
    first = _constant(computation, _element(computation, computation[loop.operands[0]], int(index)))
    root = next(i for i in body.values() if i.is_root)
    step_of = _element(body, root, int(index))
    steps = [_constant(body, body[name]) for name in step_of.operands if name in body] if step_of.opcode == "add" else []
    step = next((value for value in steps if value), None)
    if first is None or step is None or step < 0:
        return None
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
    """What a computation contains, fusions and calls within it included."""

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
            if instruction.opcode in ("fusion", "call", *STARTS):
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
        contracted = numbers(instruction.attribute("lhs_contracting_dims").strip("{}"))
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


def collective_kind(opcode: str) -> str:
    """ "all-gather" of "all-gather" and "all-gather-start"; else empty."""
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else ""


def class_of(instruction: Instruction, content: Mapping[str, Content]) -> str:
    """Which of CLASSES an operation that is executed belongs to."""
    inner = [content[name] for name in instruction.called if name in content] if instruction.opcode == "fusion" else []
    opcodes = {instruction.opcode}.union(*(c.opcodes for c in inner))
    targets = {target for c in inner for target in c.targets} | {instruction.attribute("custom_call_target").strip('"')}
    if opcodes & {"convolution", "dot"}:
        return "matmul"
    if KERNEL in targets:
        return "kernel"
    if any(collective_kind(opcode) for opcode in opcodes):
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
class Aside:
    """A program of a SparseCore that holds no collective, such as a scatter.

    The compiler has no estimate of it: beside a scatter there it writes 2^63 - 1 cycles.

    Attributes:
      name: of the instruction that starts it.
      times: how often it runs.
      opcodes: what it does.
      result_bytes: that it makes, each time.
    """

    name: str
    times: float
    opcodes: tuple[str, ...]
    result_bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Attributes:
    cycles: per class of operation, the compiler's estimate; kernels have none there, and asides are not in it.
    flops: of matmuls outside kernels.
    """

    cycles: dict[str, float]
    flops: float
    kernels: tuple[Kernel, ...]
    asides: tuple[Aside, ...]
    unknown_loops: tuple[str, ...]


def work(module: Module) -> Work:
    """Everything that one device executes, loops included."""
    times, unknown = runs(module)
    content = contents(module)
    cycles: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    flops, kernels, asides = 0.0, [], []
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
            if instruction.opcode in STARTS:
                opcodes = frozenset[str]().union(*(content[called].opcodes for called in instruction.called))
                if not any(map(collective_kind, opcodes)):
                    roots = (i for called in instruction.called for i in module.computations[called].values() if i.is_root)
                    size = sum(shape_bytes(root.shape) for root in roots)
                    asides.append(Aside(instruction.name, count, tuple(sorted(opcodes - PLUMBING)), size))
    return Work(cycles, flops, tuple(kernels), tuple(asides), tuple(unknown))


def total_cycles(module: Module, times: Mapping[str, float], kernels: Mapping[str, float]) -> dict[str, float]:
    """Cycles of one execution of each computation, loops within it included, over the compiler's estimates."""
    total: dict[str, float] = {}
    for name, computation in module.computations.items():  # Callees come first.
        if name in times:
            total[name] = sum(cycles_in(module, total, kernels, computation, one) for one in computation.values())
    return total


def cycles_in(
    module: Module, total: Mapping[str, float], kernels: Mapping[str, float], computation: Computation, instruction: Instruction
) -> float:
    if instruction.opcode == "while":
        trips = trip_count(module, computation, instruction)
        body = instruction.attribute("body").lstrip("%")
        return total.get(body, 0.0) * (module.unknown_trips if trips is None else trips)
    if instruction.opcode in ("call", "conditional"):
        return sum(total.get(called, 0.0) for called in instruction.called)
    return kernels.get(instruction.name, float(instruction.cycles))
