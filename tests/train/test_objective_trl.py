"""Losses against those of TRL: its trainers' loss functions on plain arrays, with stand-ins for trainer and model."""

import collections
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objectives.aggregate import sequence_weights, weighted_sum
from train.objectives.config import (
    RLOO,
    CPOConfig,
    DPOConfig,
    ImportanceConfig,
    KLConfig,
    KTOConfig,
    ORPOConfig,
    PolicyConfig,
    RewardModelConfig,
    SimPOConfig,
)
from train.objectives.kto import kto_losses, kto_reference_point
from train.objectives.orpo import log_odds_ratio
from train.objectives.pairs import PairLogprobs
from train.objectives.policy_gradient import Rollouts, policy_sums, prepare
from train.objectives.preference import pair_losses
from train.objectives.reward_model import pairwise_losses

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
pytest.importorskip("trl")

B, T = 8, 6
random = np.random.default_rng(0)
MASK = (np.arange(T) < np.asarray([6, 2, 4, 1, 3, 6, 5, 2])[:, None]).astype(float)
OLD = -random.exponential(size=(B, T))
POLICY, SAMPLER, REFERENCE = OLD + 0.4 * random.normal(size=(3, B, T))
REWARDS = np.asarray([1.0, 0, 0.5, 0.5, 0, 1, 1, 0.25])
GROUPS = np.repeat([0, 1], 4)
ENTROPIES = random.uniform(size=(B, T))


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def stand_in(**attributes):
    """A trainer of one process, in evaluation mode, that logs nowhere."""

    def same(x, **_):
        return x

    accelerator = types.SimpleNamespace(
        device="cpu", num_processes=1, reduce=lambda x, reduction: x, gather=same, gather_for_metrics=same
    )
    trainer = mock.MagicMock(accelerator=accelerator, aux_loss_enabled=False)
    trainer.model.training = False
    trainer._metrics = {"eval": collections.defaultdict(list)}
    trainer.configure_mock(**attributes)
    return trainer


def tensor(x, gradient=False):
    return torch.tensor(np.asarray(x), requires_grad=gradient)


DEFAULTS = {"loss_type": "grpo", "level": "token", "low": 0.2, "high": 0.28, "beta": 0.0, "delta": None, "correct_kl": False}
POLICIES = {
    "grpo": (PolicyConfig(scale="group", aggregation="seq_mean", clip_high=0.28), {}),
    "grpo_kl": (
        PolicyConfig(
            scale="group", aggregation="seq_mean", clip_high=0.28, kl=KLConfig(loss_coefficient=0.3, loss_estimator="k3")
        ),
        {"beta": 0.3},
    ),
    "grpo_kl_off_policy": (
        PolicyConfig(
            scale="group",
            aggregation="seq_mean",
            clip_high=0.28,
            kl=KLConfig(loss_coefficient=0.3, loss_estimator="k3", ratio="differentiated"),
        ),
        {"beta": 0.3, "correct_kl": True},
    ),
    "dapo": (PolicyConfig(scale="group", clip_high=0.28), {"loss_type": "dapo"}),
    "two_sided": (PolicyConfig(scale="group", clip_high=0.28, dual_clip=1.4), {"loss_type": "dapo", "delta": 1.4}),
    "dr_grpo": (PolicyConfig(aggregation="dr_grpo", max_length=9, clip_high=0.28), {"loss_type": "dr_grpo"}),
    "gspo": (PolicyConfig(surrogate="gspo", scale="group", aggregation="seq_mean", clip_high=0.28), {"level": "sequence"}),
    "cispo": (PolicyConfig(surrogate="cispo", scale="batch", clip_low=0, clip_high=0.3), {"loss_type": "cispo", "high": 1.3}),
    "sapo": (
        # 1.25, since TRL takes its temperatures in float32.
        PolicyConfig(surrogate="sapo", scale="group", aggregation="seq_mean", clip_low=0, clip_high=0, sapo_negative=1.25),
        {"loss_type": "sapo"},
    ),
    "entropy": (PolicyConfig(scale="group", clip_high=0.28, entropy_coefficient=0.2), {"loss_type": "dapo", "entropy": 0.2}),
    "truncated_importance": (
        PolicyConfig(scale="group", clip_high=0.28, importance=ImportanceConfig("token", cap=1.3)),
        {"loss_type": "dapo", "importance": np.minimum(np.exp(OLD - SAMPLER), 1.3)},
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policy_loss_and_gradient(name):
    from trl.trainer.grpo_trainer import GRPOTrainer

    config, options = POLICIES[name]
    options = DEFAULTS | options
    rollouts = Rollouts(
        mask=MASK,
        sampler_logprobs=SAMPLER,
        trainer_logprobs=OLD,
        rewards=REWARDS,
        groups=GROUPS,
        valid=np.ones(B),
        truncated=np.zeros(B),
        reference_logprobs=REFERENCE,
    )

    def ours(logprobs):
        batch, _ = prepare(config, jax.tree.map(jnp.asarray, rollouts), 0.0)
        return policy_sums(config, batch, logprobs, ENTROPIES)[0]

    grouped = REWARDS.reshape(2, 4)
    advantages = REWARDS - grouped.mean(axis=1).repeat(4)
    if config.scale == "group":
        advantages /= grouped.std(axis=1, ddof=1).repeat(4) + 1e-4
    elif config.scale == "batch":
        advantages /= REWARDS.std(ddof=1) + 1e-4
    logprobs = tensor(POLICY, gradient=True)
    trainer = stand_in(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options["level"],
        beta=options["beta"],
        args=types.SimpleNamespace(
            use_bias_correction_kl=options["correct_kl"],
            delta=options["delta"],
            sapo_temperature_pos=config.sapo_positive,
            sapo_temperature_neg=config.sapo_negative,
        ),
        loss_type=options["loss_type"],
        epsilon_low=options["low"],
        epsilon_high=options["high"],
        use_vllm="importance" in options,
        vllm_importance_sampling_correction=True,
        max_completion_length=config.max_length,
        _entropy_bonus_enabled="entropy" in options,
        entropy_coef=options.get("entropy", 0.0),
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
    )
    trainer._get_per_token_logps_and_entropies.return_value = (logprobs, tensor(ENTROPIES), None)
    inputs = {
        "prompt_ids": torch.zeros(B, 1),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T),
        "completion_mask": tensor(MASK),
        "advantages": tensor(advantages),
        "old_per_token_logps": tensor(OLD),
        "ref_per_token_logps": tensor(REFERENCE),
        "num_items_in_batch": tensor(MASK.sum()),
        "importance_sampling_ratio": tensor(options.get("importance", np.ones((B, T)))),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    value, gradient = jax.jit(jax.value_and_grad(ours))(POLICY)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
    np.testing.assert_allclose(gradient, logprobs.grad, atol=1e-12)


def test_rloo_gradient():
    """While the policy is the one that sampled: TRL then clips the ratio of the sequence, and ours is REINFORCE."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    grouped = REWARDS.reshape(2, 4)
    advantages = grouped - (grouped.sum(axis=1, keepdims=True) - grouped) / 3
    logprobs = tensor(OLD, gradient=True)
    trainer = stand_in(epsilon_low=0.2, epsilon_high=0.2)
    trainer._get_per_token_logps_and_entropies.return_value = (logprobs, tensor(ENTROPIES), None)
    inputs = {
        "prompt_ids": torch.zeros(B, 1),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T),
        "completion_mask": tensor(MASK),
        "advantages": tensor(advantages.reshape(-1)),
        "old_logps": tensor(np.sum(OLD * MASK, axis=1)),
    }
    RLOOTrainer._compute_loss(trainer, None, inputs).backward()

    def ours(logprobs):
        rollouts = Rollouts(MASK, OLD, OLD, REWARDS, GROUPS, np.ones(B), np.zeros(B))
        return policy_sums(RLOO, prepare(RLOO, jax.tree.map(jnp.asarray, rollouts), 0.0)[0], logprobs)[0]

    np.testing.assert_allclose(jax.jit(jax.grad(ours))(OLD), logprobs.grad, atol=1e-12)


def outputs_of(logprobs):
    return types.SimpleNamespace(
        log_probs=logprobs,
        entropy=torch.zeros(B, T),
        mean_logits=torch.zeros(B, T),
        is_top1=torch.zeros(B, T, dtype=torch.bool),
    )


# TRL counts prompt and completion; one token of prompt. Rows of pairs are all chosen, then all rejected.
FULL_MASK = np.concatenate([np.zeros((B, 1)), MASK], axis=1)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (DPOConfig(), "sigmoid"),
        (DPOConfig(kind="robust", label_smoothing=0.1), "robust"),
        (DPOConfig(kind="hinge"), "hinge"),
        (DPOConfig(kind="ipo", length_normalised=True), "ipo"),
        (DPOConfig(length_normalised=True), "sigmoid_norm"),
    ],
)
def test_dpo_loss_and_gradient(config, kind):
    from trl.trainer.dpo_trainer import DPOTrainer

    logprobs = tensor(POLICY, gradient=True)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        use_weighting=False,
    )
    reference = tensor(np.sum(REFERENCE * MASK, axis=1))
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long),
        "completion_mask": tensor(FULL_MASK),
        "ref_chosen_logps": reference[: B // 2],
        "ref_rejected_logps": reference[B // 2 :],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(logprobs * tensor(MASK)), inputs, return_outputs=False)
    loss.backward()

    def sums(x):
        return jnp.sum(x * MASK, axis=1)

    def ours(x):
        pairs = (PairLogprobs(*jnp.split(sums(x), 2), *jnp.split(sums(np.ones((B, T))), 2)) for x in (x, REFERENCE))
        return weighted_sum(sequence_weights(np.ones(B // 2)), pair_losses(config, *pairs))

    value, gradient = jax.jit(jax.value_and_grad(ours))(POLICY)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
    np.testing.assert_allclose(gradient, logprobs.grad, atol=1e-12)


SUMS = PairLogprobs(*(-random.uniform(2, 9, size=(2, 5))), *random.integers(1, 8, size=(2, 5)).astype(float))


def test_cpo_and_simpo_losses():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = stand_in(alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0)
    theirs = CPOTrainer.cpo_loss(trainer, tensor(SUMS.chosen_means), tensor(SUMS.rejected_means))[0]
    np.testing.assert_allclose(pair_losses(SimPOConfig(2.0, 0.7), SUMS, None), theirs, rtol=1e-10)
    trainer.configure_mock(loss_type="sigmoid", beta=0.1)
    theirs = CPOTrainer.cpo_loss(trainer, tensor(SUMS.chosen), tensor(SUMS.rejected))[0]
    ours = pair_losses(CPOConfig(0.1, 1.0), SUMS, None) + SUMS.chosen_means
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_conservative_dpo_loss():
    """TRL's DPO trainer has no such loss; its CPO trainer smooths labels alike, here of ratios to the reference."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    reference = SUMS.replace(chosen=SUMS.chosen[::-1] - 0.3, rejected=SUMS.rejected[::-1])
    trainer = stand_in(alpha=0.0, beta=0.2, loss_type="sigmoid", label_smoothing=0.15)
    ratios = tensor(SUMS.chosen - reference.chosen), tensor(SUMS.rejected - reference.rejected)
    theirs = CPOTrainer.cpo_loss(trainer, *ratios)[0]
    ours = pair_losses(DPOConfig("conservative", 0.2, label_smoothing=0.15), SUMS, reference)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_orpo_loss():
    """In float32, which TRL casts to."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = stand_in(beta=0.3)
    theirs = ORPOTrainer.odds_ratio_loss(trainer, tensor(SUMS.chosen_means), tensor(SUMS.rejected_means))
    np.testing.assert_allclose(np.mean(log_odds_ratio(SUMS)), theirs[4], rtol=1e-5)
    # TRL subtracts what it returns from the likelihood term.
    ours = -pair_losses(ORPOConfig(0.3), SUMS, None) - SUMS.chosen_means
    np.testing.assert_allclose(ours, theirs[0], rtol=1e-5)


def test_kto_loss_and_gradient():
    from trl.trainer.kto_trainer import KTOTrainer

    config = KTOConfig(0.1, 1.2, 0.9)
    desirable = np.asarray([1, 0, 0, 1, 1, 0, 1, 0])
    mismatched = random.normal(0.5, 1, size=(B,))
    logprobs = tensor(POLICY, gradient=True)
    trainer = stand_in(
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    trainer._compute_kl_logps.return_value = tensor(mismatched)
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1),
        "completion_mask": tensor(FULL_MASK),
        "label": tensor(desirable),
        "ref_logps": tensor(np.sum(REFERENCE * MASK, axis=1)),
        "ref_KL_logps": torch.zeros(B, dtype=torch.float64),
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs_of(logprobs * tensor(MASK)), inputs, return_outputs=False)
    loss.backward()

    def ours(x):
        z0 = kto_reference_point(mismatched, np.zeros(B), np.ones(B))
        losses = kto_losses(config, jnp.sum(x * MASK, axis=1), np.sum(REFERENCE * MASK, axis=1), desirable, z0)
        return weighted_sum(sequence_weights(np.ones(B)), losses)

    value, gradient = jax.jit(jax.value_and_grad(ours))(POLICY)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
    np.testing.assert_allclose(gradient, logprobs.grad, atol=1e-12)


def test_reward_model_loss():
    from trl.trainer.reward_trainer import RewardTrainer

    scores, margin = random.normal(size=B), random.uniform(size=B // 2)
    trainer = stand_in(args=types.SimpleNamespace(center_rewards_coefficient=0.01))

    def model(**_):
        return types.SimpleNamespace(logits=tensor(scores)[:, None])

    loss = RewardTrainer.compute_loss(trainer, model, {"margin": tensor(margin)})
    ours = pairwise_losses(RewardModelConfig(0.01), scores[: B // 2], scores[B // 2 :], margin)
    np.testing.assert_allclose(np.mean(ours), loss.item(), rtol=1e-10)
