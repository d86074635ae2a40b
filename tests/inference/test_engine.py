"""The engine against recomputation in full: whatever joins, leaves, waits, shares or is sent back, an answer is its own."""

import collections
import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from inference.config import EngineConfig
from inference.engine import Engine
from inference.generate import generate
from inference.programs import decode, lower_decode
from inference.request import Request
from inference.sampling import TOP_LOGPROBS, History, Rows, Sampling, draw
from inference.speculate import DraftModel, prompt_lookup
from inference.text import Answers
from model import transformer
from model.attention import attention
from model.params import param_shardings, param_specs
from model.presets import preset
from model.sharding import DECODE_RULES, MESH_AXES, TRAIN_RULES, Layout, make_mesh
from model.transformer import forward, unembed
from tests.networks import SMALL, random_params

CONTEXT = 32
MODEL = dataclasses.replace(SMALL, num_layers=2, window_pattern=(0, 6), max_seq_len=CONTEXT)
PARAMS, OTHERS = (random_params(MODEL, seed) for seed in (0, 1))
GREEDY = Sampling(temperature=0.0)


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


# --- Random traces ----------------------------------------------------------------------------------------------------

# Few pages, so that sequences are sent back; small pages and chunks, so that borders are everywhere.
CONFIGS = [
    EngineConfig(max_batch=4, cache_tokens=40, page_size=4, prefill_chunk=5),
    EngineConfig(max_batch=3, cache_tokens=96, page_size=3, prefill_chunk=18),
    EngineConfig(max_batch=2, cache_tokens=32, page_size=8, prefill_chunk=1),
    EngineConfig(max_batch=3, cache_tokens=48, page_size=4, prefill_chunk=18, cache_dtype="int8"),
]
GUESSING = [dataclasses.replace(CONFIGS[0], num_guesses=3), dataclasses.replace(CONFIGS[1], num_guesses=2)]
SAMPLINGS = [
    GREEDY,
    Sampling(),
    Sampling(temperature=1.7, top_k=5, repetition_penalty=1.3),
    Sampling(temperature=0.8, top_p=0.8, min_p=0.05, frequency_penalty=0.5, presence_penalty=0.2, logit_bias=((3, 4.0),)),
]
# Prompts that begin alike: a chain, of which a prompt takes a beginning, and then one of two tokens a few times.
CHAIN = np.random.default_rng(5).integers(0, MODEL.vocab_size, CONTEXT).tolist()
PROMPTS = st.builds(
    lambda shared, own: (CHAIN[:shared] + own) or [7], st.integers(0, 20), st.lists(st.sampled_from([1, 2]), max_size=4)
)


def half_right(ongoing, counts):
    """What recomputation would draw next, up to where a guess is spoilt; one more than was asked for."""
    guesses = []
    for sample, count in zip(ongoing, counts, strict=True):
        tokens, prompt = list(sample.tokens), list(sample.request.prompt)
        for _ in range(min(count + 1, CONTEXT - len(tokens))):
            answer = tokens[len(prompt) :]
            at = np.where(possible_after(sample.request, answer), logits_after(tokens, PARAMS, MODEL)[-1], -np.inf)
            token = int(redraw(sample.request, sample.sample, at, prompt, answer).token[0])
            tokens.append((token + (sum(tokens) % 3 == 0)) % MODEL.vocab_size)
        guesses.append(tokens[len(sample.tokens) :])
    return guesses


def drafting():
    """An engine with a draft model, whose own engine is short of pages too."""
    return Engine(PARAMS, MODEL, GUESSING[0], guess=DraftModel(Engine(near(PARAMS), MODEL, CONFIGS[0]), MODEL))


def near(params):
    """The weights of a draft that mostly agrees."""
    return jax.tree.map(lambda leaf, other: leaf + 0.02 * other, params, random_params(MODEL, seed=9))


class Traces(RuleBasedStateMachine):
    """Requests join and are dropped between steps; what is finished is compared, and nothing is left held."""

    engines = (
        *(functools.partial(Engine, PARAMS, MODEL, config) for config in CONFIGS),
        functools.partial(Engine, PARAMS, MODEL, GUESSING[1], guess=half_right),
        functools.partial(Engine, PARAMS, MODEL, GUESSING[1], guess=prompt_lookup),
        drafting,
    )

    @initialize(data=st.data())
    def start(self, data):
        self.engine = data.draw(st.sampled_from(self.engines))()
        self.requests, self.answers, self.dropped = {}, collections.defaultdict(list), set()
        self.now, self.weights = PARAMS, collections.defaultdict(list)  # by which each token of an answer was drawn

    def take(self, tokens):
        for token in tokens:
            assert token.request in self.requests
            assert token.request not in self.dropped
            self.answers[token.request, token.sample].append(token)
            self.weights[token.request, token.sample].append(self.now)

    @rule(
        prompt=PROMPTS,
        num_samples=st.integers(1, 3),
        max_tokens=st.one_of(st.none(), st.integers(1, 8)),
        sampling=st.sampled_from(SAMPLINGS),
        stop_ids=st.sampled_from([frozenset(), frozenset(range(12))]),
        seed=st.integers(0, 3),
        ends=st.sampled_from(["anywhere", "not_at_once", "constrained"]),
        top=st.sampled_from([0, 0, 2, TOP_LOGPROBS]),
    )
    def submit(self, prompt, num_samples, max_tokens, sampling, stop_ids, seed, ends, top):
        request = Request(prompt, sampling, num_samples, max_tokens, stop_ids=stop_ids, seed=seed, top_logprobs=top)
        if ends == "not_at_once":
            request = dataclasses.replace(request, min_tokens=min(3, max_tokens or 3))
        elif ends == "constrained" and not self.engine.config.num_guesses:
            request = dataclasses.replace(request, constraint=Moody, stop_ids=stop_ids | {Moody.stop_id})
        self.requests[self.engine.submit(request)] = request

    @rule(data=st.data(), own=st.lists(st.sampled_from([1, 2]), max_size=3), max_tokens=st.integers(1, 8))
    def go_on(self, data, own, max_tokens):
        """The conversation goes on after an answer, or is taken back to the middle of it."""
        if found := self._broken_off(data):
            request, sample, kept = found
            prompt = [*request.prompt, *kept, *own][: CONTEXT - max_tokens]
            changes = {"answer": (), "num_samples": 1, "first_sample": sample, "max_tokens": max_tokens, "min_tokens": 0}
            again = dataclasses.replace(request, prompt=prompt, **changes)
            self.requests[self.engine.submit(again)] = again

    @rule(data=st.data())
    def resume(self, data):
        """An answer that was broken off goes on; one with a constraint cannot."""
        found = self._broken_off(data)
        if found and not found[0].constraint:
            request, sample, kept = found
            rest = dataclasses.replace(request, answer=kept, num_samples=1, first_sample=sample)
            self.requests[self.engine.submit(rest)] = rest

    def _broken_off(self, data):
        """The request and number of some sample, and a beginning of its answer; None if nothing was drawn yet."""
        known = sorted(key for key, answer in self.answers.items() if len(answer) > 1)
        if not known:
            return None
        request_id, sample = data.draw(st.sampled_from(known))
        request, answer = self.requests[request_id], [token.token for token in self.answers[request_id, sample]]
        return request, sample, (*request.answer, *answer[: data.draw(st.integers(1, len(answer) - 1))])

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.take(self.engine.step())

    @rule(prompt=PROMPTS, calls=st.lists(st.sampled_from(["good", "refused", "empty"]), min_size=1, max_size=3))
    def generate(self, prompt, calls):
        """What was submitted goes on beside it, and its tokens are not lost."""
        good = Request(prompt, max_tokens=3, seed=7)
        for call in calls:
            if call == "refused":
                with pytest.raises(ValueError, match=r"token ids 48\.\.48"):
                    self.engine.generate([good, Request([MODEL.vocab_size])])
            else:
                requests = [good] if call == "good" else []
                for (answer,) in self.engine.generate(requests):
                    check_answer(good, 0, answer, self.now, cache_dtype=self.engine.config.cache_dtype)

    @rule(data=st.data())
    def abort(self, data):
        if self.requests:
            request_id = data.draw(st.sampled_from(sorted(self.requests)))
            self.engine.abort(request_id)
            self.dropped.add(request_id)

    @rule()
    def load(self):
        """The other one of two sets of weights; what was drawn by the old ones and not fetched is fetched first."""
        self.take(self.engine._unclaimed)
        self.engine._unclaimed = []
        self.now = OTHERS if self.now is PARAMS else PARAMS
        self.engine.load(jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), self.now, self.engine.params), MODEL)

    @invariant()
    def every_page_is_held_by_those_who_name_it(self):
        if not hasattr(self, "engine"):
            return
        pool, holders = self.engine._schedule._pool, collections.Counter()
        for seq in self.engine._schedule.holding:
            assert len(set(seq.pages)) == len(seq.pages)
            holders.update(seq.pages)
        for page in range(self.engine.config.num_pages):
            assert pool.holders(page) == holders[page]
        assert sorted([*pool._free, *pool._unheld, *holders]) == list(range(self.engine.config.num_pages))
        assert self.engine._schedule._unproven <= holders.keys()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for tokens in run_to_end(self.engine).values():
            self.take(tokens)
        assert self.engine.num_pages_held == 0
        assert len(self.engine._schedule._slots) == self.engine.config.max_batch
        for request_id, request in self.requests.items():
            for sample in range(request.first_sample, request.first_sample + request.num_samples):
                answer = self.answers[request_id, sample]
                if request_id not in self.dropped or (answer and answer[-1].finish_reason):
                    weights = self.weights[request_id, sample]
                    check_answer(request, sample, answer, weights, cache_dtype=self.engine.config.cache_dtype)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TestTraces = Traces.TestCase
TestTraces.settings = settings(max_examples=10, stateful_step_count=20, **_SETTINGS)


class ManyTraces(Traces):
    pass


class MoreTraces(Traces):
    pass


# In halves, so that two processes may share them.
TestManyTraces, TestMoreTraces = (pytest.mark.slow(machine.TestCase) for machine in (ManyTraces, MoreTraces))
TestManyTraces.settings = TestMoreTraces.settings = settings(max_examples=1000, stateful_step_count=30, **_SETTINGS)


def over_mesh(rules, config, **options):
    """An engine whose weights lie over eight devices."""
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | {"tensor": 2, "fsdp": 4}), rules)
    return Engine(jax.device_put(PARAMS, param_shardings(param_specs(MODEL), layout)), MODEL, config, **options)


class MeshTraces(Traces):
    engines = (functools.partial(over_mesh, DECODE_RULES, CONFIGS[0]),)


class ManyMeshTraces(Traces):
    engines = (
        *(functools.partial(over_mesh, DECODE_RULES, config) for config in CONFIGS),
        functools.partial(over_mesh, TRAIN_RULES, CONFIGS[0]),
        functools.partial(over_mesh, DECODE_RULES, GUESSING[1], guess=half_right),
    )


TestMeshTraces, TestManyMeshTraces = MeshTraces.TestCase, pytest.mark.slow(ManyMeshTraces.TestCase)
_UNSHRUNK = {"phases": [Phase.explicit, Phase.reuse, Phase.generate], **_SETTINGS}  # a step takes long over eight devices
TestMeshTraces.settings = settings(max_examples=3, stateful_step_count=12, **_UNSHRUNK)
TestManyMeshTraces.settings = settings(max_examples=100, stateful_step_count=30, **_UNSHRUNK)


# --- What sharing, batching and weights promise -----------------------------------------------------------------------

ROOMY = EngineConfig(max_batch=8, cache_tokens=512, page_size=4, prefill_chunk=8)


@pytest.mark.parametrize("kept", [0, 3, 5], ids=["from_the_end", "in_a_page", "across_pages"])
def test_a_conversation_goes_on_after_an_answer_that_another_one_replaced(kept):
    """The other answer was written over the page that the first one had ended in."""
    engine, first = Engine(PARAMS, MODEL, ROOMY), Request(CHAIN[:10], max_tokens=8, seed=0)
    (answer,) = engine.generate([first])[0]
    engine.generate([dataclasses.replace(first, seed=1)])
    tokens = [token.token for token in answer]
    goes_on = Request([*CHAIN[:10], *tokens, 3], max_tokens=6, seed=5)
    if kept:
        goes_on = dataclasses.replace(first, answer=tuple(tokens[:kept]))
    (rest,) = engine.generate([goes_on])[0]
    check_answer(goes_on, 0, rest)


def test_what_a_request_brings_along_harms_no_other_request():
    """A watcher that raises, a constraint that does, or one that allows nothing, ends its own request with its error."""

    class Constrained:
        stop_id = 0

        def __init__(self, allowed):
            self.allowed = allowed

        def advance(self, token):
            raise AssertionError("after an error nothing is advanced")

    def forbids_everything():
        return np.zeros(-(-MODEL.vocab_size // 32), np.uint32)

    engine, ends = Engine(PARAMS, MODEL, ROOMY), {"max_tokens": 6, "stop_ids": frozenset({0})}
    good = [engine.submit(Request(CHAIN[:5], max_tokens=6, seed=i)) for i in range(2)]
    bad = {
        engine.submit(Request(CHAIN[:4], watch=lambda sample: lambda token: 1 // 0, **ends)): ZeroDivisionError,
        engine.submit(Request(CHAIN[:4], constraint=lambda: Constrained(lambda: 1 // 0), **ends)): ZeroDivisionError,
        engine.submit(Request(CHAIN[:4], constraint=lambda: Constrained(forbids_everything), **ends)): ValueError,
        engine.submit(Request(CHAIN[:4], min_tokens=1, max_tokens=6, stop_ids=frozenset(range(MODEL.vocab_size)))): ValueError,
    }
    answers = run_to_end(engine)
    for i, request_id in enumerate(good):
        check_answer(Request(CHAIN[:5], max_tokens=6, seed=i), 0, answers[request_id, 0])
    for request_id, error in bad.items():
        (token,) = answers[request_id, 0]
        assert (token.finish_reason, type(token.error)) == ("error", error)
    assert engine.num_pages_held == 0
    with pytest.raises(RuntimeError, match="watcher, constraint or guess failed"):
        engine.generate([Request(CHAIN[:4], num_samples=2, watch=lambda sample: lambda token: 1 // sample, max_tokens=6)])
    assert not engine.has_work

    def refuses_the_second(made=[]):  # noqa: B006
        made.append(1)
        return Constrained(lambda: None) if len(made) < 2 else 1 // 0

    with pytest.raises(ZeroDivisionError):
        engine.submit(Request(CHAIN[:4], num_samples=3, constraint=refuses_the_second, **ends))
    with pytest.raises(ValueError, match="token ids 48"):
        engine.generate([Request(CHAIN[:4]), Request([48])])
    assert not engine.has_work
    with pytest.raises(ValueError, match="not among stop_ids: add it"):
        engine.submit(Request(CHAIN[:4], constraint=lambda: Constrained(lambda: None)))
    with pytest.raises(ValueError, match=r"num_samples=1000000000 must lie in \[1, 16384\]"):
        Request(CHAIN[:4], num_samples=10**9)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_logits_that_are_not_finite_are_an_error_of_their_request(monkeypatch, bad):
    """What follows token 40 overflows, as at the second token of one of three that are drawn together."""

    def overflowing(params, model, placement, pages, table, tokens, positions):
        pages, logits = decode(params, model, placement, pages, table, tokens, positions)
        return pages, logits.at[..., 3].set(jax.numpy.where(tokens == 40, bad, logits[..., 3]))

    monkeypatch.setattr("inference.programs.decode", overflowing)
    engine = Engine(PARAMS, MODEL, ROOMY)
    but_40 = Sampling(logit_bias=((40, -100.0),))
    good = [Request(CHAIN[:5], but_40, max_tokens=6, seed=seed) for seed in (0, 1)]
    overflows = Request(CHAIN[:5], Sampling(logit_bias=((40, 100.0),)), max_tokens=6)
    first, ill, second = (engine.submit(request) for request in (good[0], overflows, good[1]))
    answers = run_to_end(engine)
    *_, last = answers[ill, 0]
    assert [token.finish_reason for token in answers[ill, 0]] == [None, "error"]
    assert isinstance(last.error, FloatingPointError)
    for request, request_id in zip(good, (first, second), strict=True):
        check_answer(request, 0, answers[request_id, 0])
    with pytest.raises(RuntimeError, match="its logits are not finite"):
        engine.generate([overflows])
    assert (engine.num_pages_held, engine.has_work) == (0, False)


@pytest.mark.parametrize("chunk", [1, 18])
def test_what_is_not_finite_in_the_cache_makes_no_answer(chunk):
    """The token of the prompt whose key and value it is stands before those that are drawn, which all see it."""
    params = PARAMS | {"embedding": PARAMS["embedding"].at[40].set(np.nan)}
    engine = Engine(params, MODEL, dataclasses.replace(ROOMY, prefill_chunk=chunk))
    request_id = engine.submit(Request([40, *CHAIN[:4]], max_tokens=4))
    assert [token.finish_reason for token in run_to_end(engine)[request_id, 0]] == ["error"]


BUT_40 = Sampling(logit_bias=((40, -100.0),))


def check_healthy(engine):
    """Requests that get every page, one after the other."""
    for seed in range(2 * engine.config.num_pages):
        request = Request([seed % 40, 3, 4], BUT_40, max_tokens=3, seed=seed)
        check_answer(request, 0, engine.generate([request])[0][0], cache_dtype=engine.config.cache_dtype)


def test_what_is_not_finite_in_the_cache_does_not_outlive_its_request():
    """In pages of the prompt, which samples share, and of the answer; a request beside them and those after them are well."""
    params = PARAMS | {"embedding": PARAMS["embedding"].at[40].set(np.nan)}
    engine = Engine(params, MODEL, dataclasses.replace(ROOMY, cache_tokens=64))
    draws_40 = Sampling(logit_bias=((40, 100.0),))
    beside = Request(CHAIN[:9], BUT_40, max_tokens=12)
    request_id = engine.submit(beside)
    ill = [engine.submit(Request([*CHAIN[:2], 40, *CHAIN[:8]], num_samples=2, max_tokens=4)) for _ in range(2)]
    ill += [engine.submit(Request(CHAIN[:9], draws_40, max_tokens=4, seed=seed)) for seed in range(2)]
    answers = run_to_end(engine)
    assert all(answer[-1].finish_reason == "error" for (n, _), answer in answers.items() if n in ill)
    check_answer(beside, 0, answers[request_id, 0])
    with pytest.raises(RuntimeError, match="its logits are not finite"):  # again, though its pages are zeros by now
        engine.generate([Request([*CHAIN[:2], 40, *CHAIN[:8]], max_tokens=4)])
    check_healthy(engine)


def test_what_is_not_finite_in_the_cache_harms_no_shorter_row_beside_it():
    """Whose table of pages ends before that of the ill one does, which has the first page of all."""
    params = PARAMS | {"embedding": PARAMS["embedding"].at[40].set(np.nan)}
    engine = Engine(params, MODEL, ROOMY)
    ill, well = Request([40, *CHAIN[:6]], max_tokens=4), Request(CHAIN[10:13], BUT_40, max_tokens=4)
    ids = [engine.submit(request) for request in (ill, well)]
    answers = run_to_end(engine)
    assert [token.finish_reason for token in answers[ids[0], 0]] == ["error"]
    check_answer(well, 0, answers[ids[1], 0])


def test_what_is_not_finite_in_the_cache_does_not_outlive_a_request_that_was_aborted():
    """Before anybody saw it: neither what was proven before is lost, nor do others share or take what was not."""
    params = PARAMS | {"embedding": PARAMS["embedding"].at[40].set(np.nan)}
    engine = Engine(params, MODEL, dataclasses.replace(ROOMY, cache_tokens=48))
    proven = Request(CHAIN[:5], BUT_40, max_tokens=1)
    check_answer(proven, 0, engine.generate([proven])[0][0])
    request_id = engine.submit(Request([*CHAIN[:9], 40, *CHAIN[9:20]], max_tokens=4))
    assert not engine.step()
    engine.abort(request_id)
    shared = engine.stats.shared
    beginning = Request(CHAIN[:9], BUT_40, max_tokens=3)
    check_answer(beginning, 0, engine.generate([beginning])[0][0])
    assert engine.stats.shared == shared + 4
    check_healthy(engine)


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_what_old_weights_made_of_tokens_does_not_outlive_them(cache_dtype):
    config = dataclasses.replace(ROOMY, cache_tokens=64, prefill_chunk=18, cache_dtype=cache_dtype)
    engine = Engine(jax.tree.map(lambda leaf: leaf * np.nan, PARAMS), MODEL, config)
    dropped, request = (Request(CHAIN[start:24], max_tokens=4) for start in (1, 0))
    request_id = engine.submit(dropped)
    assert not engine.step()  # Of neither is it seen yet what came of it.
    engine.abort(request_id)
    request_id = engine.submit(request)
    assert not engine.step()
    engine.load(PARAMS, MODEL)
    check_answer(request, 0, run_to_end(engine)[request_id, 0], cache_dtype=cache_dtype)
    check_healthy(engine)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_logits_that_cannot_be_computed_leave_nothing_behind(monkeypatch, program):
    engine = Engine(PARAMS, MODEL, ROOMY)
    with monkeypatch.context() as patched:
        patched.setattr(f"inference.programs.{program}", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            engine.logits_along(CHAIN[:9], 5)
    assert (engine.num_pages_held, engine.has_work) == (0, False)
    np.testing.assert_allclose(engine.logits_along(CHAIN[:9], 5), logits_after(CHAIN[:9], PARAMS, MODEL)[5:], atol=1e-5)


def small_pairs(answer):
    return [(token.token, token.logprob, token.raw_logprob) for token in answer]


def test_an_answer_does_not_depend_on_the_requests_beside_it():
    """Its tokens not at all; its log-probabilities by rounding, for kernels of several sizes may take the rows of a product."""
    one_size = dataclasses.replace(ROOMY, max_batch=1)
    requests = [Request(CHAIN[i : 2 * i + 3], SAMPLINGS[i % 4], max_tokens=9, seed=i) for i in range(8)]
    alone = [small_pairs(Engine(PARAMS, MODEL, one_size).generate([request])[0][0]) for request in requests]
    together = Engine(PARAMS, MODEL, ROOMY).generate(requests)
    for request, single, (answer,) in zip(requests, alone, together, strict=True):
        check_answer(request, 0, answer)
        assert [token for token, *_ in single] == [token.token for token in answer]
    again = Engine(PARAMS, MODEL, ROOMY).generate([*requests[4:], *requests[:4]])
    for (answer,), (same,) in zip(together, [*again[4:], *again[:4]], strict=True):
        np.testing.assert_allclose(small_pairs(answer), small_pairs(same), atol=1e-5, rtol=0)


def test_prompts_of_one_call_and_seeds_of_several_have_random_numbers_of_their_own():
    def answers(seed):
        return generate(PARAMS, MODEL, [CHAIN[:5]] * 3, max_tokens=12, sampling=Sampling(), seed=seed)

    assert len({tuple(answer) for seed in (0, 1, 2**32 - 1) for answer in answers(seed)}) == 9
    assert answers(0) == answers(0)


def test_samples_of_one_prompt_cost_one_prefill():
    engine = Engine(PARAMS, MODEL, ROOMY)
    prompt = CHAIN[:23]
    (answers,) = engine.generate([Request(prompt, num_samples=8, max_tokens=6)])
    assert engine.stats.prefilled == len(prompt) - 1
    assert len({tuple(token.token for token in answer) for answer in answers}) > 4
    engine.generate([Request(prompt, num_samples=3, max_tokens=6, seed=1)])
    assert engine.stats.prefilled == len(prompt) - 1
    engine.load(PARAMS, MODEL)
    engine.generate([Request(prompt, max_tokens=6)])
    assert engine.stats.prefilled == 2 * (len(prompt) - 1)


def test_new_weights_take_over_in_the_midst_of_an_answer():
    engine, request = Engine(PARAMS, MODEL, ROOMY), Request(CHAIN[:9], GREEDY, max_tokens=10)
    engine.submit(request)
    first = [token for _ in range(5) for token in engine.step()]
    assert 0 < len(first) < 10
    engine.load(OTHERS, MODEL)
    rest = [token for tokens in run_to_end(engine).values() for token in tokens]
    tokens = [*CHAIN[:9], *(token.token for token in (*first, *rest))]
    before, after = logits_after(tokens, PARAMS, MODEL), logits_after(tokens, OTHERS, MODEL)
    for i, token in enumerate((*first, *rest)):
        at = (before if i < len(first) else after)[8 + i]
        assert at[token.token] >= np.max(at) - 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "final_norm"}, r"final_norm/scale is missing, in this engine float32"),
        (lambda w: w | {"embedding": w["embedding"][:40]}, r"embedding is float32 \(40, 16\), in this engine float32 \(48"),
        (lambda w: w | {"embedding": w["embedding"].astype("bfloat16")}, r"embedding is bfloat16 .*, in this engine float32"),
        (lambda w: w | {"more": w["embedding"]}, r"more is float32 .*, in this engine no parameter"),
    ],
    ids=["a_leaf_missing", "another_shape", "another_dtype", "a_leaf_more"],
)
def test_weights_of_another_network_are_refused_and_the_old_ones_stay(change, message):
    engine, request = Engine(PARAMS, MODEL, ROOMY), Request(CHAIN[:9], max_tokens=4)
    request_id = engine.submit(request)
    first = [token for _ in range(2) for token in engine.step()]
    with pytest.raises(ValueError, match=message):
        engine.load(change(PARAMS), MODEL)
    check_answer(request, 0, [*first, *run_to_end(engine)[request_id, 0]])


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(f"tiny-{name}", marks=pytest.mark.slow) for name in ("gpt2", "qwen3", "gemma3", "falcon", "mixtral")),
        "tiny-gemma2",
        "tiny-deepseek",
    ],
)
def test_every_kind_of_network_decodes_as_it_is_trained(name):
    model = preset(name, vocab_size=48, max_seq_len=CONTEXT)
    params = random_params(model)
    # Chunks of both kinds: short ones attend to pages alone, longer ones among themselves and to the pages before them.
    for chunk in (8, 18):
        requests = [Request(CHAIN[:length], max_tokens=8, seed=length) for length in (3, 9, 24)]
        answers = Engine(params, model, dataclasses.replace(ROOMY, prefill_chunk=chunk)).generate(requests)
        for request, (answer,) in zip(requests, answers, strict=True):
            check_answer(request, 0, answer, params, model)


@pytest.mark.parametrize("chunk", [8, 18])
def test_with_an_int8_cache_an_answer_is_that_of_rounded_keys_and_values(chunk):
    """Shared and copied pages, chunks of both kinds; most tokens to the last bits, and all of them not that of other keys."""
    engine = Engine(PARAMS, MODEL, dataclasses.replace(ROOMY, prefill_chunk=chunk, cache_dtype="int8"))
    requests = [Request(CHAIN[:length], num_samples=2, max_tokens=6, seed=length) for length in (3, 9, 22, 23)]
    answers = engine.generate(requests)
    assert engine.stats.shared > 0
    all_sure, unrounded = [], []
    for request, samples in zip(requests, answers, strict=True):
        for sample, answer in enumerate(samples):
            check_answer(request, sample, answer, cache_dtype="int8")
            tokens = [token.token for token in answer]
            whole, places = [*request.prompt, *tokens], np.arange(len(request.prompt) - 1, len(request.prompt) + 5)
            all_sure += recomputed(whole, PARAMS, MODEL, "int8")[1][places].tolist()
            expected = jax.nn.log_softmax(logits_after(whole, PARAMS, MODEL)[places])[np.arange(6), tokens]
            unrounded += np.abs(expected - np.array([token.raw_logprob for token in answer])).tolist()
    assert np.mean(all_sure) > 0.7
    assert np.median(unrounded) > 1e-4


def test_stacked_layers_decode_like_separate_ones():
    stacked = dataclasses.replace(MODEL, scan_layers=True)
    engine = Engine(random_params(stacked), stacked, ROOMY)
    request = Request(CHAIN[:5], GREEDY, max_tokens=6)
    check_answer(request, 0, engine.generate([request])[0][0], engine.params, engine.model)


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_what_is_lowered_without_weights_is_what_decodes(cache_dtype):
    config = EngineConfig(max_batch=4, cache_tokens=64, page_size=16, prefill_chunk=16, cache_dtype=cache_dtype)
    running = Engine(PARAMS, MODEL, config)
    table, column = running._table([], 4), np.zeros((4, 1), np.int32)
    real = decode.lower(PARAMS, MODEL, running._placement, running._pages, table, column, column)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert lower_decode(abstract, MODEL, config).as_text() == real.as_text()


def test_a_bias_is_read_when_its_request_comes_and_not_at_every_step():
    class Bias(tuple):
        times_read = 0

        def __iter__(self):
            self.times_read += 1
            return super().__iter__()

    bias = Bias([(token, 1.0) for token in range(40)])
    engine, request = Engine(PARAMS, MODEL, ROOMY), Request(CHAIN[:5], Sampling(logit_bias=bias), max_tokens=9)
    request_id = engine.submit(request)
    first = engine.step()
    times_read = bias.times_read
    rest = run_to_end(engine)[request_id, 0]
    assert (len(rest) >= 8, bias.times_read) == (True, times_read)
    check_answer(request, 0, [*first, *rest])


def test_a_minimum_of_tokens_keeps_stop_tokens_away():
    stops = frozenset(range(40))
    engine = Engine(PARAMS, MODEL, ROOMY)
    (answers,) = engine.generate([Request(CHAIN[:5], num_samples=8, max_tokens=8, min_tokens=3, stop_ids=stops)])
    for answer in answers:
        assert all(token.token not in stops for token in answer[:3])
    assert any(answer[-1].finish_reason == "stop" and len(answer) == 4 for answer in answers)


def test_a_minimum_of_tokens_holds_against_stop_strings():
    engine = Engine(PARAMS, MODEL, ROOMY)
    answers = Answers(Request(CHAIN[:5], max_tokens=8, min_tokens=4), [b"x"] * MODEL.vocab_size, ["x"])
    ((answer,),) = engine.generate([answers.request])
    assert "".join(answers.text(token) for token in answer) == "xxx"
    assert (len(answer), answer[-1].finish_reason) == (4, "stop")
    impatient = Request(CHAIN[:5], max_tokens=8, min_tokens=3, watch=lambda sample: lambda token: True)
    assert [len(answer) for answer in engine.generate([impatient])[0]] == [3]


def test_tokens_beyond_the_tokenizers_are_never_drawn():
    engine = Engine(PARAMS, MODEL, ROOMY, vocab_size=3)
    (answers,) = engine.generate([Request(CHAIN[:5], Sampling(temperature=50.0), num_samples=8, max_tokens=8)])
    assert {token.token for answer in answers for token in answer} == {0, 1, 2}


def test_a_watcher_ends_its_own_sample():
    def watch(_sample):
        seen = []
        return lambda token: seen.append(token) or len(seen) == 3

    engine = Engine(PARAMS, MODEL, ROOMY)
    (answers,) = engine.generate([Request(CHAIN[:5], num_samples=2, max_tokens=8, watch=watch)])
    assert [len(answer) for answer in answers] == [3, 3]
    assert {answer[-1].finish_reason for answer in answers} == {"stop"}


def test_right_and_wrong_guesses_change_no_answer():
    """An oracle that is right half of the time: the same tokens, in fewer steps."""
    requests = [Request(CHAIN[:length], SAMPLINGS[length % 4], 1, 12, seed=length) for length in (3, 6, 9, 12)]
    plain = Engine(PARAMS, MODEL, ROOMY)
    expected = [[token.token for token in answer] for (answer,) in plain.generate(requests)]
    rows = [[*request.prompt, *tokens] for request, tokens in zip(requests, expected, strict=True)]

    def guess(ongoing, counts):
        guesses = []
        for tokens, count in zip((sample.tokens for sample in ongoing), counts, strict=True):
            row = next((row for row in rows if row[: len(tokens)] == tokens), [])
            right = row[len(tokens) : len(tokens) + count]
            guesses.append([(token + 1) % MODEL.vocab_size if len(tokens) % 4 == 0 else token for token in right])
        return guesses

    guessing = Engine(PARAMS, MODEL, dataclasses.replace(ROOMY, num_guesses=3), guess=guess)
    for request, (answer,), tokens in zip(requests, guessing.generate(requests), expected, strict=True):
        assert [token.token for token in answer] == tokens
        check_answer(request, 0, answer)
    assert 0 < guessing.stats.guessed_right < guessing.stats.guessed
    assert guessing.stats.steps < plain.stats.steps


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda: 1 // 0, ZeroDivisionError),
        (lambda: [MODEL.vocab_size], ValueError),
        (lambda: [-1], ValueError),
        (lambda: ["a"], ValueError),
        (lambda: None, TypeError),
    ],
    ids=["raises", "beyond_the_vocabulary", "negative", "no_token", "no_list"],
)
def test_a_guess_that_goes_wrong_harms_no_other_request(bad, error):
    """Of two rows that are guessed together the one it goes wrong at ends, after what it had drawn by then."""

    def guess(ongoing, counts):
        broken = [sample.request.seed == 1 and sample.num_drawn == 2 for sample in ongoing]
        return [bad() if breaks else [3] * count for breaks, count in zip(broken, counts, strict=True)]

    engine = Engine(PARAMS, MODEL, dataclasses.replace(ROOMY, num_guesses=2), guess=guess)
    requests = [Request(CHAIN[:5], max_tokens=6, seed=seed) for seed in (0, 1, 2)]
    ids = [engine.submit(request) for request in requests]
    answers = run_to_end(engine)
    for i in (0, 2):
        check_answer(requests[i], 0, answers[ids[i], 0])
    *_, last = ended = answers[ids[1], 0]
    assert (len(ended), last.finish_reason, type(last.error)) == (3, "error", error)
    assert (engine.num_pages_held, engine.has_work) == (0, False)
    with pytest.raises(RuntimeError, match="watcher, constraint or guess failed"):
        engine.generate(requests)
    assert (engine.num_pages_held, engine.has_work) == (0, False)
    check_answer(requests[2], 0, engine.generate([requests[2]])[0][0])


@pytest.mark.parametrize("rules", [TRAIN_RULES, DECODE_RULES], ids=["train", "decode"])
def test_weights_on_a_mesh_decode_as_on_one_device(rules):
    engine = over_mesh(rules, ROOMY)
    requests = [Request(CHAIN[:length], SAMPLINGS[length % 4], 1, 8, seed=length) for length in (3, 9, 14)]
    # Alone, a single row is decoded, which is another program; penalties need its counts to be right on every device.
    for batch in (requests, [Request([7], SAMPLINGS[2], max_tokens=20)], [Request([7], SAMPLINGS[3], max_tokens=20)]):
        for request, (answer,) in zip(batch, engine.generate(batch), strict=True):
            check_answer(request, 0, answer)
    assert engine._pages[0][0].sharding.spec[1] == "tensor"
    placed = jax.tree.map(lambda leaf: leaf.sharding, engine.params)
    engine.load(jax.tree.map(np.asarray, OTHERS), MODEL)
    assert jax.tree.map(lambda leaf: leaf.sharding, engine.params) == placed
    check_answer(requests[0], 0, engine.generate(requests[:1])[0][0], OTHERS)


# --- Compilation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations():
    """Names of what is compiled while the test runs."""
    compiled = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


def tied_to_a_device(leaf):
    return jax.device_put(leaf, jax.devices()[0])


@pytest.mark.parametrize("guesses", ["none", "looked_up", "drafted"])
def test_nothing_is_compiled_after_the_warm_up(compilations, guesses):
    model = dataclasses.replace(MODEL, d_ff=20)  # whose programs no other test has made
    config = EngineConfig(max_batch=4, cache_tokens=40, page_size=4, prefill_chunk=16)
    guess = None if guesses == "none" else prompt_lookup
    if guesses == "drafted":
        small = dataclasses.replace(model, num_layers=1)
        draft = Engine(random_params(small), small, config)
        draft.warm_up()
        guess = DraftModel(draft, model)
    config = dataclasses.replace(config, num_guesses=0 if guess is None else 2)
    engine = Engine(random_params(model), model, config, guess=guess)
    engine.warm_up()
    assert compilations
    elsewhere = functools.partial(jax.tree.map, np.asarray if guess is None else tied_to_a_device)
    compilations.clear()
    rng = np.random.default_rng(0)
    for i in range(1000 if guesses == "none" else 200):
        length = int(rng.integers(1, 20))
        prompt = CHAIN[:length] if i % 3 else rng.integers(0, 48, length).tolist()
        sampling = SAMPLINGS[int(rng.integers(4))]
        top_logprobs = int(rng.integers(3))
        samples, tokens = int(rng.integers(1, 3)), int(rng.integers(1, 5))
        ends = {"constraint": Moody, "stop_ids": frozenset({Moody.stop_id})} if guess is None and i % 4 == 0 else {}
        engine.submit(Request(prompt, sampling, samples, tokens, seed=i, top_logprobs=top_logprobs, **ends))
        for _ in range(int(rng.integers(3))):
            engine.step()
        if i == 99:
            engine.load(elsewhere(random_params(model, seed=1)), model)
    run_to_end(engine)
    assert engine.stats.preemptions > 0
    assert guess is None or engine.stats.guessed > 0
    assert not compilations


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [1, 48]}, r"token ids 1\.\.48, but the vocabulary is 0\.\.47"),
        ({"prompt": [-1]}, r"token ids -1\.\.-1"),
        ({"prompt": [1, 2.5]}, r"prompt holds \[2\.5\]: tokens are whole numbers"),
        ({"prompt": "text"}, r"prompt holds \['t'\]: tokens"),
        ({"answer": (float("nan"), 1)}, r"answer holds \[nan\]"),
        ({"stop_ids": frozenset({2.5})}, r"stop_ids holds \[2\.5\]"),
        ({"answer": (99,)}, r"token ids 1\.\.99"),
        ({"prompt": [1] * 29, "max_tokens": 4}, r"29 tokens and 4 new ones exceed model\.max_seq_len=32"),
        ({"prompt": [1] * 32}, r"32 tokens and 1 new ones exceed"),
        ({"max_tokens": 0}, "max_tokens=0 must be positive"),
        ({"num_samples": 0}, "num_samples=0 must lie in"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"min_tokens": 1, "constraint": object}, "min_tokens=1 does not go with a constraint"),
        ({"seed": -1}, "seed=-1"),
        ({"top_logprobs": 21}, "top_logprobs=21"),
        ({"stop_ids": frozenset({48})}, r"stop_ids name tokens \[48\]"),
        ({"sampling": Sampling(logit_bias=((99, 1.0),))}, r"logit_bias and stop_ids name tokens \[99\]"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(options, message):
    engine = Engine(PARAMS, MODEL, ROOMY)
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**{"prompt": [1, 2, 3], **options}))
    assert not engine.has_work


def test_engines_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"engine\.cache_tokens=3 is less than a page"):
        EngineConfig(cache_tokens=3)
    with pytest.raises(ValueError, match=r"engine\.cache_dtype='int4' is not one of model, int8"):
        EngineConfig(cache_dtype="int4")
    with pytest.raises(ValueError, match=r"vocab_size=49"):
        Engine(PARAMS, MODEL, ROOMY, vocab_size=49)
    with pytest.raises(ValueError, match=r"num_guesses=2, but no function"):
        Engine(PARAMS, MODEL, dataclasses.replace(ROOMY, num_guesses=2))
    with pytest.raises(ValueError, match="another network"):
        Engine(PARAMS, MODEL, ROOMY).load(PARAMS, dataclasses.replace(MODEL, norm_eps=1e-6))
