"""Multiple choice against sums over the full forward in float64, and lm-evaluation-harness's rules by hand."""

import functools
import json

import numpy as np
import pytest

from data.tokenizer import CharTokenizer, open_huggingface_tokenizer
from inference.multiple_choice import Question, accuracy, choice_logprobs, chosen, encode_pair, read_questions
from inference.score import score
from tests.inference.engine_reference import MODEL, PARAMS, logits_after

CHARACTERS = "".join(sorted(set("Question: abcdef?\nAnswer:")))
SCORER = functools.partial(score, PARAMS, MODEL)


@pytest.mark.parametrize("boundaries", [False, True])
def test_a_choice_is_as_likely_as_its_characters_after_the_prompt_and_a_space(boundaries):
    tokenizer = CharTokenizer("chars", CHARACTERS.encode(), boundaries)
    questions = [Question("ab?\nAnswer:", ("a", "bcd", "feed a bee"), 0), Question("c", ("dead", "bad"), 1)]
    found = choice_logprobs(tokenizer, SCORER, questions)
    assert [len(values) for values in found] == [3, 2]
    for question, values in zip(questions, found, strict=True):
        for choice, value in zip(question.choices, values, strict=True):
            prompt = [*([tokenizer.bos_id] if boundaries else []), *map(CHARACTERS.index, question.prompt)]
            tokens = [*prompt, *map(CHARACTERS.index, f" {choice}")]
            logits = logits_after(tokens, PARAMS, MODEL).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            expected = sum(logprobs[i - 1, tokens[i]] for i in range(len(prompt), len(tokens)))
            assert value == pytest.approx(expected, abs=1e-4)


def test_a_space_between_context_and_continuation_is_the_continuations(tmp_path):
    """In the vocabulary " a" is one token, and so it is scored, whichever side the space is given on."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "\u0120a"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("\u0120", "a")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_huggingface_tokenizer(tmp_path)
    expected = ([vocabulary["b"], vocabulary["\u0120a"], vocabulary["b"]], 2)
    assert encode_pair(tokenizer, "b", " ab") == encode_pair(tokenizer, "b ", "ab") == expected


def test_the_first_of_equals_wins_and_lengths_are_characters():
    questions = [Question("q", ("x", "zz", "ééé"), 1), Question("q", ("a", "b"), 1)]
    logprobs = [np.array([-3.0, -4.0, -6.5]), np.array([-2.0, -2.0])]
    assert chosen(questions, logprobs).tolist() == [0, 0]
    assert chosen(questions, logprobs, per_character=True).tolist() == [1, 0]
    assert accuracy(questions, logprobs) == 0
    assert accuracy(questions, logprobs, per_character=True) == 0.5


def test_a_file_is_read_as_far_as_asked_and_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    good = {"query": "Question: why?\n", "choices": ["because", "so"], "gold": 1}
    bad = [good | {"gold": 2}, good | {"choices": [""]}, good | {"query": None}, {"query": "no more"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [good, good, *bad]) + "{")
    assert read_questions(path, 2) == [Question("Question: why?\nAnswer:", ("because", "so"), 1)] * 2
    for number in range(3, 8):
        lines = path.read_text().splitlines()
        (tmp_path / "one.jsonl").write_text(lines[number - 1])
        with pytest.raises(ValueError, match=r"one\.jsonl, line 1: expected"):
            read_questions(tmp_path / "one.jsonl", 1)
    with pytest.raises(ValueError, match="line 3: expected"):
        read_questions(path, 400)
