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
    RewardModelConfig,
    SimPOConfig,
    dapo,
    dr_grpo,
)
from train.objectives.distillation import forward_kl_losses, reverse_kl_losses, sequence_losses
from train.objectives.kto import kto_losses, kto_reference_point, mismatched_rows
from train.objectives.pairs import pair_logprobs
from train.objectives.policy_gradient import Rollouts, policy_sums, prepare
from train.objectives.preference import pair_losses, pair_metrics
from train.objectives.reward_model import (
    IGNORE,
    last_token_scores,
    outcome_losses,
    pairwise_losses,
    process_losses,
    ranking_losses,
)

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
}
PAIRS = {
    "dpo": DPOConfig(nll_coefficient=0.2),
    "ipo": DPOConfig(kind="ipo", length_normalised=True),
    "robust": DPOConfig(kind="robust", label_smoothing=0.1),
    "simpo": SimPOConfig(),
    "orpo": ORPOConfig(),
    "cpo": CPOConfig(),
}
OTHERS = ["kto", "reward_pairs", "reward_rankings", "outcome", "process", "distil_forward", "distil_reverse", "distil_sequence"]


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
    for x in data.values():
        x[~mask] = np.nan
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


def prepare_all(data):
    """Constants of each objective, of the whole batch; leading axis B or B / 2 or B / 4."""
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
        baseline=data["baseline"],
    )
    metrics = {}
    constants = {}
    for name, config in POLICIES.items():
        rows = rollouts.replace(baseline=jnp.asarray(0.3)) if config.advantage == "ema" else rollouts
        constants[name], metrics[name] = prepare(config, rows, config.kl.reward_coefficient)
    reference = sequence_sums(data["reference"], data["mask"])
    mismatched = sequence_sums(data["old"], data["mask"])[mismatched_rows(B)]
    z0 = kto_reference_point(mismatched, reference[mismatched_rows(B)], data["valid"])
    constants |= {
        "pairs": sequence_weights(jnp.arange(B // 2) != 5),
        "rankings": sequence_weights(jnp.arange(B // 4) != 2),
        "rows": sequence_weights(data["valid"]),
        "tokens": token_weights(data["mask"], "token_mean"),
        "step_ends": token_weights(process_losses(data["step_labels"], data["step_labels"])[1], "token_mean"),
        "z0": jnp.full(B, z0),
    }
    return constants, metrics


def all_losses(weights, data, constants):
    """Every objective's loss, of whatever rows it is given; each is a function of its own row of `weights` [objectives, D]."""
    mask = data["mask"]
    losses, sums = {}, {}

    def parameters(name):
        return weights[OBJECTIVES.index(name)]

    def logprobs(name):
        return -jax.nn.softplus(data["features"] @ parameters(name))

    def values(name):
        return data["features"] @ (2 * parameters(name))

    def scores(name):
        return last_token_scores(values(name), mask)

    for name, config in POLICIES.items():
        log_p = logprobs(name)
        entropies = log_p**2 if config.entropy_coefficient else None
        losses[name], sums[name] = policy_sums(config, constants[name], log_p, entropies, values(name))
    reference = pair_logprobs(data["reference"], mask)
    for name, config in PAIRS.items():
        policy = pair_logprobs(logprobs(name), mask)
        losses[name] = weighted_sum(constants["pairs"], pair_losses(config, policy, reference))
        metrics = pair_metrics(config, policy, reference)
        sums[name] = {key: weighted_sum(constants["pairs"], x) for key, x in metrics.items()}
    kto = KTOConfig(desirable_weight=1.2)
    kto_policy, kto_reference = sequence_sums(logprobs("kto"), mask), sequence_sums(data["reference"], mask)
    pairs, rankings = scores("reward_pairs"), scores("reward_rankings").reshape(-1, 4)
    ranks = jnp.broadcast_to(jnp.asarray([0, 1, 1, 2]), rankings.shape)
    of_sequence = {
        "kto": ("rows", kto_losses(kto, kto_policy, kto_reference, data["desirable"], constants["z0"])),
        "outcome": ("rows", outcome_losses(scores("outcome"), data["desirable"])),
        "reward_pairs": ("pairs", pairwise_losses(RewardModelConfig(), pairs[0::2], pairs[1::2], 0.1)),
        "reward_rankings": ("rankings", ranking_losses(RewardModelConfig(), rankings, ranks, jnp.ones_like(ranks))),
        "process": ("step_ends", process_losses(values("process"), data["step_labels"])[0]),
        "distil_sequence": ("tokens", sequence_losses(logprobs("distil_sequence"))),
    }
    teacher = jnp.where(mask[..., None] > 0, data["teacher_logits"], 0.0)
    for name, objective in {"distil_forward": forward_kl_losses, "distil_reverse": reverse_kl_losses}.items():
        logits = jnp.einsum("d,btdv->btv", parameters(name), data["feature_logits"])
        of_sequence[name] = "tokens", objective(jnp.where(mask[..., None] > 0, logits, 0.0), teacher, 2.0)
    losses |= {name: weighted_sum(constants[which], x) for name, (which, x) in of_sequence.items()}
    return losses, sums


OBJECTIVES = [*POLICIES, *PAIRS, *OTHERS]
WEIGHTS = np.tile([0.3, -0.5, 0.7], (len(OBJECTIVES), 1))


@jax.jit
def gradients(data, constants):
    """Losses, gradients [objectives, D], and metrics."""

    def total(weights):
        losses, sums = all_losses(weights, data, constants)
        return sum(losses.values()), (losses, sums)

    slopes, (losses, sums) = jax.grad(total, has_aux=True)(jnp.asarray(WEIGHTS))
    return {"losses": losses, "slopes": slopes, **sums}


prepare_all = jax.jit(prepare_all)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def whole(data):
    with jax.enable_x64(True):
        constants, metrics = prepare_all(data)
        return constants, metrics, gradients(data, constants)


def check_equal(found, expected):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    jax.tree_util.tree_map_with_path(lambda path, x, y: check(x, y, err_msg=jax.tree_util.keystr(path)), found, expected)


def test_every_objective_is_here_and_finite_though_padding_is_not(whole):
    _, metrics, result = jax.device_get(whole)
    assert set(result["losses"]) == set(OBJECTIVES)
    assert np.isfinite(ravel_pytree((metrics, result))[0]).all()
    assert (np.abs(result["slopes"]).max(axis=1) > 1e-4).all()


def test_micro_batches_are_one_batch(whole, data):
    """Parts of a quarter of the rows each, of unequal numbers of tokens."""
    constants, _, expected = whole

    def part(x, i):
        rows = x.shape[0] // PARTS
        return np.asarray(x)[i * rows : (i + 1) * rows]

    with jax.enable_x64(True):
        parts = [gradients(*jax.tree.map(lambda x, i=i: part(x, i), (data, constants))) for i in range(PARTS)]
        check_equal(jax.tree.map(lambda *x: sum(map(np.asarray, x)), *parts), jax.device_get(expected))
        # A mean of the parts' means is another loss.
        means = np.concatenate([token_weights(part(data["mask"], i), "token_mean") / PARTS for i in range(PARTS)])
        assert np.abs(means / np.maximum(constants["tokens"], 1e-9) - data["mask"]).max() > 0.2


def test_eight_devices_are_one(whole, data):
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.enable_x64(True):
        constants, metrics = prepare_all({name: jax.device_put(x, rows) for name, x in data.items()})
        check_equal(jax.device_get((constants, metrics)), jax.device_get(whole[:2]))

        # Each device adds up its own rows.
        def local(data, constants):
            return jax.tree.map(lambda x: jax.lax.psum(x, "data"), gradients(data, constants))

        sums = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False)
        )
        check_equal(jax.device_get(sums(data, constants)), jax.device_get(whole[2]))
