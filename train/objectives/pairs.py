"""Preference pairs: what DPO, SimPO, ORPO and CPO are functions of.

Axis: N pairs.
"""

from __future__ import annotations

import flax.struct
import jax

from train.objectives.aggregate import as_float, divide


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


def preference_accuracy(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """1 where the chosen answer has the higher reward, 1/2 for a tie, else 0."""
    return as_float(chosen > rejected) + as_float(chosen == rejected) / 2
