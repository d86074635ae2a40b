"""Logits of a network in bfloat16 are float32 in a process that decodes and in one that trains, however many rows there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The largest errors of logits and of log_z, by `unembed` and by `token_logprobs`, for each number of rows.
ERRORS = """
import json, sys
from model.xla import configure
configure(1, decoding=sys.argv[1] == "decodes")
import jax, jax.numpy as jnp, numpy as np
from model.config import ModelConfig
from model.logprobs import token_logprobs
from model.transformer import unembed

size = {"vocab_size": 1024, "num_layers": 1, "d_model": 128, "num_heads": 4, "d_ff": 8, "max_seq_len": 8}
config = ModelConfig(**size, dtype="bfloat16", tie_embeddings=True)
keys = jax.random.split(jax.random.key(0))
embedding, hidden = (jax.random.normal(key, shape).astype("bfloat16") for key, shape in zip(keys, ((1024, 128), (4, 1, 128))))
run = jax.jit(lambda p, h: (unembed(p, config, h), token_logprobs(p, config, h, jnp.zeros(h.shape[:2], int)).log_z))
errors = []
for rows in (1, 2, 4):
    found = run({"embedding": embedding}, hidden[:rows])
    assert [x.dtype for x in found] == ["float32", "float32"]
    wide = np.asarray(hidden[:rows], np.float64) @ np.asarray(embedding, np.float64).T
    expected = wide, np.log(np.exp(wide - 40).sum(axis=-1)) + 40
    errors.append([float(abs(a - b).max()) for a, b in zip(found, expected)])
print(json.dumps(errors))
"""


@pytest.mark.parametrize("process", ["decodes", "trains"])
def test_logits_are_not_rounded(process):
    """Against float64 of the same rounded weights and hidden states; logits, up to 40 here, would be wrong by 1/8."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    output = subprocess.check_output([sys.executable, "-c", ERRORS, process], env=environment, cwd=ROOT, text=True)
    assert max(error for errors in json.loads(output) for error in errors) < 5e-5
