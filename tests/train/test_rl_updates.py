"""Updates of a run: however its batch is cut up and laid out, they are the same; penalties and bonuses follow their targets."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from tests.train.rl_runs import EXPERTS, StopAfter, job, odd_is_right, run, verifiers_instead, watch_constants
from train import rl
from train.config import MeshConfig
from train.objectives.config import (
    CISPO,
    GRPO,
    GSPO,
    MAXRL,
    PPO,
    REINFORCE,
    REINFORCE_PLUS_PLUS,
    REMAX,
    RLOO,
    KLConfig,
    PolicyConfig,
    ValueConfig,
    dapo,
    dr_grpo,
)
from train.rl_config import RolloutConfig

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "changes"),
    [
        ("truncated_sampling", {"rollouts": RolloutConfig(4, 6, 6, max_batch=8, verifiers=1, max_mismatch=0, top_k=2)}),
        ("micro_batch_normaliser", {"accumulation": 8}),
        ("stop_token_untrained", {}),
    ],
)
def test_a_bug_on_purpose_changes_the_update(warm_start, tmp_path, bug, changes):
    clean = run(job(warm_start, tmp_path / "clean", **({} if bug == "truncated_sampling" else changes)))
    buggy = run(job(warm_start, tmp_path / "buggy", policy=PolicyConfig(group_size=4, bugs=(bug,)), **changes))
    assert buggy[0]["grad_norm"] != pytest.approx(clean[0]["grad_norm"], rel=1e-3)
    # What is drawn, and how far the trainer's distribution is from the drawn one.
    same = bug != "truncated_sampling"
    assert (buggy[0]["length_mean"] == clean[0]["length_mean"]) or not same
    assert (buggy[0]["mismatch_kl"] < 1e-5) == same


@pytest.fixture(scope="module")
def updates(warm_start, tmp_path_factory):
    """Of one batch in two minibatches, passed over twice, with a value function: the open loop; what is known before; rows and
    metrics of each update; and the metrics with a limit between the KL of the first update and that of the second."""
    policy = PolicyConfig(advantage="gae", value=ValueConfig(), group_size=4, updates_per_batch=2, entropy_coefficient=0.1)
    config = job(warm_start, tmp_path_factory.mktemp("updates") / "run", policy=policy, minibatches=2)
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))
        with rl.open_loop(config, lambda _: None, None, 0.0) as loop:
            step, begun = loop.policy.trainer.step, jax.tree.map(jax.numpy.copy, loop.state.train)

            def watched(state, batch):
                rows.append(jax.device_get(batch))
                return step(state, batch)

            loop.policy.trainer = dataclasses.replace(loop.policy.trainer, step=watched)
            loop._load_engine()
            judged, _ = loop.collector.collect(0)
            # Whatever was drawn, there is something to learn.
            judged = dataclasses.replace(judged, rewards=np.arange(16, dtype=np.float32) % 4 / 3)
            constants, before = jax.device_get(loop._constants(judged))
            metrics = jax.device_get(loop._update(judged.samples, constants, 0))
            found = {"loop": loop, "before": before, "rows": list(rows), "metrics": metrics}
            limit = float(metrics[0]["update_kl"] + metrics[1]["update_kl"]) / 2
            loop.config = dataclasses.replace(config, policy=dataclasses.replace(policy, max_update_kl=limit))
            loop.state = dataclasses.replace(loop.state, train=begun)
            limited = jax.device_get(loop._update(judged.samples, constants, 0))
            yield types.SimpleNamespace(**found, limited=limited)


def test_the_first_minibatch_has_ratio_1_and_later_ones_do_not(updates):
    first, *others = updates.metrics
    assert abs(first["update_kl"]) < 1e-9
    assert first["clip_low_fraction"] == first["clip_high_fraction"] == 0
    assert all(update["update_kl"] > 1e-7 for update in others)


def test_each_pass_goes_over_all_rows_in_an_order_of_its_own(updates):
    assert len(updates.rows) == updates.loop.config.num_updates / 3 == 4  # of three steps
    first, second = (np.concatenate([part["targets"] for part in updates.rows[i : i + 2]]) for i in (0, 2))
    assert len(first) == 16
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert (first != second).any()


def test_a_large_kl_ends_the_updates_of_a_batch(updates):
    """The update that meets it is made, and is the last."""
    assert len(updates.metrics) == 4
    assert len(updates.limited) == updates.loop.state.train.step == 2
    for name in ("loss", "update_kl", "grad_norm"):
        assert [update[name] for update in updates.limited] == [update[name] for update in updates.metrics[:2]]


def test_a_new_value_head_explains_nothing_rather_than_less(updates):
    assert updates.before["explained_variance"] == updates.metrics[0]["value_mean"] == 0
    assert updates.metrics[1]["value_mean"] != 0


def test_without_a_penalty_no_reference_is_kept(updates):
    assert updates.loop.reference is None
    assert "kl_loss" not in updates.metrics[0]


# Each surrogate, advantage and way of weighing tokens. None is silent where all rewards of a group are equal.
ALGORITHMS = {
    "grpo": dataclasses.replace(GRPO, entropy_coefficient=0.1),
    "dapo": dataclasses.replace(dapo(6, 3), zero_variance="drop"),
    "dr_grpo": dr_grpo(6),
    "gspo": GSPO,
    "cispo": CISPO,
    "maxrl": MAXRL,
    "reinforce": REINFORCE,
    "reinforce_plus_plus": REINFORCE_PLUS_PLUS,
    "rloo": RLOO,
    "remax": REMAX,
    "ppo": PPO,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_change_nothing_but_memory(warm_start, tmp_path, name, monkeypatch):
    verifiers_instead(monkeypatch, odd_is_right, 16)
    policy = dataclasses.replace(ALGORITHMS[name], group_size=4)
    whole, parts = (run(job(warm_start, tmp_path / str(n), accumulation=n, steps=1, policy=policy))[0] for n in (1, 4))
    assert whole["grad_norm"] > 0
    for name in ("loss", "grad_norm", "entropy", "param_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_eight_devices_do_what_one_does(warm_start, tmp_path, name, monkeypatch):
    verifiers_instead(monkeypatch, odd_is_right, 16)
    policy = dataclasses.replace(ALGORITHMS[name], group_size=4)
    many = run(job(warm_start, tmp_path / "many", steps=1, policy=policy))[0]
    monkeypatch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))
    one = run(job(warm_start, tmp_path / "one", steps=1, policy=policy))[0]
    assert one["grad_norm"] > 0
    for name in ("reward_mean", "length_mean", "loss", "grad_norm", "entropy", "param_norm"):
        assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_a_run_with_shared_prompts_is_that_without(warm_start, tmp_path):
    """With minibatches, micro-batches and two passes; rows that stand side by side are summed in another order."""
    policy = PolicyConfig(group_size=4, updates_per_batch=2)
    apart = run(job(warm_start, tmp_path / "a", policy=policy, accumulation=2))
    shared = run(job(warm_start, tmp_path / "b", policy=policy, accumulation=2, share_prompts=True))
    for one, other in zip(apart, shared, strict=True):
        for name in ("loss", "grad_norm", "param_norm", "entropy", "reward/right"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert all(record["mismatch_max"] < 1e-4 for record in shared)
    parts = run(job(warm_start, tmp_path / "c", policy=policy, minibatches=2, accumulation=2, share_prompts=True))
    assert all(np.isfinite(record["loss"]) for record in parts)


@pytest.mark.slow
def test_the_entropy_bonus_rises_below_its_target_and_continues_with_a_run(warm_start, tmp_path, monkeypatch):
    """By the step's own entropy, whatever the gradients do."""
    policy = PolicyConfig(group_size=4, entropy_coefficient=0.01, entropy_target=100.0, entropy_step=0.25)
    config = job(warm_start, tmp_path / "run", policy=policy)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_on_signal", lambda: StopAfter(1, calls))
        assert rl.train_with_rewards(config, log=lambda _: None) == 42
    metrics = run(config)
    assert [record["entropy_coefficient"] for record in metrics] == pytest.approx([0.01, 0.26, 0.51])
    for record in metrics:
        assert record["loss"] == pytest.approx(
            record["policy_loss"] - record["entropy_coefficient"] * record["entropy"], rel=1e-4, abs=1e-6
        )


@pytest.mark.slow
def test_at_first_the_policy_is_its_reference_at_any_temperature(warm_start, tmp_path):
    policy = PolicyConfig(group_size=4, kl=KLConfig(0.1))
    rollouts = RolloutConfig(prompts=4, max_prompt_tokens=6, max_tokens=6, max_batch=8, verifiers=1, temperature=0.7)
    first, *_ = run(job(warm_start, tmp_path / "run", policy=policy, rollouts=rollouts, steps=1))
    assert abs(first["reference_kl"]) < 1e-6
    assert first["mismatch_max"] < 1e-5


@pytest.mark.slow
def test_the_penalty_in_the_reward_follows_its_target_and_stays_positive(warm_start, tmp_path):
    """What is reported is the coefficient of the step itself: at first the given one, while the policy is its reference."""
    policy = PolicyConfig(group_size=4, kl=KLConfig(0.1, target=100.0, horizon=3.3))
    metrics = run(job(warm_start, tmp_path / "run", policy=policy))
    factor = 1 - 0.2 * 16 / 3.3
    assert [record["kl_coefficient"] for record in metrics] == pytest.approx([0.1 * factor**i for i in range(3)], rel=1e-5)
    assert factor > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 4}, {"share_prompts": True}], ids=["plain", "parts", "shared prompts"]
)
def test_experts_are_routed_alike_by_sampler_and_trainer_and_are_balanced(expert_start, tmp_path, changes):
    metrics = run(job(expert_start, tmp_path / "run", model=EXPERTS, steps=2, **changes))
    for record in metrics:
        assert record["mismatch_max"] < 1e-5
        assert abs(record["update_kl"]) < 1e-9
        # Of one layer, times 0.5: 1 where all experts have the same share, and little more, whatever the micro-batches.
        assert 0.5 * 0.99 <= record["balance_loss"] < 0.5 * 2
        assert record["loss"] == pytest.approx(
            record["policy_loss"] + record["balance_loss"] + record["router_z_loss"], rel=1e-4, abs=1e-6
        )
        assert record["load_imbalance"] >= 1
    assert metrics[0]["grad_norm"] > 0


@pytest.mark.slow
def test_experts_on_eight_devices_learn_what_they_do_on_one(expert_start, tmp_path, monkeypatch):
    """Half of the experts live on each second device in training, and all on each while it decodes."""
    settings = {"steps": 2, "policy": PolicyConfig(group_size=4, scale="group"), "model": EXPERTS}
    many = run(job(expert_start, tmp_path / "many", mesh=MeshConfig(data=4, expert=2), **settings))
    monkeypatch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))
    one = run(job(expert_start, tmp_path / "one", **settings))
    for record, alone in zip(many, one, strict=True):
        assert record["mismatch_max"] < 1e-5
        for name in ("reward_mean", "length_mean", "policy_loss", "balance_loss", "grad_norm", "entropy", "param_norm"):
            assert record[name] == pytest.approx(alone[name], rel=2e-4, abs=1e-6), name


@pytest.mark.slow
def test_the_average_of_earlier_returns_holds_all_that_is_added_to_rewards(warm_start, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    kl = KLConfig(reward_coefficient=5.0)
    policy = dataclasses.replace(
        REINFORCE, group_size=4, advantage="ema", ema_decay=0.5, kl=kl, truncation="penalty", truncation_penalty=0.5
    )
    metrics = run(job(warm_start, tmp_path / "run", policy=policy))
    means = []
    for (judged, constants, _), baseline in zip(seen, (0, 1, 2), strict=True):
        samples, mask = judged.samples, judged.samples.mask
        kl_of = np.sum(mask * (constants.old_logprobs - constants.reference_logprobs), axis=1)
        returns = judged.rewards - 0.5 * samples.truncated - 5.0 * kl_of
        weights = 0.5 ** np.arange(baseline)[::-1]
        expected = returns - (np.average(means, weights=weights) if means else 0.0)
        np.testing.assert_allclose(constants.advantages, expected[:, None] * mask, rtol=1e-4, atol=1e-5)
        means.append(returns.mean())
    assert metrics[-1]["return_mean"] == pytest.approx(means[-1], rel=1e-4, abs=1e-5)
    assert abs(metrics[-1]["reward_mean"] - means[-1]) > 0.01
