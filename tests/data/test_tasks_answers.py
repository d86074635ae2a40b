"""What counts as one answer, and what does not: each trick with which a completion could pass for right."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tasks.answers import MAX_CHARACTERS, extract, parse_number, wrap

MARKED = ["hashes", "boxed", "tags"]


@pytest.mark.parametrize(
    ("answer_format", "completion", "expected"),
    [
        ("bare", " 42\n", "42"),
        ("bare", "42 is it", "42 is it"),  # the task compares the whole, so this is wrong there
        ("bare", "", "no answer"),
        ("bare", " \n\t", "no answer"),
        ("bare", "\u00a042", "\u00a042"),  # white space that ASCII does not know is part of the answer
        ("hashes", "two and two\n#### 4", "4"),
        ("hashes", "####4\n \n", "4"),
        ("hashes", "#### 4\n#### 5", "two answers"),
        ("hashes", "#### 4 #### 4", "two answers"),
        ("hashes", "#########4", "two answers"),
        ("hashes", "#### 4\nor maybe 5", "text after the answer"),
        ("hashes", "####", "no answer"),
        ("hashes", "####\n4", "text after the answer"),
        ("hashes", "4", "no answer"),
        ("hashes", "＃＃＃＃ 4", "no answer"),
        ("boxed", "so \\boxed{4}.", "4"),
        ("boxed", "$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("boxed", "\\[\\boxed{4}\\]", "4"),
        ("boxed", "\\boxed{4} or \\boxed{5}", "two answers"),
        ("boxed", "\\boxed{\\boxed{4}}", "two answers"),
        ("boxed", "\\boxed{4", "unclosed answer"),
        ("boxed", "\\boxed{}", "no answer"),
        ("boxed", "\\boxed{4} apples", "text after the answer"),
        ("boxed", "boxed{4}", "no answer"),
        ("tags", "<answer> 4 </answer>", "4"),
        ("tags", "<answer>4</answer> 5", "text after the answer"),
        ("tags", "<answer>4</answer><answer>5</answer>", "two answers"),
        ("tags", "<answer>4", "unclosed answer"),
        ("tags", "4</answer>", "no answer"),
        ("tags", "<ANSWER>4</ANSWER>", "no answer"),
        ("last_number", "first 3, then 1,234.50.", "1,234.50"),
        ("last_number", "it costs $5", "5"),
        ("last_number", "-7", "-7"),
        ("last_number", "none", "no answer"),
        ("last_number", "٤٢ and ４２ and x² and v2", "no answer"),
        ("last_number", "in 3 steps of H2O", "3"),
        ("last_number", "version 1.2.3", "no answer"),
        ("last_number", "1,23", "no answer"),
    ],
)
def test_extract(answer_format, completion, expected):
    answer, reason = extract(completion, answer_format)
    assert expected == (answer if answer is not None else reason)
    assert (answer is None) == bool(reason)


@pytest.mark.parametrize("answer_format", [*MARKED, "bare", "last_number"])
def test_a_flood_is_refused_and_cheap(answer_format):
    for unit in ("#", "\\boxed{", "<answer>", "1,", "1", "{", "-"):
        assert extract(unit * (MAX_CHARACTERS + 1), answer_format) == (None, "completion too long")
        extract((unit * MAX_CHARACTERS)[:MAX_CHARACTERS], answer_format)


@given(st.text(alphabet="ab1 {}#<>\\", min_size=1).map(str.strip).filter(bool), st.sampled_from(MARKED))
def test_an_answer_that_was_wrapped_is_found_or_refused_never_changed(answer, answer_format):
    found, _ = extract(wrap(answer, answer_format, work="because 3"), answer_format)
    assert found in (answer, None)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_a_number_is_read_by_its_value(number):
    for text in (str(number), f"{number:,}", f"{number}%", f" {number}. "):
        assert parse_number(text) is not None
        assert Decimal(parse_number(text)) == number
    assert parse_number(f"{number:,}") == parse_number(f"{number}000")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("+5", "5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("5 $", "5"),
        ("5%", "5"),
        ("1,23", None),
        ("1234,567", None),
        ("--5", None),
        ("1e3", None),
        ("٤", None),
        ("４", None),
        ("²", None),
        ("1/2", None),
        ("5 apples", None),
        ("4 5", None),
        ("inf", None),
        ("nan", None),
        ("", None),
        ("0x10", None),
        ("1_000", None),
    ],
)
def test_what_a_number_is(text, number):
    assert parse_number(text) == number


def test_there_is_no_place_for_work_around_a_bare_answer():
    with pytest.raises(ValueError, match="bare"):
        wrap("4", "bare", work="2+2")
