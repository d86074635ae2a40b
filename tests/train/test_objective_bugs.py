"""Mistakes on purpose (`PolicyConfig.bugs`): each changes what it says, and nothing else; none is on unless it is named."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from data.config import TaskConfig
from model.config import ModelConfig
from train.objectives.aggregate import normalised_apart
from train.objectives.config import GRPO, KLConfig, PolicyConfig
from train.objectives.policy_gradient import Rollouts, policy_sums, prepare
from train.rl_config import RLConfig, RolloutConfig

B, T = 4, 6
LENGTHS = np.array([3, 1, 4, 2])  # drawn tokens, from index 1 on
MASK = np.array([[1 <= t <= length for t in range(T)] for length in LENGTHS], np.float32)
TRUNCATED = np.array([0, 0, 1, 0])
REWARDS = np.array([1.0, 0.0, 0.0, 1.0], np.float32)
LOGPROBS = -np.random.default_rng(0).uniform(0.1, 2, (B, T)).astype(np.float32)
DISTANCE = np.random.default_rng(2).normal(size=(B, T)).astype(np.float32)
# Of the rows that ended themselves, the last token.
STOPS = np.array([[t == length and not cut for t in range(T)] for length, cut in zip(LENGTHS, TRUNCATED, strict=True)])


def gradient(config):
    """Of the loss in the log-probabilities, [B, T]."""
    rollouts = Rollouts(
        mask=MASK,
        sampler_logprobs=LOGPROBS,
        trainer_logprobs=LOGPROBS,
        rewards=REWARDS,
        groups=np.array([0, 0, 1, 1]),
        valid=np.ones(B),
        truncated=TRUNCATED,
        reference_logprobs=LOGPROBS - DISTANCE,
    )
    batch, _ = prepare(config, rollouts, 0.0)
    return jax.device_get(jax.jit(jax.grad(lambda logprobs: policy_sums(config, batch, logprobs)[0]))(LOGPROBS))


def test_no_bug_is_on_by_default():
    assert PolicyConfig().bugs == ()
    assert RolloutConfig().top_k == 0


@pytest.mark.parametrize("kl", [KLConfig(), KLConfig(loss_coefficient=0.1, loss_estimator="k2")], ids=["", "kl"])
def test_stop_token_untrained(kl):
    """The gradient of stop tokens is 0, of a truncated answer's last token is not, and the others share the whole weight."""
    clean = gradient(PolicyConfig(group_size=2, kl=kl))
    buggy = gradient(PolicyConfig(group_size=2, kl=kl, bugs=("stop_token_untrained",)))
    assert (clean[MASK > 0] != 0).all()
    assert (buggy[STOPS] == 0).all()
    others = (MASK > 0) & ~STOPS
    assert others[2, 4]
    np.testing.assert_allclose(buggy[others], clean[others] * MASK.sum() / others.sum(), rtol=1e-5)


def test_micro_batch_normaliser():
    """Means of each micro-batch's tokens, averaged: against numpy. Rows 0 and 2 have 7 tokens, 1 and 3 have 3."""
    weights = np.asarray(normalised_apart(MASK / MASK.sum(), 2))
    losses = np.random.default_rng(1).normal(size=(B, T))
    means = [(losses * MASK)[rows].sum() / MASK[rows].sum() for rows in ([0, 2], [1, 3])]
    assert (weights * losses).sum() == pytest.approx(np.mean(means), rel=1e-5)
    assert (weights * losses).sum() != pytest.approx((losses * MASK).sum() / MASK.sum(), rel=1e-2)
    np.testing.assert_allclose(normalised_apart(MASK / MASK.sum(), 1), MASK / MASK.sum(), rtol=1e-6)
    # A micro-batch without any token weighs nothing.
    empty = MASK * np.array([[1], [0], [1], [0]])
    np.testing.assert_allclose(normalised_apart(empty, 2), empty / 2, rtol=1e-6)


def test_k1_in_the_loss_has_a_gradient_without_direction():
    """Equal for every token, whatever it is; k2's is the larger the farther a token is from the reference."""
    penalty = {}
    for estimator, bugs in (("k1", ("k1_in_loss",)), ("k2", ())):
        kl = KLConfig(loss_coefficient=1.0, loss_estimator=estimator)
        penalty[estimator] = gradient(PolicyConfig(group_size=2, kl=kl, bugs=bugs)) - gradient(PolicyConfig(group_size=2))
    np.testing.assert_allclose(penalty["k1"], MASK / MASK.sum(), atol=1e-6)
    np.testing.assert_allclose(penalty["k2"], DISTANCE * MASK / MASK.sum(), atol=1e-6)


job = functools.partial(
    RLConfig,
    "tiny",
    ModelConfig(vocab_size=32, num_layers=1, d_model=32, num_heads=2, d_ff=64, max_seq_len=128),
    "runs/start",
    TaskConfig("reverse"),
    1,
)


def test_bugs_are_refused_where_they_are_not_named_or_change_nothing():
    truncated = dataclasses.replace(GRPO, bugs=("truncated_sampling",))
    assert job(policy=truncated, rollouts=RolloutConfig(top_k=3)).rollouts.top_k == 3
    with pytest.raises(ValueError, match=r"rollouts.top_k=3: the trainer scores the whole distribution"):
        job(rollouts=RolloutConfig(top_k=3))
    with pytest.raises(ValueError, match=r"rollouts.top_k=0"):
        job(policy=truncated)
    apart = dataclasses.replace(GRPO, bugs=("micro_batch_normaliser",))
    assert job(policy=apart, accumulation=2).accumulation == 2
    with pytest.raises(ValueError, match="set accumulation above 1"):
        job(policy=apart)
