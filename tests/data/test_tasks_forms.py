"""Verifiers of form, by hand; and what they are not made of."""

import pytest

from data.tasks.registry import make_form
from data.tasks.task import Example

EXAMPLE = Example("prompt", "answer", "problem")


@pytest.mark.parametrize(
    ("form", "options", "completion", "reason"),
    [
        ("length", {"max_characters": 3}, " abc\n", "right"),
        ("length", {"max_characters": 3}, "abcd", "too long"),
        ("length", {"max_characters": 3}, "  ", "too short"),
        ("length", {"max_characters": 3, "min_characters": 0}, "", "right"),
        ("length", {"max_characters": 2}, "\u00e9\U0001f600", "right"),  # characters, not bytes
        ("pattern", {"pattern": "[0-9]+"}, "12", "right"),
        ("pattern", {"pattern": "[0-9]+"}, "12 ", "no match"),  # the whole completion
        ("pattern", {"pattern": "[0-9]+"}, "12\n", "no match"),  # which `$` would let through
        ("answer_format", {"answer_format": "tags"}, "so <answer>wrong</answer>", "right"),
        ("answer_format", {"answer_format": "tags"}, "so wrong", "no answer"),
        ("answer_format", {"answer_format": "boxed"}, r"\boxed{1} \boxed{1}", "two answers"),
    ],
)
def test_forms_by_hand(form, options, completion, reason):
    score = make_form(form, **options).score(completion, EXAMPLE)
    assert (score.reward, score.reason) == (float(reason == "right"), reason)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("lenght", {}, "no form is called 'lenght'; did you mean 'length'"),
        ("length", {"max_character": 3}, "has no field 'max_character'; did you mean 'max_characters'"),
        ("length", {}, "form 'length' needs a value of max_characters"),
        ("length", {"max_characters": 3, "min_characters": 4}, r"got \(4, 3\)"),
        ("length", {"max_characters": "3"}, "whole numbers"),
        ("pattern", {"pattern": "("}, "is no regular expression"),
        ("pattern", {"pattern": 3}, "is no regular expression"),
        ("answer_format", {"answer_format": "tag"}, "answer_format='tag' is not of"),
    ],
)
def test_forms_that_cannot_be_made_are_refused(form, options, message):
    with pytest.raises(ValueError, match=message):
        make_form(form, **options)
