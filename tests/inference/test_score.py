"""Scores of given rows against the full forward in float64, whatever the rows beside them."""

import numpy as np
import pytest

from inference.score import score
from tests.inference.test_engine import CHAIN, MODEL, PARAMS, logits_after


def test_scores_are_the_log_probabilities_of_the_full_forward():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, MODEL.vocab_size, length).tolist() for length in (2, 17, 5, 32, 24, 3, 31)]
    found = dict(score(PARAMS, MODEL, rows, tokens_per_batch=40))
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        logits = logits_after(row, PARAMS, MODEL).astype(np.float64)[:-1]
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        targets = row[1:]
        np.testing.assert_allclose(found[i].logprobs, logprobs[np.arange(len(targets)), targets], atol=1e-5)
        assert found[i].greedy.tolist() == (np.argmax(logits, axis=1) == targets).tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "row 1 has 1 tokens"),
        ([1] * 34, "row 1 has 34 tokens, but model.max_seq_len=32"),
        ([1, 48], r"row 1 holds .* 1\.\.48"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        list(score(PARAMS, MODEL, [CHAIN[:4], row]))
