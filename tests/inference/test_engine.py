"""What the engine promises of sharing, batching, weights, guesses, failures and compilation; `test_engine_traces.py` draws."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest

from inference.config import EngineConfig
from inference.engine import Engine
from inference.generate import generate
from inference.programs import decode, lower_decode
from inference.request import Request
from inference.sampling import Sampling
from inference.speculate import DraftModel, prompt_lookup
from inference.text import Answers
from model.presets import preset
from model.sharding import DECODE_RULES, TRAIN_RULES
from tests.inference.engine_reference import (
    CHAIN,
    CONTEXT,
    GREEDY,
    MODEL,
    OTHERS,
    PARAMS,
    ROOMY,
    SAMPLINGS,
    Moody,
    check_answer,
    logits_after,
    over_mesh,
    recomputed,
    run_to_end,
)
from tests.networks import random_params

# --- What sharing, batching and weights promise -----------------------------------------------------------------------


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
        (answer,) = engine.generate([request])[0]
        check_answer(request, 0, answer, engine.params, engine.model, engine.config.cache_dtype)


def overflows_after_a_layer(model):
    """Parameters by which the first layer's MLP makes infinity of token 40, and nothing else of any other."""
    params = random_params(model)
    mark = model.d_model - 1  # the feature by which it is known
    first = jax.tree.map(np.array, params["blocks"][0])
    first["attention"]["out"][..., mark] = 0
    for name in ("gate", "up"):
        first["mlp"][name][:, 0], first["mlp"][name][mark, 0] = 0, 1e18
    first["mlp"]["down"][0] = 1e18
    embedding = np.array(params["embedding"])
    embedding[:, mark] = 0
    embedding[40, mark] = 1
    return jax.tree.map(jax.numpy.asarray, params | {"embedding": embedding, "blocks": (first, *params["blocks"][1:])})


@pytest.mark.parametrize("window_pattern", [(4,), (0, 6)])
def test_what_is_not_finite_and_beyond_a_window_does_not_outlive_its_request(window_pattern):
    """No token that is drawn sees the keys and values that the second layer makes of token 40. What is well is shared yet."""
    model = dataclasses.replace(MODEL, window_pattern=window_pattern)
    engine = Engine(overflows_after_a_layer(model), model, dataclasses.replace(ROOMY, cache_tokens=32))
    long = Request(CHAIN[:21], BUT_40, max_tokens=2)
    for shared in (0, 20):
        (answer,) = engine.generate([long])[0]
        check_answer(long, 0, answer, engine.params, model)
        assert engine.stats.shared == shared
    engine.generate([Request([*CHAIN[:3], 40, *CHAIN[:17]], BUT_40, max_tokens=2)])  # the last of its page is written last
    check_healthy(engine)


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
        guess = DraftModel(draft, model.vocab_size)
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


def test_a_warm_up_of_an_engine_that_was_used_forgets_what_its_pages_held():
    """It writes to them; and an engine that is in the midst of something refuses."""
    engine, request = Engine(PARAMS, MODEL, dataclasses.replace(ROOMY, max_batch=1)), Request(CHAIN[:13], GREEDY, max_tokens=4)
    check_answer(request, 0, engine.generate([request])[0][0])
    engine.warm_up()
    check_answer(request, 0, engine.generate([request])[0][0])
    request_id = engine.submit(request)
    first = engine.step()
    with pytest.raises(ValueError, match="the engine has work: wait for its end"):
        engine.warm_up()
    check_answer(request, 0, [*first, *run_to_end(engine)[request_id, 0]])


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
