"""Engine against trainer from the command line: what is printed, and that precision shows."""

import json

import pytest

from data.tokenizer import ByteTokenizer
from experiments import parity
from experiments.cli import parse
from inference.models import LoadedModel
from model.presets import preset
from tests.networks import random_params


@pytest.fixture
def compared(monkeypatch, capsys):
    """What comparing a small model prints: its lines, and the JSON of the last."""
    tokenizer = ByteTokenizer("bytes", b"", document_boundaries=True)
    config = preset("tiny-llama", vocab_size=300, max_seq_len=64)
    loaded = LoadedModel(random_params(config), config, tokenizer, None, frozenset(), "tiny")
    monkeypatch.setattr(parity, "open_any", lambda source: loaded)

    def compare(*options):
        parity.compare(parse(["parity", "tiny", "--samples=3", *options]))
        lines = capsys.readouterr().out.splitlines()
        return lines, json.loads(lines[-1])

    return compare


def test_what_is_printed_is_the_difference_in_the_precision_that_was_asked_for(compared):
    lines, exact = compared("--tokens=9")
    assert lines[0] == "tiny, activations in float32: 3 samples of 9 tokens"
    assert lines[2].split()[-2:] == [f"{exact[name]:.3g}" for name in ("largest", "mean")]
    assert lines[3].split()[-2:] == [f"{exact[name]:.3g}" for name in ("drawn_largest", "drawn_mean")]
    assert 0 < exact["mean"] < exact["largest"] < 1e-4
    # Rounded alike, so small a network mostly gives the very same bits: other differences, not larger ones.
    lines, rounded = compared("--tokens=9", "--dtype=bfloat16")
    assert lines[0] == "tiny, activations in bfloat16: 3 samples of 9 tokens"
    assert rounded["largest"] != exact["largest"]


def test_samples_of_nothing_or_of_more_than_the_context_are_refused(compared):
    with pytest.raises(ValueError, match="--tokens=0 must be positive"):
        compared("--tokens=0")
    with pytest.raises(ValueError, match="--tokens=60 and one after them exceed the context of 64"):
        compared("--tokens=60")
