"""Combinations that are no sensible objective are refused when the config is read, with the option to change."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import TaskConfig
from inference.sampling import Sampling
from model.config import ModelConfig
from train.objectives import config as objectives
from train.objectives.config import (
    CPOConfig,
    DPOConfig,
    ImportanceConfig,
    KLConfig,
    KTOConfig,
    ORPOConfig,
    PolicyConfig,
    RewardModelConfig,
    SimPOConfig,
    ValueConfig,
    dapo,
    dr_grpo,
)
from train.rl_config import RLConfig, RolloutConfig

NO_CLIP = {"surrogate": "reinforce", "clip_low": 0, "clip_high": 0}
REFUSED = {
    "gspo_with_token_mean": ("aggregation='token_mean'", {"surrogate": "gspo", "aggregation": "token_mean"}),
    "gspo_with_values": ("gspo", {"surrogate": "gspo", "aggregation": "seq_mean", "advantage": "gae", "value": ValueConfig()}),
    "gspo_with_some_tokens": ("entropy_fraction", {"surrogate": "gspo", "aggregation": "seq_mean", "entropy_fraction": 0.2}),
    "maxrl_with_kl_in_reward": ("maxrl", {"advantage": "maxrl", "kl": KLConfig(reward_coefficient=0.1)}),
    "maxrl_with_penalty": ("maxrl", {"advantage": "maxrl", "truncation": "penalty", "truncation_penalty": 1.0}),
    "k1_in_loss": ("no gradient in expectation", {"kl": KLConfig(loss_coefficient=0.1, loss_estimator="k1")}),
    "std_of_group_with_kl_in_reward": ("scale='group'", {"scale": "group", "kl": KLConfig(reward_coefficient=0.1)}),
    "std_without_group": ("scale='group'", {"scale": "group", "advantage": "rloo"}),
    "group_of_one": ("group_size >= 2", {"group_size": 1}),
    "values_without_gae": ("policy.value", {"value": ValueConfig()}),
    "gae_without_values": ("policy.value", {"advantage": "gae"}),
    "dr_grpo_without_length": ("policy.max_length", {"aggregation": "dr_grpo"}),
    "dual_clip_inside_of_clip": ("policy.dual_clip", {"dual_clip": 1.1}),
    "dual_clip_of_reinforce": ("policy.dual_clip", {**NO_CLIP, "dual_clip": 3.0}),
    "reinforce_with_clip": ("reinforce has no ratio", {"surrogate": "reinforce"}),
    "reinforce_twice": (
        "updates_per_batch=1",
        {"surrogate": "reinforce", "clip_low": 0, "clip_high": 0, "updates_per_batch": 2},
    ),
    "cispo_with_lower_bound": ("clip_low=0", {"surrogate": "cispo"}),
    "sapo_with_clip": ("sapo has no ratio", {"surrogate": "sapo"}),
    "sapo_that_never_fades": ("policy.sapo_positive", {**NO_CLIP, "surrogate": "sapo", "sapo_positive": 0.0}),
    "no_clip": ("clip_low=0", {"clip_low": 0}),
    "dropping_without_groups": ("zero_variance='drop'", {"advantage": "batch", "zero_variance": "drop"}),
    "dropping_with_kl_in_reward": (
        "leaves out groups that kl.reward_coefficient still has something to tell",
        {"zero_variance": "drop", "kl": KLConfig(reward_coefficient=0.1)},
    ),
    "reward_to_go_of_groups": ("reward_to_go", {"reward_to_go": True}),
    "penalty_of_zero": ("truncation_penalty", {"truncation": "penalty"}),
    "penalty_unused": ("truncation_penalty", {"truncation_penalty": 1.0}),
    "ramp_longer_than_answers": ("overlong_cache", {"truncation": "soft_penalty", "max_length": 8, "overlong_cache": 9}),
    "negative_limit_of_kl": ("max_update_kl=-1.0", {"max_update_kl": -1.0}),
    "unknown_name": ("policy.aggregation='mean'", {"aggregation": "mean"}),
    "no_tokens": ("entropy_fraction", {"entropy_fraction": 0.0}),
    "greedy_with_penalty": ("that of the greedy answer", {"advantage": "greedy", "truncation": "zero_reward"}),
    "parts_without_scale": ("normalise_parts", {"normalise_parts": True}),
    "parts_that_are_dropped": ("normalise_parts", {"normalise_parts": True, "scale": "group", "zero_variance": "drop"}),
    "parts_with_kl_in_reward": (
        "normalise_parts",
        {"normalise_parts": True, "scale": "batch", "kl": KLConfig(reward_coefficient=0.1)},
    ),
    "entropy_without_a_step": ("entropy_step", {"entropy_target": 1.0, "entropy_step": 0.0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    message, options = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KLConfig, {"reward_coefficient": 0.1, "loss_coefficient": 0.1}, "twice"),
        (KLConfig, {"reward_coefficient": -0.1}, "kl.reward_coefficient=-0.1"),
        (KLConfig, {"loss_coefficient": 0.1, "target": 6.0}, "kl.target"),
        (ImportanceConfig, {"cap": 0.5}, "importance.cap=0.5"),
        (ImportanceConfig, {"low": 1.5}, "have 1 between them"),
        (ValueConfig, {"gae_lambda": 1.5}, "value.gae_lambda=1.5"),
        (ValueConfig, {"adaptive_lambda": -0.1}, "value.adaptive_lambda=-0.1"),
        (DPOConfig, {"beta": 0.0}, "dpo.beta=0.0"),
        (DPOConfig, {"kind": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5"),
        (DPOConfig, {"kind": "conservative"}, "label_smoothing"),
        (DPOConfig, {"label_smoothing": 0.1}, "label_smoothing"),
        (DPOConfig, {"kind": "ipo"}, "length_normalised=True"),
        (SimPOConfig, {"gamma": -1.0}, "simpo.gamma"),
        (ORPOConfig, {"coefficient": 0.0}, "orpo.coefficient"),
        (CPOConfig, {"nll_coefficient": 0.0}, "cpo.nll_coefficient"),
        (KTOConfig, {"desirable_weight": 0.0}, "kto.desirable_weight"),
        (RewardModelConfig, {"centring": -1.0}, "reward_model.centring"),
    ],
)
def test_refuses_parts(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_named_algorithms_are_allowed_and_bugs_must_be_named():
    named = [value for value in vars(objectives).values() if isinstance(value, PolicyConfig)]
    assert len(named) == 9
    assert dr_grpo(64).aggregation == "dr_grpo"
    assert dapo(64, 16).zero_variance == "resample"
    buggy = KLConfig(loss_coefficient=0.1, loss_estimator="k1")
    assert PolicyConfig(kl=buggy, bugs=("k1_in_loss",)).kl.needs_reference
    assert PolicyConfig(kl=dataclasses.replace(buggy, ratio="differentiated")).bugs == ()
    assert not PolicyConfig().kl.needs_reference


def test_rollouts_are_drawn_from_what_the_trainer_scores():
    """Of what shapes a distribution a run may set the temperature, which the trainer applies too, and no more."""
    shapes = {field.name for field in dataclasses.fields(Sampling)} & {
        field.name for field in dataclasses.fields(RolloutConfig)
    }
    assert shapes == {"temperature", "top_k"}
    with pytest.raises(ValueError, match=r"rollouts\.temperature=0\.0 must be positive"):
        RolloutConfig(temperature=0.0)

    def job(**policy):
        model, task = ModelConfig(32, 1, 32, 2, 32, max_seq_len=256), TaskConfig("reverse")
        return RLConfig("x", model, "y", task, 1, rollouts=RolloutConfig(top_k=50), policy=PolicyConfig(**policy))

    with pytest.raises(ValueError, match=r"rollouts\.top_k=50: the trainer scores the whole distribution"):
        job()
    assert job(bugs=("truncated_sampling",)).rollouts.top_k == 50


def test_read_without_jax():
    code = "import sys, train.objectives.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
