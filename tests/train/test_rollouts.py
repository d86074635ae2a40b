"""What is drawn, and what the trainer thinks of it: the same distribution at every temperature, tokens that are drawn
independently, and scores of a row that are its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tasks.task import Example
from inference.config import EngineConfig
from inference.engine import Engine
from inference.sampling import Sampling
from model.transformer import forward, unembed
from tests.networks import SMALL, random_params
from train.rl_step import score
from train.rollouts import draw, fitting, shuffled_rows

MODEL = dataclasses.replace(SMALL, num_layers=2)
PARAMS = random_params(MODEL)
PROMPTS = [[5, 6, 7, 8, 9], [11], [40, 2, 40]]
MOST, ROW = 8, 12  # tokens of an answer, and targets of a row


@pytest.fixture(scope="module")
def engine():
    return Engine(PARAMS, MODEL, EngineConfig(max_batch=16, cache_tokens=512, page_size=4, prefill_chunk=8))


@pytest.fixture(scope="module")
def scores():
    """Of (parameters, rows, temperature)."""
    return jax.jit(lambda params, rows, t: score(params, MODEL, rows, t, MOST))


def rows_of(samples):
    return {name: getattr(samples, name) for name in ("tokens", "targets", "positions", "segment_ids", "mask")}


def draw_some(engine, temperature, prompts=PROMPTS, samples=4, max_tokens=MOST):
    options = {
        "row_tokens": ROW,
        "sampling": Sampling(temperature=temperature),
        "stop_ids": frozenset({3}),
        "seed": 0,
        "step": 0,
    }
    return draw(engine, prompts, samples=samples, max_tokens=max_tokens, **options)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.9])
def test_the_ratio_of_the_first_update_is_1_at_every_temperature(engine, scores, temperature):
    """Of trainer and sampler, for each token; nothing else that shapes a distribution may be set in a run."""
    samples = draw_some(engine, temperature)
    ratio = np.exp(
        samples.mask * (np.asarray(scores(PARAMS, rows_of(samples), temperature).logprobs) - samples.behavior_logprobs)
    )
    assert samples.mask.sum() > 12
    np.testing.assert_allclose(ratio, 1, rtol=0, atol=1e-5)
    other = scores(PARAMS, rows_of(samples), temperature + 0.1).logprobs
    assert np.abs(samples.mask * (other - samples.behavior_logprobs)).max() > 1e-3


def test_the_first_tokens_of_a_group_are_drawn_independently(engine):
    """600 answers of one token: their shares are the probabilities, and those of twice the same, but for 5 deviations."""
    (prompt,) = prompts = [PROMPTS[0]]
    first = draw_some(engine, 1.0, prompts, samples=600, max_tokens=1).targets[:, len(prompt) - 1]
    read = jax.jit(lambda tokens, places: unembed(PARAMS, MODEL, forward(PARAMS, MODEL, tokens, places)[0]))
    p = np.asarray(jax.nn.softmax(read(np.array(prompts), np.arange(len(prompt))[None])[0, -1]), np.float64)
    assert p.max() < 0.5
    shares = np.bincount(first, minlength=MODEL.vocab_size) / len(first)
    assert (np.abs(shares - p) <= 5 * np.sqrt(p * (1 - p) / len(first)) + 1e-9).all()
    same, expected = np.mean(first[1:] == first[:-1]), np.sum(p**2)
    assert abs(same - expected) < 5 * np.sqrt(expected * (1 - expected) / len(first))


@pytest.fixture(scope="module")
def scored(engine, scores):
    """Samples, and what is thought of each of their tokens by a network with a value function."""
    samples = draw_some(engine, 1.0)
    params = PARAMS | {"value_head": jnp.asarray(np.random.default_rng(0).normal(size=(MODEL.d_model, 1)), jnp.float32)}
    find = functools.partial(scores, params, t=1.0)
    return samples, lambda rows: jax.tree.map(lambda x: np.asarray(x) * rows["mask"], find(rows))


def test_scores_of_a_row_do_not_depend_on_padding_nor_on_the_rows_beside_it(scored):
    samples, find = scored
    rows = rows_of(samples)
    random = np.random.default_rng(1)
    others = np.arange(len(samples.mask)) % 2 == 1
    changed = {name: np.where(others[:, None], x[::-1], x) for name, x in rows.items()}
    noise = random.integers(0, MODEL.vocab_size, samples.tokens.shape)
    for name in ("tokens", "targets"):
        changed[name] = np.where(changed["segment_ids"] == 0, noise, changed[name])
    assert (changed["tokens"] != rows["tokens"])[~others].any()
    for one, other in zip(jax.tree.leaves(find(rows)), jax.tree.leaves(find(changed)), strict=True):
        np.testing.assert_allclose(other[~others], one[~others], rtol=0, atol=2e-6)
        assert np.abs(other[others] - one[others]).max() > 1e-2


def test_a_value_is_of_the_state_before_its_token(scored):
    """Another token at index t changes the values after it, and not its own."""
    samples, find = scored
    row = int(np.argmax(samples.mask.sum(1)))
    t = int(np.flatnonzero(samples.mask[row])[2])
    rows = rows_of(samples)
    changed = {name: x.copy() for name, x in rows.items()}
    changed["targets"][row, t] = changed["tokens"][row, t + 1] = (rows["targets"][row, t] + 1) % MODEL.vocab_size
    before, after = find(rows).values[row], find(changed).values[row]
    np.testing.assert_array_equal(after[: t + 1], before[: t + 1])
    assert before[t]
    assert abs(after[t + 1] - before[t + 1]) > 1e-4


def test_prompts_that_do_not_fit_are_left_out_by_name_and_others_stand_in():
    def example(number):
        return Example(str(number), "", str(number))

    lengths = {3: 0, 4: 9, 104: 9}
    examples, prompts, left_out = fitting(example, lambda e: [1] * lengths.get(int(e.prompt), 5), range(2, 6), 8, 100)
    assert [e.prompt for e in examples] == ["2", "103", "204", "5"]
    assert [len(p) for p in prompts] == [5] * 4
    assert [e.prompt for e in left_out] == ["3", "4", "104"]
    with pytest.raises(
        ValueError, match=r"of 100 prompts none has 1 to rollouts\.max_prompt_tokens=4 tokens, .* '9902': raise it"
    ):
        fitting(example, lambda e: [1] * 5, range(2, 3), 4, 100)


def test_shuffled_rewards_stay_in_their_group_and_are_its_mean_on_average():
    generator, rewards = np.random.default_rng(0), np.arange(12.0) ** 2
    orders = np.array([shuffled_rows(generator, 12, 4) for _ in range(4000)])
    assert (np.sort(orders.reshape(-1, 3, 4), axis=-1) == np.arange(12).reshape(3, 4)).all()
    means, spread = rewards.reshape(3, 4).mean(1), rewards.reshape(3, 4).std(1)
    errors = (rewards[orders].mean(0).reshape(3, 4) - means[:, None]) / (spread[:, None] / np.sqrt(len(orders)))
    assert np.abs(errors).max() < 5
    assert set(shuffled_rows(generator, 12, 12)[:4]) != set(range(4))
