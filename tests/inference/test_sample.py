"""Sampling: the distribution that is drawn from, and that the cached loop continues as the full forward would."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.sample import SamplingConfig, generate, sample_token
from model.transformer import forward, unembed
from tests.networks import SMALL, random_params

GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=1.5, top_k=20, top_p=0.95)
PROMPTS = [[3, 7, 1], [5], [40, 2, 2, 9, 11]]
NEW = 8  # tokens; the same everywhere, so that few programs are compiled

TWO_LAYERS = dataclasses.replace(SMALL, num_layers=2)
WINDOWED = dataclasses.replace(TWO_LAYERS, window_pattern=(3, 0), qk_norm="head")  # RoPE, two query heads a key-value head
SCANNED = dataclasses.replace(WINDOWED, scan_layers=True)
# The longest prompt and its continuation fill the context to the last position.
LEARNED = dataclasses.replace(
    TWO_LAYERS, positions="learned", max_seq_len=5 + NEW, num_kv_heads=4, norm="layernorm", mlp="gelu", tie_embeddings=True
)


# --- One token --------------------------------------------------------------------------------------------------------

LOGITS = np.array([1.0, 2.5, 2.5, -1.0, 0.3, 2.5, -2.0, 1.9], np.float32)


def exact(temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities in float64, one token at a time; among equal logits the lower id comes first."""
    logits = LOGITS.astype(np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[:top_k] if top_k else order
    weights = {token: np.exp(logits[token]) for token in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    probabilities = np.zeros(len(logits))
    probabilities[nucleus] = [weights[token] for token in nucleus]
    return probabilities / probabilities.sum()


def draws(sampling, count):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: sample_token(jnp.asarray(LOGITS), key, sampling)))(keys))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 2},  # cuts through three equal logits
        {"top_k": 4, "temperature": 2.0},
        {"top_k": 100},
        {"top_p": 0.35},  # the first two of three equal logits
        {"top_p": 0.8},
        {"top_p": 0.6, "top_k": 3, "temperature": 0.7},  # top_p is a share of what top_k leaves
    ],
    ids=str,
)
def test_tokens_come_with_their_exact_probabilities(options):
    count, expected = 20_000, exact(**options)
    counts = np.bincount(draws(SamplingConfig(**options), count), minlength=len(LOGITS))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = np.sum((counts - count * expected)[possible] ** 2 / (count * expected[possible]))
    # 1 - 1e-4 quantiles of chi-square with 1 to 7 degrees of freedom: over the 9 cases a right sampler fails for one seed in
    # a thousand, and this seed is fixed.
    quantiles = [15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88]
    assert possible.sum() > 1
    assert statistic < quantiles[possible.sum() - 2]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 1e-6}, {"top_k": 1}, {"temperature": 0.0, "top_k": 3}])
def test_greedy_and_its_limits_take_the_first_of_the_most_likely(options):
    assert set(draws(SamplingConfig(**options), 200).tolist()) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p")],
)
def test_options_off_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


# --- Continuations ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def all_logits(params, config, tokens):
    positions = jnp.arange(tokens.size, dtype=jnp.int32)[None]
    return unembed(params, config, forward(params, config, tokens[None], positions)[0][0])


def next_logits(params, config, tokens):
    """Of the token after `tokens`, from a full forward without a cache; what is padded behind them is not seen."""
    padded = np.zeros(config.max_seq_len, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(all_logits(params, config, padded))[len(tokens) - 1]


@pytest.mark.parametrize("config", [LEARNED, WINDOWED, SCANNED], ids=["learned", "rope_window_gqa", "scanned"])
def test_greedy_continuations_are_those_of_the_full_forward(config):
    params = random_params(config)
    continuations = generate(params, config, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        assert len(continuation) == NEW
        for i, token in enumerate(continuation):
            logits = next_logits(params, config, prompt + continuation[:i])
            runner_up, best = np.sort(logits)[-2:]
            assert best - runner_up > 1e-4, "choose another seed: rounding could change this token"
            assert token == np.argmax(logits)


def test_sampled_continuations_draw_from_the_logits_of_the_full_forward():
    """The key of (seed, row, step) and the logits of a full forward give the same token, at every step of every row."""
    params, draw = random_params(WINDOWED), jax.jit(sample_token, static_argnames="sampling")
    for row, continuation in enumerate(generate(params, WINDOWED, PROMPTS, max_new_tokens=NEW, seed=3, sampling=SAMPLED)):
        row_key = jax.random.fold_in(jax.random.key(3), row)
        for i, token in enumerate(continuation):
            logits = next_logits(params, WINDOWED, PROMPTS[row] + continuation[:i])
            assert token == draw(logits, jax.random.fold_in(row_key, i), SAMPLED)


def test_a_prompt_in_a_ragged_batch_continues_as_it_does_alone():
    params = random_params(LEARNED)
    together = generate(params, LEARNED, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)
    assert generate(params, LEARNED, [PROMPTS[1]], max_new_tokens=NEW, sampling=GREEDY) == [together[1]]


def test_a_sampled_row_depends_on_its_place_and_not_on_its_neighbours():
    params = random_params(WINDOWED)

    def sampled(prompts, seed=1):
        return generate(params, WINDOWED, prompts, max_new_tokens=NEW, seed=seed, sampling=SAMPLED)

    prompt = [5, 6, 7, 8, 9]
    first, other, same = sampled([[1, 2], prompt, [8]]), sampled([[30, 31, 32], prompt, [9, 9]]), sampled([prompt] * 3)
    assert first[1] == other[1] == same[1]
    assert first[0] != other[0]
    assert len({tuple(row) for row in same}) == 3
    assert sampled([prompt] * 3, seed=2) != same


def test_an_end_token_is_included_and_ends_its_row_alone():
    params = random_params(LEARNED)
    free = generate(params, LEARNED, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)
    eos_id = free[1][0]
    ended = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert len(ended[1]) == 1 < max(map(len, ended))
    assert generate(params, LEARNED, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, eos_id=eos_id) == ended


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 4, "at least one token"),
        ([[1], []], 4, "at least one token"),
        ([[1]], 0, "max_new_tokens=0 must be positive"),
        ([[1, 48]], 4, r"token ids 1\.\.48, but the vocabulary is 0\.\.47"),
        ([[-1]], 4, r"token ids -1\.\.-1"),
        ([[1] * 29], 4, r"29 tokens and 4 new ones exceed model\.max_seq_len=32"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_computed(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generate(None, SMALL, prompts, max_new_tokens=count)
