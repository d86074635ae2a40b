"""What shows whether post-training is honest and healthy.

Axes: B sequences, T tokens. Shares are of the whole batch; what is marked "per token" is to be weighed and summed like a loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from train.objectives.aggregate import as_float, divide, masked, masked_mean
from train.objectives.config import PolicyConfig
from train.objectives.kl import kl_values


def pass_at_k(num_samples: np.ndarray | int, num_correct: np.ndarray | int, k: int) -> np.ndarray:
    """Unbiased chance that one of k samples is right, of `num_correct` right ones among `num_samples` of each problem
    (arXiv:2107.03374): 1 - C(n - c, k) / C(n, k), as a product without large numbers.

    Raises:
      ValueError: k is more than the samples there are, or counts make no sense.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of each problem, and k >= 1; there are {n.min()}")
    if ((c < 0) | (c > n)).any():
        raise ValueError("num_correct must lie in [0, num_samples]")
    i = np.arange(k)
    return 1 - np.prod(np.maximum(n[..., None] - c[..., None] - i, 0) / (n[..., None] - i), axis=-1)


def held_out_scores(right: np.ndarray) -> dict[str, float]:
    """Mean pass@1 and pass@n of the prompts of which so many answers were judged (without any, none), how many prompts are
    left out of each, and how many answers were not judged.

    Args:
      right: [prompts, n], whether each answer is right; NaN where nobody could tell, which is no wrong answer.
    """
    judged = np.isfinite(right).sum(axis=1)
    scores: dict[str, float] = {"eval/failed": int(right.size - judged.sum())}
    for k in sorted({1, right.shape[1]}):
        enough = judged >= k
        scores[f"eval/prompts_left_out@{k}"] = int((~enough).sum())
        if enough.any():
            scores[f"eval/pass@{k}"] = float(pass_at_k(judged[enough], (right[enough] == 1).sum(axis=1), k).mean())
    return scores


def clip_fractions(config: PolicyConfig, log_ratio: jax.Array, advantages: jax.Array) -> dict[str, jax.Array]:
    """Per token: whether a bound on its ratio (`gspo`: its sequence's) took its gradient, or cut it short (`cispo`). Zero until
    the policy has moved.

    clip_low_fraction: below the lower bound, which only bites where the advantage is negative; `cispo` has none.
    clip_high_fraction: above the upper bound, where the advantage is positive.
    clip_high_negative_fraction: above it where the advantage is negative, if it has a bound there: `dual_clip`, or `cispo`'s.
    """
    ratio = jnp.exp(log_ratio)
    cispo = config.surrogate == "cispo"
    lowest, highest = 0.0 if cispo else 1 - config.clip_low, 1 + config.clip_high
    fractions = {
        "clip_low_fraction": as_float((ratio < lowest) & (advantages < 0)),
        "clip_high_fraction": as_float((ratio > highest) & (advantages > 0)),
    }
    if cispo or config.dual_clip:
        above = ratio > (highest if cispo else config.dual_clip)
        fractions["clip_high_negative_fraction"] = as_float(above & (advantages < 0))
    return fractions


def sampler_mismatch(trainer_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Of the same tokens [B, T] scored by the trainer before it moves and by the sampler: KL(sampler, trainer) per token
    (k3: never negative), and the largest difference of log-probabilities."""
    difference = jnp.abs(masked(trainer_logprobs, mask) - masked(sampler_logprobs, mask))
    return {
        "mismatch_kl": masked_mean(kl_values(sampler_logprobs, trainer_logprobs, mask, "k3"), mask),
        "mismatch_max": jnp.max(difference),
    }


def effective_sample_fraction(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """(sum w)^2 / (n sum w^2) of importance weights [B, T]: 1 if all are equal, 1/n if one rules."""
    total, squares = jnp.sum(masked(weights, mask)), jnp.sum(masked(jnp.square(weights), mask))
    return divide(jnp.square(total), jnp.sum(as_float(mask)) * squares)


def rollout_metrics(
    rewards: np.ndarray, correct: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, valid: np.ndarray
) -> dict[str, float]:
    """Of the whole batch, all [B]. Lengths of right and of wrong answers apart: wrong ones that grow are a biased loss. A mean
    over nothing is left out.

    `correct` is 1 or 0, or NaN where nobody could tell: a reward need not be made of it.
    """
    judged = np.asarray(valid) > 0
    told = judged & np.isfinite(correct)
    of = {
        "reward_mean": (rewards, judged),
        "correct_fraction": (correct, told),
        "truncated_fraction": (truncated, judged),
        "length_mean": (lengths, judged),
        "length_correct": (lengths, told & (correct == 1)),
        "length_wrong": (lengths, told & (correct == 0)),
    }
    means = {name: float(np.mean(x[chosen], dtype=np.float64)) for name, (x, chosen) in of.items() if chosen.any()}
    spread = {"reward_std": float(np.std(rewards[judged], dtype=np.float64))} if judged.any() else {}
    return means | spread
