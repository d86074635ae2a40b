"""Constrained answers: what is finished is valid by another library, what cannot be had is refused, and neighbours are free."""

import dataclasses
import json
import random
import re

import jsonschema
import numpy as np
import pytest

from inference.config import EngineConfig
from inference.engine import Engine
from inference.grammar import Grammars
from inference.request import Request
from inference.sampling import Sampling
from inference.text import Answers
from tests.networks import SMALL, random_params

STOP = 256
TOKEN_BYTES = (*(bytes([i]) for i in range(256)), b"", b"tru", b'":', b"}}", "é".encode(), b"[1")
MODEL = dataclasses.replace(SMALL, vocab_size=320, num_layers=1, max_seq_len=512)  # more than tokens, and than words of a mask
PARAMS = random_params(MODEL)
ENGINE = Engine(PARAMS, MODEL, EngineConfig(max_batch=8, cache_tokens=8192, prefill_chunk=16), vocab_size=len(TOKEN_BYTES))


def encode(text):
    return list(text.encode())


GRAMMARS = Grammars(TOKEN_BYTES, STOP, encode, MODEL.vocab_size)


def answers_to(constraints, max_tokens=300, temperature=1.0, seed=0):
    """(text, finish reason) for each of many constraints at once."""
    sampling = Sampling(temperature=temperature)
    requests = [
        Request([65], sampling, max_tokens=max_tokens, stop_ids=frozenset({STOP}), seed=seed + i, constraint=constraint)
        for i, constraint in enumerate(constraints)
    ]
    found = []
    for (answer,) in ENGINE.generate(requests):
        text = b"".join(TOKEN_BYTES[token.token] for token in answer)
        found.append((text, answer[-1].finish_reason))
    return found


def some_schema(rng, depth=2):
    """A JSON schema of bounded answers."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice([*kinds, "object", "object", "array", "anyOf"] if depth else kinds)
    if kind == "string":
        low = rng.randrange(3)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(6)}
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.randrange(1, 9)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": rng.sample(["a", "b\n", "é", 3, 2.5, None, True, [1]], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, {"a": [1, None]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice([r"^[a-c]{2,4}$", r"^\d{3}-\d{2}$", r"^(yes|no)$"])}
    if kind == "array":
        low = rng.randrange(2)
        items = some_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(3)}
    if kind == "anyOf":
        return {"anyOf": [some_schema(rng, depth - 1) for _ in range(2)]}
    names = rng.sample(["id", "name", "näme", "a b", "tags", "x"], rng.randrange(1, 4))
    properties = {name: some_schema(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def test_every_finished_answer_to_200_schemas_is_valid():
    schemas = [some_schema(random.Random(i)) for i in range(200)]
    answers = answers_to([GRAMMARS.constraint("json_schema", schema) for schema in schemas])
    finished = 0
    for schema, (text, reason) in zip(schemas, answers, strict=True):
        if reason == "stop":
            finished += 1
            jsonschema.validate(json.loads(text.decode()), schema)
    assert finished > 150
    assert len({text for text, _ in answers}) > 100


def test_what_is_cut_off_is_said_to_be():
    ((text, reason),) = answers_to([GRAMMARS.constraint("json_schema", {"type": "string", "minLength": 50})], max_tokens=10)
    assert reason == "length"
    assert text.startswith(b'"')


@pytest.mark.parametrize("seed", range(4))
def test_no_other_end_makes_what_is_incomplete_look_finished(seed):
    """Stop tokens that the grammar knows as digits are not drawn; a stop string cuts off, be it at the last token or before."""
    digits, ends = GRAMMARS.constraint("regex", "[0-9]{6}"), frozenset({STOP, *map(ord, "1234")})
    request = Request([65], max_tokens=20, stop_ids=ends, seed=seed, constraint=digits)
    ((answer,),) = ENGINE.generate([request])
    assert answer[-1].finish_reason == "stop"
    assert re.fullmatch(b"[0-9]{6}", b"".join(TOKEN_BYTES[token.token] for token in answer))

    answers = Answers(request, TOKEN_BYTES, list("56789"))
    ((answer,),) = ENGINE.generate([answers.request])
    assert "".join(answers.text(token) for token in answer).strip("0") == ""
    assert answer[-1].finish_reason == ("stop" if answer[-1].token == STOP else "length")


def test_regular_expressions_and_grammars_hold():
    pattern = r"(cat|dog){1,3} [0-9]+!"
    lark = 'start: "<" (start | WORD) ">"\nWORD: /[xyz]{1,2}/'
    constraints = [GRAMMARS.constraint("regex", pattern)] * 6 + [GRAMMARS.constraint("lark", lark)] * 6
    for i, (text, reason) in enumerate(answers_to(constraints, temperature=2.0)):
        if reason == "length":
            continue
        assert re.fullmatch(pattern if i < 6 else r"(<+)[xyz]{1,2}(>+)", text.decode())
        assert i < 6 or text.count(b"<") == text.count(b">")


def test_samples_and_neighbours_are_constrained_each_by_its_own():
    digits = GRAMMARS.constraint("regex", "[0-9]{4}")
    constrained = Request([65], num_samples=3, max_tokens=8, stop_ids=frozenset({STOP}), constraint=digits)
    free = Request([65], max_tokens=8, seed=5)
    ((alone,),) = ENGINE.generate([free])
    samples, (beside,) = ENGINE.generate([constrained, free])
    assert [token.token for token in beside] == [token.token for token in alone]
    texts = [b"".join(TOKEN_BYTES[token.token] for token in sample) for sample in samples]
    assert all(re.fullmatch(b"[0-9]{4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_the_distribution_is_that_of_what_is_allowed():
    """Log-probabilities are those of the model's distribution over the allowed tokens alone."""
    (answer,) = ENGINE.generate(
        [
            Request(
                [65],
                max_tokens=1,
                top_logprobs=3,
                stop_ids=frozenset({STOP}),
                constraint=GRAMMARS.constraint("regex", "[abc]x"),
            )
        ]
    )[0]
    token = answer[0]
    assert token.top is not None
    assert sorted(token.top.tokens) == [97, 98, 99]
    assert np.sum(np.exp(token.top.logprobs)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", {"type": "strin"}, "json_schema"),
        ("json_schema", "{not json", "json_schema cannot be read"),
        ("json_schema", "[" * 50_000, "json_schema cannot be read"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}, "cannot be satisfied"),
        ("json_schema", {"$ref": "http://example.com/schema"}, "cannot be satisfied or is not supported"),
        ("regex", "[0-9", "regex cannot be satisfied"),
        ("lark", "start: missing", "lark cannot be satisfied"),
        ("regex", "a" * 100_001, "100001 characters exceeds 100000"),
        ("ebnf", "x", "constraint 'ebnf' is not one of"),
    ],
)
def test_what_cannot_be_had_is_refused_before_it_is_queued(kind, source, message):
    with pytest.raises(ValueError, match=message):
        GRAMMARS.constraint(kind, source)


def test_constraints_do_not_go_with_guesses():
    config = EngineConfig(max_batch=1, cache_tokens=64, num_guesses=2)
    engine = Engine(PARAMS, MODEL, config, guess=lambda ongoing, counts: [[] for _ in ongoing])
    with pytest.raises(ValueError, match=r"set engine\.num_guesses=0"):
        engine.submit(Request([65], constraint=GRAMMARS.constraint("regex", "a")))
