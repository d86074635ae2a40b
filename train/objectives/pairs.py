"""Preference pairs: what DPO, SimPO, ORPO and CPO are functions of.

Axes: N pairs, T tokens.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from train.objectives.aggregate import as_float, divide, sequence_sums


@flax.struct.dataclass
class PairLogprobs:
    """Of N pairs, each [N]: sums of the answers' log-probabilities, and their lengths in tokens; stop tokens included."""

    chosen: jax.Array
    rejected: jax.Array
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array

    @property
    def chosen_means(self) -> jax.Array:
        return divide(self.chosen, self.chosen_lengths)

    @property
    def rejected_means(self) -> jax.Array:
        return divide(self.rejected, self.rejected_lengths)


def pair_logprobs(logprobs: jax.Array, mask: jax.Array) -> PairLogprobs:
    """From [N, 2, T], chosen before rejected: a pair is one row, which stays whole when rows are dealt out. The mask is 1
    on the answers' tokens."""
    sums, lengths = sequence_sums(logprobs, mask), jnp.sum(as_float(mask), axis=-1)
    return PairLogprobs(sums[:, 0], sums[:, 1], lengths[:, 0], lengths[:, 1])


def preference_accuracy(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """1 where the chosen answer has the higher reward, 1/2 for a tie, else 0."""
    return as_float(chosen > rejected) + as_float(chosen == rejected) / 2
