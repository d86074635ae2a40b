"""However a batch is cut into micro-batches or dealt out to devices, each objective's loss and gradients are the same; and what
lies in padding does not matter, even if it is NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.objectives.aggregate import sequence_sums, sequence_weights, token_weights, weighted_sum
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
from train.objectives.distillation import forward_kl_losses, reverse_kl_losses
from train.objectives.kto import kto_losses, kto_reference_point
from train.objectives.pairs import PairLogprobs
from train.objectives.policy_gradient import Rollouts, policy_sums, prepare
from train.objectives.ppo import last_action
from train.objectives.preference import pair_losses, pair_metrics
from train.objectives.reward_model import IGNORE, outcome_losses, pairwise_losses, process_losses

B, T, D, V, PARTS = 32, 6, 3, 5, 4

POLICIES = {
    "reinforce": REINFORCE,
    "ema": dataclasses.replace(REINFORCE, advantage="ema"),
    "rloo": RLOO,
    "remax": REMAX,
    "reinforce_plus_plus": REINFORCE_PLUS_PLUS,
    "ppo": PPO,
    "grpo": dataclasses.replace(
        GRPO,
        entropy_coefficient=0.1,
        entropy_fraction=0.6,
        importance=ImportanceConfig("token", reject="geometric", low=0.8, high=1.3),
        dual_clip=3.0,
    ),
    "dr_grpo": dr_grpo(T),
    "dapo": dapo(T, 3),
    "gspo": dataclasses.replace(GSPO, truncation="mask", importance=ImportanceConfig("sequence", reject="sequence")),
    "cispo": dataclasses.replace(
        CISPO, scale="batch", kl=KLConfig(loss_coefficient=0.1, ratio="detached"), zero_variance="drop"
    ),
    "maxrl": MAXRL,
    "sapo": PolicyConfig(surrogate="sapo", clip_low=0, clip_high=0),
    "vapo": dataclasses.replace(PPO, value=ValueConfig(gae_lambda=1.0, adaptive_lambda=0.5, whiten_rewards=True)),
}
PAIRS = {
    "dpo": DPOConfig(nll_coefficient=0.2),
    "ipo": DPOConfig(kind="ipo", length_normalised=True),
    "hinge": DPOConfig(kind="hinge"),
    "conservative": DPOConfig(kind="conservative", label_smoothing=0.1),
    "robust": DPOConfig(kind="robust", label_smoothing=0.1),
    "simpo": SimPOConfig(),
    "orpo": ORPOConfig(),
    "cpo": CPOConfig(),
}
OTHERS = ["kto", "reward_pairs", "outcome", "process", "distil_forward", "distil_reverse"]


def make_data() -> dict[str, np.ndarray]:
    """Rows of 1 to 6 tokens, the first token of some a tool's; rows of a group lie apart, and two groups have equal rewards.
    NaN outside of the mask."""
    random = np.random.default_rng(0)
    lengths = np.repeat([1, 1, 2, 2, 3, 6, 6, 6, 6, 5, 4, 4, 3, 1, 2, 6], 2)  # the first part has half of the others' tokens
    mask = np.arange(T) < lengths[:, None]
    mask[lengths > 3, 1] = False
    noise = random.normal(size=(4, B, T))
    groups = np.arange(B) % 8
    rewards = random.integers(0, 3, B) / 2 + 0.25
    rewards[groups == 1] = 0.5
    rewards[groups == 2] = 0.75 - 0.5 * (np.arange(4) == 1)
    data = {
        "features": random.normal(size=(B, T, D)),
        "feature_logits": random.normal(size=(B, T, D, V)),
        "teacher_logits": random.normal(size=(B, T, V)),
        "old": -1 + 0.5 * noise[0],
        "sampler": -1 + 0.5 * noise[0] + 0.2 * noise[1],
        "reference": -1 + 0.4 * noise[2],
        "old_values": 0.3 * noise[3],
    }
    for name in ("old", "sampler", "reference", "old_values"):
        data[name][~mask] = np.nan
    step_labels = np.where(mask, random.integers(0, 2, (B, T)), IGNORE)
    step_labels[:, 0] = IGNORE
    return data | {
        "mask": mask.astype(float),
        "groups": groups,
        "rewards": rewards,
        "valid": np.arange(B) != 7,
        "truncated": lengths == T,
        "baseline": random.normal(size=B),
        "desirable": random.integers(0, 2, B),
        "step_labels": step_labels.astype(float),
    }


@functools.partial(jax.jit, static_argnums=1)
def prepare_all(data, names):
    """Constants and metrics of the objectives named, of the whole batch; leading axis B, or that of pairs."""
    rollouts = Rollouts(
        mask=data["mask"],
        sampler_logprobs=data["sampler"],
        trainer_logprobs=data["old"],
        rewards=data["rewards"],
        groups=data["groups"],
        valid=data["valid"],
        truncated=data["truncated"],
        reference_logprobs=data["reference"],
        values=data["old_values"],
        entropies=-data["old"],
    )
    constants, metrics = {}, {}
    for name in names:
        if name in POLICIES:
            config = POLICIES[name]
            rows = rollouts.replace(baseline=jnp.asarray(0.3) if config.advantage == "ema" else data["baseline"])
            constants[name], metrics[name] = prepare(config, rows, config.kl.reward_coefficient)
    reference = sequence_sums(data["reference"], data["mask"])
    z0 = kto_reference_point(sequence_sums(data["old"], data["mask"])[::-1], reference[::-1], data["valid"])
    return constants | {
        "pairs": sequence_weights(jnp.arange(B // 2) != 5),
        "rows": sequence_weights(data["valid"]),
        "tokens": token_weights(data["mask"], "token_mean"),
        "step_ends": token_weights(process_losses(data["step_labels"], data["step_labels"])[1], "token_mean"),
        "z0": jnp.full(B, z0),
    }, metrics


def loss(name, weights, data, constants):
    """An objective's loss of whatever rows it is given, and metrics; of a linear model that makes NaN outside of the mask."""
    mask, reference = data["mask"], data["reference"]

    def visible(x):
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)) > 0, x, jnp.nan)

    logprobs = visible(-jax.nn.softplus(data["features"] @ weights))
    values = visible(data["features"] @ (2 * weights))
    scores = sequence_sums(values, last_action(mask))
    if name in POLICIES:
        config = POLICIES[name]
        return policy_sums(config, constants[name], logprobs, logprobs**2 if config.entropy_coefficient else None, values)
    if name in PAIRS:
        policy, reference = (
            PairLogprobs(*(sequence_sums(x, mask)[i::2] for x in (x, jnp.ones_like(x)) for i in range(2)))
            for x in (logprobs, reference)
        )
        metrics = pair_metrics(PAIRS[name], policy, reference)
        weigh = functools.partial(weighted_sum, constants["pairs"])
        return weigh(pair_losses(PAIRS[name], policy, reference)), {key: weigh(x) for key, x in metrics.items()}
    match name:
        case "kto":
            sums = sequence_sums(logprobs, mask), sequence_sums(reference, mask)
            which, losses = "rows", kto_losses(KTOConfig(desirable_weight=1.2), *sums, data["desirable"], constants["z0"])
        case "reward_pairs":
            which, losses = "pairs", pairwise_losses(RewardModelConfig(), scores[0::2], scores[1::2], 0.1)
        case "outcome":
            which, losses = "rows", outcome_losses(scores, data["desirable"])
        case "process":
            which, losses = "step_ends", process_losses(values, data["step_labels"])[0]
        case _:
            objective = forward_kl_losses if name == "distil_forward" else reverse_kl_losses
            logits = visible(jnp.einsum("d,btdv->btv", weights, data["feature_logits"]))
            which, losses = "tokens", objective(logits, data["teacher_logits"], 2.0)
    return weighted_sum(constants[which], losses), {}


@functools.partial(jax.jit, static_argnums=2)
def gradients(data, constants, names):
    """Losses, gradients [objectives, D], and metrics. Each objective has parameters of its own, so one backward pass does."""

    def total(weights):
        found = {name: loss(name, weights[i], data, constants) for i, name in enumerate(names)}
        return sum(x for x, _ in found.values()), found

    slopes, found = jax.grad(total, has_aux=True)(jnp.asarray(np.tile(WEIGHTS, (len(names), 1))))
    return {"losses": found, "slopes": slopes}


WEIGHTS = np.asarray([0.3, -0.5, 0.7])
ALL = (*POLICIES, *PAIRS, *OTHERS)
# What differs most: statistics and weights of the batch, values, pairs, constants made of the batch.
SOME = ("grpo", "ppo", "dpo", "kto")


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module", params=[pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.slow)])
def whole(request, data):
    """Names of objectives, their constants, metrics and gradients."""
    with jax.enable_x64(True):
        constants, metrics = prepare_all(data, request.param)
        return request.param, constants, metrics, gradients(data, constants, request.param)


def check_equal(found, expected):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    jax.tree_util.tree_map_with_path(lambda path, x, y: check(x, y, err_msg=jax.tree_util.keystr(path)), found, expected)


def test_every_loss_is_finite_though_padding_is_not(whole):
    metrics, result = jax.device_get(whole[2:])
    assert np.isfinite(ravel_pytree((metrics, result))[0]).all()
    assert (np.abs(result["slopes"]).max(axis=1) > 1e-4).all()


def test_micro_batches_are_one_batch(whole, data):
    """Quarters of the rows, of unequal numbers of tokens."""
    names, constants, _, expected = whole

    def part(x, i):
        rows = x.shape[0] // PARTS
        return np.asarray(x)[i * rows : (i + 1) * rows]

    with jax.enable_x64(True):
        parts = [gradients(*jax.tree.map(lambda x, i=i: part(x, i), (data, constants)), names) for i in range(PARTS)]
        check_equal(jax.tree.map(lambda *x: sum(map(np.asarray, x)), *parts), jax.device_get(expected))
        # A mean of the parts' means is another loss.
        means = np.concatenate([token_weights(part(data["mask"], i), "token_mean") / PARTS for i in range(PARTS)])
        assert np.abs(means / np.maximum(constants["tokens"], 1e-9) - data["mask"]).max() > 0.2


def test_eight_devices_are_one(whole, data):
    names, constants, metrics, expected = whole
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.enable_x64(True):
        dealt_out = {name: jax.device_put(x, rows) for name, x in data.items()}
        found = prepare_all(dealt_out, names)
        check_equal(jax.device_get(found), jax.device_get((constants, metrics)))
        result = gradients(dealt_out, jax.tree.map(lambda x: jax.device_put(x, rows), found[0]), names)
        check_equal(jax.device_get(result), jax.device_get(expected))
