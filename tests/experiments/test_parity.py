"""The gate between sampling and training: both give the same distributions, and a difference would be seen."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.parity import parity, trainers_logprobs
from inference.engine import Engine
from inference.request import Request, Token
from model.presets import preset
from tests.inference.engine_reference import CHAIN, MODEL, ROOMY
from tests.networks import random_params

PROMPT, LENGTHS = CHAIN[:7], (13, 19, 4)
# Answers that nobody drew.
GIVEN = [[Token(0, 0, token, 0.0, 0.0, None, None, None) for token in row] for row in (CHAIN[7:20], CHAIN[9:28], CHAIN[7:11])]
# As it is trained: layers in a scan, computed again for the gradient, and the loss in chunks.
STACKED = dataclasses.replace(MODEL, scan_layers=True, remat="full")
PARAMS = random_params(STACKED)
CHUNK_TOKENS = 16  # of 75


def draw(engine):
    """An answer of each of the lengths, drawn beside each other."""
    requests = [Request(PROMPT, max_tokens=length, seed=seed) for seed, length in enumerate(LENGTHS)]
    return [answer for (answer,) in engine.generate(requests)]


def trained(params, model, answers):
    rows = [[*PROMPT, *(token.token for token in answer)] for answer in answers]
    return trainers_logprobs(params, model, rows, len(PROMPT), CHUNK_TOKENS)


def found(model, params, answers=None):
    engine = Engine(params, model, ROOMY)
    answers = answers or draw(engine)
    return parity(engine, PROMPT, answers, trained(params, model, answers))


@pytest.mark.optimised
# Of 22,000 numbers after drawn tokens the largest difference of tiny-deepseek is 1.7e-5. It is that of three layers of 64
# dimensions, whose sums are longer: without latent attention and experts it is 1.5e-5, and in one layer of them 0.7e-5.
@pytest.mark.parametrize(("name", "bound"), [("", 1e-5), ("tiny-gemma2", 1e-5), ("tiny-deepseek", 2e-5)])
def test_in_float32_they_agree_on_the_whole_vocabulary(name, bound):
    model = preset(name, vocab_size=48, max_seq_len=32, scan_layers=True, remat="full") if name else STACKED
    params = random_params(model) if name else PARAMS
    given, drawn = found(model, params, GIVEN), found(model, params)
    assert given.largest < 1e-5
    assert given.drawn_largest < 1e-5
    assert drawn.largest < bound
    assert max(drawn.drawn_largest, drawn.reported_largest) < 1e-5
    for mean in (given.mean, drawn.mean, drawn.reported_mean):
        assert 0 < mean < 2e-6


def test_in_bfloat16_they_differ_by_rounding():
    model = dataclasses.replace(STACKED, dtype="bfloat16", param_dtype="bfloat16")
    differences = found(model, random_params(model))
    # A thousandth more in one layer's weights is lost in that, a hundredth is not.
    assert differences.largest < 0.08
    assert differences.mean < 0.01
    assert differences.reported_largest < 0.08


def test_the_trainers_tokens_are_of_its_own_vocabulary():
    """What the scorer says of the drawn tokens stands in the whole vocabulary, which sums to one; a short row is padded."""
    answers = draw(Engine(PARAMS, STACKED, ROOMY))
    scores = trained(PARAMS, STACKED, answers)
    np.testing.assert_allclose(np.exp(scores.everything).sum(axis=-1), 1, atol=1e-5)
    for answer, everything, drawn in zip(answers, scores.everything, scores.drawn, strict=True):
        places, tokens = np.arange(len(answer)), [token.token for token in answer]
        np.testing.assert_allclose(everything[places, tokens], drawn[places], atol=1e-5)


def test_a_difference_would_be_seen():
    """Weights that differ by a thousandth, of one layer in the engine or of the trainer's scorer alone, or a single report."""
    other = PARAMS | {"scanned_blocks": jax.tree.map(lambda leaf: leaf * 1.001, PARAMS["scanned_blocks"])}
    engine = Engine(PARAMS, STACKED, ROOMY)
    answers = draw(engine)
    right, wrong = (trained(params, STACKED, answers) for params in (PARAMS, other))
    seen = parity(engine, PROMPT, answers, wrong)
    assert min(seen.largest, seen.drawn_largest, seen.reported_largest) > 1e-4
    of_scorer = parity(engine, PROMPT, answers, dataclasses.replace(right, drawn=wrong.drawn))
    assert of_scorer.largest < 1e-4 < of_scorer.drawn_largest
    last = answers[1][-1]
    answers[1][-1] = dataclasses.replace(last, raw_logprob=last.raw_logprob + 1e-3)
    of_report = parity(engine, PROMPT, answers, right)
    assert of_report.drawn_largest < 1e-4 < of_report.reported_largest


def test_nothing_is_left_held_and_work_is_not_disturbed():
    engine = Engine(PARAMS, STACKED, ROOMY)
    answers = draw(engine)
    parity(engine, PROMPT, answers, trained(PARAMS, STACKED, answers))
    assert engine.num_pages_held == 0
    assert not engine.has_work
    assert np.isfinite(engine.logits_along(CHAIN[:3], 0)).all()
