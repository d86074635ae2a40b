"""Checkpoints in and out, against what transformers made of the same weights (tests/hugging_face.py)."""

import functools
import json

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from model.convert.config_json import differences
from model.convert.families import FAMILIES
from model.convert.huggingface import load, save
from model.convert.safetensors import read_headers
from model.transformer import forward, unembed
from tests.hugging_face import (
    CASES,
    FIXTURE,
    NEW_TOKENS,
    PROMPT,
    greedy_with_transformers,
    logits_with_transformers,
    make_with_transformers,
    write_checkpoint,
)

KNOWN = json.loads(FIXTURE.read_text())


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, config: ModelConfig, tokens):
    positions = np.arange(tokens.shape[0], dtype=np.int32)[None]
    hidden = forward(params, config, tokens[None], positions)[0]
    return unembed(params, config, hidden)[0]


def checkpoint(directory, name):
    """The checkpoint of a case, written without transformers."""
    known = KNOWN[name]
    write_checkpoint(directory, known["config"], known["tensors"])
    return directory


def assert_same_trees(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


# --- against transformers -----------------------------------------------------------------------------------------------------


def test_every_family_has_a_case_and_every_case_its_record():
    assert {name.split()[0] for name in CASES} == set(FAMILIES)
    assert set(KNOWN) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_those_that_transformers_gave(name, tmp_path):
    """Greedy by one pass over its tokens: if each is the most likely after those before it, ours are the same."""
    params, config = load(checkpoint(tmp_path, name))
    tokens = np.array(PROMPT + KNOWN[name]["greedy"], np.int32)
    logits = np.asarray(logits_of(params, config, tokens))
    for at, expected in KNOWN[name]["logits"].items():
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(logits[int(at)], expected, atol=1e-4, rtol=0)
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist() == KNOWN[name]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_names_shapes_and_bits(name, tmp_path):
    """Of the tensors and of the parameters, in one file and in shards; and the config says the same network."""
    source = checkpoint(tmp_path / "in", name)
    params, config = load(source)
    save(tmp_path / "out", params, config, name.split()[0], max_shard_bytes=20_000)
    before, after = read_headers(source), read_headers(tmp_path / "out")
    assert len({tensor.file for tensor in after.values()}) > 1
    assert set(before) == set(after)
    for tensor in before:
        np.testing.assert_array_equal(before[tensor].read(), after[tensor].read(), err_msg=tensor, strict=True)
    again, same = load(tmp_path / "out")
    assert not differences(config, same)
    assert_same_trees(params, again)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the extra `bench` has it")
    return pytest.importorskip("transformers", reason="the extra `bench` has it")


@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees_today(name, tmp_path, transformers):
    """The same against the installed transformers, and it loads what we write with equal logits."""
    theirs = make_with_transformers(name, tmp_path / "in")
    params, config = load(tmp_path / "in")
    greedy = greedy_with_transformers(theirs)
    assert len(greedy) == NEW_TOKENS
    tokens = PROMPT + greedy
    expected = logits_with_transformers(theirs, tokens)
    logits = np.asarray(logits_of(params, config, np.array(tokens, np.int32)))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist() == greedy
    save(tmp_path / "out", params, config, name.split()[0], source=tmp_path / "in")
    import torch

    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    np.testing.assert_array_equal(logits_with_transformers(again.eval(), tokens), expected)
