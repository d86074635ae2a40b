"""A real model's scores on real questions, against those another engine and lm-eval's scorer gave for the same file.

`LOAM_EVAL_DATA=DIRECTORY pytest -m slow tests/inference/test_published_scores.py`: a directory with `arc_easy.jsonl` and
`piqa.jsonl`, lines of {"query", "choices", "gold"}; the model is `loam pull smollm2-135m-instruct`. Six minutes on two cores.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from inference.models import open_model
from inference.score import score

DOCUMENTS = 400


def accuracy(model, path, *, per_character):
    """Percent of the first documents whose right answer is the most likely, or the most likely per character."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[:DOCUMENTS]]
    rows, lengths = [], []
    for line in lines:
        context = model.tokenizer.encode(line["query"].rstrip("\n") + "\nAnswer:")
        for choice in line["choices"]:
            # The answer's tokens are those that follow the context's in the whole text.
            whole = model.tokenizer.encode(line["query"].rstrip("\n") + "\nAnswer: " + choice)
            assert whole[: len(context)] == context
            rows.append(whole)
            lengths.append((len(whole) - len(context), len(choice)))
    sums = np.zeros(len(rows))
    for i, scores in score(model.params, model.config, rows):
        sums[i] = scores.logprobs[-lengths[i][0] :].astype(np.float64).sum()
    right, at = 0, 0
    for line in lines:
        here = slice(at, at + len(line["choices"]))
        at = here.stop
        values = sums[here] / [characters for _, characters in lengths[here]] if per_character else sums[here]
        right += int(np.argmax(values)) == line["gold"]
    return 100 * right / len(lines)


@pytest.mark.slow
def test_smollm2_scores_what_it_scores_elsewhere():
    directory = Path(os.environ.get("LOAM_EVAL_DATA", "/nowhere"))
    if not (directory / "arc_easy.jsonl").is_file():
        pytest.skip("LOAM_EVAL_DATA names no directory with arc_easy.jsonl and piqa.jsonl")
    try:
        model = open_model("smollm2-135m-instruct")
    except ValueError as error:
        pytest.skip(str(error))
    arc = accuracy(model, directory / "arc_easy.jsonl", per_character=False)
    piqa = accuracy(model, directory / "piqa.jsonl", per_character=True)
    print(f"ARC-Easy {arc:.2f}, PIQA {piqa:.2f} percent")
    assert arc == pytest.approx(50.3, abs=1)
    assert piqa == pytest.approx(65.8, abs=1)
