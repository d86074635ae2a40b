"""Over every sequence of an enumerable policy: expected gradients are those of the true objective, and each algorithm reaches
the optimum that is known in closed form.

A batch is two samples of one prompt; the expectation is over all 15 x 15 of them, through `prepare` and `policy_sums`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tabular
from train.objectives.aggregate import sequence_weights, weighted_sum
from train.objectives.config import DPOConfig, ImportanceConfig, KLConfig, PolicyConfig, ValueConfig
from train.objectives.kl import kl_losses
from train.objectives.pairs import PairLogprobs
from train.objectives.policy_gradient import Rollouts, policy_sums, prepare
from train.objectives.preference import pair_losses

ROWS = tabular.ROWS
POLICY, OTHER, REFERENCE = (tabular.random_policy(seed) for seed in range(3))
REWARDS = np.random.default_rng(3).normal(size=ROWS)
BETA = 0.3

REINFORCE = PolicyConfig(surrogate="reinforce", advantage="none", aggregation="seq_sum", clip_low=0, clip_high=0)
in_reward = functools.partial(dataclasses.replace, REINFORCE, kl=KLConfig(reward_coefficient=BETA))


def in_loss(estimator, **options):
    bugs = ("k1_in_loss",) if estimator == "k1" else ()
    config = KLConfig(loss_coefficient=BETA, loss_estimator=estimator, **options)
    return dataclasses.replace(REINFORCE, kl=config, bugs=bugs)


def corrected(level, cap):
    return dataclasses.replace(REINFORCE, importance=ImportanceConfig(level=level, cap=cap))


def expected_gradient(config: PolicyConfig, sampler: np.ndarray, old: np.ndarray, baseline=None) -> np.ndarray:
    """Of the loss [7, 3], over all pairs of sequences of `sampler`; `old` is the trainer's policy before its updates."""
    pairs = jnp.asarray(np.stack(np.meshgrid(np.arange(ROWS), np.arange(ROWS))).reshape(2, -1).T)
    log_p = tabular.sequence_logprobs(sampler)

    def loss(logits, pair):
        def of(policy):
            return tabular.token_logprobs(policy)[pair]

        rollouts = Rollouts(
            mask=jnp.asarray(tabular.MASK)[pair],
            sampler_logprobs=of(sampler),
            trainer_logprobs=of(old),
            rewards=jnp.asarray(REWARDS)[pair],
            groups=jnp.zeros(2, int),
            valid=jnp.ones(2),
            truncated=jnp.asarray(tabular.TRUNCATED)[pair],
            reference_logprobs=of(REFERENCE),
            baseline=None if baseline is None else jnp.asarray(baseline),
        )
        batch, _ = prepare(config, rollouts, config.kl.reward_coefficient)
        return policy_sums(config, batch, of(logits))[0]

    def expectation(logits):
        return jnp.sum(jnp.exp(log_p[pairs].sum(axis=-1)) * jax.vmap(loss, (None, 0))(logits, pairs))

    return np.asarray(jax.jit(jax.grad(expectation))(POLICY))


def gradient_of(objective) -> np.ndarray:
    return np.asarray(jax.jit(jax.grad(objective))(POLICY))


def expected_reward(logits):
    return jnp.sum(jnp.exp(tabular.sequence_logprobs(logits)) * REWARDS)


# On policy; name: config, baseline, and what share of the gradient of the expected reward is expected.
ON_POLICY = {
    "reinforce": (REINFORCE, None, 1),
    "ema": (dataclasses.replace(REINFORCE, advantage="ema"), 0.7, 1),
    "greedy": (dataclasses.replace(REINFORCE, advantage="greedy"), [0.7, 0.7], 1),
    "batch": (dataclasses.replace(REINFORCE, advantage="batch"), None, 1 / 2),
    "rloo": (dataclasses.replace(REINFORCE, advantage="rloo"), None, 1),
    "grpo_without_std": (PolicyConfig(aggregation="seq_sum", group_size=2), None, 1 / 2),
    "rloo_clipped": (PolicyConfig(aggregation="seq_sum", advantage="rloo"), None, 1),
    "rloo_cispo": (PolicyConfig(aggregation="seq_sum", advantage="rloo", surrogate="cispo", clip_low=0), None, 1),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_expected_gradient_is_that_of_the_expected_reward(name):
    config, baseline, share = ON_POLICY[name]
    with jax.enable_x64(True):
        gradient = expected_gradient(config, POLICY, POLICY, baseline)
        np.testing.assert_allclose(gradient, -share * gradient_of(expected_reward), atol=1e-12)


@pytest.mark.parametrize("reward_to_go", [False, True])
def test_k1_in_the_reward_has_the_gradient_of_the_kl(reward_to_go):
    with jax.enable_x64(True):
        gradient = expected_gradient(in_reward(reward_to_go=reward_to_go), POLICY, POLICY)
        true = gradient_of(lambda logits: BETA * tabular.kl(logits, REFERENCE) - expected_reward(logits))
        np.testing.assert_allclose(gradient, true, atol=1e-12)


def test_kl_in_the_loss_has_the_gradients_that_are_stated():
    """Beyond that of the reward: k1 none; k2 that of the next tokens' KL; k3 that of the KL in the other direction."""

    def next_tokens(p, q):
        return tabular.kl_of_next_tokens(p, q, POLICY)

    def reverse(logits):
        log_p, log_r = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
        reached = (
            jnp.zeros(len(POLICY)).at[tabular.CONTEXTS].add(tabular.MASK * jnp.exp(tabular.sequence_logprobs(POLICY))[:, None])
        )
        return jnp.sum(reached * jnp.sum(jnp.exp(log_r) * (log_r - log_p), axis=-1))

    with jax.enable_x64(True):
        reward = gradient_of(expected_reward)
        of_k2 = gradient_of(lambda logits: next_tokens(logits, REFERENCE))
        of_k3 = gradient_of(reverse)
        assert np.abs(of_k2 - of_k3).max() > 0.05
        for estimator, true in {"k1": 0.0, "k2": of_k2, "k3": of_k3}.items():
            gradient = expected_gradient(in_loss(estimator), POLICY, POLICY)
            np.testing.assert_allclose((gradient + reward) / BETA, true * np.ones_like(reward), atol=1e-12, err_msg=estimator)


def test_kl_estimators_of_whole_sequences():
    """On policy, and from another policy with either use of the ratio; only k2 of the values is biased."""
    log_r = tabular.sequence_logprobs(jnp.asarray(REFERENCE))
    forward = lambda logits: tabular.kl(logits, REFERENCE)  # noqa: E731
    backward = lambda logits: tabular.kl(REFERENCE, logits)  # noqa: E731

    def k2_mean(logits):
        log_p = tabular.sequence_logprobs(logits)
        return jnp.sum(jnp.exp(log_p) * jnp.square(log_p - log_r) / 2)

    def loss(logits, sampler, estimator, ratio):
        log_p, log_mu = tabular.sequence_logprobs(logits), tabular.sequence_logprobs(sampler)
        values = kl_losses(log_p, log_r, jnp.ones(ROWS), estimator, log_p - log_mu, ratio)
        return jnp.sum(jnp.exp(log_mu) * values)

    true = {
        ("k1", "detached"): None,
        ("k2", "detached"): forward,
        ("k3", "detached"): backward,
        ("k1", "differentiated"): forward,
        ("k2", "differentiated"): k2_mean,
        ("k3", "differentiated"): forward,
    }
    with jax.enable_x64(True):
        log_r = tabular.sequence_logprobs(jnp.asarray(REFERENCE))

        @jax.jit
        def compare(policy):
            results = []
            for (estimator, ratio), objective in true.items():
                gradient = jax.grad(objective)(policy) if objective else jnp.zeros_like(policy)
                found = [jax.grad(loss)(policy, OTHER, estimator, ratio)]
                if ratio == "detached":
                    found.append(jax.grad(loss)(policy, jax.lax.stop_gradient(policy), estimator, "none"))
                value = loss(policy, OTHER, estimator, ratio) - (k2_mean if estimator == "k2" else forward)(policy)
                results.append((jnp.stack(found) - gradient, value))
            return results

        for case, (differences, value) in zip(true, compare(jnp.asarray(POLICY)), strict=True):
            np.testing.assert_allclose(differences, 0, atol=1e-12, err_msg=str(case))
            np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=str(case))


def test_importance_weights_of_sequences_undo_another_sampler():
    with jax.enable_x64(True):
        gradient = expected_gradient(corrected("sequence", 1e9), OTHER, POLICY)
        np.testing.assert_allclose(gradient, -gradient_of(expected_reward), atol=1e-12)


def test_truncated_importance_sampling_has_the_gradient_of_its_objective():
    """min(p / q, C) A grad log p, expected under q, is the gradient of A f(p) with f(p) = p up to p = C q, from where it
    goes on as C q (1 + log (p / (C q)))."""
    cap = 1.5

    def truncated(logits):
        log_p, log_bound = tabular.sequence_logprobs(logits), tabular.sequence_logprobs(OTHER) + np.log(cap)
        excess = log_p - log_bound
        return jnp.sum(REWARDS * jnp.where(excess < 0, jnp.exp(log_p), jnp.exp(log_bound) * (1 + excess)))

    with jax.enable_x64(True):
        true = gradient_of(truncated)
        assert np.abs(true - gradient_of(expected_reward)).max() > 0.01
        np.testing.assert_allclose(expected_gradient(corrected("sequence", cap), OTHER, POLICY), -true, atol=1e-12)
        # Nothing to truncate: the same as the sampler's own gradient.
        np.testing.assert_allclose(
            expected_gradient(corrected("token", cap), POLICY, POLICY), -gradient_of(expected_reward), atol=1e-12
        )


# Closed form: the best policy of reward - beta KL is reference x exp(reward / beta).
STRENGTH = 0.5


def kl_from_optimum(logits) -> float:
    log_best = jax.nn.log_softmax(tabular.sequence_logprobs(REFERENCE) + REWARDS / STRENGTH)
    log_p = tabular.sequence_logprobs(logits)
    return float(jnp.sum(jnp.exp(log_p) * (log_p - log_best)))


def minimise(gradient, params, steps: int, learning_rate: float):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(gradient(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])()


POLICY_GRADIENTS = {
    "reinforce": dataclasses.replace(REINFORCE, advantage="ema", reward_to_go=True, kl=KLConfig(reward_coefficient=STRENGTH)),
    "ppo": PolicyConfig(
        advantage="gae", aggregation="seq_sum", value=ValueConfig(clip=0), kl=KLConfig(reward_coefficient=STRENGTH)
    ),
}


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_reaches_the_closed_form_optimum(name):
    """From the reference, with expected gradients; PPO learns its values on the way, and makes two updates of every batch."""
    config = POLICY_GRADIENTS[name]

    def gradient(params):
        def loss(params, batch):
            values = params["values"][tabular.CONTEXTS]
            return policy_sums(config, batch, tabular.token_logprobs(params["logits"]), values=values)[0]

        logprobs = tabular.token_logprobs(params["logits"])
        chances = jnp.exp(tabular.sequence_logprobs(params["logits"]))[:, None]
        rollouts = Rollouts(
            mask=jnp.asarray(tabular.MASK),
            sampler_logprobs=logprobs,
            trainer_logprobs=logprobs,
            rewards=jnp.asarray(REWARDS),
            groups=jnp.arange(ROWS),
            valid=jnp.ones(ROWS),
            truncated=jnp.asarray(tabular.TRUNCATED),
            reference_logprobs=tabular.token_logprobs(REFERENCE),
            values=params["values"][tabular.CONTEXTS],
            baseline=jnp.asarray(0.0),
        )
        batch, _ = prepare(config, rollouts, STRENGTH)
        # Each sequence as often as the policy would write it.
        batch = batch.replace(weights=batch.mask * chances, token_weights=batch.mask * chances)
        first = jax.grad(loss)(params, batch)
        if name == "reinforce":
            return first
        moved = jax.tree.map(lambda x, d: x - 0.02 * d, params, first)
        return jax.tree.map(jnp.add, first, jax.grad(loss)(moved, batch))

    with jax.enable_x64(True):
        assert kl_from_optimum(REFERENCE) > 0.1
        params = {"logits": jnp.asarray(REFERENCE), "values": jnp.zeros(len(REFERENCE))}
        assert kl_from_optimum(minimise(gradient, params, 1500, 0.05)["logits"]) < 1e-3


def test_dpo_reaches_the_closed_form_optimum():
    """On all pairs, drawn from the reference and judged by Bradley-Terry: the optimum of policy gradients, without any."""
    first, second = np.nonzero(~np.eye(ROWS, dtype=bool))
    config = DPOConfig(beta=STRENGTH)

    with jax.enable_x64(True):
        log_ref = tabular.sequence_logprobs(REFERENCE)
        chances = jnp.exp(log_ref[first] + log_ref[second]) * jax.nn.sigmoid(REWARDS[first] - REWARDS[second])

        def pairs(log_p):
            return PairLogprobs(log_p[first], log_p[second], tabular.LENGTHS[first], tabular.LENGTHS[second])

        def loss(logits):
            losses = pair_losses(config, pairs(tabular.sequence_logprobs(logits)), pairs(log_ref))
            return weighted_sum(sequence_weights(jnp.ones(len(first))) * chances, losses)

        assert kl_from_optimum(minimise(jax.grad(loss), jnp.asarray(REFERENCE), 1500, 0.05)) < 1e-3
