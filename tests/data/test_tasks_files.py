"""Tasks that read local files, and the one that reads a package: GSM8K, Python programs, reasoning-gym."""

import dataclasses
import json
import sys

import pytest

from data.config import TaskConfig
from data.sandbox import Limits, SandboxUnavailable
from data.tasks.gsm8k import Gsm8k
from data.tasks.python_programs import BrokenProblem, PythonPrograms, run_tests, split_assertion
from data.tasks.reasoning_gym import ReasoningGym
from data.tasks.registry import TASKS, make_task


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(i):
    return {
        "question": f"Ann has {i} pens and gets {i}. How many?",
        "answer": f"She has {i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}",
    }


@pytest.fixture
def gsm8k(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [question(i) for i in range(600, 630)])
    return Gsm8k(train_path=train, eval_path=write_jsonl(tmp_path / "test.jsonl", [question(i) for i in range(10)]))


def test_gsm8k_asks_every_question_once_an_epoch_in_the_order_of_the_seed(gsm8k):
    epochs = [[gsm8k.example(i, seed=0).problem for i in range(30 * e, 30 * e + 30)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(question(i)["question"] for i in range(600, 630))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [gsm8k.example(i, seed=1).problem for i in range(30)]
    assert {gsm8k.example(i, 0, "eval").problem for i in range(10)} == {question(i)["question"] for i in range(10)}


def test_tasks_name_the_files_they_read(gsm8k, tmp_path):
    assert gsm8k.files() == (str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
    assert Gsm8k(eval_path=gsm8k.eval_path).files() == (gsm8k.eval_path,)
    assert make_task("reverse").files() == ()


def test_gsm8k_solutions_score_and_have_no_annotations(gsm8k):
    for split in ("train", "eval"):
        for i in range(10):
            example = gsm8k.example(i, 0, split)
            solution = gsm8k.solution(example)
            assert gsm8k.score(solution, example).reward == 1.0
            assert "<<" not in solution
            assert "She has" in solution


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("so 1,234\n#### 1,234", "right"),
        ("#### $1234.00", "right"),
        ("#### 1234.", "right"),
        ("#### 1235", "wrong answer"),
        ("#### -1234", "wrong answer"),
        ("#### 1234 pens", "not a number"),
        ("#### ١٢٣٤", "not a number"),
        ("#### 12,34", "not a number"),
        ("#### 1234 or 1235", "not a number"),
        ("#### 1235\n#### 1234", "two answers"),
        ("#### 1234\nQuestion: more", "text after the answer"),
        ("1234", "no answer"),
        ("", "no answer"),
    ],
)
def test_gsm8k_answers(gsm8k, completion, reason):
    example = next(e for i in range(30) for e in [gsm8k.example(i, 0)] if e.answer == "1234")
    assert gsm8k.score(completion, example).reason == reason


def test_gsm8k_files_that_will_not_do_are_named(tmp_path):
    with pytest.raises(ValueError, match="train_path or eval_path is needed"):
        make_task("gsm8k")
    with pytest.raises(FileNotFoundError, match="grade-school-math"):
        make_task("gsm8k", train_path=str(tmp_path / "none.jsonl"))
    both = write_jsonl(tmp_path / "both.jsonl", [question(1), question(2)])
    with pytest.raises(ValueError, match="1 questions of"):
        Gsm8k(train_path=both, eval_path=write_jsonl(tmp_path / "eval.jsonl", [question(2), question(3)]))
    for row in (
        {"question": "How many?"},
        {"question": "How many?", "answer": "four"},
        {"question": "", "answer": "#### 4"},
        [],
    ):
        with pytest.raises(ValueError, match=r"bad.*jsonl:2: a JSON object"):
            Gsm8k(train_path=write_jsonl(tmp_path / f"bad{len(str(row))}.jsonl", [question(1), row]))
    with pytest.raises(ValueError, match="eval_path is not set"):
        Gsm8k(train_path=both).example(0, 0, "eval")


# Python programs

DOUBLE = {"prompt": "Write double(x).", "code": "def double(x):\n    return 2 * x", "test_imports": ["import math"],
          "test_list": ["assert double(2) == 4", "assert math.isclose(double(0.5), 1)"]}  # fmt: skip
QUICK = Limits(cpu_seconds=1, wall_seconds=20)


def test_assertions_are_split_so_that_the_answer_stays_outside():
    cases = {
        "assert f(2) == 4": ("f(2)", 4),
        "assert {'a': 1} == f(2), 'message'": ("f(2)", {"a": 1}),
        "assert f(f(1) == 2) == (1, -2.5, 'x', None)": ("f(f(1) == 2)", (1, -2.5, "x", None)),
    }
    for test, (expression, value) in cases.items():
        computed, expected = split_assertion(test)
        assert (computed, expected.value) == (expression, value)
    assert split_assertion("assert f(2)")[1] is None
    assert split_assertion("assert f(2) == g(2)")[1] is None
    assert split_assertion("assert 1 < f(2) == 4")[1] is None
    for bad in ("f(2) == 4", "assert f(2) == 4; x = 1", "assert", "", "import os"):
        with pytest.raises(ValueError, match="one assert statement"):
            split_assertion(bad)


def programs(path):
    try:
        return PythonPrograms(path=path, limits=QUICK)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def score(program, tests=("assert f(2) == 4",), setup=""):
    try:
        return run_tests(program, setup, list(tests), QUICK)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("value", "literal"),
    [
        ("[1, (2.5, None), {'a': {3}}]", "[1, (2.5, None), {'a': {3}}]"),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("(1+2j, b'x', True, -10**30)", "(1+2j, b'x', True, -10**30)"),
        ("1.0", "1"),
        ("'\\ud800\\n\\0'", "'\\ud800\\n\\0'"),
    ],
)
def test_values_come_out_of_the_sandbox_as_they_went_in(value, literal):
    literal = literal.replace("-10**30", str(-(10**30)))
    assert score(f"def f(): return {value}", [f"assert f() == {literal}"]).reason == "right"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x): return 2 * x", "right"),
        ("def f(x): print('[]', 4); return 2 * x", "right"),
        ("def f(x): return 5", "wrong answer"),
        ("", "program failed"),
        ("def f(x): return x +", "program failed"),
        ("def f(x):\n    while True: pass", "program timed out"),
        ("while True: print('x' * 10000)", "program killed"),
        # What a policy finds when only the exit status is looked at, or what is compared inside:
        ("import os; os._exit(0)", "program left before the tests"),
        ("raise SystemExit", "program left before the tests"),
        ("def f(x):\n    import os; os._exit(0)", "program left before the tests"),
        ("class A:\n    def __eq__(self, other): return True\ndef f(x): return A()", "program failed"),
        ("class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(5)", "wrong answer"),
        ("import builtins\nbuiltins.AssertionError = None\ndef f(x): return 5", "wrong answer"),
        ("def plain(x): return ['int', '0x4']\nimport __main__\n__main__.plain = lambda x: ['none', None]\ndef f(x): return 5",
         "wrong answer"),
        ("import json\njson.dumps = lambda x: '[]'\ndef f(x): return 4", "program left before the tests"),
        ("import sys\nsys.stdout.write('\\n[[\"int\", \"0x4\"]]'); sys.stdout.flush()\nimport os; os._exit(0)",
         "program left before the tests"),
    ],
)  # fmt: skip
def test_a_program_scores_by_what_it_computes(program, reason):
    assert score(program).reason == reason


def test_programs_from_a_file(tmp_path):
    rows = [DOUBLE | {"prompt": f"Write double(x), number {i}."} for i in range(100)]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows))
    task = programs(str(array))
    lines = programs(write_jsonl(tmp_path / "lines.jsonl", rows))
    assert [task.example(i, 0) for i in range(5)] == [lines.example(i, 0) for i in range(5)]
    sides = [{task.example(i, 0, split).problem for i in range(100)} for split in ("train", "eval")]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {row["prompt"] for row in rows}
    example = task.example(0, 0)
    assert DOUBLE["test_list"][0] in example.prompt
    fenced = f"Here:\n```python\n{DOUBLE['code']}\n```\nDone."
    for completion, reason in {
        task.solution(example): "right",
        fenced: "right",
        fenced + "\n" + fenced: "two answers",
        f"```python\n{DOUBLE['code']}": "unclosed answer",
        "Here is double.": "program failed",
        "": "no answer",
    }.items():
        assert task.score(completion, example).reason == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r'problem 1 needs a "prompt" \(or "text"\) and a "test_list"'),
        (["x"], 'needs a "prompt"'),
        (DOUBLE | {"test_list": [1]}, '"test_list" must be a list of texts'),
        (DOUBLE | {"test_imports": "import math"}, "\"test_imports\" must be a list of texts, not 'import math'"),
        (DOUBLE | {"test_imports": [None]}, '"test_imports" must be a list of texts'),
        (DOUBLE | {"code": ["x"]}, '"code" must be a text'),
        (DOUBLE | {"test_setup_code": ["x"]}, '"test_setup_code" must be a text'),
        ({"prompt": "x", "test_list": []}, "anything would pass"),
        ({"prompt": "x", "test_list": ["check(f)"]}, "one assert statement"),
    ],
)
def test_program_files_that_will_not_do_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        PythonPrograms(path=write_jsonl(tmp_path / "rows.jsonl", [DOUBLE, row]))


WRONG_ANSWERS = ("def double(x): return 1 / 0", "def", "raise SystemExit", "import os; os._exit(0)")


@pytest.mark.parametrize("imports", [["import no_such_module"], ["x ="]])
def test_a_setup_that_does_not_run_is_no_wrong_answer(tmp_path, imports):
    """Of the problem, that is; and one that runs lets no answer get away."""
    broken = programs(write_jsonl(tmp_path / "broken.jsonl", [DOUBLE | {"test_imports": imports}]))
    sound = programs(write_jsonl(tmp_path / "sound.jsonl", [DOUBLE]))
    for answer in (DOUBLE["code"], WRONG_ANSWERS[0]):
        with pytest.raises(BrokenProblem, match="test_imports does not run: "):
            broken.score(answer, broken.example(0, 0))
    for answer in WRONG_ANSWERS:
        assert sound.score(answer, sound.example(0, 0)).reward == 0


def test_the_setup_of_tests_runs_after_the_program_and_its_faults_are_told_from_the_programs(tmp_path):
    """As in the whole of MBPP, where the prompt is called text and what is not there may be null."""
    row = {
        "text": "Write a class Node(value).",
        "code": "class Node:\n    def __init__(self, value): self.value = value",
        "test_setup_code": "root = Node(1)\nleaf = Node(2)",
        "test_list": ["assert root.value == 1", "assert leaf.value == 2"],
        "test_imports": None,
    }
    task = programs(write_jsonl(tmp_path / "rows.jsonl", [row]))
    example = task.example(0, 0)
    assert "Write a class" in example.prompt
    assert task.score(task.solution(example), example).reward == 1
    for answer in ("class Node: pass", "def node(): pass", "class Node:\n    def __init__(self, value): self.value = 1"):
        assert task.score(answer, example).reward == 0
    task = programs(write_jsonl(tmp_path / "broken.jsonl", [row | {"test_setup_code": "root = Noed(1)"}]))
    with pytest.raises(BrokenProblem, match="test_setup_code after its code does not run: .*Noed"):
        task.score(row["code"], task.example(0, 0))
    task = programs(write_jsonl(tmp_path / "no code.jsonl", [row | {"code": None}]))
    assert task.score("class Node: pass", task.example(0, 0)).reward == 0


def test_a_program_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="sanitized-mbpp"):
        PythonPrograms(path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="path is needed"):
        PythonPrograms()


def test_where_no_program_can_be_run_the_config_is_refused(tmp_path, monkeypatch):
    broken = tmp_path / "child.py"
    broken.write_text("raise OSError('no seccomp here')")
    monkeypatch.setattr("data.sandbox._CHILD", broken)
    with pytest.raises(SandboxUnavailable, match="no seccomp here"):
        PythonPrograms(path=write_jsonl(tmp_path / "rows.jsonl", [DOUBLE]))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cpu_second": 2}, "limits of task 'python_programs' has no field 'cpu_second'; did you mean 'cpu_seconds'"),
        ({"cpu_seconds": 0}, "cpu_seconds=0 must be a whole number"),
        ({"wall_seconds": "2"}, "limits of task 'python_programs'={'wall_seconds': '2'}"),
        (2, "limits=2 must be of type Limits"),
        ({"wall_seconds": 1e-6}, "not even an empty program ends within Limits"),
    ],
)
def test_limits_that_will_not_do_are_named(tmp_path, limits, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [DOUBLE])
    programs(path)
    with pytest.raises(ValueError, match=message):
        TaskConfig("python_programs", (("path", path), ("limits", limits)))


# Every task as a config gives it

OPTIONS = {"constraints": {"words": ["one", "two"]}, "reasoning_gym": {"dataset": "chain_sum", "options": [["max_terms", 3]]}}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_made_of_what_a_config_can_say_and_asks_and_scores(name, tmp_path):
    """The config as it is kept in a run's config.json, where tuples are lists and dataclasses objects."""
    files = {
        "gsm8k": {"train_path": write_jsonl(tmp_path / "gsm8k.jsonl", [question(1)])},
        "python_programs": {"path": write_jsonl(tmp_path / "programs.jsonl", [DOUBLE]), "limits": QUICK},
    }
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="the extra `rl` is not installed")
    try:
        config = TaskConfig(name, tuple((OPTIONS | files).get(name, {}).items()))
        kept = json.loads(json.dumps(dataclasses.asdict(config)))
        task = TaskConfig(name, tuple((field, value) for field, value in kept["options"])).make()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert task == config.make()
    example = task.example(0, seed=0)
    assert task.score(task.solution(example), example).reward == 1.0


def test_a_task_of_programs_needs_no_limits(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [DOUBLE])
    programs(path)
    assert TaskConfig("python_programs", (("path", path),)).make() == PythonPrograms(path=path)


# reasoning-gym


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"loam\[rl\]"):
        ReasoningGym(dataset="chain_sum")


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="the extra `rl` is not installed")


def test_reasoning_gym_examples_are_a_function_of_seed_and_index(gym):
    task = ReasoningGym(dataset="chain_sum", options=(("max_terms", 3),))
    examples = [task.example(i, 0) for i in range(10)]
    assert examples == [task.example(i, 0) for i in range(10)]
    assert len({example.prompt for example in examples}) == 10
    for example in examples:
        assert task.score(task.solution(example), example).reward == 1.0
        assert task.score("<answer>x</answer>", example).reward < 1
        assert task.score(example.answer, example).reason == "no answer"


def test_reasoning_gym_credits_characters_in_place_only_if_asked(gym):
    for partial in (False, True):
        task = ReasoningGym(dataset="string_manipulation", partial_credit=partial)
        example = task.example(0, 0)
        entry = example.metadata["entry"]
        theirs = gym.create_dataset("string_manipulation", size=1).score_answer(entry["answer"] + "x", entry)
        score = task.score(f"<answer>{entry['answer']}x</answer>", example)
        assert score.reward == (theirs if partial else 0.0)


def test_reasoning_gym_mistakes_are_named(gym):
    with pytest.raises(ValueError, match="'chainsum' is not among its"):
        ReasoningGym(dataset="chainsum")
    with pytest.raises(ValueError, match="does not take options"):
        ReasoningGym(dataset="chain_sum", options=(("no_such", 1),))
