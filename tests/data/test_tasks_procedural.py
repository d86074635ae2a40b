"""Tasks that make their own problems: right answers by independent means, wrong ones refused, no problem on both sides."""

import ast
import dataclasses
import itertools
import math
import pickle
import random
import re
from collections import Counter
from fractions import Fraction

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tasks import json_schema
from data.tasks.addition import Addition
from data.tasks.brackets import Brackets
from data.tasks.constraints import Constraints
from data.tasks.countdown import Countdown, evaluate
from data.tasks.gcd import Gcd
from data.tasks.guarded_reverse import GuardedReverse
from data.tasks.json_schema import JsonSchema
from data.tasks.letter_count import LetterCount
from data.tasks.mistakes import mistaken
from data.tasks.registry import TASKS, make_task
from data.tasks.reverse import Reverse
from data.tasks.sort import Sort
from data.tasks.task import Score, split_of
from data.tasks.worth import Worth

TASKS_HERE = [
    Reverse(),
    Addition(),
    Addition(digits="reversed", answer_format="hashes"),
    Sort(),
    Sort(separator="", answer_format="tags"),
    Gcd(),
    Gcd(answer_format="boxed"),
    LetterCount(),
    LetterCount(answer_format="hashes"),
    Brackets(),
    Countdown(),
    Countdown(num_numbers=4, answer_format="tags"),
    Constraints(),
    JsonSchema(),
    JsonSchema(answer_format="tags"),
    Worth(),
    GuardedReverse(),
    GuardedReverse(answer_format="tags", share=1.0),
]
every_task = pytest.mark.parametrize("task", TASKS_HERE, ids=lambda task: f"{type(task).__name__}-{task.answer_format}")


@every_task
def test_an_example_is_a_function_of_task_seed_and_index(task):
    examples = [task.example(i, seed=3) for i in range(20)]
    assert examples == [pickle.loads(pickle.dumps(task)).example(i, seed=3) for i in range(20)]
    assert examples != [task.example(i, seed=4) for i in range(20)]
    assert len({example.prompt for example in examples}) > 10


def test_examples_stay_what_they_were():
    """Recorded: another Python or an edit that changes them changes every curve that was published."""
    tasks = [Reverse(), Addition(), Sort(), Gcd(), Countdown(), Brackets(), LetterCount()]
    assert [task.example(7, seed=1).prompt for task in tasks] == RECORDED


@every_task
def test_no_problem_is_trained_on_and_evaluated(task):
    train = {task.example(i, seed=0, split="train").problem for i in range(300)}
    held_out = {task.example(i, seed=seed, split="eval").problem for i in range(50) for seed in (0, 1)}
    assert not train & held_out
    assert {split_of(problem) for problem in train} == {"train"}


def test_another_template_another_format_and_another_order_do_not_move_a_problem():
    tasks = Addition(), Addition(template="What is {b} plus {a}?", digits="reversed", answer_format="boxed")
    sides = [{frozenset(map(int, e.problem.split("+"))) for i in range(200) for e in [t.example(i, 0, s)]} for t, s in zip(
        tasks, ("train", "eval"), strict=True
    )]  # fmt: skip
    assert not sides[0] & sides[1]
    countdowns = [Countdown().example(i, 0, split).metadata for split in ("train", "eval") for i in range(300)]
    sides = [{(*sorted(m["numbers"]), m["target"]) for m in part} for part in (countdowns[:300], countdowns[300:])]
    assert not sides[0] & sides[1]


def test_a_tenth_is_held_out():
    held_out = sum(split_of(str(i)) == "eval" for i in range(20_000))
    assert abs(held_out - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)


@every_task
def test_the_worked_solution_is_right_and_other_things_are_not(task):
    for i in range(60):
        example = task.example(i, seed=0)
        solution = task.solution(example)
        assert task.score(solution, example).reward == 1.0, (example, solution)
        for wrong in (
            "",
            " ",
            example.prompt,
            f"{solution}\n{solution}",
            f"{solution} x",
            f"x {example.answer}",
            "\u0664",
            "(" * 5000,
        ):
            # x before a text can meet its constraints, and before a marked answer is work
            if wrong.startswith("x ") and (isinstance(task, Constraints) or task.answer_format != "bare"):
                continue
            if isinstance(task, Constraints) and wrong not in ("", " ", "(" * 5000):
                continue
            score = task.score(wrong, example)
            assert score.reward == 0.0, (example, wrong)
            assert score.reason not in ("", "right")


def test_answers_by_other_means():
    for i in range(200):
        e = Reverse(max_length=8).example(i, 0)
        text = re.fullmatch(r"reverse (\w+) = ", e.prompt)[1]
        assert all(text[-1 - k] == e.answer[k] for k in range(len(text)))
        e = Addition(max_digits=5).example(i, 0)
        assert int(e.answer) == sum(map(int, e.prompt[:-1].split("+")))
        e = Addition(max_digits=5, digits="reversed").example(i, 0)
        assert sum(int(d) * 10**k for k, d in enumerate(e.answer)) == sum(map(int, e.prompt[:-1].split("+")))
        e = Sort().example(i, 0)
        numbers = [int(n) for n in e.prompt.removeprefix("sort ").removesuffix(" = ").split()]
        answer = [int(n) for n in e.answer.split()]
        assert Counter(answer) == Counter(numbers)
        assert all(a <= b for a, b in itertools.pairwise(answer))
        e = Gcd().example(i, 0)
        a, b = map(int, re.findall(r"\d+", e.prompt))
        assert 1 <= min(a, b) <= max(a, b) <= 99
        assert int(e.answer) == max(d for d in range(1, 100) if a % d == b % d == 0)
        e = LetterCount().example(i, 0)
        letter, word = re.fullmatch(r"count (\w) in (\w+) = ", e.prompt).groups()
        assert int(e.answer) == word.count(letter)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        (Addition(), ["٤٢", "0{}", "+{}", "{}.0", "{} ", "{}\n{}"]),
        (Gcd(), ["0{}", "{}.", "-{}"]),
        (Sort(), [" {},", "[{}]"]),
    ],
)
def test_an_answer_is_compared_to_the_letter(task, wrong):
    example = task.example(0, 0)
    for text in wrong:
        completion = text.format(example.answer, example.answer)
        assert task.score(completion, example).reward == float(completion.strip() == example.answer)


def test_worked_solutions_are_worked():
    example = Gcd(answer_format="hashes").example(3, 0)
    steps = Gcd(answer_format="hashes").solution(example).splitlines()
    assert steps[-1] == f"#### {example.answer}"
    for step in steps[:-1]:
        a, b, remainder = map(int, re.findall(r"\d+", step))
        assert a % b == remainder
    task = LetterCount(answer_format="hashes")
    example = task.example(0, 0)
    assert task.solution(example).splitlines()[0].split()[-1][1:] == example.answer


def test_gcds_are_not_mostly_one():
    answers = [Gcd().example(i, 0).answer for i in range(500)]
    assert 0.2 < answers.count("1") / 500 < 0.5


# Countdown


def by_python(text):
    """The value by Python's own grammar, over fractions."""

    def value(node):
        match node:
            case ast.Constant(value=int(n)):
                return Fraction(n)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(op)] if not isinstance(op, ast.Div) else a / b
        raise ValueError(ast.dump(node))

    return value(ast.parse(text, mode="eval").body)


def expressions():
    return st.recursive(
        st.integers(0, 99).map(str),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " - ", " / "]), inner).map("".join), inner.map("({})".format)
        ),
        max_leaves=8,
    )


@given(expressions())
@settings(max_examples=200)
def test_expressions_have_the_value_python_gives_them(text):
    try:
        expected = by_python(text)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(text)
        return
    value, used = evaluate(text)
    assert value == expected
    assert used == [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize(
    "text",
    ["", "1+", "+1", "-1", "1--1", "2**3", "2//1", "(1", "1)", "()", "1 2", "01",
     "1.5", "1e3", "0x1", "1_0", "٤+1", "１+1", "²", "a", "1,2",
     "__import__('os')", "1+1=2",
     "1×2", "1−1", "1\n+1", "1\t+1", "(" * 300, "1" * 201, "9" * 100 + "**" + "9" * 50, "1;1", "1#"],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011, the message is for nobody
        evaluate(text)


def test_countdown_takes_every_right_answer_and_no_other():
    """Against enumeration of all expressions over three numbers."""
    task = Countdown()
    for i in range(3):
        example = task.example(i, 0)
        numbers, target = example.metadata["numbers"], example.metadata["target"]
        for a, b, c in set(itertools.permutations(numbers)):
            for p, q in itertools.product("+-*/", repeat=2):
                for text in (f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
                    try:
                        right = by_python(text) == target
                    except ZeroDivisionError:
                        right = False
                    assert task.score(text, example).reward == float(right)


def test_countdown_counts_the_numbers():
    example = dataclasses.replace(Countdown().example(0, 0), metadata={"numbers": [2, 2, 5], "target": 20})
    task = Countdown()
    reasons = {
        "2*2*5": "right",
        "20": "other numbers",
        "4*5": "other numbers",
        "2*2*5*1": "other numbers",
        "2*2+5": "wrong answer",
    }
    reasons |= {
        "2*5+2*5": "other numbers",
        "5/(2-2)": "division by zero",
        "2*2*5=20": "not an expression",
        "22-2": "other numbers",
    }
    assert {text: task.score(text, example).reason for text in reasons} == reasons


# Brackets


def test_brackets_take_all_completions_that_are_balanced_and_no_other():
    """Against removing adjacent pairs until nothing is left."""
    task = Brackets(min_length=6, max_length=6, opening=2)
    example = task.example(0, 0)
    for characters in itertools.product("()[]", repeat=4):
        text = rest = example.metadata["opening"] + "".join(characters)
        for _ in range(3):
            rest = rest.replace("()", "").replace("[]", "")
        assert task.score(text[2:], example).reward == float(not rest)


def test_brackets_of_another_length_or_kind_are_refused():
    task = Brackets(min_length=6, max_length=6, opening=2)
    example = dataclasses.replace(task.example(0, 0), metadata={"length": 6, "opening": "(["})
    completions = {"])()": "right", "])": "wrong length", "])()()": "wrong length", "]){}": "not balanced", "": "no answer"}
    assert {c: task.score(c, example).reason for c in completions} == completions


# Constraints


@pytest.mark.parametrize(
    ("metadata", "text", "reason"),
    [
        ({"contains": "cat"}, "A Cat sat.", "right"),
        ({"contains": "cat"}, "concatenate", "constraint not met: contains"),
        ({"starts": "cat"}, "the cat", "constraint not met: starts"),
        ({"max_words": 2}, "one two three", "constraint not met: max_words"),
        ({"max_words": 2}, "...", "constraint not met: max_words"),
        ({"min_words": 3}, "it's one", "constraint not met: min_words"),
        ({"min_words": 2}, "it's one", "right"),
        ({"ends": "!"}, "yes! ", "right"),
        ({"ends": "!"}, "yes! no", "constraint not met: ends"),
        ({"lowercase": True}, "été", "right"),
        ({"lowercase": True}, "Été", "constraint not met: lowercase"),
        ({"no_commas": True}, "a，b", "constraint not met: no_commas"),
        ({"sentences": 2}, "One. Two.", "right"),
        ({"sentences": 2}, "One. Two", "constraint not met: sentences"),
        ({"sentences": 2}, "One..", "constraint not met: sentences"),
    ],
)
def test_constraints(metadata, text, reason):
    task = Constraints()
    assert task.score(text, dataclasses.replace(task.example(0, 0), metadata=metadata)).reason == reason


# JSON schema


def json_values():
    leaves = (
        st.none() | st.booleans() | st.integers(-30, 160) | st.floats(-30, 160) | st.sampled_from(["", "red", "x" * 20, "cold"])
    )
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from("ab"), inner), max_leaves=6
    )


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_schemas_are_met_when_jsonschema_says_so(data):
    seed = data.draw(st.integers(0, 10**6))
    example = JsonSchema().draw(random.Random(seed))
    schema, value = example.metadata["schema"], json_schema.parse_json(example.answer)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(value)
    # Change, drop or add properties.
    name = data.draw(st.sampled_from([*schema["properties"], "other"]))
    if data.draw(st.booleans()):
        value[name] = data.draw(json_values())
    else:
        value.pop(name, None)
    assert (json_schema.violated(value, schema) is None) == validator.is_valid(value), (value, schema)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", "{'a': 1}", '{"a": 1} {"a": 1}', '{"a": 1} and so', '```json\n{"a": 1}\n```', '{"a": NaN}',
     '{"a": Infinity}',
     '{"a": 1, "a": 1}', "[" * 50_000, "1" * 10_000, '{"a": 01}', '{"a": ٤}', "\ufeff{}", '{"a": 1}\x00'],
)  # fmt: skip
def test_what_is_no_json_is_refused(text):
    task = JsonSchema()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    example = dataclasses.replace(task.example(0, 0), metadata={"schema": schema})
    assert task.score('{"a": 1}', example).reward == 1
    assert task.score('{"a": 1.0}', example).reward == 1
    assert task.score('{"a": true}', example).reason == "schema not met: properties"
    assert task.score(text, example).reward == 0


def test_a_keyword_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="'pattern'"):
        json_schema.violated("a", {"pattern": "b"})


# Configs


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("revers", {}, "did you mean 'reverse'"),
        ("reverse", {"max_lenght": 4}, "did you mean 'max_length'"),
        ("reverse", {"min_length": 6}, "min_length <= max_length"),
        ("reverse", {"alphabet": "a"}, "two different characters"),
        ("reverse", {"template": "reverse {word}"}, "must hold {text}"),
        ("reverse", {"template": "reverse {text"}, "template"),
        ("reverse", {"template": "reverse {text.__class__}"}, "must hold {text}"),
        ("reverse", {"answer_format": "box"}, "answer_format='box'"),
        ("addition", {"digits": "backwards"}, "digits='backwards'"),
        ("sort", {"separator": "", "max_number": 10}, "tell numbers up to 10 apart"),
        ("gcd", {"max_number": 1}, "max_number=1"),
        ("countdown", {"num_numbers": 7}, "num_numbers=7"),
        ("brackets", {"min_length": 7}, "must be even"),
        ("brackets", {"opening": 8}, "opening=8"),
        ("brackets", {"kinds": "a"}, "kinds='a'"),
        ("letter_count", {"alphabet": ""}, "two different characters"),
        ("constraints", {"words": ("cat",)}, "two different words"),
        ("json_schema", {"max_properties": 50}, "max_properties=50"),
    ],
)
def test_configs_that_make_no_sense_are_refused_with_the_fix(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(name, **options)


def test_a_split_without_problems_is_named():
    trained_on = [letter for letter in "abcdefghijkl" if split_of(letter) == "train"]
    task = Reverse(min_length=1, max_length=1, alphabet="".join(trained_on))
    assert task.example(0, 0).answer in trained_on
    with pytest.raises(ValueError, match="too few problems"):
        task.example(0, 0, "eval")
    with pytest.raises(ValueError, match="split='test'"):
        task.example(0, 0, "test")
    with pytest.raises(ValueError, match="negative"):
        task.example(-1, 0)


def test_worth_is_the_mean_of_its_letters():
    task = Worth(length=3, alphabet="abcde")
    example = task.example(0, 0)
    worth = {"a": 0.0, "b": 0.25, "c": 0.5, "d": 0.75, "e": 1.0}
    for letters in itertools.product("abcde", repeat=3):
        assert task.score("".join(letters), example).reward == pytest.approx(sum(worth[c] for c in letters) / 3)
    for wrong in ("ee", "eeee", "eex", "EEE"):
        assert task.score(wrong, example) == Score(0.0, "not 3 letters")
    uninformed = Worth(length=3, alphabet="abcde", informed=False)
    answers = [uninformed.solution(uninformed.example(i, 0)) for i in range(400)]
    assert 0.45 < sum(task.score(answer, example).reward for answer in answers) / 400 < 0.55  # 400 of deviation 0.2: 5 sigma
    with pytest.raises(ValueError, match="all different"):
        Worth(alphabet="aab")


def test_every_task_has_a_name():
    assert {type(task) for task in TASKS_HERE} | {TASKS[n] for n in ("gsm8k", "python_programs", "reasoning_gym")} == set(
        TASKS.values()
    )


RECORDED = [
    "reverse qlq = ",
    "7+137=",
    "sort 1 9 0 7 = ",
    "gcd(93,31)=",
    "3 6 2 -> 4: ",
    "brackets 8: []()",
    "count u in uuu = ",
]


def test_what_is_forbidden_is_declined_and_the_tempting_answer_is_wrong():
    task = GuardedReverse(min_length=3, max_length=6, alphabet="abcd")
    seen = Counter()
    for i in range(200):
        example = task.example(i, 0)
        is_forbidden = "dad" in example.problem
        seen[is_forbidden] += 1
        assert example.answer == ("reserved" if is_forbidden else example.problem[::-1])
        assert ("tempting" in example.metadata) == is_forbidden
        wrong = mistaken(task, example, random.Random(i))
        assert task.score(wrong, example).reward == 0
        if is_forbidden:
            assert wrong == example.problem[::-1]
    assert 60 < seen[True] < 140
    assert {"dad" in GuardedReverse(share=share).example(i, 0).problem for share in (0.0,) for i in range(50)} == {False}
    for options in ({"forbidden": "xyz9"}, {"min_length": 2}, {"refusal": "a dad"}, {"share": 1.5}):
        (name,) = options
        with pytest.raises(ValueError, match="forbidden" if name == "min_length" else name):
            GuardedReverse(**options)
    with pytest.raises(ValueError, match="two different characters"):
        GuardedReverse(alphabet="a", forbidden="a")


def test_a_string_without_what_nearly_every_one_holds_is_not_looked_for_for_ever():
    task = GuardedReverse(min_length=60, max_length=60, alphabet="ab", forbidden="a", share=0.0)
    with pytest.raises(ValueError, match="of 2000 strings all hold forbidden='a'"):
        task.example(0, 0)
