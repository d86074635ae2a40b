"""Scores of given rows against the full forward in float64, whatever the rows beside them."""

import functools

import numpy as np
import pytest

from data.tokenizer import CharTokenizer
from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request
from inference.sampling import Sampling
from inference.score import bits_per_byte, score
from tests.inference.engine_reference import CHAIN, MODEL, PARAMS, logits_after


def test_scores_are_the_log_probabilities_of_the_full_forward():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, MODEL.vocab_size, length).tolist() for length in (2, 17, 5, 32, 24, 3, 31)]
    found = dict(score(PARAMS, MODEL, rows, tokens_per_batch=40))
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        logits = logits_after(row, PARAMS, MODEL).astype(np.float64)[:-1]
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        targets = row[1:]
        np.testing.assert_allclose(found[i].logprobs, logprobs[np.arange(len(targets)), targets], atol=1e-5)
        assert found[i].greedy.tolist() == (np.argmax(logits, axis=1) == targets).tolist()


def test_a_rounded_cache_costs_what_it_costs_in_the_engine():
    """What the engine gives to what it drew; of a cache that is not rounded, what the full forward gives."""
    engine = Engine(PARAMS, MODEL, EngineConfig(max_batch=2, cache_tokens=64, page_size=8, cache_dtype="int8"))
    prompt = list(range(1, 10))
    ((answer,),) = engine.generate([Request(prompt, Sampling(temperature=1.0), max_tokens=20)])
    row = [*prompt, *(token.token for token in answer)]
    drawn = [token.logprob for token in answer]

    def of_row(cache_dtype):
        ((_, found),) = score(PARAMS, MODEL, [row], cache_dtype=cache_dtype)
        return found.logprobs

    np.testing.assert_allclose(of_row("int8")[len(prompt) - 1 :], drawn, atol=1e-5)
    np.testing.assert_allclose(of_row("model"), of_row(None), atol=1e-5)
    assert np.max(np.abs(of_row("int8") - of_row(None))) > 1e-4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "row 1 has 1 tokens"),
        ([1] * 34, "row 1 has 34 tokens, but model.max_seq_len=32"),
        ([1, 48], r"row 1 holds .* 1\.\.48"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        list(score(PARAMS, MODEL, [CHAIN[:4], row]))


@pytest.mark.parametrize("boundaries", [False, True])
def test_bits_per_byte_are_what_coding_token_by_token_takes(boundaries):
    """Of a text whose characters are one to three bytes long, read in rows of seven."""
    characters = "abcdeé→"
    tokenizer = CharTokenizer("chars", characters.encode(), boundaries)
    text = "".join(np.random.default_rng(0).choice(list(characters), 30))
    tokens = [characters.index(character) for character in text]
    bits, size = 0.0, 0
    for place, token in enumerate(tokens):
        if boundaries:
            before = [tokenizer.bos_id, *tokens[place // 7 * 7 : place]]
        elif place:
            before = tokens[(place - 1) // 7 * 7 : place]
        else:
            continue  # nothing predicts the first
        logits = logits_after(before, PARAMS, MODEL).astype(np.float64)[-1]
        bits -= (logits[token] - np.log(np.exp(logits).sum())) / np.log(2)
        size += len(text[place].encode())
    found = bits_per_byte(tokenizer, functools.partial(score, PARAMS, MODEL), text, 7)
    assert found == pytest.approx(bits / size, abs=1e-5)


def test_a_text_with_nothing_to_predict_is_refused():
    tokenizer = CharTokenizer("chars", b"a", False)
    with pytest.raises(ValueError, match="a text of 1 tokens has nothing to predict"):
        bits_per_byte(tokenizer, functools.partial(score, PARAMS, MODEL), "a")
