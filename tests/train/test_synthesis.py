"""Data made by a model: what is kept, by hand; conversations with a scripted model; and whole jobs that are stopped."""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import string
import types

import numpy as np
import pytest

from data.chat import import_row
from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from data.overlap import common_subsequence, rouge_l, words
from data.prepare import prepare
from data.tokenizer import train_tokenizer
from experiments.cli import main
from model.config import ModelConfig
from model.transformer import forward
from tests.train.rl_runs import drawn
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from train.loop import train
from train.metrics import read_jsonl
from train.objectives.config import ObjectiveConfig, RewardModelConfig
from train.preferences import REWARD_HEAD
from train.step import make_trainer
from train.synthesis import job
from train.synthesis.best_of import select
from train.synthesis.config import (
    BestOfConfig,
    CritiqueConfig,
    InstructionConfig,
    Principle,
    PromptConfig,
    SynthesisConfig,
)
from train.synthesis.critique import criticise
from train.synthesis.instructions import first_line, refusal, write_instructions
from train.synthesis.writer import Answer, Writer

MODEL = ModelConfig(vocab_size=260, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_seq_len=96)
TASK = TaskConfig("reverse", (("min_length", 1), ("max_length", 2), ("alphabet", "ab"), ("template", "{text}=")))


# --- Similarity -----------------------------------------------------------------------------------------------------------


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert words("The cat's 2 mats, naïve_ÉTÉ!") == ["the", "cat", "s", "2", "mats", "naïve", "été"]
    assert rouge_l("police killed the gunman".split(), "police kill the gunman".split()) == 3 / 4
    assert rouge_l("police killed the gunman".split(), "the gunman kill police".split()) == 2 / 4
    assert rouge_l("a b c d e f".split(), "a c e".split()) == pytest.approx(2 * 3 / 9)
    assert rouge_l([], ["a"]) == rouge_l(["a"], []) == 0
    assert words("猫坐在垫子上。狗呢") == ["猫坐在垫子上", "狗呢"]
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (rng.integers(0, 3, rng.integers(0, 7)).tolist() for _ in range(2))
        subsequences = [{tuple(part) for n in range(len(x) + 1) for part in itertools.combinations(x, n)} for x in (a, b)]
        assert common_subsequence(a, b) == max(len(part) for part in subsequences[0] & subsequences[1])


# --- Best of n ------------------------------------------------------------------------------------------------------------

ANSWERS = [Answer("a", True), Answer("b", True), Answer("a", True), Answer("cut", False), Answer(" ", True), Answer("c", True),
           Answer("d", True), Answer("\ufffde", True), Answer("\ufffdcut", False)]  # fmt: skip
SCORES = [0.5, 1.0, 0.9, 2.0, 2.0, math.nan, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (BestOfConfig(7, "best"), ["b"]),
        (BestOfConfig(7, "best", min_score=1.5), []),
        (BestOfConfig(7, "right", min_score=1.0), ["b", "d"]),
        (BestOfConfig(7, "right", min_score=0.0), ["b", "d", "a"]),
        (BestOfConfig(7, "right", min_score=0.0, max_kept=2), ["b", "d"]),
        (BestOfConfig(7, "all"), ["b", "d", "a"]),
        (BestOfConfig(7, "pairs"), [("b", "a")]),
        (BestOfConfig(7, "pairs", min_score=1.5), []),
    ],
)
def test_what_is_kept_of_answers(config, kept):
    rows, counts = select(config, "p", ANSWERS, SCORES)
    if config.keep == "pairs":
        assert [(row["chosen"], row["rejected"]) for row in rows] == kept
        assert all((row["score_chosen"], row["score_rejected"]) == (1.0, 0.5) for row in rows)
    else:
        assert [row["completion"] for row in rows] == kept
        assert [row["score"] for row in rows] == [dict(zip("bda", (1.0, 1.0, 0.5), strict=True))[text] for text in kept]
    left_out = {name: counts[name] for name in ("answers", "truncated", "no_text", "empty", "unjudged", "duplicate")}
    assert left_out == {"answers": 9, "truncated": 2, "no_text": 1, "empty": 1, "unjudged": 1, "duplicate": 1}
    for row in rows:
        import_row(row, "pairs" if config.keep == "pairs" else "conversations")


def test_special_tokens_within_an_answer_are_seen_in_its_text():
    """And not taken out, so that what stands around them would be judged: only the stop token is."""
    tokenizer = train_tokenizer(TokenizerConfig("chars"), ["ab"])
    (a, b), bos, eos = tokenizer.encode("ab"), tokenizer.bos_id, tokenizer.eos_id
    writer = types.SimpleNamespace(tokenizer=tokenizer)
    found = [Writer._answer(writer, drawn(ids)) for ids in ([a, b, eos], [bos, a, bos, b, eos], [eos, a, b, eos])]
    assert [answer.text for answer in found] == ["ab", "\ufffda\ufffdb", "\ufffdab"]
    assert [answer.no_text for answer in found] == [False, True, True]
    assert Writer._answer(writer, drawn([a, bos], "length")).text == "a\ufffd"


def test_bytes_that_are_no_text_are_seen_in_an_answer():
    writer = types.SimpleNamespace(tokenizer=train_tokenizer(TokenizerConfig("bytes"), ["x"]))
    for text, no_text in (("né".encode(), False), ("né".encode()[:-1], True), (b"\xffok", True), (b"", False)):
        assert Writer._answer(writer, drawn([*text, 257])).no_text is no_text


def test_answers_that_are_equally_good_are_no_pair():
    rows, counts = select(BestOfConfig(2, "pairs"), "p", [Answer("a", True), Answer("b", True)], [1.0, 1.0])
    assert rows == []
    assert counts["prompts_without_a_pair"] == 1


# --- Critique and revision ------------------------------------------------------------------------------------------------

PRINCIPLES = (Principle("bad?", "anew!", "which?"), Principle("wrong?", "again!", "who?"))


def test_a_revision_follows_from_critique_and_is_preferred_in_both_orders_or_not_at_all():
    """Prompt i is answered "answer i"; the model prefers the longer, the left by one more letter; prompt 3's critique is cut
    off, prompt 4 stays as it was."""
    revisions = {0: "much longer revision 0", 1: "r", 2: "answer_2", 4: "answer 4"}
    seen = []

    def write(conversations, stage, numbers):
        seen.append((stage, list(numbers), conversations))
        of_stage = {
            0: lambda i: Answer(f"answer {i}", True),
            1: lambda i: Answer(f"critique {i}", i != 3),
            2: lambda i: Answer(revisions[i], True),
        }
        return [of_stage[stage](number - 10) for number in numbers]

    def weigh(conversations, replies):
        assert replies == ("A", "B")
        found = []
        for ((message,),) in zip(conversations, strict=True):
            _, _, rest = message["content"].partition("Answer A: ")
            a, _, rest = rest.partition("\n\nAnswer B: ")
            b = rest.partition("\n\n")[0]
            found.append([len(a) + 1, len(b)])
        return np.array(found, float)

    prompts = [[{"role": "user", "content": f"q{i}"}] for i in range(5)]
    rows, counts = criticise(CritiqueConfig(PRINCIPLES), prompts, 10, 0, write, weigh)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("much longer revision 0", "answer 0"), ("answer 1", "r")]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    longer = len("much longer revision 0") - len("answer 0")
    assert rows[0]["score_chosen"] == pytest.approx((sigmoid(longer + 1) + sigmoid(longer - 1)) / 2)
    assert counts == {
        "prompts": 5, "truncated": 1, "unchanged": 1, "undecided": 1, "revision_preferred": 1, "original_preferred": 1,
    }  # fmt: skip
    assert [(stage, numbers) for stage, numbers, _ in seen] == [
        (0, [*range(10, 15)]),
        (1, [*range(10, 15)]),
        (2, [10, 11, 12, 14]),
    ]
    said = [message["content"] for message in seen[2][2][1]]
    principle = next(p for p in PRINCIPLES if p.critique == said[2])
    assert said == ["q1", "answer 1", principle.critique, "critique 1", principle.revision]
    for row in rows:
        import_row(row, "pairs")
    talks = seen[1][2]
    anew = criticise(CritiqueConfig(PRINCIPLES), prompts[1:], 11, 0, write, weigh)[0]
    assert anew == rows[1:]  # whatever else was in its round
    assert seen[-2][2] == talks[1:]  # the principle too
    assert len({talk[-1]["content"] for talk in talks}) == 2


def test_without_preferences_the_revision_is_chosen():
    def write(conversations, stage, numbers):
        return [None if number == 1 else Answer(f"{stage}", True) for number in numbers]

    rows, counts = criticise(
        CritiqueConfig(PRINCIPLES, revisions=2, min_preference=0), [[{"role": "user", "content": "q"}]] * 2, 0, 0, write, None
    )
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("4", "0")]
    assert counts == {"prompts": 2, "too_long": 1, "revision_preferred": 1}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_answer_critique_or_revision_that_is_no_text_leaves_its_prompt_out(stage):
    def write(conversations, at, numbers):
        return [Answer(f"{at} \ufffd" if at == stage and number == 1 else f"{at}", True) for number in numbers]

    prompts = [[{"role": "user", "content": "q"}]] * 2
    rows, counts = criticise(CritiqueConfig(PRINCIPLES, min_preference=0), prompts, 0, 0, write, None)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("2", "0")]
    assert counts == {"prompts": 2, "no_text": 1, "revision_preferred": 1}


# --- Instructions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Name three animals of the sea.", ""),
        ("Name it.", "too_few_words"),
        ("one " * 151, "too_many_words"),
        ("? what is this thing", "no_sentence"),
        ("Describe this Picture to me", "forbidden"),
        ("Write a very short poem about rain", "similar"),  # 2 x 6 / 13
        ("Write a song about wet rain", ""),  # 2 x 4 / 12 = 0.67
    ],
)
def test_an_instruction_is_left_out_by_name(text, why):
    known = [words("Write a short poem about rain"), words("Add two numbers")]
    assert refusal(InstructionConfig(1), text, known) == why


def test_the_first_line_without_its_number_is_the_instruction():
    assert first_line("\n 5. Do this.\n6. And that.") == "Do this."
    assert first_line("- Do this") == "Do this"
    assert first_line("3 men and a boat") == "3 men and a boat"
    assert first_line(" \n") == ""


def test_new_instructions_are_told_from_known_ones_and_from_each_other_and_answered():
    written = [
        "5. Sing a song of sixpence now",
        "Sing the song of sixpence now",
        "",
        "Count all the sheep here",
        "Cut the grass well",
    ]

    def write(conversations, stage, numbers):
        if stage == 0:
            assert all(len(talk) == 1 and talk[0]["content"].endswith("3. ") for talk in conversations)
            return [Answer(written[number - 10], True) for number in numbers]
        return [
            Answer(f"answer to {talk[0]['content']}", number != 13) for talk, number in zip(conversations, numbers, strict=True)
        ]

    arguments = {"seeds": ["Seed one is here", "Seed\ntwo is there"], "known": ["Known thing of old"], "write": write}
    rows, counts = write_instructions(InstructionConfig(3, shown=2), round_number=2, batch=5, seed=0, **arguments)
    assert [row["prompt"] for row in rows] == ["Sing a song of sixpence now"]
    assert rows[0]["completion"] == "answer to Sing a song of sixpence now"
    # The last one is more than the two that are wanted beside the known one.
    assert counts == {"written": 5, "similar": 1, "too_few_words": 1, "more_than_wanted": 1, "unanswered": 1}
    assert counts["written"] == len(rows) + sum(counts.values()) - counts["written"]
    import_row(rows[0], "conversations")


def test_an_instruction_that_was_cut_off_is_none_and_one_before_the_cut_is():
    written = [
        Answer("Sing a song of", False),
        Answer("\n \nCut the grass and", False),
        Answer("Count all the sheep here\n6. And", False),
        Answer("Name the days of this week", True),
    ]

    def write(conversations, stage, numbers):
        return written if stage == 0 else [Answer("an answer", True) for _ in conversations]

    rows, counts = write_instructions(InstructionConfig(9), ["Seed one is here"], [], 0, 4, 0, write)
    assert [row["prompt"] for row in rows] == ["Count all the sheep here", "Name the days of this week"]
    assert counts == {"written": 4, "truncated": 2}


def test_instructions_and_answers_that_are_no_text_are_not_kept():
    """What comes after the line of an instruction is not used, and may be anything."""
    written = ["Sing a song of \ufffd now", "Cut the grass and trees\n\ufffd", "Count all the sheep here"]

    def write(conversations, stage, numbers):
        return [Answer(written[number] if stage == 0 else "a\ufffd" * (number == 2) or "yes", True) for number in numbers]

    rows, counts = write_instructions(InstructionConfig(9), ["Seed one is here"], [], 0, 3, 0, write)
    assert rows == [{"prompt": "Cut the grass and trees", "completion": "yes"}]
    assert counts == {"written": 3, "no_text": 2}


# --- Whole jobs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run with a chat template, hardly trained."""
    directory = tmp_path_factory.mktemp("writer")
    rows = [{"prompt": f"q{i}", "completion": f"{i}"} for i in range(30)]
    (directory / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        (SourceConfig("made", "files", path=str(directory / "chats.jsonl"), held_out_fraction=0.2),),
        content="conversations",
        tokenizer=TokenizerConfig("bytes"),
        seq_len=96,
        cache_dir=str(directory / "cache"),
        loader_threads=0,
    )
    options = {
        "run_dir": str(directory / "run"),
        "writers": (),
        "checkpoint": CheckpointConfig(every=2),
        "eval": EvalConfig(100),
    }
    assert train(TrainConfig("writer", MODEL, data, steps=2, batch_size=8, **options), log=lambda _: None) == 0
    return directory / "run"


HOSTILE = 'Say <eos> {{ 7 * 7 }} {0}\n"\\'


def config_of(begun, run_dir, **options):
    settings = {
        "prompts": PromptConfig(texts=(HOSTILE, *(f"q{i}" for i in range(6)))),
        "chat": True,
        "best_of": BestOfConfig(2, "all"),
        "batch": 2,
        "max_prompt_tokens": 60,
        "max_tokens": 30,
        "max_batch": 4,
        "verifiers": 1,
    }
    return SynthesisConfig(
        **({"name": "made", "model": MODEL, "initial_weights": str(begun), "run_dir": str(run_dir)} | settings | options)
    )


def run(config, stop_after=99, monkeypatch=None):
    calls = itertools.count(1)

    @contextlib.contextmanager
    def stop():
        yield lambda: next(calls) > stop_after

    if monkeypatch is None:
        return job.synthesize(config, log=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(job, "stop_on_signal", stop)
        return job.synthesize(config, log=lambda _: None)


def short_answers(monkeypatch):
    """A model that ends: what it drew, up to the eighth token, and then a stop. Its bytes stand for letters: as it is hardly
    trained they are seldom text, and nothing would be kept."""
    real = Writer._answer

    def answer(self, tokens):
        tokens = [*tokens[:8]]
        text = "".join(string.ascii_lowercase[token.token % 26] for token in tokens)
        return dataclasses.replace(real(self, tokens), text=text, complete=True)

    monkeypatch.setattr(Writer, "_answer", answer)


@pytest.mark.slow
def test_a_job_that_is_stopped_ends_with_the_same_data_and_draws_nothing_twice(begun, tmp_path, monkeypatch):
    short_answers(monkeypatch)
    drawn, real = collections.Counter(), Writer.draw

    def draw(self, conversations, stage, numbers):
        drawn.update(numbers)
        return real(self, conversations, stage, numbers)

    monkeypatch.setattr(Writer, "draw", draw)
    assert run(config_of(begun, tmp_path / "straight")) == 0
    drawn.clear()
    stopped = config_of(begun, tmp_path / "stopped")
    assert run(stopped, 2, monkeypatch) == 42
    assert not (tmp_path / "stopped/dataset.jsonl").exists()
    with (tmp_path / "stopped/rounds.jsonl").open("a") as file:
        file.write('{"rows": [{"torn')
    assert run(dataclasses.replace(stopped, max_batch=3)) == 0  # which changes nothing
    assert drawn == dict.fromkeys(range(7), 1)
    texts = [(tmp_path / name / "dataset.jsonl").read_bytes() for name in ("straight", "stopped")]
    assert texts[0] == texts[1]
    result = json.loads((tmp_path / "stopped/result.json").read_text())
    assert result["rounds"] == 4
    assert result["prompts"] == 7
    assert result["answers"] == 14
    rows = read_jsonl(tmp_path / "stopped/dataset.jsonl")
    assert result["rows"] == len(rows) == 14 - result.get("duplicate", 0) - result.get("empty", 0)
    with pytest.raises(ValueError, match=r"another config; different are seed\."):
        run(dataclasses.replace(stopped, seed=1))
    # What is in the rows is text, also what looks like something else, and fine-tuning reads it.
    assert HOSTILE in {row["prompt"] for row in rows}
    source = SourceConfig("made", "files", path=str(tmp_path / "stopped/dataset.jsonl"), held_out_fraction=0.3)
    data = DataConfig(
        (source,), content="conversations", tokenizer=TokenizerConfig("bytes"), seq_len=96, cache_dir=str(tmp_path / "cache")
    )
    prepared = prepare(data, log=lambda _: None)
    parts = prepared.manifest["sources"]["made"]
    assert parts["train"]["sequences"] + parts["held_out"]["sequences"] + sum(parts["refused"].values()) == len(rows)


@pytest.mark.slow
def test_a_job_that_keeps_nothing_says_what_it_left_out(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "_answer", lambda self, tokens: Answer("x", False))
    with pytest.raises(ValueError, match="nothing was kept of 7 prompts: answers 14, .* truncated 14"):
        run(config_of(begun, tmp_path / "run"))
    assert not (tmp_path / "run/dataset.jsonl").exists()
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.slow
def test_other_prompts_are_refused_when_a_job_goes_on(begun, tmp_path, monkeypatch):
    short_answers(monkeypatch)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(6)))
    config = config_of(begun, tmp_path / "run", prompts=PromptConfig(path=str(path)))
    assert run(config, 1, monkeypatch) == 42
    whole = path.read_text()
    path.write_text(whole.replace("q5", "q6"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl no longer holds the prompts that .*run began with"):
        run(config)
    path.write_text(whole)
    assert run(config) == 0


def test_a_special_token_in_a_prompt_is_text(begun, tmp_path):
    writer = Writer(config_of(begun, tmp_path))
    ids = writer.encode([{"role": "user", "content": HOSTILE}])
    assert writer.tokenizer.decode(ids[1:]).count(HOSTILE) == 1
    assert ids.count(257) == 1  # that of the template, after the message
    assert writer.encode([{"role": "user", "content": "x" * 60}]) is None
    # Both replies after the same words: the sum over what can come is at most 1.
    found = writer.weigh([[{"role": "user", "content": "a"}], [{"role": "user", "content": "x" * 60}]], ("A", "B"))
    assert np.exp(found[0]).sum() < 1
    assert np.isnan(found[1]).all()


@pytest.mark.slow
def test_the_best_of_n_is_that_by_the_verifier(begun, tmp_path, monkeypatch):
    """Of a model whose bytes stand for a or b, so that it is right at times."""
    real = Writer._answer

    def answer(self, tokens):
        text = "".join("ab"[token.token % 2] for token in tokens[:2])
        return dataclasses.replace(real(self, tokens), text=text, complete=True)

    monkeypatch.setattr(Writer, "_answer", answer)
    prompts = PromptConfig(task=TASK, number=9)
    config = config_of(begun, tmp_path / "run", prompts=prompts, best_of=BestOfConfig(2, "best"), chat=False)
    assert run(config) == 0
    rows = read_jsonl(tmp_path / "run/dataset.jsonl")
    task, writer = TASK.make(), Writer(config, 2)
    for number, row in enumerate(rows):
        example = task.example(number, 0)
        (answers,) = writer.draw([[{"role": "user", "content": example.prompt}]], 0, [number])
        scores = {answer.text: task.score(answer.text, example).reward for answer in answers}
        assert row["prompt"] == example.prompt
        assert row["score"] == max(scores.values()) == scores[row["completion"]]
    assert {row["score"] for row in rows} == {0.0, 1.0}
    right = dataclasses.replace(config, best_of=BestOfConfig(2, "right", min_score=1.0), run_dir=str(tmp_path / "right"))
    assert run(right) == 0
    kept = [row["completion"] for row in read_jsonl(tmp_path / "right/dataset.jsonl")]
    assert kept == [row["completion"] for row in rows if row["score"] == 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["critique", "instructions"])
def test_other_methods_resume_to_the_same_data(begun, tmp_path, monkeypatch, method):
    short_answers(monkeypatch)
    methods = {
        "critique": CritiqueConfig(PRINCIPLES, min_preference=0),
        "instructions": InstructionConfig(5, shown=2, min_words=1, max_rounds=4),
    }
    options = {"best_of": None, method: methods[method], "model": dataclasses.replace(MODEL, max_seq_len=200)}
    options |= {"max_prompt_tokens": 160}
    assert run(config_of(begun, tmp_path / "straight", **options)) == 0
    assert run(config_of(begun, tmp_path / "stopped", **options), 1, monkeypatch) == 42
    assert run(config_of(begun, tmp_path / "stopped", **options)) == 0
    straight, stopped = ((tmp_path / name / "dataset.jsonl").read_bytes() for name in ("straight", "stopped"))
    assert straight == stopped
    assert straight.count(b"\n") > 0


@pytest.mark.slow
def test_the_best_of_n_is_that_by_a_reward_model(begun, tmp_path, monkeypatch):
    pairs = [{"prompt": f"q{i}", "chosen": "a" * (1 + i % 3), "rejected": "b"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = DataConfig(
        (SourceConfig("made", "files", path=str(tmp_path / "pairs.jsonl"), held_out_fraction=0.2),),
        content="pairs",
        seq_len=96,
        cache_dir=str(tmp_path / "cache"),
        loader_threads=0,
    )
    options = {
        "run_dir": str(tmp_path / "scorer"),
        "writers": (),
        "checkpoint": CheckpointConfig(every=8),
        "eval": EvalConfig(100),
    }
    options |= {"objective": ObjectiveConfig(reward_model=RewardModelConfig()), "initial_weights": str(begun)}
    options |= {"optimizer": OptimizerConfig(learning_rate=1e-2)}
    assert train(TrainConfig("scorer", MODEL, data, steps=8, batch_size=8, **options), log=lambda _: None) == 0
    short_answers(monkeypatch)
    config = config_of(begun, tmp_path / "run", best_of=BestOfConfig(3, "best"), reward_model=str(tmp_path / "scorer"))
    assert run(config) == 0
    rows, writer = read_jsonl(tmp_path / "run/dataset.jsonl"), Writer(config, 3)
    trainer = make_trainer(TrainConfig("scorer", MODEL, data, steps=8, batch_size=8, **options))
    found = Checkpoints(str(tmp_path / "scorer/checkpoints"), keep=None)
    params = found.restore_newest({"params": trainer.abstract_state.params}, print, partial=True)[0]["params"]
    for number, row in enumerate(rows):
        talk = [{"role": "user", "content": row["prompt"]}]
        (answers,) = writer.draw([talk], 0, [number])
        scores = {}
        for answer in answers:
            ids = np.array([[*writer.encode(talk), *(token.token for token in answer.tokens)]])
            read = forward(params, MODEL, ids, np.arange(ids.size)[None], np.ones_like(ids))[0]
            scores[answer.text] = float(np.asarray(read[0, -1]) @ np.asarray(params[REWARD_HEAD])[:, 0])
        assert row["completion"] == max(scores, key=scores.__getitem__)
        assert row["score"] == pytest.approx(max(scores.values()), abs=1e-5)
    assert len({row["score"] for row in rows}) > 2


@pytest.mark.slow
def test_the_command_makes_data_and_says_what_it_cannot_do_with_such_a_config(begun, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("model.xla.configure", lambda *_, **__: None)  # jax has begun here
    short_answers(monkeypatch)
    path = tmp_path / "made.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom model.config import ModelConfig\n\ndef get_config():\n"
        "    config = ConfigDict()\n"
        "    config.model = ModelConfig(vocab_size=260, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_seq_len=96)\n"
        "    config.prompts = {'texts': ('a', 'b')}\n    config.best_of = {'samples': 1, 'keep': 'all'}\n"
        "    config.max_prompt_tokens, config.max_tokens, config.chat = 60, 8, True\n"
        f"    config.initial_weights = {str(begun)!r}\n    config.run_dir = {str(tmp_path / 'run')!r}\n    return config\n"
    )
    assert main(["run", f"--config={path}", "--config.batch=1"]) == 0
    assert len(read_jsonl(tmp_path / "run/rounds.jsonl")) == 2
    assert json.loads((tmp_path / "run/result.json").read_text())["answers"] == 2
    assert main(["inspect", f"--config={path}"]) == 1
    assert "makes data and trains nothing" in capsys.readouterr().err
    assert main(["launch", f"--config={path}", "--on=local", "--dry-run"]) == 1
    assert "no run of pretraining or fine-tuning" in capsys.readouterr().err


def test_files_of_prompts_are_read_and_what_is_none_is_left_out(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"nothing": 1}, {"messages": [{"role": "user", "content": "b"}]}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of("x", tmp_path, prompts=PromptConfig(path=str(path), number=2))
    prompts, refused = job.read_prompts(config)
    assert [asked.messages[0]["content"] for asked in prompts] == ["a", "b"]
    assert refused == {"unknown layout": 1}
    path.write_text('{"nothing": 1}\n')
    with pytest.raises(ValueError, match="no prompt that can be used; left out: {'unknown layout': 1}"):
        job.read_prompts(config)


def test_rows_that_are_no_prompts_are_told_and_counted_in_the_result(tmp_path, monkeypatch):
    """The data are made by nobody here: each prompt is its own answer."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"nothing": 1}, {"prompt": ""}, {"nothing": 2}, {"prompt": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @contextlib.contextmanager
    def method(config, prompts):
        yield lambda number, _: ([{"prompt": prompts[number].messages}], collections.Counter(answers=1)), len(prompts)

    monkeypatch.setattr(job, "_method", method)
    told = []
    assert job.synthesize(config_of("x", tmp_path / "run", prompts=PromptConfig(path=str(path))), log=told.append) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["prompts"], result["rows"], result["answers"]) == (2, 2, 2)
    assert result["refused"] == {"empty": 1, "unknown layout": 2}
    assert f"{path}: 3 rows are no prompts and are left out: empty 1, unknown layout 2" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": PromptConfig(texts=("a",)), "best_of": BestOfConfig(2, "best")},
            r"set one of them, or best_of\.keep='all'",
        ),
        ({"best_of": None}, "nothing to do"),
        ({"critique": CritiqueConfig(PRINCIPLES)}, "best_of and critique"),
        ({"max_tokens": 90}, r"exceed model\.max_seq_len=96"),
        ({"temperature": 0.0}, "draws the same answer again"),
        ({"temperature": -0.5, "best_of": None, "critique": CritiqueConfig(PRINCIPLES)}, r"temperature=-0\.5 must lie in"),
        ({"top_p": 0.0}, r"top_p=0\.0 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be >= 0"),
        ({"reward_model": "x"}, "reward_model is for best_of that keeps by a score"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_config_is_read(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("x", tmp_path, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptConfig(), "prompts has nothing"),
        (lambda: PromptConfig(texts=("a",), path="b"), "prompts has path and texts"),
        (lambda: PromptConfig(task=TASK), r"set prompts\.number"),
        (lambda: BestOfConfig(keep="right"), r"needs best_of\.min_score"),
        (lambda: BestOfConfig(1, "pairs"), r"set best_of\.samples >= 2"),
        (lambda: CritiqueConfig(()), "principles is empty"),
        (lambda: CritiqueConfig(PRINCIPLES, min_preference=0.4), r"min_preference=0\.4"),
        (lambda: Principle("a", " ", "b"), "revision is empty"),
        (lambda: InstructionConfig(1, min_words=9, max_words=8), "min_words is more"),
    ],
)
def test_parts_of_a_config_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
