"""Process reward models, from lines and labels to a reward: where each label stands, the loss by hand, scores of samples."""

import json
import math
import random
import re

import jax
import numpy as np
import pytest
import scipy.special

from data.chat import BadExample, import_row
from data.config import IGNORE, DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from data.loader import Batches
from data.prepare import prepare
from data.steps import LineTokens, step_ends
from data.tasks.mistakes import mistaken_steps
from inference.request import Token
from model.config import ModelConfig
from model.params import is_spec, param_specs
from model.transformer import forward
from train.config import CheckpointConfig, EvalConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from train.learned_reward import LearnedReward
from train.loop import evaluate, train
from train.metrics import read_jsonl
from train.objectives.config import ObjectiveConfig, ProcessModelConfig
from train.preferences import REWARD_HEAD, preference_objective
from train.rollouts import to_rows
from train.scalar_head import scalar_head_spec
from train.step import make_trainer

MODEL = ModelConfig(vocab_size=258, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_seq_len=96)
PROCESS = ObjectiveConfig(process_model=ProcessModelConfig())
# A line is right where it ends with +; the last label of the second kind is not known.
ROWS = [
    {
        "prompt": f"q{i}",
        "completions": [f"{k}{'+-'[(i + k) % 3 == 0]}\n"[: None if k < 2 else -1] for k in range(1 + i % 3)],
        "labels": [None if (i % 5 == 1 and k == 0 and i % 3) else (i + k) % 3 != 0 for k in range(1 + i % 3)],
    }
    for i in range(60)
]


def job(directory, **options):
    path = directory / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = DataConfig(
        sources=(SourceConfig("made", "files", path=str(path), held_out_fraction=0.2),),
        content="steps",
        tokenizer=TokenizerConfig("bytes"),
        seq_len=96,
        cache_dir=str(directory / "cache"),
        loader_threads=0,
    )
    settings = {
        "name": "process",
        "run_dir": str(directory / "run"),
        "model": MODEL,
        "data": data,
        "objective": PROCESS,
        "steps": 40,
        "batch_size": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, schedule=ScheduleConfig("constant", warmup="0 %")),
        "checkpoint": CheckpointConfig(every=40),
        "eval": EvalConfig(every=100),
        "writers": (),
    }
    return TrainConfig(**(settings | options))


def random_params(seed):
    random = np.random.default_rng(seed)
    draw = lambda spec: np.asarray((spec.init == "ones") + 0.3 * random.standard_normal(spec.shape), np.float32)  # noqa: E731
    return jax.tree.map(draw, param_specs(MODEL) | {REWARD_HEAD: scalar_head_spec(MODEL)}, is_leaf=is_spec)


def solutions(batch):
    """(ids, {place of a token: its label}) of every solution in the rows."""
    for r in range(len(batch["tokens"])):
        for s in range(1, batch["segment_ids"][r].max() + 1):
            here = batch["segment_ids"][r] == s
            labels = batch["labels"][r][here]
            yield batch["tokens"][r][here].tolist(), {int(i): float(labels[i]) for i in np.flatnonzero(labels != IGNORE)}


def expected_solution(row):
    """Ids of bytes in the default template, and where each line's last token is."""
    prompt = [256, *b"user\n", *row["prompt"].encode(), 257, 256, *b"assistant\n"]
    ids, labels = list(prompt), {}
    lines = [line.strip("\n") for line in row["completions"]]
    for k, (line, label) in enumerate(zip(lines, row["labels"], strict=True)):
        ids += [*line.encode(), *(b"\n" if k + 1 < len(lines) else [257])]
        if label is not None:
            labels[len(ids) - 1] = float(label)
    return ids, labels


def test_a_label_stands_where_the_last_token_of_its_step_is_read(tmp_path):
    data = prepare(job(tmp_path).data, log=lambda _: None)
    packs = [data.train["made"], data.held_out["made"]]
    found = [solution for pack in packs for solution in solutions(pack.read(np.arange(len(pack))))]
    usable = [row for row in ROWS if any(label is not None for label in row["labels"])]
    key = lambda solution: (solution[0], sorted(solution[1].items()))  # noqa: E731
    assert sorted(map(key, found)) == sorted(key(expected_solution(row)) for row in usable)
    manifest = data.manifest["sources"]["made"]
    assert manifest["train"]["steps"] + manifest["held_out"]["steps"] == sum(len(labels) for _, labels in found)
    assert manifest["train"]["sequences"] + manifest["held_out"]["sequences"] == len(usable)


def test_the_loss_is_the_cross_entropy_of_the_labelled_steps_alone(tmp_path):
    config = job(tmp_path, batch_size=4)
    batch = Batches(prepare(config.data, log=lambda _: None), config.data, batch_size=4, seed=0)[0]
    batch = {name: np.pad(x, ((0, 1), (0, 0))) for name, x in batch.items()}  # a row of padding, whose labels are 0
    params = random_params(1)
    total, sums = preference_objective(PROCESS, LossConfig())(params, MODEL, batch, None)
    losses, right = [], 0.0
    for ids, labels in solutions({name: x[:4] for name, x in batch.items()}):
        tokens = np.array([ids])
        hidden = np.asarray(forward(params, MODEL, tokens, np.arange(len(ids))[None], np.ones_like(tokens))[0], np.float64)[0]
        for place, label in labels.items():
            logit = float(hidden[place] @ np.asarray(params[REWARD_HEAD], np.float64)[:, 0])
            losses.append(-math.log(scipy.special.expit(logit if label else -logit)))
            right += (logit > 0) == (label == 1)
    assert len(losses) > 8
    assert float(sums["weight"]) == len(losses)
    assert float(total) == pytest.approx(sum(losses), rel=1e-5)
    assert float(sums["accuracy"]) == right


@pytest.mark.slow
def test_a_process_model_learns_and_its_score_of_a_sample_is_of_its_steps(tmp_path):
    config = job(tmp_path)
    assert train(config, log=lambda _: None) == 0
    steps = [record for record in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["val_accuracy"] > 0.9

    trainer = make_trainer(config, jax.devices()[:1])
    learned = {how: LearnedReward(str(tmp_path / "run"), MODEL, trainer.mesh, 4, how) for how in ("min", "product", "last")}
    params = learned["min"].params
    prompt, answers, chances = [256, *b"user\nq", 257, 256, *b"assistant\n"], [], []
    for text, stops in ((b"0+\n1-\n2+", True), (b"0+", True), (b"0-\n\n1", False), (b"\n", False)):
        drawn = [*text, *([257] if stops else [])]
        ids = np.array([prompt + drawn])
        hidden = np.asarray(forward(params, MODEL, ids, np.arange(ids.size)[None], np.ones_like(ids))[0], np.float64)[0]
        breaks = [i for i, token in enumerate(drawn) if token == 10 and drawn[max(i - 1, 0)] != 10]  # none at a blank line
        ends = [len(prompt) + i for i in (*breaks, len(drawn) - 1)]
        chances.append(scipy.special.expit(hidden[ends] @ np.asarray(params[REWARD_HEAD], np.float64)[:, 0]))
        reason = "stop" if stops else "length"
        last = len(drawn) - 1
        answers.append([Token(0, 0, t, -1, -1, None, None, reason if i == last else None) for i, t in enumerate(drawn)])
    samples = to_rows([prompt] * 4, [[answer] for answer in answers], row_tokens=40)
    for how, of in (("min", np.min), ("product", np.prod), ("last", lambda p: p[-1])):
        np.testing.assert_allclose(learned[how](samples), [of(p) for p in chances], rtol=1e-4)
    # Held-out scores are means over labelled steps.
    data = prepare(config.data, log=lambda _: None)
    held_out = data.held_out["made"].read(np.arange(len(data.held_out["made"])))
    scores = evaluate(trainer, params, data)
    sums = preference_objective(PROCESS, LossConfig())(params, MODEL, held_out, None)[1]
    assert scores["val_loss"] == pytest.approx(float(sums["loss"]) / float(sums["weight"]), rel=1e-5)


SAYS = (b"a", b"\n", b"b\n", b" ", b"\n\n", b"")  # the last one is special
LINES = LineTokens(np.array([b"\n" in text for text in SAYS]), np.array([bool(text.strip()) for text in SAYS]))


def test_steps_end_at_line_breaks_and_at_the_end_of_the_answer_alone():
    tokens = np.array([[1, 0, 1, 2, 0, 0, 0], [1, 1, 0, 2, 0, 7, 0]])
    written = np.array([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]], bool)
    expected = [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0]]
    np.testing.assert_array_equal(step_ends(tokens, written, LINES), np.array(expected, bool))


def test_blank_lines_are_no_steps_whatever_tokens_they_are_written_with():
    """As many steps end as lines of the text say something, the k-th where its line does; and at least one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens, start = rng.integers(0, 7, 9), rng.integers(0, 4)
        count = rng.integers(1, 9 - start)
        written = (np.arange(9) >= start) & (np.arange(9) < start + count)
        ends = np.flatnonzero(step_ends(tokens, written, LINES))
        # Place of each character; what is beyond the tokenizer is a letter.
        places = [(i, c) for i in np.flatnonzero(written) for c in (*SAYS, b"?")[tokens[i]].decode()]
        lines, line = [], []
        for place, character in places:
            line.append((place, character))
            if character == "\n":
                lines, line = [*lines, line], []
        wanted = [one[-1][0] for one in lines if "".join(c for _, c in one).strip()]
        if "".join(c for _, c in line).strip():
            wanted.append(start + count - 1)
        assert ends.tolist() == (wanted or [start + count - 1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gcd", (("answer_format", "hashes"),)),
        ("gcd", (("answer_format", "last_number"),)),
        ("gcd", ()),
        ("letter_count", (("answer_format", "tags"),)),
        ("countdown", ()),
        ("sort", ()),
        ("brackets", ()),
    ],
)
def test_a_solution_with_a_slip_ends_there_and_the_slip_is_one(name, options):
    """Other numbers, or another text than the right step whatever its spaces; no equation that holds; and no right answer."""
    task = TaskConfig(name, options).make()
    places = set()
    for i in range(300):
        example = task.example(i, 0)
        right = task.solution(example).split("\n")
        steps, labels = mistaken_steps(task, example, random.Random(i))
        assert steps[:-1] == right[: len(steps) - 1]
        assert labels == [True] * (len(steps) - 1) + [False]
        instead, slip = right[len(steps) - 1], steps[-1]
        assert re.sub(r"\s", "", slip) != re.sub(r"\s", "", instead)
        if re.search(r"\d", instead):
            assert [int(n) for n in re.findall(r"\d+", slip)] != [int(n) for n in re.findall(r"\d+", instead)]
        if equation := re.fullmatch(r"(\d+) mod (\d+) = (\d+)", slip):
            a, b, rest = map(int, equation.groups())
            assert a % b != rest
        assert task.score("\n".join(steps), example).reward < 1
        places.add(len(right) - len(steps))
    assert len(places) > 1 or "\n" not in task.solution(task.example(0, 0))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completions": ["a"], "labels": [True, False]}, "unequal steps and labels"),
        ({"completions": ["a\nb"], "labels": [True]}, "step is not a line"),
        ({"completions": [" "], "labels": [True]}, "step is not a line"),
        ({"completions": [3], "labels": [True]}, "step is not a line"),
        ({"completions": ["a"], "labels": [2]}, "label is no chance"),
        ({"completions": ["a"], "labels": [float("nan")]}, "label is no chance"),
        ({"completions": ["a"], "labels": ["yes"]}, "label is no chance"),
        ({"completions": ["a"], "labels": [None]}, "no label"),
        ({"completions": "a", "labels": [True]}, "unknown layout"),
        ({"completions": [], "labels": []}, "no label"),
    ],
)
def test_steps_that_teach_nothing_are_left_out_by_name(row, reason):
    with pytest.raises(BadExample) as error:
        import_row({"prompt": "q"} | row, "steps")
    assert error.value.reason == reason
