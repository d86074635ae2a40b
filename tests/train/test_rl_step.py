"""Rows of drawn answers, and their scores by the trainer."""

import dataclasses

import jax
import numpy as np
import pytest

from model.config import MoeConfig
from model.transformer import forward, unembed
from tests.networks import random_params
from tests.train.rl_runs import MODEL, drawn
from train.rl_step import score
from train.rollouts import prompt_seed, to_rows


def test_the_stop_token_is_an_action_and_the_prompt_and_padding_are_not():
    rows = to_rows([[5, 6, 7], [8]], [[drawn([1, 2])], [drawn([3, 3, 3], "length")]], row_tokens=6)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 1, 0, 0], [8, 3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[6, 7, 1, 2, 0, 0], [3, 3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.mask, [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.behavior_logprobs, [[0, 0, -0.5, -1.5, 0, 0], [-0.5, -1.5, -2.5, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]])
    assert rows.truncated.tolist() == [False, True]
    assert rows.answers() == [[1], [3, 3, 3]]


def test_every_prompt_of_every_step_has_random_numbers_of_its_own():
    seeds = {prompt_seed(seed, step, i) for seed in range(3) for step in range(20) for i in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert max(seeds) >= 2**31


@pytest.mark.parametrize("moe", [None, MoeConfig(num_experts=4, experts_per_token=2, d_ff=32)], ids=["dense", "experts"])
def test_answers_that_share_their_prompt_are_scored_and_trained_as_if_each_had_its_own(moe):
    """Groups of three: of different prompts and answers, with a window, and with a row whose reward is missing."""
    model = dataclasses.replace(MODEL, window_pattern=(0, 3), num_layers=2, moe=moe)
    params = random_params(model) | {"value_head": jax.random.normal(jax.random.key(1), (model.d_model, 1))}
    answers = [[drawn([1, 2, 9]), drawn([2]), drawn([3] * 4, "length")], [drawn([4, 4]), drawn([9]), drawn([7, 5, 1])]]
    rows = to_rows([[5, 6, 7], [8]], answers, row_tokens=6)
    names = ("tokens", "targets", "positions", "segment_ids", "mask")
    batch = {name: jax.numpy.asarray(getattr(rows, name)) for name in names}
    batch["mask"] = batch["mask"].at[1].set(0)
    weights = batch["mask"] * jax.random.normal(jax.random.key(2), batch["mask"].shape)

    def of_answers(params, shared):
        found = score(params, model, batch, temperature=0.7, max_tokens=4, shared=shared)
        every = (found.logprobs, found.entropies, found.values)
        return sum(jax.numpy.sum(weights * x) for x in every), tuple(batch["mask"] * x for x in every)

    gradients = jax.jit(jax.value_and_grad(of_answers, has_aux=True), static_argnums=1)
    (total, found), of_found = gradients(params, 3)
    (expected_total, expected), of_expected = gradients(params, 1)
    assert abs(float(expected_total)) > 0.1
    for x, y in zip(
        jax.tree.leaves((total, found, of_found)), jax.tree.leaves((expected_total, expected, of_expected)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))


def test_scores_of_answers_are_those_of_whole_rows():
    """Wherever an answer begins, and for rows that hold none."""
    params = random_params(MODEL)
    rows = to_rows([[5, 6, 7], [8], [1, 2]], [[drawn([1, 2, 9])], [drawn([3] * 4, "length")], [drawn([4])]], row_tokens=6)
    names = ("tokens", "targets", "positions", "segment_ids", "mask")
    batch = {name: jax.numpy.asarray(getattr(rows, name)) for name in names}
    batch["mask"] = batch["mask"].at[2].set(0)
    found = score(params, MODEL, batch, temperature=0.7, max_tokens=4)
    hidden = forward(params, MODEL, batch["tokens"], batch["positions"], batch["segment_ids"])[0]
    logits = np.asarray(unembed(params, MODEL, hidden), np.float64) / 0.7
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs, rows.targets[..., None], 2)[..., 0]
    entropies = -(np.exp(logprobs) * logprobs).sum(-1)
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(found.logprobs * mask, expected * mask, atol=1e-5)
    np.testing.assert_allclose(found.entropies * mask, entropies * mask, atol=1e-5)
    assert found.logprobs.shape == mask.shape
    assert (np.count_nonzero(found.logprobs, axis=1) == 4).all()  # no more than an answer may have
