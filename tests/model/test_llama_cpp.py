"""Random networks that we write run in llama.cpp, which finds the same distributions (SmolLM2: tests/inference)."""

import dataclasses
import functools
import json
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from data.gguf_tokenizer import SPLITS, metadata_of, tokenizer_of
from model.config import ModelConfig, RopeConfig
from model.convert.gguf import load, save
from model.transformer import forward, unembed
from tests.data.gguf_metadata import TEXT, byte_bpe_metadata, sentencepiece_metadata
from tests.llama_cpp import open_llama_cpp
from tests.networks import random_params

VOCAB_SIZE = 160
# Whole words: of a token that ends within a character the server of llama.cpp tells no probability.
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [f"word{i}" for i in range(VOCAB_SIZE)],
    "tokenizer.ggml.token_type": [1] * VOCAB_SIZE,
    "tokenizer.ggml.merges": ["w o"],
    "tokenizer.ggml.eos_token_id": 0,
}
LLAMA = ModelConfig(
    vocab_size=VOCAB_SIZE,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
    max_seq_len=256,
    dtype="float32",
    scan_layers=False,
    remat="none",
)
SCALED = {"factor": 8.0, "original_max_len": 8192, "theta": 500_000.0}
NETWORKS = {
    "llama": LLAMA,
    "llama, tied": dataclasses.replace(LLAMA, tie_embeddings=True, num_kv_heads=4),
    "llama 3.1": dataclasses.replace(LLAMA, rope=RopeConfig(scaling="llama3", **SCALED)),
    "llama, linear rope": dataclasses.replace(LLAMA, rope=RopeConfig(scaling="linear", factor=4.0)),
    "llama, yarn": dataclasses.replace(LLAMA, rope=RopeConfig(scaling="yarn", factor=4.0, original_max_len=64)),
    "llama, biases": dataclasses.replace(LLAMA, qkv_bias=True, attention_out_bias=True),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="head", head_dim=32),
}
# Largest difference of log-probabilities, nats. llama.cpp rounds the inputs of a product to the kind of its weights; the widest
# seen were 6e-5, 0.027 and 0.44.
TOLERANCE = {"F32": 2e-4, "F16": 0.05, "Q8_0": 0.8}


QUICK = [("llama", "Q8_0")]
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow) for name in NETWORKS for kind in TOLERANCE
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_llama_cpp_finds_our_distributions(name, kind, tmp_path):
    """Over the whole vocabulary, after each token of its greedy answer; without rounding the answer is ours too."""
    path = tmp_path / "model.gguf"
    save(path, random_params(NETWORKS[name]), NETWORKS[name], kind, TOKENIZER)
    prompt = np.random.default_rng(0).integers(3, VOCAB_SIZE, 150).tolist()
    with open_llama_cpp(path) as theirs:
        answer = theirs.greedy(prompt, 32, top=VOCAB_SIZE)
    assert len(answer.tokens) == 32, "the answer ended early: take another prompt"
    expected = np.array([[place[token] for token in range(VOCAB_SIZE)] for place in answer.logprobs])
    params, config = load(path)
    tokens = np.array([prompt + answer.tokens], np.int32)
    hidden = forward(params, config, tokens, np.arange(tokens.size, dtype=np.int32)[None])[0]
    ours = np.asarray(jax.nn.log_softmax(unembed(params, config, hidden)[0, len(prompt) - 1 : -1]))
    assert np.std(expected) > 1.5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE[kind])
    if kind == "F32":
        np.testing.assert_array_equal(np.argmax(ours, axis=-1), answer.tokens)


# --- Tokenizers ---------------------------------------------------------------------------------------------------------------

WORDS = [
    "x 1234 12345678 a1b22c333",
    'a !! b?! (c), "d" -- e_f $5+3=8 <y> ^z ~w|v `u` a@b.c #h %k &l *m',
    "it's don't I'LL you'Re we'D they've 'tis 'S",
    "  two\n\n\ttab   three \r\n \n end  ",
    "ünïcödé Straße ΑΘΗΝΑ привет 你好世界 こんにちは 🎉🎉 “quoted” — ¿qué? €5 ½ ² Ⅷ ٣٤٥",
    "camelCase HTTPServer fooBar/baz path/to/file.py:12 //comment/\n/* x */",
    "\u00a0no-break\u3000wide\u2028line",
    "word " * 5 + "a" * 40 + "-" * 20 + "9" * 17,
]
MARKED = ["cafe\u0301 nai\u0308ve हिन्दी", "приветМир ΑβΓδ"]


@functools.cache
def merged_across_borders() -> dict:
    """Byte-level BPE whose merges know no split, so that only the split by its name keeps them within words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    # Windows of a few characters, each often enough to be merged.
    texts = [text[i : i + 6] for text in [*WORDS, *MARKED] for i in range(len(text))]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


@contextmanager
def llama_cpp_with(metadata, directory):
    """A network of this vocabulary, in llama.cpp."""
    config = dataclasses.replace(LLAMA, vocab_size=len(metadata["tokenizer.ggml.tokens"]), num_layers=1)
    save(directory / "model.gguf", random_params(config), config, "F32", metadata)
    with open_llama_cpp(directory / "model.gguf") as theirs:
        yield theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITS, None])
def test_llama_cpp_finds_our_tokens(name, tmp_path):
    metadata = merged_across_borders() | ({"tokenizer.ggml.pre": name} if name else {})
    ours = tokenizer_of(metadata, "test")
    with llama_cpp_with(metadata, tmp_path) as theirs:
        for text in WORDS:
            assert ours.encode(text) == theirs.tokenize(text), text
        for text in MARKED:  # of which llama.cpp's tekken is an approximation, and ours is as published
            assert (ours.encode(text) == theirs.tokenize(text)) == (name != "tekken"), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece", "sentencepiece without a space before"])
def test_llama_cpp_opens_what_is_written_of_a_tokenizer_that_is_narrower_than_the_model(kind, tmp_path):
    """And finds the same tokens, also in the words that a split leaves alone."""
    read = byte_bpe_metadata("qwen2") if kind == "byte_bpe" else sentencepiece_metadata(kind == "sentencepiece")
    ours = tokenizer_of(read, "test")
    metadata = metadata_of(ours, ours.vocab_size + 7)
    assert len(metadata["tokenizer.ggml.tokens"]) == ours.vocab_size + 7
    with llama_cpp_with(metadata, tmp_path) as theirs:
        for text in [*WORDS, *TEXT, " the fox"]:
            assert ours.encode(text) == theirs.tokenize(text), text
