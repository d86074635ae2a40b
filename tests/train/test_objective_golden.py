"""Values worked out by hand or by other programs, in float64: section by section what each objective is of given numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objectives.aggregate import token_weights, weighted_sum
from train.objectives.config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardModelConfig, SimPOConfig
from train.objectives.dpo import dpo_losses
from train.objectives.grpo import group_advantages, group_statistics, maxrl_advantages
from train.objectives.kl import kl_values
from train.objectives.kto import kto_losses
from train.objectives.metrics import pass_at_k
from train.objectives.orpo import log_odds_ratio
from train.objectives.pairs import PairLogprobs
from train.objectives.ppo import clipped_losses, generalised_advantages
from train.objectives.preference import pair_losses
from train.objectives.reinforce import leave_one_out_baseline
from train.objectives.reward_model import pairwise_losses

T = 1 / 3
EXPECTED = {
    "dpo": 0.6209570478,
    "dpo_conservative": 0.6359570478,
    "dpo_robust": 0.6022070478,
    "dpo_hinge": 0.85,
    "ipo_sums": 12.25,
    "ipo": 22.44390625,
    "dpo_nll": 0.6209570478 + 0.2 * 2,
    "simpo": 2.1269280110,
    "orpo_log_odds": -0.6070690011,
    "orpo_term": 1.0420578079,
    "orpo": 2.1042057808,
    "cpo": math.log1p(math.exp(-0.2)) + 2,
    "kto_desirable": 0.4800106598,
    "kto_undesirable": 0.4825071423,
    "bradley_terry": 0.3411538747,
    "bradley_terry_margin": 0.5130152524,
    "bradley_terry_centred": 0.3700538747,
    "advantage": [0.75, -0.25, -0.25, -0.25],
    "advantage_over_std_0": [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)],
    "advantage_over_std_1": [1.5, -0.5, -0.5, -0.5],
    "advantage_rloo": [1, -T, -T, -T],
    "advantage_maxrl": [3, -1, -1, -1],
    "gae_advantages": [0.43675, 0.565, 0.7],
    "gae_returns": [0.93675, 0.965, 1.0],
    "seq_mean": 0.75,
    "token_mean": 0.625,
    "dr_grpo": 0.3125,
    "seq_sum": 2.5,
    "clipped": [-1.28, 0.8, 4.0],
    "clipped_dual": [-1.28, 0.8, 3.0],
    "kl_k1": 0.5,
    "kl_k2": 0.125,
    "kl_k3": math.exp(-0.5) - 1 + 0.5,
}


@pytest.fixture(scope="module")
def values():
    """All of them in one compiled program."""
    with jax.enable_x64(True):
        policy = PairLogprobs(*(jnp.asarray([x]) for x in (-10.0, -12.0, 5.0, 8.0)))
        reference = PairLogprobs(*(jnp.asarray([x]) for x in (-11.0, -11.5, 5.0, 8.0)))
        rewards = jnp.asarray([1.0, 0, 0, 0])
        mask = jnp.asarray([[1.0] * 2 + [0] * 6, [1.0] * 6 + [0, 0]])

        def compute(policy, reference, rewards, mask):
            def dpo(**options):
                return dpo_losses(DPOConfig(**options), policy, reference)[0]

            def kto(log_ratio, desirable):
                return kto_losses(
                    KTOConfig(), jnp.asarray([log_ratio]), jnp.zeros(1), jnp.asarray([desirable]), jnp.asarray(0.2)
                )[0]

            def bradley_terry(centring=0.0, margin=0.0):
                return pairwise_losses(RewardModelConfig(centring), jnp.asarray(1.3), jnp.asarray(0.4), margin)

            def one_token(pair):
                return pair.replace(chosen_lengths=jnp.ones(1), rejected_lengths=jnp.ones(1))

            ipo = DPOConfig(kind="ipo", length_normalised=True)
            groups, valid = jnp.zeros(4, int), jnp.ones(4)
            advantages, returns = generalised_advantages(
                jnp.asarray([[0.0, 0, 1]]), jnp.asarray([[0.5, 0.4, 0.3]]), jnp.ones((1, 3)), 1.0, 0.95
            )
            losses = jnp.broadcast_to(jnp.asarray([[1.0], [0.5]]), mask.shape)
            log_ratio, signs = jnp.log(jnp.asarray([1.5, 0.5, 4.0])), jnp.asarray([1.0, -1, -1])
            centred = group_advantages(rewards, groups, valid)
            return {
                "dpo": dpo(),
                "dpo_conservative": dpo(kind="conservative", label_smoothing=0.1),
                "dpo_robust": dpo(kind="robust", label_smoothing=0.1),
                "dpo_hinge": dpo(kind="hinge"),
                "ipo_sums": dpo_losses(ipo, one_token(policy), one_token(reference))[0],
                "ipo": dpo_losses(ipo, policy, reference)[0],
                "dpo_nll": dpo(nll_coefficient=0.2),
                "simpo": pair_losses(SimPOConfig(2.0, 1.0), policy, None)[0],
                "orpo_log_odds": log_odds_ratio(policy)[0],
                "orpo_term": -jax.nn.log_sigmoid(log_odds_ratio(policy))[0],
                "orpo": pair_losses(ORPOConfig(0.1), policy, None)[0],
                "cpo": pair_losses(CPOConfig(0.1, 1.0), policy, None)[0],
                "kto_desirable": kto(1.0, 1),
                "kto_undesirable": kto(-0.5, 0),
                "bradley_terry": bradley_terry(),
                "bradley_terry_margin": bradley_terry(margin=0.5),
                "bradley_terry_centred": bradley_terry(centring=0.01),
                "advantage": centred,
                "advantage_over_std_0": centred / (group_statistics(rewards, groups, valid).std * (3 / 4) ** 0.5),
                "advantage_over_std_1": group_advantages(rewards, groups, valid, "group", eps=0.0),
                "advantage_rloo": rewards - leave_one_out_baseline(rewards, groups, valid),
                "advantage_maxrl": maxrl_advantages(rewards, groups, valid),
                "gae_advantages": advantages[0],
                "gae_returns": returns[0],
                **{
                    kind: weighted_sum(token_weights(mask, kind, 8), losses)
                    for kind in ("seq_mean", "token_mean", "dr_grpo", "seq_sum")
                },
                "clipped": clipped_losses(log_ratio, signs, 0.2, 0.28),
                "clipped_dual": clipped_losses(log_ratio, signs, 0.2, 0.28, dual_clip=3.0),
                **{f"kl_{k}": kl_values(jnp.asarray(-1.0), jnp.asarray(-1.5), jnp.ones(()), k) for k in ("k1", "k2", "k3")},
            }

        return jax.device_get(jax.jit(compute)(policy, reference, rewards, mask))


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_value(values, name):
    assert values[name].dtype == np.float64
    np.testing.assert_allclose(values[name], EXPECTED[name], rtol=0, atol=6e-11)


def test_pass_at_k_is_that_of_the_binomials():
    np.testing.assert_allclose(pass_at_k(10, 3, 2), 0.5333333333333333, rtol=1e-12)
    n, c = np.meshgrid([1, 5, 16, 200], np.arange(17), indexing="ij")
    c = np.minimum(n, c)
    for k in (1, 2, 5):
        enough = n >= k
        exact = [1 - math.comb(a - b, k) / math.comb(a, k) for a, b in zip(n[enough], c[enough], strict=True)]
        np.testing.assert_allclose(pass_at_k(n[enough], c[enough], k), exact, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="pass@6 needs at least 6 samples"):
        pass_at_k(np.asarray([8, 5]), np.asarray([1, 1]), 6)
    with pytest.raises(ValueError, match="num_correct"):
        pass_at_k(4, 5, 2)
