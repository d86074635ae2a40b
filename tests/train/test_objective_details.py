"""Details that are easily got wrong, one test each, against numpy or scipy, or an invariant."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from model.config import ModelConfig
from train import preferences, scalar_head
from train.objectives import (
    aggregate,
    cispo,
    distillation,
    entropy,
    grpo,
    gspo,
    importance,
    kl,
    kto,
    metrics,
    orpo,
    pairs,
    ppo,
    preference,
    reinforce,
    reward_model,
)
from train.objectives.config import (
    CISPO,
    GSPO,
    MAXRL,
    RLOO,
    DPOConfig,
    ImportanceConfig,
    KLConfig,
    KTOConfig,
    ORPOConfig,
    PolicyConfig,
    RewardModelConfig,
    SimPOConfig,
    ValueConfig,
)
from train.objectives.pairs import (
    PairLogprobs,
)
from train.objectives.policy_gradient import (
    Rollouts,
    policy_sums,
    prepare,
)
from train.objectives.sapo import sapo_losses


def quick(function):
    """`function` as one compiled program, not one for each of its operations, from and to numpy; as it is under a gradient."""
    choices = {"config", "scale", "normalise_each", "dual_clip", "clip", "estimator", "aggregation", "wanted", "fraction"}
    choices |= {"temperature", "shift_mean", "ratio"}
    static = [name for name in inspect.signature(function).parameters if name in choices]
    compiled = jax.jit(function, static_argnames=static)

    def call(*args, **kwargs):
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return function(*args, **kwargs)
        return jax.device_get(compiled(*args, **kwargs))

    return call


def gradient_of(function, *args):
    return jax.device_get(jax.jit(jax.grad(function))(*args))


token_weights = quick(aggregate.token_weights)
weighted_sum = quick(aggregate.weighted_sum)
cispo_losses = quick(cispo.cispo_losses)
forward_kl_losses = quick(distillation.forward_kl_losses)
reverse_kl_losses = quick(distillation.reverse_kl_losses)
adapt_coefficient = quick(entropy.adapt_coefficient)
high_entropy_mask = quick(entropy.high_entropy_mask)
entropy = quick(entropy.entropy)
group_advantages = quick(grpo.group_advantages)
multi_reward_advantages = quick(grpo.multi_reward_advantages)
overlong_penalty = quick(grpo.overlong_penalty)
maxrl_advantages = quick(grpo.maxrl_advantages)
select_groups = quick(grpo.select_groups)
gspo_losses = quick(gspo.gspo_losses)
importance_weights = quick(importance.importance_weights)
log_ratio = quick(importance.log_ratio)
kl_losses = quick(kl.kl_losses)
kl_values = quick(kl.kl_values)
class_balance = quick(kto.class_balance)
kto_losses = quick(kto.kto_losses)
kto_reference_point = quick(kto.kto_reference_point)
effective_sample_fraction = quick(metrics.effective_sample_fraction)
rollout_metrics = metrics.rollout_metrics
sampler_mismatch = quick(metrics.sampler_mismatch)
log1mexp = quick(orpo.log1mexp)
pair_logprobs = quick(preferences.pair_logprobs)
preference_accuracy = quick(pairs.preference_accuracy)
adapt_kl_coefficient = quick(ppo.adapt_kl_coefficient)
clipped_losses = quick(ppo.clipped_losses)
explained_variance = quick(ppo.explained_variance)
generalised_advantages = quick(ppo.generalised_advantages)
token_rewards = quick(ppo.token_rewards)
value_losses = quick(ppo.value_losses)
whiten = quick(ppo.whiten)
pair_losses = quick(preference.pair_losses)
pair_metrics = quick(preference.pair_metrics)
leave_one_out_baseline = quick(reinforce.leave_one_out_baseline)
rewards_to_go = quick(reinforce.rewards_to_go)
update_ema = quick(reinforce.update_ema)
ema_baseline = quick(reinforce.ema_baseline)
at_stop_tokens = quick(preferences.at_stop_tokens)
outcome_losses = quick(reward_model.outcome_losses)
pairwise_losses = quick(reward_model.pairwise_losses)
length_preference = quick(reward_model.length_preference)
process_losses = quick(reward_model.process_losses)
solution_scores = quick(reward_model.solution_scores)
run_prepare, run_sums = quick(prepare), quick(policy_sums)

B, T = 4, 5
MASK = np.asarray([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 0, 1, 0]], float)
random = np.random.default_rng(0)
LOGPROBS, OLD, SAMPLER, REFERENCE = -random.exponential(size=(4, B, T))
GROUPS, ONES = np.asarray([0, 1, 0, 1]), np.ones(B)
close = np.testing.assert_allclose


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def make_rollouts(**changes) -> Rollouts:
    rollouts = Rollouts(
        mask=MASK,
        sampler_logprobs=OLD,
        trainer_logprobs=OLD,
        rewards=np.asarray([1.0, 0.5, 0.0, 0.25]),
        groups=GROUPS,
        valid=ONES,
        truncated=np.asarray([0, 0, 1, 0]),
        reference_logprobs=REFERENCE,
        values=np.zeros((B, T)),
    )
    return rollouts.replace(**changes)


# Sampler, trainer and what lies between them.


def test_three_policies_are_distinct_and_only_the_trained_one_has_a_gradient():
    """A token's weight is trainer / sampler, its ratio policy / trainer."""
    config = PolicyConfig(advantage="none", importance=ImportanceConfig("token", cap=1e9), aggregation="seq_sum")
    batch, _ = run_prepare(config, make_rollouts(sampler_logprobs=SAMPLER), 0.0)
    close(batch.weights, MASK / B * np.exp(OLD - SAMPLER), rtol=1e-12)
    close(batch.old_logprobs, MASK * OLD)
    gradient = jax.grad(lambda x: jnp.sum(importance_weights(config.importance, x, jnp.asarray(SAMPLER), MASK)))(
        jnp.asarray(OLD)
    )
    assert not gradient.any()


def test_importance_weights_truncate_and_reject():
    ratio = np.exp(OLD - SAMPLER)
    total = np.exp(np.sum(MASK * (OLD - SAMPLER), axis=1, keepdims=True))
    mean = total ** (1 / MASK.sum(axis=1, keepdims=True))

    def within(x):
        return (x >= 0.5) & (x <= 2)

    expected = {
        ("none", "none"): 1.0,
        ("token", "none"): np.minimum(ratio, 2),
        ("sequence", "none"): np.minimum(total, 2),
        ("token", "token"): np.where(within(ratio), ratio, 0),
        ("none", "sequence"): within(total),
        ("none", "geometric"): within(mean),
    }
    # Every bound bites somewhere.
    assert (ratio > 2)[MASK > 0].any()
    assert (ratio < 0.5)[MASK > 0].any()
    assert not within(total).all()
    assert within(total).sum() != within(mean).sum()
    for (level, reject), weights in expected.items():
        config = ImportanceConfig(level, reject=reject)
        close(importance_weights(config, OLD, SAMPLER, MASK), MASK * weights, rtol=1e-12, err_msg=str(config))


def test_mismatch_is_zero_for_equal_policies_and_never_negative():
    same = sampler_mismatch(OLD, OLD, MASK)
    assert same == {"mismatch_kl": 0, "mismatch_max": 0}
    other = sampler_mismatch(OLD, SAMPLER, MASK)
    assert other["mismatch_kl"] > 0
    close(other["mismatch_max"], np.abs(OLD - SAMPLER)[MASK > 0].max())
    close(effective_sample_fraction(np.asarray([1.0, 1, 4, 0]), np.asarray([1, 1, 0, 1])), 4 / (3 * 2))


# Advantages.


def test_loo_baseline_is_the_scaled_group_mean_whatever_the_group_sizes():
    """Rows of a group lie apart, one row is no sample, one is alone."""
    rewards = np.asarray([1.0, 5, 2, 4, 7, 9, 100, 3])
    groups = np.asarray([0, 3, 0, 3, 5, 3, 3, 0])
    valid = np.asarray([1, 1, 1, 1, 1, 1, 0, 1])
    loo = rewards - leave_one_out_baseline(rewards, groups, valid)
    plain = group_advantages(rewards, groups, valid)
    for group in (0, 3):
        rows = (groups == group) & (valid > 0)
        n = rows.sum()
        close(plain[rows], rewards[rows] - rewards[rows].mean())
        close(loo[rows], n / (n - 1) * plain[rows])
    assert plain[6] == 0
    # Alone, a sample is compared with nothing.
    assert plain[4] == loo[4] == 7


def test_group_std_has_ddof_1_and_eps_outside_of_the_root_and_batch_std_is_of_rewards():
    rewards = np.asarray([1.0, 0.5, 0.0, 0.75])
    scaled = group_advantages(rewards, GROUPS, ONES, "group", eps=0.1)
    close(scaled[0], 0.5 / (np.std([1.0, 0.0], ddof=1) + 0.1))
    batch = group_advantages(rewards, GROUPS, ONES, "batch", eps=0.1)
    close(batch[0], 0.5 / (rewards.std(ddof=1) + 0.1))


def test_a_group_of_one_is_not_compared_and_not_scaled():
    """Mean 0 and standard deviation 1 by convention, so that its advantage is its reward; whatever the other groups are."""
    rewards, groups = np.asarray([0.25, 1.0, 0.0]), np.asarray([0, 1, 1])
    close(group_advantages(rewards, groups, np.ones(3), "group", eps=0.0), [0.25, 0.5**0.5, -(0.5**0.5)])


@pytest.mark.parametrize(("advantage", "zero_variance"), [("group", "keep"), ("rloo", "drop"), ("maxrl", "keep")])
def test_the_only_judged_row_of_a_group_is_compared_with_nothing_and_teaches_nothing(advantage, zero_variance):
    """Nor does it count in the normaliser; it is a sample still to the penalty, and to the other advantages."""
    rollouts = make_rollouts(rewards=np.asarray([1.0, 0.5, 0.0, 0.75]), valid=np.asarray([1, 0, 1, 1]))
    config = PolicyConfig(advantage=advantage, zero_variance=zero_variance, kl=KLConfig(loss_coefficient=0.1))
    batch, metrics = run_prepare(config, rollouts, 0.0)
    compared = MASK * np.asarray([1, 0, 1, 0])[:, None]
    close(batch.weights, compared / compared.sum())
    assert not batch.advantages[3].any()
    assert batch.advantages[0, 0] > 0
    assert (metrics["lone_fraction"], metrics["bad_reward_fraction"]) == (0.25, 0.25)
    judged = MASK * np.asarray([1, 0, 1, 1])[:, None]
    close(batch.kl_weights, judged / judged.sum())
    _, metrics = run_prepare(PolicyConfig(advantage="none"), rollouts, 0.0)
    assert metrics["lone_fraction"] == 0


def test_maxrl_is_zero_where_no_answer_is_rewarded():
    rewards = np.asarray([0.0, 0.0, 0.0, 3.0])
    close(maxrl_advantages(rewards, GROUPS, ONES), [0, -1, 0, 1])
    assert (maxrl_advantages(np.zeros(B), GROUPS, ONES) == 0).all()


def test_the_batch_baseline_is_the_mean_return_of_what_was_judged():
    config = PolicyConfig(surrogate="reinforce", advantage="batch", clip_low=0, clip_high=0, kl=KLConfig(0.1))
    batch, _ = run_prepare(config, make_rollouts(valid=np.asarray([1, 1, 0, 1])), 0.1)
    returns = np.asarray([1.0, 0.5, 0.0, 0.25]) - 0.1 * np.sum(MASK * (OLD - REFERENCE), axis=1)
    expected = returns - returns[[0, 1, 3]].mean()
    expected[2] = 0
    close(batch.advantages, MASK * expected[:, None])


def test_rewards_that_are_all_equal_teach_nothing_and_are_counted():
    configs = [PolicyConfig(scale="group", aggregation="seq_mean"), RLOO, MAXRL, GSPO, CISPO]

    def losses(logprobs):
        prepared = [prepare(config, make_rollouts(rewards=np.full(B, 0.7)), 0.0) for config in configs]
        both = zip(configs, prepared, strict=True)
        return jnp.stack([policy_sums(config, batch, logprobs)[0] for config, (batch, _) in both]), [m for _, m in prepared]

    slopes, metrics = jax.device_get(jax.jit(jax.jacrev(losses, has_aux=True))(LOGPROBS))
    assert not slopes.any()
    for found in metrics:
        assert found["zero_variance_fraction"] == 1
        assert found["effective_batch_fraction"] == found["bad_reward_fraction"] == 0


@pytest.mark.parametrize("reward", [0.1, 0.3, 1e8 + 0.1])
def test_zero_variance_is_found_exactly(reward):
    """Seven times 0.1 has another mean than 0.1: without the comparison, advantages would be rounding over rounding."""
    rewards = np.full(7, reward)
    assert (group_advantages(rewards, np.zeros(7, int), np.ones(7), "group", eps=0.0) == 0).all()
    assert (leave_one_out_baseline(rewards, np.zeros(7, int), np.ones(7)) == rewards).all()
    rewards[3] = np.nextafter(reward, 1e9)
    assert np.abs(group_advantages(rewards, np.zeros(7, int), np.ones(7), "group")).max() < 1e-2


def test_zero_variance_groups_are_kept_in_or_dropped_from_the_denominator():
    rollouts = make_rollouts(rewards=np.asarray([1.0, 0.5, 0.0, 0.5]))
    for kept in (True, False):
        batch, metrics = run_prepare(PolicyConfig(zero_variance="keep" if kept else "drop"), rollouts, 0.0)
        trained = MASK if kept else MASK * np.asarray([1, 0, 1, 0])[:, None]
        close(batch.weights, trained / trained.sum())
        assert metrics["zero_variance_fraction"] == metrics["effective_batch_fraction"] == 0.5


@pytest.mark.parametrize(
    ("changes", "rewards", "effective"),
    [
        # Groups of equal rewards are inert by comparison with their own kind, and by nothing else.
        ({"advantage": "rloo"}, [1.0, 0.1, 0.0, 0.1], [0, 2]),
        ({"advantage": "maxrl"}, [1.0, 0.1, 0.0, 0.1], [0, 2]),
        ({"advantage": "none"}, [1.0, 0.5, 0.0, 0.5], [0, 1, 3]),
        ({"advantage": "batch"}, [1.0, 0.5, 0.0, 0.5], [0, 2]),
        ({"advantage": "batch"}, [1.0, 0.0, 1.0, 0.0], [0, 1, 2, 3]),
        ({"advantage": "greedy"}, [1.0, 0.5, 0.0, 0.5], [1, 2, 3]),
        ({"advantage": "none"}, [1.0, 0.5, np.nan, 0.5], [0, 1, 3]),
        ({"advantage": "none", "truncation": "mask"}, [1.0, 1.0, 1.0, 1.0], [0, 1, 3]),
        ({"advantage": "none", "importance": ImportanceConfig("token", reject="token", low=0.5, high=2.0)}, [1.0] * 4, [1]),
        ({}, [1.0, 0.5, 0.0, 0.5], [0, 2]),
    ],
)
def test_effective_rows_are_those_that_the_policy_loss_pushes_of_all_rows(changes, rewards, effective):
    sampler = OLD - 3 * (np.arange(B) != 1)[:, None]
    changed = {"sampler_logprobs": sampler} if "importance" in changes else {}
    baseline = np.asarray([1.0, 0.0, 1.0, 1.0]) if changes.get("advantage") == "greedy" else None
    rollouts = make_rollouts(rewards=np.asarray(rewards), baseline=baseline, **changed)
    assert rollouts.truncated.tolist() == [0, 0, 1, 0]
    config = PolicyConfig(**changes)
    _, metrics = run_prepare(config, rollouts, 0.0)

    def loss(logprobs):
        return policy_sums(config, prepare(config, rollouts, 0.0)[0], logprobs)[0]

    pushed = np.any(np.asarray(jax.grad(loss)(jnp.asarray(OLD))) != 0, axis=1)
    assert np.flatnonzero(pushed).tolist() == effective
    assert metrics["effective_batch_fraction"] == len(effective) / B


@pytest.mark.parametrize("valid", [[1, 1, 1, 1], [1, 1, 1, 0]])
def test_rows_that_are_no_samples_are_not_effective_and_are_counted(valid):
    _, metrics = run_prepare(PolicyConfig(advantage="none"), make_rollouts(valid=np.asarray(valid, float)), 0.0)
    assert metrics["effective_batch_fraction"] == (sum(valid) - 1) / B  # and the reward of one is 0


def test_dynamic_sampling_takes_the_first_informative_prompts_and_tells_what_is_missing():
    indices, missing = select_groups(np.asarray([False, True, False, True, True]), 2)
    assert indices.tolist() == [1, 3]
    assert missing == 0
    indices, missing = select_groups(np.asarray([False, True, False]), 2)
    assert indices.tolist() == [1, 0]
    assert missing == 1


def test_rewards_of_several_kinds_are_normalised_each_or_summed():
    kinds, coefficients = np.asarray([[0.0, 0, 1, 1], [0, 100, 0, 100]]), np.asarray([1.0, 2.0])
    same = np.zeros(4, int)
    each = multi_reward_advantages(kinds, coefficients, same, ONES, "group")
    close(each, 3**0.5 / 2 * np.asarray([-3, 1, -1, 3]), rtol=1e-3)
    rollouts = make_rollouts(rewards=coefficients @ kinds, groups=same, parts=kinds.T, part_weights=coefficients)
    apart, summed = (run_prepare(PolicyConfig(scale="group", normalise_parts=n), rollouts, 0.0)[0] for n in (True, False))
    close(apart.advantages, MASK * np.asarray(each)[:, None])
    close(summed.advantages, MASK * np.asarray(group_advantages(kinds[0] + 2 * kinds[1], same, ONES, "group"))[:, None])


def test_bad_rewards_are_left_out_and_counted():
    """Whether the reward is bad or was replaced, as by `train.rewards.compose`."""
    replaced = make_rollouts(rewards=np.asarray([1.0, 0.0, 0.0, 0.25]), valid=np.asarray([1.0, 0, 1, 1]))
    assert run_prepare(PolicyConfig(scale="group"), replaced, 0.0)[1]["bad_reward_fraction"] == 0.25
    rollouts = make_rollouts(rewards=np.asarray([1.0, np.nan, 0.0, 0.25]))
    batch, metrics = run_prepare(PolicyConfig(scale="group"), rollouts, 0.0)
    assert metrics["bad_reward_fraction"] == 0.25
    loss, sums = run_sums(PolicyConfig(scale="group"), batch, LOGPROBS)
    assert np.isfinite([loss, *sums.values(), *metrics.values()]).all()
    assert not batch.weights[1].any()
    _, metrics = run_prepare(PolicyConfig(advantage="maxrl"), make_rollouts(rewards=-np.ones(B)), 0.0)
    assert metrics["bad_reward_fraction"] == 1


def test_ema_baseline_is_of_earlier_returns_and_not_of_its_own_batch():
    config = PolicyConfig(surrogate="reinforce", advantage="ema", clip_low=0, clip_high=0)
    batch, _ = run_prepare(config, make_rollouts(baseline=np.asarray(0.4)), 0.0)
    close(batch.advantages, MASK * (np.asarray([1, 0.5, 0, 0.25])[:, None] - 0.4))
    ema = np.zeros(2)
    assert ema_baseline(ema) == 0
    for seen in ([3.0], [3.0, 5.0], [3.0, 5.0, -1.0]):
        ema = update_ema(ema, np.asarray(seen[-1]), 0.9)
        # At first the mean itself; then weighed by age.
        close(ema_baseline(ema), np.average(seen, weights=0.9 ** np.arange(len(seen))[::-1]))


def test_ema_baseline_is_of_returns_and_not_of_bare_rewards():
    """What is added to rewards, KL and the penalty of truncation, is in what the baseline is subtracted from."""
    kl = KLConfig(reward_coefficient=0.1)
    config = PolicyConfig(advantage="ema", kl=kl, truncation="penalty", truncation_penalty=0.2)
    rollouts = make_rollouts(baseline=np.asarray(0.0), valid=np.asarray([1, 0, 1, 1]))
    batch, metrics = run_prepare(config, rollouts, 0.3)
    returns = np.asarray([1.0, 0.5, -0.2, 0.25]) - 0.3 * np.sum(MASK * (OLD - REFERENCE), axis=1)
    close(metrics["return_mean"], returns[[0, 2, 3]].mean())
    close(batch.advantages[2, 1], returns[2])


# Ratio and clip.


def test_first_update_has_ratio_1_and_an_inert_clip():
    batch, _ = run_prepare(PolicyConfig(), make_rollouts(), 0.0)
    _, sums = run_sums(PolicyConfig(), batch, OLD)
    assert sums["clip_low_fraction"] == sums["clip_high_fraction"] == sums["update_kl"] == 0
    close(sums["policy_loss"], -np.sum(batch.weights * batch.advantages))


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(clip_low=0.2, clip_high=0.28),
        PolicyConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
        dataclasses.replace(CISPO, clip_high=0.4),
        dataclasses.replace(GSPO, clip_low=0.05, clip_high=0.05),
    ],
    ids=["clipped", "dual_clip", "cispo", "gspo"],
)
def test_clip_fractions_are_of_the_tokens_whose_gradient_the_clip_changes(config):
    """By autodiff: of each sign of the advantage, the tokens whose gradient is another where all bounds are out of reach."""
    ratio = np.asarray([[1.5, 1.25, 0.9, 1, 1], [0.6, 1, 1, 1, 1], [1, 0.7, 1.5, 4, 0.85], [0.5, 0.9, 1, 1.1, 1]])
    free = {} if config.surrogate == "cispo" else {"clip_low": 1 - 1e-9}
    unbounded = dataclasses.replace(config, clip_high=1e9, dual_clip=0.0, **free)
    batch, _ = run_prepare(config, make_rollouts(), 0.0)
    logprobs = OLD + np.log(ratio)
    slopes = [gradient_of(lambda x, c=c: policy_sums(c, batch, x)[0], logprobs) for c in (config, unbounded)]
    changed = (np.abs(slopes[0] - slopes[1]) > 1e-9) & (MASK > 0)
    if config.surrogate == "gspo":
        ratio = np.exp(np.mean(np.log(ratio), axis=1, where=MASK > 0, keepdims=True))
    up, down = changed & (batch.advantages > 0), changed & (batch.advantages < 0)
    _, sums = run_sums(config, batch, logprobs)
    close(sums["clip_high_fraction"], up.sum() / MASK.sum())
    close(sums["clip_low_fraction"], (down & (ratio < 1)).sum() / MASK.sum())
    close(sums.get("clip_high_negative_fraction", 0), (down & (ratio > 1)).sum() / MASK.sum())
    assert up.any()
    assert down.any()


def test_clip_higher_and_dual_clip_against_a_case_by_case_definition():
    ratio, advantages = np.meshgrid([0.1, 0.5, 0.8, 1, 1.2, 1.28, 1.5, 2.9, 3, 4, 50], [-2.0, -1, 0, 1, 2])

    def by_cases(r, a):
        if a >= 0:
            return -min(r, 1.28) * a
        return min(max(r, 0.8), 3) * -a

    losses = clipped_losses(np.log(ratio), advantages, 0.2, 0.28, 3.0)
    close(losses, np.vectorize(by_cases)(ratio, advantages), rtol=1e-12)


def test_cispo_differentiates_the_logprob_only_and_drops_no_token():
    logprobs, advantages = np.asarray([-1.0, -1.0]), np.asarray([2.0, -3.0])
    logs = np.log(np.asarray([9.0, 0.5]))

    def loss(x):
        return jnp.sum(cispo_losses(x, logs + x - jax.lax.stop_gradient(x), advantages, 1.5))

    close(gradient_of(loss, logprobs), [-2.5 * 2, 0.5 * 3])


def test_sapo_begins_as_the_plain_ratio_and_fades_by_the_sign_of_the_advantage():
    """Against the paper's gate on the gradient: 4 p (1 - p), of p = s(t (r - 1))."""
    ratio, advantages = np.meshgrid([0.01, 0.5, 1, 1.5, 3, 50], [-2.0, 1.0])
    slopes = gradient_of(lambda x: jnp.sum(sapo_losses(x, advantages, 1.0, 2.0)), np.log(ratio))
    p = scipy.special.expit(np.where(advantages > 0, 1.0, 2.0) * (ratio - 1))
    close(slopes, -4 * p * (1 - p) * ratio * advantages, rtol=1e-9)
    close(slopes[ratio == 1], -advantages[ratio == 1])


def test_gspo_is_the_sequence_level_objective_in_value_and_gradient():
    advantages, mask = np.asarray([1.0, -1.0, 0.5, -2.0]), MASK

    def by_tokens(x):
        losses = gspo_losses(log_ratio(x, OLD, mask), mask, advantages[:, None] * mask, 0.2, 0.3)
        return weighted_sum(token_weights(mask, "seq_mean"), losses)

    def by_sequences(x):
        ratio = jnp.exp(jnp.sum(mask * (x - OLD), axis=1) / jnp.sum(mask, axis=1))
        return -jnp.mean(jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.3) * advantages))

    found, expected = (jax.device_get(jax.jit(jax.value_and_grad(f))(LOGPROBS)) for f in (by_tokens, by_sequences))
    close(found[0], expected[0], rtol=1e-12)
    close(found[1], expected[1], atol=1e-14)
    assert np.any(expected[1][0]) or np.any(expected[1][2])


# Aggregation.


def test_denominators_have_the_mask_of_the_numerators():
    """Truncated samples leave both, but stay in their group's mean."""
    batch, _ = run_prepare(PolicyConfig(truncation="mask"), make_rollouts(), 0.0)
    trained = MASK * np.asarray([1, 1, 0, 1])[:, None]
    close(batch.weights, trained / trained.sum())
    close(batch.advantages[0, 0], 0.5)
    batch, _ = run_prepare(PolicyConfig(), make_rollouts(valid=np.asarray([1, 0, 1, 0])), 0.0)
    close(batch.weights.sum(), 1)
    for kind in ("seq_mean", "seq_sum", "dr_grpo", "token_mean"):
        assert not token_weights(np.zeros((2, 3)), kind, 3).any()


def test_truncated_samples_are_kept_zeroed_or_penalised():
    expected = {
        PolicyConfig(advantage="none"): 0.5,
        PolicyConfig(advantage="none", truncation="zero_reward"): 0.0,
        PolicyConfig(advantage="none", truncation="penalty", truncation_penalty=0.2): 0.3,
        PolicyConfig(advantage="none", truncation="soft_penalty", max_length=4, overlong_cache=2): -0.5,
    }
    rollouts = make_rollouts(rewards=np.full(B, 0.5))
    advantages = jax.device_get(jax.jit(lambda x: [prepare(config, x, 0.0)[0].advantages for config in expected])(rollouts))
    for found, reward in zip(advantages, expected.values(), strict=True):
        close([found[2, 1], found[1, 0]], [reward, 0.5])
    close(overlong_penalty(np.asarray([0, 12, 13, 14, 16, 20]), 16, 4), [0, 0, -0.25, -0.5, -1, -1])


def test_components_have_normalisers_of_their_own():
    """Values, entropy and KL are means over all actions though the policy loss is of few tokens."""
    config = PolicyConfig(
        entropy_fraction=0.2,
        entropy_coefficient=0.3,
        kl=KLConfig(loss_coefficient=0.7, loss_estimator="k3"),
    )
    entropies = random.uniform(size=(B, T))
    batch, _ = run_prepare(config, make_rollouts(entropies=entropies), 0.0)
    assert (batch.weights > 0).sum() == 3
    close(batch.weights.sum(), 1)
    total, sums = run_sums(config, batch, LOGPROBS, entropies)
    d = LOGPROBS - REFERENCE
    close(sums["kl_loss"], np.mean((np.exp(-d) - 1 + d)[MASK > 0]))
    close(sums["entropy"], np.mean(entropies[MASK > 0]))
    close(total, sums["policy_loss"] + 0.7 * sums["kl_loss"] - 0.3 * sums["entropy"])


def test_every_coefficient_changes_the_gradient():
    configs = [
        PolicyConfig(),
        PolicyConfig(kl=KLConfig(loss_coefficient=0.1)),
        PolicyConfig(kl=KLConfig(reward_coefficient=0.1)),
        PolicyConfig(entropy_coefficient=0.1),
    ]

    def losses(logprobs):
        batches = [prepare(config, make_rollouts(), config.kl.reward_coefficient)[0] for config in configs]
        entropies = -logprobs * jnp.exp(logprobs)
        return jnp.stack([policy_sums(*case, logprobs, entropies)[0] for case in zip(configs, batches, strict=True)])

    plain, *others = jax.device_get(jax.jit(jax.jacrev(losses))(OLD))
    for other in others:
        assert np.abs(plain - other).max() > 1e-3


def test_missing_arrays_are_named():
    with pytest.raises(ValueError, match="reference_logprobs"):
        prepare(PolicyConfig(kl=KLConfig(loss_coefficient=0.1)), make_rollouts(reference_logprobs=None), 0.0)


# KL.


def test_k3_is_not_of_the_inverted_ratio():
    """By an exact expectation over a categorical of eight; with d negated it would estimate something else, as credibly."""
    log_p, log_r = np.log(random.dirichlet(np.ones(8), size=2))
    true = np.sum(np.exp(log_p) * (log_p - log_r))
    mean = {k: np.sum(np.exp(log_p) * kl_values(log_p, log_r, np.ones(8), k)) for k in ("k1", "k2", "k3")}
    close([mean["k1"], mean["k3"]], true, rtol=1e-12)
    assert abs(mean["k2"] - true) > 0.01
    assert abs(np.sum(np.exp(log_p) * (np.expm1(log_p - log_r) - (log_p - log_r))) - true) > 0.1


def test_kl_is_clamped_and_precise():
    """In float32: finite at any distance, gradient too; and near 0 not lost to cancellation."""
    d = np.asarray([-1e4, -50, 50, 1e4, 1e-4], np.float32)
    zeros, ones = np.zeros(5, np.float32), np.ones(5, np.float32)
    for estimator in ("k1", "k2", "k3"):
        values, slopes = jax.jit(jax.value_and_grad(lambda x, k=estimator: jnp.sum(kl_values(x, zeros, ones, k))))(d)
        assert np.isfinite(values)
        assert np.isfinite(slopes).all()
    d64 = 1e-3
    close(kl_values(np.float32(d64), np.float32(0), np.float32(1), "k3"), np.expm1(-d64) + d64, rtol=2e-3)


def test_kl_in_the_reward_is_detached_and_per_token():
    config = PolicyConfig(advantage="none", reward_to_go=True, kl=KLConfig(reward_coefficient=0.1))
    batch, metrics = run_prepare(config, make_rollouts(), 0.1)
    k1 = (OLD - REFERENCE)[0]
    close(batch.advantages[0, :3], [1 - 0.1 * k1[:3].sum(), 1 - 0.1 * k1[1:3].sum(), 1 - 0.1 * k1[2]])
    close(metrics["reference_kl"], np.mean(np.sum(MASK * (OLD - REFERENCE), axis=1)))

    def through(x):
        return jnp.sum(token_rewards(np.ones(B), MASK, kl_values(x, REFERENCE, MASK, "k1"), 0.1))

    assert not gradient_of(through, OLD).any()


def test_adaptive_kl_coefficient_is_proportional_and_bounded():
    close(adapt_kl_coefficient(0.2, 6.6, 500, 6.0, 10_000), 0.2 * (1 + 0.1 * 0.05))
    close(adapt_kl_coefficient(0.2, 600.0, 500, 6.0, 10_000), 0.2 * 1.01)
    close(adapt_kl_coefficient(0.2, 0.0, 500, 6.0, 10_000), 0.2 * 0.99)


# Entropy.


def test_entropy_is_of_the_whole_distribution_and_can_be_differentiated():
    logits = random.normal(size=(3, 7))
    close(entropy(logits), scipy.stats.entropy(scipy.special.softmax(logits, axis=-1), axis=-1))
    close(entropy(np.asarray([0.0, -np.inf])), 0)
    log_p = scipy.special.log_softmax(logits, axis=-1)
    slopes = -np.exp(log_p) * (log_p - np.sum(np.exp(log_p) * log_p, axis=-1, keepdims=True))
    close(gradient_of(lambda x: jnp.sum(entropy(x)), logits), slopes, atol=1e-12)


def test_high_entropy_tokens_are_chosen_over_the_batch_and_the_coefficient_adapts():
    entropies = random.permutation(B * T).reshape(B, T).astype(float)
    chosen = high_entropy_mask(entropies, MASK, 0.25)
    assert set(entropies[chosen > 0]) == set(np.sort(entropies[MASK > 0])[-3:])
    assert adapt_coefficient(0.01, 0.5, 1.0, 0.005) == 0.015
    assert adapt_coefficient(0.003, 1.5, 1.0, 0.005) == 0


# PPO.


def test_score_is_added_at_the_stop_token_not_at_the_last_column():
    rewards = token_rewards(np.asarray([5.0, 6, 7, 8]), MASK)
    assert np.argwhere(rewards).tolist() == [[0, 2], [1, 0], [2, 4], [3, 3]]
    close(rewards.sum(axis=1), [5, 6, 7, 8])


def test_gae_passes_over_observations_and_ends_at_the_stop_token():
    """The same as of the actions alone, side by side, by the plain recursion; what lies elsewhere may be NaN."""
    rewards, values = random.normal(size=(2, B, T))
    hidden = np.where(MASK > 0, 0, np.nan)
    advantages, returns = generalised_advantages(rewards + hidden, values + hidden, MASK, 0.9, 0.8)
    for row in range(B):
        acts = np.flatnonzero(MASK[row])
        advantage, next_value = 0.0, 0.0
        for t in acts[::-1]:
            advantage = rewards[row, t] + 0.9 * next_value - values[row, t] + 0.72 * advantage
            next_value = values[row, t]
            close(advantages[row, t], advantage)
            close(returns[row, t], advantage + next_value)
    assert not advantages[MASK == 0].any()


def test_gae_with_lambda_1_is_monte_carlo_and_with_0_one_step():
    rewards, values = random.normal(size=(2, B, T))
    _, returns = generalised_advantages(rewards, values, MASK, 1.0, 1.0)
    close(returns, rewards_to_go(rewards, MASK), atol=1e-12)
    advantages, _ = generalised_advantages(rewards, values, MASK, 1.0, 0.0)
    close(advantages[0, :3], rewards[0, :3] + np.asarray([values[0, 1], values[0, 2], 0]) - values[0, :3])


def test_lambda_adapts_to_the_length_of_an_answer_in_advantages_alone():
    """Of 3, 1, 4 and 3 tokens; where 1 / (a x length) is above 1, lambda is 0."""
    value = ValueConfig(discount=0.9, gae_lambda=1.0, adaptive_lambda=0.3)
    batch, _ = run_prepare(PolicyConfig(advantage="gae", value=value), make_rollouts(values=REFERENCE), 0.0)
    rewards = token_rewards(np.asarray([1.0, 0.5, 0.0, 0.25]), MASK)
    for row, of_row in enumerate([0.0, 0.0, 1 - 1 / 1.2, 0.0]):
        close(batch.advantages[row], generalised_advantages(rewards, REFERENCE, MASK, 0.9, of_row)[0][row], atol=1e-12)
    close(batch.returns, generalised_advantages(rewards, REFERENCE, MASK, 0.9, 1.0)[1])


def test_whitened_rewards_keep_their_mean_and_are_what_returns_are_of():
    value = ValueConfig(gae_lambda=1.0, whiten_rewards=True)
    batch, _ = run_prepare(PolicyConfig(advantage="gae", value=value), make_rollouts(), 0.0)
    rewards = token_rewards(np.asarray([1.0, 0.5, 0.0, 0.25]), MASK)
    acts = rewards[MASK > 0]
    rewards = np.where(MASK > 0, (rewards - acts.mean()) / acts.std(ddof=1) + acts.mean(), 0)
    close(batch.returns, rewards_to_go(rewards, MASK), rtol=1e-6, atol=1e-6)


def test_returns_are_made_before_advantages_are_whitened():
    config = PolicyConfig(advantage="gae", value=ValueConfig(gae_lambda=1.0), whiten=True)
    batch, _ = run_prepare(config, make_rollouts(values=LOGPROBS), 0.0)
    close(batch.returns, MASK * np.asarray([1, 0.5, 0, 0.25])[:, None], atol=1e-12)
    acts = np.asarray(batch.advantages)[MASK > 0]
    close([acts.mean(), acts.std(ddof=1)], [0, 1], atol=1e-6)


def test_whitening_is_over_the_mask_and_may_keep_the_mean():
    x = random.normal(3, 2, size=(B, T))
    acts = x[MASK > 0]
    close(whiten(x, MASK)[MASK > 0], (acts - acts.mean()) / acts.std(ddof=1), rtol=1e-6)
    close(whiten(x, MASK, shift_mean=False)[MASK > 0].mean(), acts.mean())


def test_value_loss_is_the_larger_of_both():
    values, returns = np.asarray([1.0, 0.1, -1, 0.1]), np.asarray([1.0, 1.0, 0, -1.0])
    close(value_losses(values, np.zeros(4), returns, 0.2), np.asarray([0.64, 0.81, 1, 1.21]) / 2)
    close(value_losses(values, np.zeros(4), returns), np.square(values - returns) / 2)


def test_ppo_tells_its_values_and_how_often_each_clip_bites():
    config = PolicyConfig(advantage="gae", value=ValueConfig(clip=0.2))
    batch, prepared = run_prepare(config, make_rollouts(values=REFERENCE), 0.0)
    moved = REFERENCE + random.normal(0, 0.3, size=(B, T))
    _, sums = run_sums(config, batch, LOGPROBS, None, moved)
    acts = MASK > 0
    close(sums["value_mean"], moved[acts].mean())
    close(sums["value_clip_fraction"], (np.abs(moved - REFERENCE)[acts] > 0.2).mean())
    ratio = np.exp(LOGPROBS - OLD)[acts]
    close(sums["update_kl"], np.mean(ratio - 1 - np.log(ratio)))
    returns = np.asarray(batch.returns)[acts]
    close(prepared["explained_variance"], 1 - np.var(returns - REFERENCE[acts]) / np.var(returns))


def test_explained_variance_is_0_for_zeros_and_constants_and_1_for_the_returns():
    returns = random.normal(size=(B, T))
    assert explained_variance(np.zeros((B, T)), returns, MASK) == 0
    close(explained_variance(returns + 3, returns, MASK), 1)
    assert explained_variance(returns, np.ones((B, T)), MASK) == 0
    assert explained_variance(-returns, returns, MASK) < 0


# Preferences. Before the first update the policy is the reference.

PAIR = PairLogprobs(*(np.asarray(x) for x in ([-4.0, -9.0], [-6.0, -2.0], [4.0, 6.0], [3.0, 2.0])))


@pytest.mark.parametrize(
    "config", [DPOConfig(), DPOConfig(kind="conservative", label_smoothing=0.2), DPOConfig(length_normalised=True)]
)
def test_dpo_begins_at_log_2_with_accuracy_one_half(config):
    close(pair_losses(config, PAIR, PAIR), np.log(2))
    metrics = pair_metrics(config, PAIR, PAIR)
    assert metrics["accuracy"].tolist() == [0.5, 0.5]
    assert not metrics["reward_margin"].any()
    assert metrics["logprob_chosen"].tolist() == [-4, -9]


# Two pairs in the first row, one in the second; an answer's last target is its stop token, and is read one index on.
PACKED = {
    "segment_ids": np.asarray([[1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4], [1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0]]),
    "weights": np.asarray([[0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]], float),
}


def test_pair_sums_are_over_answers_alone():
    """Each of its own segment: prompts, the other answer, other pairs and padding may be anything."""
    x = np.where(PACKED["weights"] > 0, random.normal(size=(2, 12)), np.nan)
    found = pair_logprobs(x, PACKED)
    close(found.chosen, [[x[0, 1] + x[0, 2], x[0, 7], 0], [x[1, 1], 0, 0]])
    close(found.rejected, [[x[0, 4] + x[0, 5], x[0, 9] + x[0, 10], 0], [x[1, 5] + x[1, 6] + x[1, 7], 0, 0]])
    close(found.chosen_lengths, [[2, 1, 0], [1, 0, 0]])
    close(found.rejected_lengths, [[2, 2, 0], [3, 0, 0]])


def test_robust_dpo_is_unbiased_under_flipped_labels():
    e = 0.3
    config = DPOConfig(kind="robust", label_smoothing=e)
    swapped = PairLogprobs(PAIR.rejected, PAIR.chosen, PAIR.rejected_lengths, PAIR.chosen_lengths)
    zero = jax.tree.map(np.zeros_like, PAIR)
    noisy = (1 - e) * pair_losses(config, PAIR, zero) + e * pair_losses(config, swapped, zero)
    close(noisy, pair_losses(DPOConfig(), PAIR, zero))


def test_lengths_matter_to_averaged_losses_only():
    longer = PAIR.replace(chosen_lengths=2 * PAIR.chosen_lengths)
    zero = jax.tree.map(np.zeros_like, PAIR)
    close(pair_losses(DPOConfig(), PAIR, zero), pair_losses(DPOConfig(), longer, zero))
    for config in (SimPOConfig(), ORPOConfig(), DPOConfig(kind="ipo", length_normalised=True)):
        assert np.abs(pair_losses(config, PAIR, zero) - pair_losses(config, longer, zero)).min() > 1e-3


def test_log1mexp_is_stable_with_its_gradient():
    x = np.asarray([-1e-12, -1e-3, -0.7, -0.6931, -5, -100.0])
    close(log1mexp(x), np.where(x > -1, np.log(-np.expm1(x)), np.log1p(-np.exp(x))), rtol=1e-12)
    slopes = gradient_of(lambda x: jnp.sum(log1mexp(x)), np.asarray([-200.0, -1.0, 0.0], np.float32))
    assert np.isfinite(slopes).all()
    assert np.isfinite(log1mexp(np.zeros(1, np.float32))).all()


# KTO.


def test_kto_begins_at_half_the_class_weight():
    losses = kto_losses(KTOConfig(0.1, 1.4, 0.6), OLD[:, 0], OLD[:, 0], np.asarray([1, 0, 1, 0]), 0.0)
    close(losses, [0.7, 0.3, 0.7, 0.3])


def test_kto_reference_point_is_a_mean_detached_and_not_negative():
    policy = np.asarray([1.0, 2.0, 30.0])
    close(kto_reference_point(policy, np.zeros(3), np.asarray([1, 1, 0])), 1.5)
    assert kto_reference_point(-policy, np.zeros(3), np.ones(3)) == 0
    assert not gradient_of(lambda x: kto_reference_point(x, np.zeros(3), np.ones(3)), policy).any()


def test_kto_weighs_classes_by_their_numbers():
    """Of three answers two are desirable; 0 where there are no undesirable ones."""
    close(class_balance(KTOConfig(0.1, 1.2, 1.5), 2 / 3), 2 * 1.2 / 1.5)
    assert class_balance(KTOConfig(), 1.0) == 0


# Reward models.


def test_reward_is_read_at_the_stop_token_wherever_an_answer_lies():
    x = random.normal(size=(2, 12))
    found = at_stop_tokens(x, PACKED)
    close(found[0, :2], [[x[0, 3], x[0, 6]], [x[0, 8], x[0, 11]]])
    close(found[1, 0], [x[1, 2], x[1, 8]])


def test_the_scalar_head_is_zero_at_first_without_bias_and_computed_in_float32():
    """Of a network that computes in bfloat16, whose sums over d_model would keep 8 bits."""
    model = ModelConfig(vocab_size=8, num_layers=1, d_model=64, num_heads=2, d_ff=64, max_seq_len=8, dtype="bfloat16")
    spec = scalar_head.scalar_head_spec(model)
    assert (spec.shape, spec.init, spec.dtype) == ((64, 1), "zeros", "float32")
    head, hidden = random.normal(size=(64, 1)).astype(np.float32), jnp.asarray(random.normal(size=(2, 3, 64)), jnp.bfloat16)
    found = quick(scalar_head.scalar_head)(head, hidden)
    assert found.dtype == np.float32
    close(found, (np.asarray(hidden, np.float64) @ head)[..., 0], rtol=1e-5, atol=1e-5)


def test_bradley_terry_begins_at_log_2_and_centring_removes_the_free_constant():
    close(pairwise_losses(RewardModelConfig(), np.zeros(2), np.zeros(2)), np.log(2))
    shifted = [pairwise_losses(RewardModelConfig(c), np.asarray(1.0) + 5, np.asarray(0.5) + 5) for c in (0, 0.01)]
    plain = [pairwise_losses(RewardModelConfig(c), np.asarray(1.0), np.asarray(0.5)) for c in (0, 0.01)]
    close(shifted[0], plain[0])
    assert shifted[1] > plain[1] + 1


def test_scores_that_go_with_lengths_are_told():
    """By the rank correlation of both answers of each pair, one of which is a tie in length and one in score."""
    scores, lengths = random.normal(size=(2, 6)), np.asarray([[3, 9, 4, 4, 1, 7], [5, 2, 4, 1, 8, 2]])
    scores[1, 3] = scores[0, 3]
    found = length_preference(*scores, *lengths)
    tau = [scipy.stats.kendalltau(x, y).statistic for x, y in zip(scores.T, lengths.T, strict=True)]
    close(found["longer_scored_higher"], (np.nan_to_num(tau) + 1) / 2)
    close(found["longer_chosen"], [0, 1, 0.5, 1, 0, 1])


def test_a_tie_is_half_right():
    assert preference_accuracy(np.asarray([1.0, 2, 3]), np.asarray([1.0, 3, 2])).tolist() == [0.5, 0, 1]


def test_outcome_and_process_losses_are_cross_entropies_where_there_are_labels():
    logits, labels = random.normal(size=(B, T)) * 5, random.uniform(size=(B, T))
    theirs = -scipy.special.xlogy(labels, scipy.special.expit(logits)) - scipy.special.xlogy(
        1 - labels, scipy.special.expit(-logits)
    )
    close(outcome_losses(logits, labels), theirs, rtol=1e-10)
    labels[MASK == 0] = -100
    losses, mask = process_losses(np.where(MASK > 0, logits, np.nan), labels)
    close(mask, MASK)
    close(losses, np.where(MASK > 0, theirs, 0), rtol=1e-10)


def test_steps_are_put_together_by_minimum_product_or_the_last():
    logits = random.normal(size=(B, T))
    p = [scipy.special.expit(row[acts > 0]) for row, acts in zip(logits, MASK, strict=True)]
    close(solution_scores(logits, MASK, "min"), [x.min() for x in p])
    close(solution_scores(logits, MASK, "product"), [x.prod() for x in p])
    close(solution_scores(logits, MASK, "last"), [x[-1] for x in p])


# Distillation and health.


def test_distillation_losses_are_scipy_s_and_equal_at_the_teacher():
    student, teacher = random.normal(size=(2, 3, 6))
    p, q = (scipy.special.softmax(x / 2, axis=-1) for x in (student, teacher))
    close(forward_kl_losses(student, teacher, 2.0), 4 * scipy.special.rel_entr(q, p).sum(axis=-1))
    close(reverse_kl_losses(student, teacher, 2.0), 4 * scipy.special.rel_entr(p, q).sum(axis=-1))
    for losses in (forward_kl_losses, reverse_kl_losses):
        close(gradient_of(lambda x, losses=losses: jnp.sum(losses(x, teacher)), teacher), 0, atol=1e-12)
    assert np.isfinite(forward_kl_losses(np.zeros(2), np.asarray([0.0, -np.inf])))


def test_lengths_of_right_and_wrong_answers_are_apart():
    metrics = rollout_metrics(
        np.asarray([1.0, 0, 0, 9]),
        np.asarray([1, 0, 0, 1]),
        np.asarray([3, 10, 20, 99]),
        np.asarray([0, 0, 1, 1]),
        np.asarray([1, 1, 1, 0]),
    )
    expected = {"reward_mean": 1 / 3, "reward_std": 2**0.5 / 3, "correct_fraction": 1 / 3, "truncated_fraction": 1 / 3}
    expected |= {"length_mean": 11, "length_correct": 3, "length_wrong": 15}
    for name, value in expected.items():
        close(metrics[name], value, err_msg=name)


def test_an_answer_that_nobody_could_judge_is_not_wrong():
    unknown = rollout_metrics(np.ones(3), np.asarray([1, 0, np.nan]), np.asarray([3, 10, 50]), np.zeros(3), np.ones(3))
    assert {name: unknown[name] for name in ("correct_fraction", "length_correct", "length_wrong", "length_mean")} == {
        "correct_fraction": 0.5, "length_correct": 3, "length_wrong": 10, "length_mean": 21,
    }  # fmt: skip
    lengths, most = np.asarray([3, 10]), {"reward_mean", "reward_std", "correct_fraction", "truncated_fraction", "length_mean"}
    for correct, valid, there in (
        ([1, 1], [1, 1], most | {"length_correct"}),
        ([0, 0], [1, 1], most | {"length_wrong"}),
        ([np.nan] * 2, [1, 1], most - {"correct_fraction"}),
        ([1, 0], [0, 0], set()),
    ):
        assert rollout_metrics(np.zeros(2), np.asarray(correct), lengths, np.zeros(2), np.asarray(valid)).keys() == there
    right = np.asarray([[1, 0, 0, 1], [1, np.nan, 0, np.nan], [np.nan] * 4, [0, 1, np.nan, 0]])
    assert metrics.held_out_scores(right) == {
        "eval/failed": 7, "eval/pass@1": pytest.approx((2 / 4 + 1 / 2 + 1 / 3) / 3), "eval/prompts_left_out@1": 1,
        "eval/pass@4": 1.0, "eval/prompts_left_out@4": 3,
    }  # fmt: skip
    assert metrics.held_out_scores(right[2:3]) == {
        "eval/failed": 4, "eval/prompts_left_out@1": 1, "eval/prompts_left_out@4": 1
    }  # fmt: skip
    assert metrics.held_out_scores(right[:1, :1]) == {"eval/failed": 0, "eval/pass@1": 1.0, "eval/prompts_left_out@1": 0}


def test_losses_stay_float32_and_finite_for_wild_ratios():
    with jax.enable_x64(False):
        config = dataclasses.replace(PolicyConfig(), kl=KLConfig(loss_coefficient=0.1, loss_estimator="k3"))
        batch, _ = run_prepare(config, make_rollouts(), 0.0)
        gradient = jax.jit(jax.grad(lambda x: policy_sums(config, batch, x)[0]))
        for distance in (-1e4, 1e4):
            slopes = gradient((OLD + distance).astype(np.float32))
            assert slopes.dtype == np.float32
            assert np.isfinite(slopes).all()


def test_kl_losses_of_another_policy_need_its_ratio():
    values = kl_losses(LOGPROBS, REFERENCE, MASK, "k2", log_ratio(LOGPROBS, OLD, MASK), "detached")
    close(values, MASK * np.square(LOGPROBS - REFERENCE) / 2 * np.exp(LOGPROBS - OLD))
