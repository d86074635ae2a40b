"""Random traces: whatever joins, leaves, waits, shares or is sent back, an answer is that of recomputation in full."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request
from inference.sampling import TOP_LOGPROBS
from inference.speculate import DraftModel, prompt_lookup
from model.sharding import DECODE_RULES, TRAIN_RULES
from tests.inference.engine_reference import (
    CHAIN,
    CONTEXT,
    MODEL,
    OTHERS,
    PARAMS,
    SAMPLINGS,
    Moody,
    check_answer,
    logits_after,
    near,
    over_mesh,
    possible_after,
    redraw,
    run_to_end,
)

# Few pages, so that sequences are sent back; small pages and chunks, so that borders are everywhere.
CONFIGS = [
    EngineConfig(max_batch=2, cache_tokens=40, page_size=4, prefill_chunk=5),
    EngineConfig(max_batch=3, cache_tokens=96, page_size=3, prefill_chunk=18),
    EngineConfig(max_batch=2, cache_tokens=32, page_size=8, prefill_chunk=1),
    EngineConfig(max_batch=2, cache_tokens=48, page_size=4, prefill_chunk=16, cache_dtype="int8"),
]
GUESSING = [dataclasses.replace(config, max_batch=2, num_guesses=2) for config in (*CONFIGS[:2], CONFIGS[3])]
NEAR_SIGHTED = dataclasses.replace(MODEL, window_pattern=(4,))  # sees nothing far away in any layer
# Prompts that begin alike: with a beginning of the chain, and then one of two tokens a few times.
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
    return Engine(PARAMS, MODEL, GUESSING[0], guess=DraftModel(Engine(near(PARAMS), MODEL, CONFIGS[0]), MODEL.vocab_size))


class Traces(RuleBasedStateMachine):
    """Requests join and are dropped between steps; what is finished is compared, and nothing is left held."""

    engines = (
        *(functools.partial(Engine, PARAMS, MODEL, config) for config in CONFIGS),
        functools.partial(Engine, PARAMS, MODEL, GUESSING[1], guess=half_right),
        functools.partial(Engine, PARAMS, MODEL, GUESSING[1], guess=prompt_lookup),
        drafting,
        functools.partial(Engine, PARAMS, MODEL, GUESSING[2], guess=prompt_lookup),
        functools.partial(Engine, PARAMS, NEAR_SIGHTED, CONFIGS[0]),
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
                    check_answer(good, 0, answer, self.now, self.engine.model, self.engine.config.cache_dtype)

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
        placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), self.now, self.engine.params)
        self.engine.load(placed, self.engine.model)

    @precondition(lambda self: hasattr(self, "engine") and not self.engine.has_work)
    @rule()
    def warm_up(self):
        """Between two jobs."""
        self.engine.warm_up()

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
                    weights, config = self.weights[request_id, sample], self.engine.config
                    check_answer(request, sample, answer, weights, self.engine.model, config.cache_dtype)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


# Each of its own programs, so few of them: the plain one, the one of 8 bits, and the two kinds of guesses.
@pytest.mark.parametrize("number", [0, 3, 4, 6], ids=["plain", "int8", "guessing", "drafting"])
def test_traces(number):
    machine = type("FewTraces", (Traces,), {"engines": (Traces.engines[number],)})
    run_state_machine_as_test(machine, settings=settings(max_examples=3, stateful_step_count=20, **_SETTINGS))


class ManyTraces(Traces):
    pass


class MoreTraces(Traces):
    pass


# In halves, so that two processes may share them.
TestManyTraces, TestMoreTraces = (pytest.mark.slow(machine.TestCase) for machine in (ManyTraces, MoreTraces))
TestManyTraces.settings = TestMoreTraces.settings = settings(max_examples=1000, stateful_step_count=30, **_SETTINGS)


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
