"""Do engine and trainer agree? Log-probabilities of the whole vocabulary after every token of some rows, by the programs that
decode and by the forward that trains, of the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import Engine
from model.transformer import forward, unembed


@dataclasses.dataclass(frozen=True)
class Parity:
    """Absolute differences of log-probabilities, nats, over the whole vocabulary; `drawn` over the rows' own tokens alone."""

    largest: float
    mean: float
    drawn_largest: float
    drawn_mean: float


def parity(engine: Engine, rows: Sequence[Sequence[int]], num_prefilled: int) -> Parity:
    """How far the two are apart.

    Args:
      engine: one without work; what it holds of other prompts is left alone.
      rows: token ids, each longer than `num_prefilled`, which are prefilled; the others are decoded one at a time.
    """

    @jax.jit
    def trained(params, tokens: jax.Array) -> jax.Array:
        hidden, _, _ = forward(params, engine.model, tokens, jnp.arange(tokens.shape[1])[None])
        return jax.nn.log_softmax(unembed(params, engine.model, hidden))[0]

    all_differences, drawn_differences = [], []
    for row in rows:
        decoded = jax.nn.log_softmax(engine.logits_along(row, num_prefilled))
        expected = trained(engine.params, np.asarray(row, np.int32)[None])[num_prefilled:]
        difference = np.abs(np.asarray(decoded, np.float64) - np.asarray(expected, np.float64))
        all_differences.append(difference)
        drawn_differences.append(difference[np.arange(len(difference) - 1), row[num_prefilled + 1 :]])
    everything, drawn = (np.concatenate([d.ravel() for d in ds]) for ds in (all_differences, drawn_differences))
    return Parity(*(float(x) for x in (everything.max(), everything.mean(), drawn.max(), drawn.mean())))
