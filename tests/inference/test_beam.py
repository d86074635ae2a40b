"""Beam search against every answer there is."""

import dataclasses
import itertools

import numpy as np
import pytest

from inference.beam import beam_search
from inference.config import EngineConfig
from inference.engine import Engine
from tests.inference.engine_reference import logits_after
from tests.networks import SMALL, random_params

VOCAB = 4
MODEL = dataclasses.replace(SMALL, vocab_size=VOCAB, num_layers=1)
PARAMS = random_params(MODEL, seed=3)
PROMPT = [1, 3, 2]
ENGINE = Engine(PARAMS, MODEL, EngineConfig(max_batch=16, cache_tokens=1024, page_size=4, prefill_chunk=4))


def all_answers(max_tokens, stop_ids, length_penalty):
    """Every answer with its score: those that a stop token ends, and those of full length without one."""
    found = []
    for length in range(1, max_tokens + 1):
        for answer in itertools.product(range(VOCAB), repeat=length):
            stops = [token in stop_ids for token in answer]
            if any(stops[:-1]) or not (stops[-1] or length == max_tokens):
                continue
            logits = logits_after([*PROMPT, *answer], PARAMS, MODEL).astype(np.float64)
            logprobs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
            total = sum(logprobs[len(PROMPT) - 1 + i, token] for i, token in enumerate(answer))
            found.append((answer, total, total / length**length_penalty))
    return sorted(found, key=lambda found: -found[2])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset({2})], ids=["no_stop", "stop"])
def test_a_search_wide_enough_finds_the_best_of_all_answers(stop_ids, length_penalty):
    best = all_answers(3, stop_ids, length_penalty)[:5]
    found = beam_search(
        ENGINE, PROMPT, num_beams=16, max_tokens=3, stop_ids=stop_ids, length_penalty=length_penalty, num_best=5
    )
    assert [beam.tokens for beam in found] == [answer for answer, *_ in best]
    np.testing.assert_allclose([beam.logprob for beam in found], [logprob for _, logprob, _ in best], atol=1e-4)
    np.testing.assert_allclose([beam.score for beam in found], [score for *_, score in best], atol=1e-4)
    assert [beam.finished for beam in found] == [answer[-1] in stop_ids for answer, *_ in best]


def test_one_beam_is_greedy_decoding():
    (found,) = beam_search(ENGINE, PROMPT, num_beams=1, max_tokens=6)
    tokens = list(PROMPT)
    for token in found.tokens:
        assert token == int(np.argmax(logits_after(tokens, PARAMS, MODEL)[-1]))
        tokens.append(token)
    assert len(found.tokens) == 6


def test_beams_reuse_their_past():
    ENGINE.load(PARAMS, MODEL)
    before = ENGINE.stats.prefilled
    beam_search(ENGINE, PROMPT, num_beams=3, max_tokens=8)
    # The prompt once; after that a beam's last token alone is computed, beside what the engine decodes itself.
    assert ENGINE.stats.prefilled - before == len(PROMPT) - 1


def test_tokens_that_the_tokenizer_does_not_have_take_no_beam():
    """The search is that over the smaller vocabulary, with the log-probabilities of the larger one."""
    model = dataclasses.replace(SMALL, num_layers=1)
    params = random_params(model, seed=3)
    engine = Engine(params, model, EngineConfig(max_batch=16, cache_tokens=1024, page_size=4), vocab_size=VOCAB)
    found = beam_search(engine, PROMPT, num_beams=16, max_tokens=2, num_best=16)
    assert sorted(beam.tokens for beam in found) == sorted(itertools.product(range(VOCAB), repeat=2))
    for beam in found:
        logits = logits_after([*PROMPT, *beam.tokens], params, model).astype(np.float64)
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        expected = sum(logprobs[len(PROMPT) - 1 + i, token] for i, token in enumerate(beam.tokens))
        assert beam.logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, r"num_beams=0 must lie in \[1, 19\] with 1 stop tokens"),
        ({"num_beams": 20}, "num_beams=20"),
        ({"num_best": 4}, "num_best=4"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"length_penalty": -0.1}, "length_penalty"),
    ],
)
def test_numbers_off_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(ENGINE, PROMPT, **{"num_beams": 3, "max_tokens": 4, "stop_ids": frozenset({2}), **options})
