"""What the engine is compared with: recomputation of the whole row for every token, and a draw for it alone."""

import collections
import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest

from inference.config import EngineConfig
from inference.engine import Engine
from inference.sampling import History, Rows, Sampling, draw
from model import transformer
from model.attention import attention
from model.params import param_shardings, param_specs
from model.sharding import MESH_AXES, Layout, make_mesh
from model.transformer import forward, unembed
from tests.networks import SMALL, random_params

CONTEXT = 32
MODEL = dataclasses.replace(SMALL, num_layers=2, window_pattern=(0, 6), max_seq_len=CONTEXT)
PARAMS, OTHERS = (random_params(MODEL, seed) for seed in (0, 1))
ROOMY = EngineConfig(max_batch=8, cache_tokens=512, page_size=4, prefill_chunk=8)
GREEDY = Sampling(temperature=0.0)
SAMPLINGS = [
    GREEDY,
    Sampling(),
    Sampling(temperature=1.7, top_k=5, repetition_penalty=1.3),
    Sampling(temperature=0.8, top_p=0.8, min_p=0.05, frequency_penalty=0.5, presence_penalty=0.2, logit_bias=((3, 4.0),)),
]
# Prompts of the tests begin with its beginning.
CHAIN = np.random.default_rng(5).integers(0, MODEL.vocab_size, CONTEXT).tolist()


# Where a sum in another order tips an element of a key or a value over to the next step of 8 bits, all that follows differs by
# that step: the model's own log-probability of a token by INT8_TOLERANCE at most. It happens to what is within NARROW of a step
# of the border between two, where sums differ by less than a millionth of the largest element, which is 127 steps.
NARROW = 1e-4
INT8_TOLERANCE = 0.05


@functools.cache
def full_forward(model, cache_dtype):
    """Logits [T, V] and margins [T]: how far, in steps of 8 bits, keys and values are from being rounded otherwise."""

    def run(params, tokens):
        margins = [jax.numpy.full(tokens.shape[1], 0.5)]

        def rounded(x):
            step = jax.numpy.abs(x).max(axis=-1, keepdims=True) / 127
            steps = x / jax.numpy.where(step == 0, 1, step)
            margins.append(0.5 - jax.numpy.abs(steps - jax.numpy.round(steps)).max(axis=(0, 2, 3)))
            return jax.numpy.round(steps) * step

        def attend(q, k, v, *args, **options):
            """To all tokens at once, keys and values rounded to 127ths of the largest of each token and head."""
            return attention(q, rounded(k), rounded(v), *args, **options)

        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
        with mock.patch.object(transformer, "attention", attend if cache_dtype == "int8" else attention):
            hidden, _, _ = forward(params, model, tokens, positions)
        return unembed(params, model, hidden)[0], jax.numpy.min(jax.numpy.stack(margins), axis=0)

    return jax.jit(run)


def recomputed(tokens, params, model, cache_dtype="model"):
    """Of the whole row at once, without a cache: float32 logits [len(tokens), V] after each token, and whether none that it
    sees is rounded so nearly otherwise that a sum in another order may tip it over: bool [len(tokens)]."""
    padded = np.zeros((1, model.max_seq_len), np.int32)
    padded[0, : len(tokens)] = tokens
    logits, margins = full_forward(model, cache_dtype)(params, padded)
    sure = np.minimum.accumulate(np.asarray(margins)) > NARROW
    return np.asarray(logits)[: len(tokens)], sure[: len(tokens)]


def logits_after(tokens, params, model, cache_dtype="model"):
    return recomputed(tokens, params, model, cache_dtype)[0]


ALL = np.full((1, -(-MODEL.vocab_size // 32)), 2**32 - 1, np.uint32)
draw_one = jax.jit(draw)


def redraw(request, sample, logits, prompt, answer):
    """The next token of a request by the logits of full recomputation, alone."""
    sampling = dataclasses.asdict(request.sampling)
    del sampling["logit_bias"]
    bias = np.zeros(MODEL.vocab_size, np.float32)
    for token, value in request.sampling.logit_bias:
        bias[token] = value
    in_prompt = np.isin(np.arange(MODEL.vocab_size), prompt)
    history = History(bias[None], np.bincount(answer, minlength=MODEL.vocab_size).astype(np.int32)[None], in_prompt[None])
    rows = Rows(
        slot=np.zeros(1, np.int32),
        reads_history=np.array([request.sampling.reads_history]),
        **{name: np.array([value], np.int32 if name == "top_k" else np.float32) for name, value in sampling.items()},
        seed=np.array([request.seed], np.uint32),
        sample=np.array([sample], np.uint32),
        num_drawn=np.array([len(answer)], np.uint32),
        top_logprobs=np.array([request.top_logprobs], np.int32),
    )
    return draw_one(logits[None], rows, history, ALL)


class Moody:
    """A constraint of which every token changes what may come next; the reference asks `possible` for the whole answer. Token
    40, which ends no answer, is always among it."""

    stop_id = 5

    def __init__(self):
        self.said = []

    @classmethod
    def possible(cls, said):
        may = np.random.default_rng([len(said), *said]).random(MODEL.vocab_size) < 0.25
        may[40], may[cls.stop_id] = True, len(said) > 1
        return may

    def allowed(self):
        bits = np.zeros(-(-MODEL.vocab_size // 32) * 32, bool)
        bits[: MODEL.vocab_size] = self.possible(self.said)
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def advance(self, token):
        self.said.append(token)


def possible_after(request, said):
    """bool [V]: what a request lets follow the beginning of an answer, a token at a time."""
    if request.constraint:
        other_ends = sorted(request.stop_ids - {request.constraint.stop_id})
        return request.constraint.possible(said) & ~np.isin(np.arange(MODEL.vocab_size), other_ends)
    return (len(said) >= request.min_tokens) | ~np.isin(np.arange(MODEL.vocab_size), list(request.stop_ids))


def check_alternatives(found, count, tokens, logprobs):
    """What is reported are the `count` first of these, the most probable first; equal ones, to rounding, in any order."""
    if not count:
        assert found is None
        return
    known = {int(token): float(x) for token, x in zip(tokens, logprobs, strict=True) if x > -1e9}
    least = min(known.values())
    assert len(found.tokens) == len(set(found.tokens)) == min(count, len(known))
    np.testing.assert_allclose(found.logprobs, list(known.values())[: len(found.tokens)], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.logprobs, [known.get(token, least) for token in found.tokens], rtol=0, atol=1e-5)


def check_answer(request, sample, answer, params=PARAMS, model=MODEL, cache_dtype="model"):
    """Every token and log-probability of an answer is that of recomputation, and it ends where it should. After keys or values
    of which it is not sure how they are rounded, a token may be another one. `params` may be a list: those of each token."""
    prompt, tokens = list(request.prompt), [*request.answer, *(token.token for token in answer)]
    weights = params if isinstance(params, list) else [params] * len(answer)
    by_weights = {id(w): recomputed(prompt + tokens, w, model, cache_dtype) for w in {id(w): w for w in weights}.values()}
    for i, token in enumerate(answer, start=len(request.answer)):
        logits, sure = by_weights[id(weights[i - len(request.answer)])]
        at = logits[len(prompt) + i - 1]
        possible = possible_after(request, tokens[:i])
        left = np.where(possible, at, -np.inf)
        raw = at.astype(np.float64) - np.log(np.sum(np.exp(at.astype(np.float64))))
        if sure[len(prompt) + i - 1]:
            likeliest = request.sampling.temperature == 0 and not request.sampling.reads_history
            if likeliest:
                assert left[token.token] >= np.max(left) - 1e-5
                assert token.logprob == 0
            if request.top_logprobs or not likeliest:
                again = redraw(request, sample, left, prompt, tokens[:i])
                assert likeliest or token.token == int(again.token[0])
                assert token.logprob == pytest.approx(float(again.logprob[0]), abs=1e-5)
                check_alternatives(token.top, request.top_logprobs, again.top_tokens[0], again.top_logprobs[0])
            assert token.raw_logprob == pytest.approx(raw[token.token], abs=1e-5)
            order = np.argsort(-raw)
            check_alternatives(token.raw_top, request.top_logprobs, order, raw[order])
        else:
            assert possible[token.token]
            assert token.raw_logprob == pytest.approx(raw[token.token], abs=INT8_TOLERANCE)
        ends = token.token in request.stop_ids
        full = i + 1 == (request.max_tokens or model.max_seq_len - len(prompt))
        assert token.finish_reason == ("stop" if ends else "length" if full else None)
    assert answer[-1].finish_reason is not None


def run_to_end(engine):
    answers = collections.defaultdict(list)
    while engine.has_work:
        for token in engine.step():
            answers[token.request, token.sample].append(token)
    return answers


def near(params):
    """The weights of a draft that mostly agrees."""
    return jax.tree.map(lambda leaf, other: leaf + 0.02 * other, params, random_params(MODEL, seed=9))


def over_mesh(rules, config, **options):
    """An engine whose weights lie over eight devices."""
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | {"tensor": 2, "fsdp": 4}), rules)
    return Engine(jax.device_put(PARAMS, param_shardings(param_specs(MODEL), layout)), MODEL, config, **options)
