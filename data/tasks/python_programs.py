"""Write a Python function that meets assertions, which are run in the sandbox. Reads MBPP's layout (Austin et al. 2021,
arXiv:2108.07732): `prompt`, `code`, `test_imports`, `test_list`; in the whole of it `text` and `test_setup_code`, which is run
between the program and its tests, since it may use what the program defines.

That a program ends well says nothing: it may leave before the assertions, or return an object that is equal to everything. So
an assertion `assert f(2) == 4` is not run as it stands. The sandbox computes `f(2)` and sends it out as plain data; the 4 never
enters, and the comparison is made here. A program can print what it likes, but has to know the answer. Assertions of another
form (`assert math.isclose(f(2), 4)`; one in seventeen of the sanitised MBPP) are computed inside, and here it is only seen
whether the value is true: those a program that goes about it can deceive.

A program that fails is no proof that it is wrong: what the problem itself brings may fail. That is then run apart, where no
program can pretend it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import random
import re
import secrets
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.permutation import permute
from data.sandbox import Limits, run
from data.tasks.task import RIGHT, WRONG, Example, Score, Split, Task, check_place, split_of

_ORIGIN = "https://github.com/google-research/google-research/tree/master/mbpp (sanitized-mbpp.json)"
_FENCE = re.compile(r"^```[ \t]*(?:python|py)?[ \t]*$\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)

# Plain values only, by their base classes' own methods, so that what a subclass redefines is not asked.
_HARNESS = """
import json, sys
def plain(value):
    kind = type(value)
    if value is None: return ["none", None]
    if isinstance(value, bool): return ["bool", value]
    if isinstance(value, int): return ["int", hex(int.__index__(value))]
    if isinstance(value, float): return ["float", float.hex(value)]
    if isinstance(value, complex): return ["complex", [part.__get__(value).hex() for part in (complex.real, complex.imag)]]
    if isinstance(value, str): return ["str", str.__str__(value)]
    if isinstance(value, bytes): return ["bytes", bytes.hex(value)]
    for name, base in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, base): return [name, [plain(item) for item in base.__iter__(value)]]
    if isinstance(value, dict): return ["dict", [[plain(k), plain(v)] for k, v in dict.items(value)]]
    raise TypeError("the value of a test is not plain data but of " + repr(kind))
def compute(sources, expressions):
    namespace = {"__name__": "answer"}
    for source in sources: exec(compile(source, "<program>", "exec"), namespace)
    return [plain(eval(compile(expression, "<test>", "eval"), namespace)) for expression in expressions]
"""


@dataclasses.dataclass(frozen=True)
class PythonPrograms(Task):
    """The answer is a program: one fenced block (```python), or, if there is no fence, the whole completion.

    Attributes:
      path: MBPP's JSON array, or the same objects as JSONL. A problem is held out by the hash of its prompt.
      limits: of each run.

    Making one runs an empty program, so that SandboxUnavailable is raised where the config is read.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("prompt", "tests")
    template: str = "{prompt}\nIt must pass:\n{tests}\n"
    path: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)

    def validate(self) -> None:
        if not self.path:
            raise ValueError(f"PythonPrograms.path is needed, a file of {_ORIGIN}")
        if self.answer_format != "bare":
            raise ValueError(
                "PythonPrograms.answer_format must be 'bare': the program is the fenced block, or the whole completion"
            )
        if not isinstance(self.limits, Limits):
            raise ValueError(f"PythonPrograms.limits={self.limits!r} must be of type Limits (data/sandbox.py)")
        _read(self.path)
        empty = run("", self.limits)
        if empty.outcome != "passed":
            raise ValueError(f"PythonPrograms.limits: not even an empty program ends within {self.limits}: {empty.reason}")

    def files(self) -> tuple[str, ...]:
        return (self.path,)

    def draw(self, rng: random.Random) -> Example:
        raise NotImplementedError("problems come from a file: see example")

    def example(self, index: int, seed: int, split: Split = "train") -> Example:
        check_place(index, split)
        problems = [problem for problem in _read(self.path) if split_of(problem.prompt) == split]
        if not problems:
            raise ValueError(f"{self.path} has no problem that belongs to split {split!r}")
        epoch, position = divmod(index, len(problems))
        problem = problems[int(permute(np.array([position]), len(problems), f"programs/{seed}/{epoch}")[0])]
        metadata = {"tests": list(problem.tests), "setup": problem.setup, "test_setup": problem.test_setup}
        prompt = self.template.format(prompt=problem.prompt, tests="\n".join(problem.tests))
        return Example(prompt, problem.solution, problem.prompt, metadata)

    def judge(self, answer: str, example: Example) -> Score:
        """
        Raises:
          SandboxUnavailable: no program can be run on this machine; that is no fault of the answer.
          BrokenProblem: nor is that what the problem brings does not run.
        """
        blocks = _FENCE.findall(answer + "\n")
        if len(blocks) > 1:
            return Score(0.0, "two answers")
        if not blocks and "```" in answer:
            return Score(0.0, "unclosed answer")
        score = run_tests(
            blocks[0] if blocks else answer,
            example.metadata["setup"],
            example.metadata["tests"],
            self.limits,
            example.metadata["test_setup"],
        )
        if score not in (RIGHT, WRONG):
            _check_problem(example.metadata["setup"], example.answer, example.metadata["test_setup"], self.limits)
        return score


class BrokenProblem(RuntimeError):
    """What a problem brings does not run, so that nothing is known of an answer to it."""


def run_tests(program: str, setup: str, tests: list[str], limits: Limits, test_setup: str = "") -> Score:
    """1 if `program` meets all `tests` (assert statements), otherwise 0 and why.

    Args:
      setup: runs before it.
      test_setup: runs after it.

    Raises:
      ValueError: a test is not one assert statement.
      SandboxUnavailable: nothing was run.
    """
    expressions, expected = zip(*(split_assertion(test) for test in tests), strict=True)
    mark = secrets.token_hex(16)  # not to be guessed, so that what the program prints is not taken for the values
    source = f"{_HARNESS}\nvalues = compute({[setup, program, test_setup]!r}, {list(expressions)!r})\n"
    result = run(f"{source}sys.__stdout__.write('\\n{mark}' + json.dumps(values))\n", limits)
    if result.outcome != "passed":
        reason = {"failed": "program failed", "timed_out": "program timed out", "killed": "program killed"}[result.outcome]
        return Score(0.0, reason)
    _, marked, output = result.stdout.rpartition(f"\n{mark}")
    if not marked:
        return Score(0.0, "program left before the tests")
    try:
        values = [_value(item) for item in json.loads(output)]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Score(0.0, "program left before the tests")
    if len(values) != len(expected):
        return Score(0.0, "program left before the tests")
    met = all(bool(value) if want is None else value == want.value for value, want in zip(values, expected, strict=True))
    return RIGHT if met else WRONG


@functools.lru_cache(maxsize=4096)
def _check_problem(setup: str, solution: str, test_setup: str, limits: Limits) -> None:
    """Raises BrokenProblem unless the setup runs: that of the tests after the solution, where there is one."""
    sources = [setup, solution, test_setup] if solution and test_setup else [setup]
    if any(sources):
        result = run(f"{_HARNESS}\ncompute({sources!r}, [])\n", limits)
        if result.outcome != "passed":
            what = "test_setup_code after its code" if len(sources) > 1 else "test_imports"
            raise BrokenProblem(f"a problem's own {what} does not run: {result.reason}")


@dataclasses.dataclass(frozen=True)
class _Expected:
    value: Any


def split_assertion(test: str) -> tuple[str, _Expected | None]:
    """The expression to compute and the value it must have; None where it must only be true.

    Raises:
      ValueError: `test` is not one assert statement.
    """
    try:
        body = ast.parse(test.strip()).body
    except (SyntaxError, ValueError):
        body = []
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError(f"a test of a Python program must be one assert statement, not {test[:100]!r}")
    condition = body[0].test
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1 and isinstance(condition.ops[0], ast.Eq):
        sides = condition.left, condition.comparators[0]
        for computed, literal in (sides, sides[::-1]):
            try:
                return ast.unparse(computed), _Expected(ast.literal_eval(literal))
            except ValueError:
                continue
    return f"not not ({ast.unparse(condition)})", None


def _value(item: Any) -> Any:
    kind, content = item
    match kind:
        case "none" | "bool" | "str":
            return content
        case "int":
            return int(content, 16)
        case "float":
            return float.fromhex(content)
        case "complex":
            return complex(*map(float.fromhex, content))
        case "bytes":
            return bytes.fromhex(content)
        case "dict":
            return {_value(key): _value(value) for key, value in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_value, content))


@dataclasses.dataclass(frozen=True)
class _Problem:
    prompt: str
    solution: str
    setup: str
    test_setup: str
    tests: tuple[str, ...]


@functools.lru_cache(maxsize=4)
def _read(path: str) -> tuple[_Problem, ...]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"PythonPrograms: {path} is not there; get it from {_ORIGIN}")
    text = Path(path).read_text(encoding="utf-8")
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{path}: neither a JSON array nor JSONL: {error}") from None
    return tuple(_problem(row, f"{path}: problem {number}") for number, row in enumerate(rows))


def _problem(row: Any, where: str) -> _Problem:
    row = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}
    prompt, tests, imports = row.get("prompt", row.get("text")), row.get("test_list"), row.get("test_imports", [])
    if not (isinstance(prompt, str) and isinstance(tests, list)):
        raise ValueError(f'{where} needs a "prompt" (or "text") and a "test_list"')
    for name, value in (("test_list", tests), ("test_imports", imports)):
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f'{where}: "{name}" must be a list of texts, not {value!r:.100}')
    for name in ("code", "test_setup_code"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f'{where}: "{name}" must be a text, not {row[name]!r:.100}')
    if not tests:
        raise ValueError(f"{where} has no tests: anything would pass")
    for test in tests:
        try:
            split_assertion(test)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return _Problem(prompt, row.get("code", ""), "\n".join(imports), row.get("test_setup_code", ""), tuple(tests))
