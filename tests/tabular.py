"""A policy small enough to enumerate: every sequence it can write, exact probabilities, exact expectations.

Three tokens, of which 0 stops; at most three tokens. That makes 15 sequences over 7 prefixes, of unequal lengths, the longest
ones cut off.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

V, LIMIT = 3, 3
PREFIXES = [p for length in range(LIMIT) for p in itertools.product((1, 2), repeat=length)]
SEQUENCES = [(*p, 0) for p in PREFIXES] + list(itertools.product((1, 2), repeat=LIMIT))
ROWS = len(SEQUENCES)
LENGTHS = np.asarray([len(s) for s in SEQUENCES])
MASK = (np.arange(LIMIT) < LENGTHS[:, None]).astype(np.float64)
TOKENS, CONTEXTS = np.zeros((2, ROWS, LIMIT), np.int64)
for row, sequence in enumerate(SEQUENCES):
    for t, token in enumerate(sequence):
        TOKENS[row, t], CONTEXTS[row, t] = token, PREFIXES.index(sequence[:t])
TRUNCATED = np.asarray([sequence[-1] != 0 for sequence in SEQUENCES])


def random_policy(seed: int, scale: float = 1.0) -> np.ndarray:
    """Logits [7, 3] float64."""
    return scale * np.random.default_rng(seed).normal(size=(len(PREFIXES), V))


def token_logprobs(logits: jax.Array) -> jax.Array:
    """[15, 3], of the tokens of every sequence; NaN after its end."""
    return jnp.where(MASK > 0, jax.nn.log_softmax(logits)[CONTEXTS, TOKENS], jnp.nan)


def sequence_logprobs(logits: jax.Array) -> jax.Array:
    """[15]."""
    return jnp.nansum(token_logprobs(logits), axis=-1)


def kl(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(policy, reference) over sequences."""
    log_p = sequence_logprobs(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - sequence_logprobs(reference)))


def kl_of_next_tokens(logits: jax.Array, reference: jax.Array, prefixes_of: jax.Array) -> jax.Array:
    """Sum over prefixes of their probability under `prefixes_of` x KL of the next token."""
    log_p, log_r = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    reached = jnp.zeros(len(PREFIXES)).at[CONTEXTS].add(MASK * jnp.exp(sequence_logprobs(prefixes_of))[:, None])
    return jnp.sum(reached * jnp.sum(jnp.exp(log_p) * (log_p - log_r), axis=-1))
