"""The gate between sampling and training: both give the same distributions, and a difference would be seen."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.parity import parity, trainers_logprobs
from inference.engine import Engine
from model.presets import preset
from tests.inference.test_engine import CHAIN, MODEL, ROOMY
from tests.networks import random_params

ROWS = [CHAIN[:20], CHAIN[:7] + CHAIN[9:28], CHAIN[:11]]
# As it is trained: layers in a scan, computed again for the gradient, and the loss in chunks.
STACKED = dataclasses.replace(MODEL, scan_layers=True, remat="full")
PARAMS = random_params(STACKED)
CHUNK_TOKENS = 16  # of 75


def found(model, params, rows=ROWS):
    return parity(Engine(params, model, ROOMY), rows, 7, trainers_logprobs(params, model, rows, 7, CHUNK_TOKENS))


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["", "tiny-gemma2", "tiny-deepseek"])
def test_in_float32_they_agree_on_the_whole_vocabulary(name):
    model = preset(name, vocab_size=48, max_seq_len=32, scan_layers=True, remat="full") if name else STACKED
    differences = found(model, random_params(model) if name else PARAMS)
    assert differences.largest < 1e-5
    assert 0 < differences.mean < 2e-6
    assert differences.drawn_largest < 1e-5


def test_in_bfloat16_they_differ_by_rounding():
    model = dataclasses.replace(STACKED, dtype="bfloat16", param_dtype="bfloat16")
    differences = found(model, random_params(model))
    # A thousandth more in one layer's weights is lost in that, a hundredth is not.
    assert differences.largest < 0.08
    assert differences.mean < 0.01


def test_the_trainers_tokens_are_of_its_own_vocabulary():
    """What the scorer says of the drawn tokens stands in the whole vocabulary, which sums to one; a short row is padded."""
    trained = trainers_logprobs(PARAMS, STACKED, ROWS, 7, CHUNK_TOKENS)
    np.testing.assert_allclose(np.exp(trained.everything).sum(axis=-1), 1, atol=1e-5)
    for row, everything, drawn in zip(ROWS, trained.everything, trained.drawn, strict=True):
        places = np.arange(len(row) - 7)
        np.testing.assert_allclose(everything[places, row[7:]], drawn[places], atol=1e-5)


def test_a_difference_would_be_seen():
    """Weights that differ by a thousandth, of one layer in the engine or of the trainer's scorer alone."""
    other = PARAMS | {"scanned_blocks": jax.tree.map(lambda leaf: leaf * 1.001, PARAMS["scanned_blocks"])}
    right, wrong = (trainers_logprobs(params, STACKED, ROWS, 7, CHUNK_TOKENS) for params in (PARAMS, other))
    engine = Engine(PARAMS, STACKED, ROOMY)
    seen = parity(engine, ROWS, 7, wrong)
    assert seen.largest > 1e-4
    assert seen.drawn_largest > 1e-4
    drawn_alone = parity(engine, ROWS, 7, dataclasses.replace(right, drawn=wrong.drawn))
    assert drawn_alone.largest < 1e-4 < drawn_alone.drawn_largest


def test_nothing_is_left_held_and_work_is_not_disturbed():
    engine = Engine(PARAMS, STACKED, ROOMY)
    parity(engine, ROWS, 7, trainers_logprobs(PARAMS, STACKED, ROWS, 7, CHUNK_TOKENS))
    assert engine.num_pages_held == 0
    assert not engine.has_work
    assert np.isfinite(engine.logits_along(CHAIN[:3], 0)).all()
