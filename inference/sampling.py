"""How the next token is drawn: what a request asks for, and the draw for a batch of rows that each ask for something else.

Logits become a distribution in this order: penalties, bias, temperature, what is allowed at all, top-k, top-p of what top-k
left, min-p. Tokens of equal logits stay or go together, so that no order among them is made up.

A row draws with random numbers that depend on its seed, its sample and the number of its token alone (the Gumbel-max trick),
and so not on its neighbours, nor on the order in which the engine takes things.

Axes: B rows, T tokens of a row, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import numbers

import flax.struct
import jax
import jax.numpy as jnp

from model.config import check
from model.kernels.reductions import log_sum_exp
from model.kernels.tiles import MASKED

TOP_LOGPROBS = 20  # at most so many alternatives are reported


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; 0 is off.
    top_p: only the most likely tokens that together reach this probability (arXiv:1904.09751); 1 is off.
    min_p: only tokens at least so probable as this share of the most probable one (arXiv:2407.01082); 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of tokens that stand in the prompt or the answer
      (arXiv:1909.05858); 1 is off.
    frequency_penalty, presence_penalty: taken off a token's logit, for each time that it stands in the answer, and once.
    logit_bias: tokens, and what is added to their logits.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        said = {f"logit_bias of token {token}": bias for token, bias in self.logit_bias}
        said |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "logit_bias"}
        for name, value in said.items():
            check(isinstance(value, numbers.Real), f"{name}={value!r} must be a number")
        check(
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            f"temperature={self.temperature} must lie in [0.001, 1000], or be 0 (greedy)",
        )
        check(
            isinstance(self.top_k, numbers.Integral) and 0 <= self.top_k < 2**31,
            f"top_k={self.top_k} must be a whole number in [0, 2^31) (0 is off)",
        )
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1] (1 is off)")
        check(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1] (0 is off)")
        check(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty={self.repetition_penalty} must lie in [0.01, 100] (1 is off)",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            check(-2 <= getattr(self, name) <= 2, f"{name}={getattr(self, name)} must lie in [-2, 2] (0 is off)")
        for token, bias in self.logit_bias:
            check(isinstance(token, numbers.Integral), f"logit_bias of token {token!r}: tokens are whole numbers")
            check(-100 <= bias <= 100, f"logit_bias of token {token} is {bias}: it must lie in [-100, 100]")

    @property
    def reads_history(self) -> bool:
        """Whether the draw depends on tokens of the prompt or the answer, or on a bias."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


SAMPLING = Sampling()  # from the model's own distribution


def derived_seed(purpose: str, *numbers: int) -> int:
    """For a request: 32 bits that no other purpose and numbers have but by chance."""
    return int.from_bytes(hashlib.sha256("/".join([purpose, *map(str, numbers)]).encode()).digest()[:4], "little")


@flax.struct.dataclass
class Rows:
    """What each row of a batch asks for, arrays [B]: the fields of `Sampling`, and the numbers its random numbers come from.

    Attributes:
      slot: int32, its row of `History`.
      reads_history: bool; the penalties and the bias of other rows are not looked at.
      seed, sample, num_drawn: uint32; which request, which of its samples, how many tokens that has already.
      top_logprobs: int32, how many alternatives are reported.
    """

    slot: jax.Array
    reads_history: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    seed: jax.Array
    sample: jax.Array
    num_drawn: jax.Array
    top_logprobs: jax.Array


@flax.struct.dataclass
class History:
    """What penalties read, a row per slot of the engine: float32, int32 and bool [slots, V]."""

    bias: jax.Array
    counts: jax.Array
    in_prompt: jax.Array

    @classmethod
    def empty(cls, slots: int, vocab_size: int) -> History:
        shape = (slots, vocab_size)
        return cls(jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


@flax.struct.dataclass
class Draws:
    """What was drawn, [B, ...].

    Attributes:
      token: int32.
      logprob: float32, under the distribution that was drawn from; 0 where the most likely token was taken.
      raw_logprob: float32, under the model's own distribution over its whole vocabulary.
      top_tokens, top_logprobs: [B, TOP_LOGPROBS], the most probable of the distribution that was drawn from (for rows at
        temperature 0, of what it would be at 1); zeros where no row asks.
      raw_top_tokens, raw_top_logprobs: likewise of the model's own.
    """

    token: jax.Array
    logprob: jax.Array
    raw_logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    raw_top_tokens: jax.Array
    raw_top_logprobs: jax.Array


def _with_history(logits_BV: jax.Array, rows: Rows, history: History) -> jax.Array:
    bias, counts, in_prompt = (leaf[rows.slot] for leaf in (history.bias, history.counts, history.in_prompt))
    repetition = rows.repetition_penalty[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
    x = jnp.where(in_prompt | (counts > 0), penalised, logits_BV)
    x = x - rows.frequency_penalty[:, None] * counts - rows.presence_penalty[:, None] * (counts > 0) + bias
    return jnp.where(rows.reads_history[:, None], x, logits_BV)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 `x` do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys_BV: jax.Array, weights_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """The largest uint32 [B] such that the weights of keys not below it reach `wanted`; 0 if all together do not.

    Found bit by bit, which on CPUs and TPUs is many times cheaper than to sort a vocabulary.
    """

    def bit(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        candidate_B = threshold_B | (jnp.uint32(1 << 31) >> i)
        mass_B = jnp.sum(jnp.where(keys_BV >= candidate_B[:, None], weights_BV, 0.0), axis=1)
        return jnp.where(mass_B >= wanted_B, candidate_B, threshold_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(wanted_B, jnp.uint32))


def _truncated(x_BV: jax.Array, rows: Rows) -> jax.Array:
    """MASKED in place of the logits that top-k, top-p and min-p leave out."""
    keys_BV = _ordered(x_BV)
    wanted_B = jnp.where(rows.top_k > 0, rows.top_k, x_BV.shape[1]).astype(jnp.float32)
    least_B = jax.lax.cond(
        jnp.any(rows.top_k > 0),
        lambda: _threshold(keys_BV, jnp.ones_like(x_BV), wanted_B),
        lambda: jnp.zeros_like(wanted_B, jnp.uint32),
    )
    probabilities_BV = jax.nn.softmax(jnp.where(keys_BV >= least_B[:, None], x_BV, MASKED))
    nucleus_B = jax.lax.cond(
        jnp.any(rows.top_p < 1),
        lambda: _threshold(_ordered(probabilities_BV), probabilities_BV, rows.top_p),
        lambda: jnp.zeros_like(wanted_B, jnp.uint32),
    )
    # The most likely token stays, however small top_p is: below 1e-38 it is 0 in float32, which nothing at all reaches.
    nucleus_B = jnp.minimum(nucleus_B, jnp.max(_ordered(probabilities_BV), axis=1))
    nucleus_B = jnp.where(rows.top_p < 1, nucleus_B, 0)
    kept_BV = (keys_BV >= least_B[:, None]) & (_ordered(probabilities_BV) >= nucleus_B[:, None])
    kept_BV &= probabilities_BV >= rows.min_p[:, None] * jnp.max(probabilities_BV, axis=1, keepdims=True)
    return jnp.where(kept_BV, x_BV, MASKED)


def _keys(rows: Rows) -> jax.Array:
    def of_row(seed: jax.Array, sample: jax.Array, num_drawn: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), num_drawn)

    return jax.vmap(of_row)(rows.seed, rows.sample, rows.num_drawn)


def gumbel(bits: jax.Array) -> jax.Array:
    """Gumbel noise -log(-log(1 - u)), float32, of uniform uint32: u = (bits + 1/2) / 2^32.

    A token of probability p is drawn with p x / sinh(x), x = 2^-33 / p: too seldom by 1e-4 of it where p is 5e-9, and by less
    than 0.12 * 2^-32 whatever it is, which over 262,144 tokens are 8e-6. With the 23 bits that `jax.random.gumbel` takes of
    these 32 all the unlikely ones of so many together lose up to a hundredth. Its mode "high" takes 46 of twice as many, and on
    CPUs 2 to 3 times as long as either.
    """
    # By halves, and as signed numbers: a float32 holds each, and CPUs convert them faster.
    high, low = (half.astype(jnp.int32).astype(jnp.float32) for half in (bits >> 16, bits & 0xFFFF))
    u = jnp.minimum(high * 2.0**-16 + (low + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # Where 1 - u would lose bits of u, the logarithm is its series.
    exponential = jnp.where(u < 2.0**-8, u * (1 + u * (1 / 2 + u / 3)), -jnp.log(1 - u))
    return -jnp.log(exponential)


def draw(logits_BV: jax.Array, rows: Rows, history: History, allowed_BW: jax.Array) -> Draws:
    """One token for each row.

    Args:
      logits_BV: float32.
      allowed_BW: uint32, bit i of word w is set where token 32 w + i may be drawn.
    """
    V = logits_BV.shape[1]
    bits_BWx = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed_BV = bits_BWx.reshape(logits_BV.shape[0], -1)[:, :V] == 1
    x_BV = jax.lax.cond(jnp.any(rows.reads_history), lambda: _with_history(logits_BV, rows, history), lambda: logits_BV)
    greedy_B = rows.temperature == 0
    x_BV = jnp.where(allowed_BV, x_BV / jnp.where(greedy_B, 1.0, rows.temperature)[:, None], MASKED)
    most_likely_B = jnp.argmax(x_BV, axis=1).astype(jnp.int32)

    def sampled() -> tuple[jax.Array, jax.Array]:
        truncates = jnp.any((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
        kept_BV = jax.lax.cond(truncates, lambda: _truncated(x_BV, rows), lambda: x_BV)
        kept_BV = jnp.where(greedy_B[:, None], x_BV, kept_BV)  # as where all rows are greedy
        noise_BV = gumbel(jax.vmap(lambda key: jax.random.bits(key, (V,), jnp.uint32))(_keys(rows)))
        noisy_BV = jnp.where(kept_BV > MASKED, kept_BV + noise_BV, MASKED)
        return kept_BV, jnp.where(greedy_B, most_likely_B, jnp.argmax(noisy_BV, axis=1).astype(jnp.int32))

    x_BV, token_B = jax.lax.cond(jnp.all(greedy_B), lambda: (x_BV, most_likely_B), sampled)

    def at_token(values_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values_BV, token_B[:, None], axis=1)[:, 0]

    raw_lse_B = log_sum_exp(logits_BV)
    lse_B = log_sum_exp(x_BV)
    k = min(TOP_LOGPROBS, V)

    def alternatives() -> tuple[jax.Array, ...]:
        (top, tokens), (raw_top, raw_tokens) = jax.lax.top_k(x_BV, k), jax.lax.top_k(logits_BV, k)
        return tokens, top - lse_B[:, None], raw_tokens, raw_top - raw_lse_B[:, None]

    nothing = (jnp.zeros((len(logits_BV), k), jnp.int32), jnp.zeros((len(logits_BV), k))) * 2
    top = jax.lax.cond(jnp.any(rows.top_logprobs > 0), alternatives, lambda: nothing)
    logprob_B = jnp.where(greedy_B, 0.0, at_token(x_BV) - lse_B)
    return Draws(token_B, logprob_B, at_token(logits_BV) - raw_lse_B, *top)


def draw_in_turn(
    logits_BTV: jax.Array, tokens_BT: jax.Array, real_BT: jax.Array, rows: Rows, history: History, allowed_BW: jax.Array
) -> tuple[Draws, History]:
    """A token after each of `tokens`, the first of which stands and the others of which are guesses.

    A guess that is drawn stands as well, and what is drawn after one that is not is drawn in vain: the tokens up to there are
    those that one at a time would have been drawn, by the same random numbers.

    Args:
      tokens_BT: int32; real_BT: bool, False from where a row has no guess.

    Returns:
      Draws [B, T], and the history with the tokens that were not drawn in vain.
    """
    following_BT = jnp.concatenate([tokens_BT[:, 1:], jnp.full_like(tokens_BT[:, :1], -1)], axis=1)
    real_after_BT = jnp.concatenate([real_BT[:, 1:], jnp.zeros_like(real_BT[:, :1])], axis=1)

    def turn(carry: tuple[History, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple[History, jax.Array], Draws]:
        history, stands_B = carry
        t, logits_BV, following_B, real_after_B = now
        draws = draw(logits_BV, dataclasses.replace(rows, num_drawn=rows.num_drawn + t), history, allowed_BW)
        # Whole rows: where the vocabulary lies over a mesh, jaxlib 0.10.2 counts single elements wrong at the borders between
        # devices (experiments/LOG.md).
        counted_BV = (jnp.arange(history.counts.shape[1]) == draws.token[:, None]) & stands_B[:, None]
        counts = history.counts.at[rows.slot].add(counted_BV.astype(jnp.int32), mode="drop")
        stands_B &= real_after_B & (draws.token == following_B)
        return (dataclasses.replace(history, counts=counts), stands_B), draws

    turns = jnp.arange(tokens_BT.shape[1], dtype=jnp.uint32)
    steps = (turns, logits_BTV.swapaxes(0, 1), following_BT.T, real_after_BT.T)
    (history, _), draws = jax.lax.scan(turn, (history, real_BT[:, 0]), steps)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), draws), history
