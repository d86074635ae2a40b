"""Who judges a run's answers: verifiers, reward models, the greedy answer; and what of those that nobody could judge."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from data.chat_encoder import ChatEncoder
from data.tasks.task import Score
from experiments.cli import summary
from experiments.report import write_report
from model.transformer import forward, unembed
from tests.train.rl_runs import BARE, MODEL, TASK, StopAfter, job, odd_is_right, run, verifiers_instead, watch_constants
from train import collector, rl
from train.initial import open_initial
from train.objectives.config import REMAX, ImportanceConfig, ObjectiveConfig, PolicyConfig, ProcessModelConfig
from train.preferences import answer_scores
from train.rewards import Verifiers
from train.rl_config import FormRewardConfig, RLEvalConfig, RolloutConfig

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
def test_a_reward_model_judges_with_the_task_and_without(warm_start, scorer, tmp_path):
    model = scorer("scorer", BARE)
    metrics = run(job(warm_start, tmp_path / "alone", reward_model=model, task_weight=0.0, steps=2))
    for record in metrics:
        assert record["reward/total"] == pytest.approx(record["reward/learned"], abs=1e-6)
        assert 0 <= record["reward/right"] <= 1
    assert any(abs(record["reward/learned"] - record["reward/right"]) > 0.01 for record in metrics)
    assert 0 <= json.loads((tmp_path / "alone/result.json").read_text())["eval/pass@1"] <= 1
    together = run(job(warm_start, tmp_path / "together", reward_model=model, reward_model_weight=0.5, steps=1))
    assert together[0]["reward/right"] == metrics[0]["reward/right"]  # the same samples
    assert together[0]["reward/total"] == pytest.approx(
        together[0]["reward/right"] + 0.5 * together[0]["reward/learned"], abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["min", "product"])
def test_a_process_model_judges_by_the_chance_that_steps_are_right(warm_start, scorer, tmp_path, steps, monkeypatch):
    seen = watch_constants(monkeypatch)
    model = scorer(f"process_{steps}", BARE, ObjectiveConfig(process_model=ProcessModelConfig()))
    options = {"reward_model": model, "reward_model_steps": steps, "task_weight": 0.0}
    (record,) = run(job(warm_start, tmp_path / "run", steps=1, **options))
    ((judged, _, loop),) = seen
    assert np.all((judged.rewards > 0) & (judged.rewards < 1))
    assert np.ptp(judged.rewards) > 0
    assert record["reward/total"] == pytest.approx(float(judged.rewards.mean()), rel=1e-5)
    # Of an answer in one line there is one step, whatever is made of several.
    last = answer_scores(loop.collector.learned.params, MODEL, *whole_rows(judged.samples))
    places = judged.samples.segment_ids.sum(1)
    chances = 1 / (1 + np.exp(-np.asarray(last, np.float64)[np.arange(len(places)), places]))
    np.testing.assert_allclose(judged.rewards, chances, rtol=1e-5)


def whole_rows(samples):
    """Prompts and answers with their last tokens, which rows of an update only predict."""
    tokens = np.concatenate([samples.tokens[:, :1], samples.targets], axis=1)
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return (
        {"tokens": tokens, "positions": places, "segment_ids": (places <= samples.segment_ids.sum(1)[:, None]).astype(int)},
    )


def test_gates_and_conditional_parts_make_the_reward_and_each_is_told(warm_start, tmp_path, monkeypatch):
    class OddIsRight(Verifiers):
        def __init__(self, parts, *options):
            instead = [dataclasses.replace(part, verifier=odd_is_right) if part.name == "right" else part for part in parts]
            super().__init__(instead, *options)

    monkeypatch.setattr(collector, "Verifiers", OddIsRight)
    seen = watch_constants(monkeypatch)
    gate = FormRewardConfig("no_sign", "pattern", (("pattern", "[^=]*"),), gate=True)
    bonus = FormRewardConfig("short", "length", (("max_characters", 2),), weight=0.25, only_if="right")
    (record,) = run(job(warm_start, tmp_path / "run", rewards=(gate, bonus), task_weight=2.0, steps=1))
    ((judged, constants, loop),) = seen
    texts = [loop.collector.text(answer) for answer in judged.samples.answers()]
    right, passed, short = (
        np.array([float(holds(text)) for text in texts])
        for holds in (lambda text: len(text) % 2, lambda text: "=" not in text, lambda text: 1 <= len(text.strip()) <= 2)
    )
    np.testing.assert_allclose(judged.rewards, (2 * right + 0.25 * short * right) * passed)
    assert np.any(right * (1 - passed))  # the gate took it all
    assert np.any(short * (1 - right))  # form that paid nothing
    assert np.any(short * right * passed)
    of_parts = {"right": right, "no_sign": passed, "short": short}
    assert {name: record[f"reward/{name}"] for name in of_parts} == pytest.approx({k: v.mean() for k, v in of_parts.items()})
    assert record["reward/total"] == pytest.approx(judged.rewards.mean())
    assert record["reward/no_sign/reason/no match"] == pytest.approx(1 - passed.mean())
    advantages = judged.rewards.reshape(-1, 4) - judged.rewards.reshape(-1, 4).mean(1, keepdims=True)
    np.testing.assert_allclose(constants.advantages, advantages.reshape(-1, 1) * judged.samples.mask, atol=1e-6)


@pytest.mark.slow
def test_a_reward_model_that_read_other_prompts_is_refused(warm_start, scorer, tmp_path):
    other = scorer("other", BARE.replace("bos_token + m", "bos_token + 'a' + m"))
    with pytest.raises(ValueError, match="was trained with another tokenizer or chat template"):
        run(job(warm_start, tmp_path / "run", reward_model=other))
    with pytest.raises(ValueError, match="is not the directory of a run"):
        run(job(warm_start, tmp_path / "run", reward_model=str(tmp_path)))


GATE = FormRewardConfig("no_sign", "pattern", (("pattern", "[^=]*"),), gate=True)
SHORT = FormRewardConfig("short", "length", (("max_characters", 2),))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rewards": (GATE,)}, "the gate 'no_sign' of rewards would pay"),
        ({"rewards": (dataclasses.replace(SHORT, only_if="learned"),)}, "only_if='learned' of rewards 'short' would pay"),
        ({"policy": PolicyConfig(group_size=4, truncation="zero_reward")}, r"policy\.truncation='zero_reward' would pay"),
        ({"policy": PolicyConfig(group_size=4, truncation="mask")}, None),
        ({"rewards": (dataclasses.replace(SHORT, only_if="right"),)}, None),
    ],
)
@pytest.mark.parametrize("judges_steps", [False, True])
def test_what_takes_zero_for_the_worst_is_refused_beside_scores_that_may_be_negative(
    warm_start, tmp_path, monkeypatch, changes, named, judges_steps
):
    class Opened:
        def __init__(self, *_):
            self.judges_steps = judges_steps
            self.chat = ChatEncoder(open_initial(str(warm_start), MODEL).tokenizer, BARE)

    monkeypatch.setattr(collector, "LearnedReward", Opened)
    config = job(warm_start, tmp_path / "run", reward_model="x", **changes)
    expected = pytest.raises(ValueError, match=named) if named and not judges_steps else contextlib.nullcontext()
    with expected, contextlib.closing(collector.Collector(config, open_initial(str(warm_start), MODEL), None, print)):
        pass


@pytest.mark.slow
def test_shuffled_rewards_are_the_same_rewards(warm_start, tmp_path):
    plain, shuffled = (
        run(job(warm_start, tmp_path / str(shuffle), shuffle_rewards=shuffle, steps=1))[0] for shuffle in (False, True)
    )
    assert shuffled["reward_mean"] == plain["reward_mean"]
    assert shuffled["length_mean"] == plain["length_mean"]


def most_likely(read, prompt, most, stop_id):
    """The greedy answer, by a forward pass over the whole text for each token; without its stop token."""
    ids, size = list(prompt), MODEL.max_seq_len
    while len(ids) - len(prompt) < most:
        real = (np.arange(size) < len(ids)).astype(np.int32)[None]
        ids.append(int(np.argmax(read(np.pad(ids, (0, size - len(ids)))[None], real)[0, len(ids) - 1])))
        if ids[-1] == stop_id:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_the_greedy_baseline_is_the_reward_of_the_most_likely_answer(warm_start, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    policy = dataclasses.replace(REMAX, group_size=2)
    rollouts = RolloutConfig(prompts=6, max_prompt_tokens=6, max_tokens=6, max_batch=8, verifiers=1)
    (record,) = run(job(warm_start, tmp_path / "run", policy=policy, rollouts=rollouts, steps=1))
    ((judged, constants, loop),) = seen
    weights = open_initial(str(warm_start), MODEL).load(loop.policy.trainer.abstract_weights)
    task = TASK.make()
    places = np.arange(MODEL.max_seq_len)[None]
    read = jax.jit(lambda tokens, real: unembed(weights, MODEL, forward(weights, MODEL, tokens, places, real)[0]))
    for row, baseline in enumerate(judged.baseline):
        example = task.example(row // 2, 0)
        answer = most_likely(read, loop.collector.prompt(example), 6, loop.collector.tokenizer.eos_id)
        assert baseline == task.score(loop.collector.text(answer), example).reward
        expected = (judged.rewards[row] - baseline) * judged.samples.mask[row]
        np.testing.assert_allclose(constants.advantages[row], expected, atol=1e-7)
    assert record["reward/greedy"] == pytest.approx(judged.baseline.mean())
    assert np.ptp(judged.baseline) > 0
    assert np.any(constants.advantages)


def raises(completion, example):
    raise RuntimeError("nothing can be said of this")


def so_so(completion, example):
    return Score(0.5, "so-so")


def raises_on_some(completion, example):
    if example.problem.startswith("a"):
        raise RuntimeError("nothing can be said of this")
    return Score(0.5, "so-so")


def test_prompts_whose_greedy_answer_cannot_be_judged_are_left_out_and_counted(warm_start, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    verifiers_instead(monkeypatch, raises_on_some, 6)
    policy = dataclasses.replace(REMAX, group_size=2)
    rollouts = RolloutConfig(prompts=6, max_prompt_tokens=6, max_tokens=6, max_batch=8, verifiers=1)
    (record,) = run(job(warm_start, tmp_path / "run", policy=policy, rollouts=rollouts, steps=1))
    ((judged, constants, _),) = seen
    task = TASK.make()
    lost = np.repeat([task.example(i, 0).problem.startswith("a") for i in range(6)], 2)
    assert 0 < lost.sum() < 12
    np.testing.assert_array_equal(judged.valid, ~lost)
    assert record["reward/greedy_failed"] == lost.sum() / 2
    assert record["reward/right/failed"] == 0
    assert record["bad_reward_fraction"] == pytest.approx(lost.mean())
    assert record["reward/greedy"] == 0.5
    assert not np.any(constants.weights[lost] * constants.advantages[lost])
    assert np.all(np.any(constants.weights[~lost] * constants.advantages[~lost], axis=1))
    assert record["effective_batch_fraction"] == pytest.approx(1 - lost.mean())


def raises_on_some_answers(completion, example):
    if len(completion) > 2:
        raise RuntimeError("too long for me")
    return Score(float(completion == example.answer), "right or wrong")


@pytest.mark.parametrize("verifier", [raises, raises_on_some_answers])
def test_an_evaluation_is_of_what_was_judged(warm_start, tmp_path, monkeypatch, verifier):
    verifiers_instead(monkeypatch, verifier, 12)
    seen, told, real = [], [], rl.Collector.judge

    def judge(self, samples, examples):
        seen.append((real(self, samples, examples), [self.text(answer) for answer in samples.answers()]))
        return seen[-1][0]

    monkeypatch.setattr(rl.Collector, "judge", judge)
    config = job(warm_start, tmp_path / "run", eval=RLEvalConfig(every=100, prompts=4, samples=3))
    with rl.open_loop(config, told.append, None, 0.0) as loop:
        loop._evaluate()
        loop._write_result()
    (((rewards, _, metrics), texts),) = seen
    judged = np.asarray([verifier is not raises and len(text) <= 2 for text in texts])
    np.testing.assert_array_equal(rewards.valid, judged)
    (record,) = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run/metrics.jsonl").open())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert record["eval/failed"] == result["eval/failed"] == result["initial_eval/failed"] == (~judged).sum() > 0
    of_prompt = judged.reshape(4, 3).sum(1)
    assert record["eval/prompts_left_out@1"] == (of_prompt == 0).sum()
    assert record["eval/prompts_left_out@3"] == (of_prompt < 3).sum()
    means = {"eval/pass@1", "eval/pass@3", "eval/reward"}
    if verifier is raises:
        assert not means & record.keys()
        assert not means & result.keys()
        assert "reward/right" not in metrics
    else:
        assert 0 < judged.sum() < 12
        shares = rewards.total.reshape(4, 3).sum(1)[of_prompt > 0] / of_prompt[of_prompt > 0]
        assert record["eval/pass@1"] == result["eval/pass@1"] == pytest.approx(shares.mean())
        assert record["eval/reward"] == metrics["reward/right"] == pytest.approx(rewards.total[judged].mean())
    samples = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run/samples.jsonl").open()]
    assert [sample["reward"] is None for sample in samples] == (~judged[::3]).tolist()
    assert any(f"eval/failed {(~judged).sum()}" in line for line in told)
    assert "not judged" in write_report(tmp_path / "run").read_text()
    assert f"{(~judged).sum()} answers were not judged" in summary(str(tmp_path / "run"), "report.html")


def test_groups_are_chosen_by_the_rewards_that_the_update_sees(warm_start, tmp_path, monkeypatch):
    """Where every answer gets the same, those of different cost for truncation can be compared, and those without are told."""
    verifiers_instead(monkeypatch, so_so, 16)
    options = {"group_size": 4, "zero_variance": "resample"}
    policy = PolicyConfig(**options, truncation="penalty", truncation_penalty=0.2)
    with rl.open_loop(job(warm_start, tmp_path / "run", policy=policy), print, None, 0.0) as loop:
        loop._load_engine()
        judged, metrics = loop.collector.collect(0)
        cut = judged.samples.truncated.reshape(4, 4)
        informative = cut.any(1) & ~cut.all(1)
        assert informative.any()
        assert metrics["groups_filled_up"] == (~informative).sum()
        assert metrics["rounds"] < 3 or not informative.all()
        # Nothing is added to the rewards: all groups are filled up.
        loop.collector.config = dataclasses.replace(loop.config, policy=PolicyConfig(**options))
        assert loop.collector.collect(0)[1]["groups_filled_up"] == 4


@pytest.mark.slow
def test_failures_of_all_rounds_of_sampling_are_counted(warm_start, tmp_path, monkeypatch):
    """Of which no group can be compared, so each round draws others; and nothing is learned, and nothing breaks."""
    verifiers_instead(monkeypatch, raises, 16)
    (record,) = run(job(warm_start, tmp_path / "run", policy=PolicyConfig(group_size=4, zero_variance="resample"), steps=1))
    assert record["rounds"] == 3
    assert record["reward/right/failed"] == record["reward/right/raised"] == 48
    assert record["bad_reward_fraction"] == 1
    assert record["effective_batch_fraction"] == 0
    assert record["grad_norm"] == 0


@pytest.mark.slow
def test_a_greedy_baseline_goes_on_to_the_same_bits_with_answers_drawn_ahead(warm_start, tmp_path, monkeypatch):
    changes = {
        "policy": PolicyConfig(advantage="greedy", group_size=2, importance=ImportanceConfig("token")),
        "rollouts": RolloutConfig(6, 6, 6, ahead=True, max_batch=8, verifiers=1),
    }
    straight = run(job(warm_start, tmp_path / "straight", **changes))
    stopped, calls = job(warm_start, tmp_path / "stopped", **changes), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_on_signal", lambda: StopAfter(1, calls))
        assert rl.train_with_rewards(stopped, log=lambda _: None) == 42
    assert run(stopped) == straight


@pytest.mark.slow
def test_parts_of_the_reward_are_normalised_apart(warm_start, scorer, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    policy = PolicyConfig(group_size=4, scale="group", normalise_parts=True)
    options = {"reward_model": scorer("parts", BARE), "task_weight": 2.0, "reward_model_weight": 0.5, "policy": policy}
    run(job(warm_start, tmp_path / "run", steps=1, **options))
    ((judged, constants, _),) = seen
    np.testing.assert_allclose(judged.parts @ [2.0, 0.5], judged.rewards, rtol=1e-5)
    apart = judged.parts.astype(np.float64).reshape(-1, 4, 2)
    normalised = (apart - apart.mean(1, keepdims=True)) / (apart.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = (normalised @ [2.0, 0.5]).reshape(-1)
    np.testing.assert_allclose(constants.advantages, expected[:, None] * judged.samples.mask, rtol=1e-3, atol=1e-4)
