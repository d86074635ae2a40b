"""Jobs of preferences, from files of pairs and labels to a result: gradients through packed rows against answers alone, sums
that no way of cutting a batch changes, the reference, learning, and going on to the same bits."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from data.config import IGNORE, DataConfig, SourceConfig, TokenizerConfig
from data.loader import Batches
from data.prepare import prepare
from experiments.report import write_report
from inference.request import Token
from model.config import LoraConfig, ModelConfig
from model.lora import merge
from model.params import is_spec, param_specs
from model.sharding import MESH_AXES, make_mesh
from model.transformer import forward, unembed
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, EvalConfig, LossConfig, MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from train.initial import compare_initial, load_initial, open_initial
from train.learned_reward import LearnedReward
from train.loop import evaluate, train
from train.metrics import read_jsonl
from train.objectives.config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ObjectiveConfig,
    ORPOConfig,
    OutcomeModelConfig,
    ProcessModelConfig,
    RewardModelConfig,
    SimPOConfig,
)
from train.preferences import REWARD_HEAD, answer_scores, at_stop_tokens, constants_of_update, preference_objective
from train.rollouts import to_rows
from train.scalar_head import scalar_head_spec
from train.step import gradient_sums, make_trainer

MODEL = ModelConfig(vocab_size=258, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_seq_len=96)
DPO, KTO = ObjectiveConfig(dpo=DPOConfig()), ObjectiveConfig(kto=KTOConfig())
SGD = OptimizerConfig("sgd", 0.1, weight_decay=0.0, clip_norm=0.0, momentum=0.0, schedule=ScheduleConfig("constant", "0 %"))
FAST = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, schedule=ScheduleConfig("constant", warmup="0 %"))


def write_examples(directory):
    """Prompts of which one kind of answer is preferred: the one that ends with +. Lengths differ, and so do margins."""
    directory.mkdir(exist_ok=True)
    pairs = [
        {
            "prompt": f"q{i}",
            "chosen": f"{i % 7}" * (1 + i % 3) + "+",
            "rejected": f"{i % 5}" * (1 + i % 4) + "-",
            "margin": i % 3 / 4,
        }
        for i in range(48)
    ]
    labels = [
        {"prompt": row["prompt"], "completion": row[("rejected", "chosen")[i % 2]], "label": bool(i % 2)}
        for i, row in enumerate(pairs)
    ]
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    steps = [
        {
            "prompt": row["prompt"],
            "completions": [f"{(i + k) % 7}" * (1 + k) + "+-"[(i + k) % 3 == 0] for k in range(1 + i % 3)],
            "labels": [None if i % 3 == 2 and k == 0 else (i + k) % 3 != 0 for k in range(1 + i % 3)],
        }
        for i, row in enumerate(pairs)
    ]
    for name, rows in (("pairs", pairs), ("labels", labels), ("conversations", chats), ("steps", steps)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_of(directory, content):
    if not (directory / "pairs.jsonl").exists():
        write_examples(directory)
    return DataConfig(
        sources=(SourceConfig("made", "files", path=str(directory / f"{content}.jsonl"), held_out_fraction=0.2),),
        content=content,
        tokenizer=TokenizerConfig("bytes"),
        seq_len=96,
        cache_dir=str(directory / "cache"),
        loader_threads=0,
    )


def job(directory, objective, **options):
    settings = {
        "name": "preferences",
        "run_dir": str(directory / "run"),
        "model": MODEL,
        "data": data_of(directory, objective.content if objective else "conversations"),
        "objective": objective,
        "initial_weights": str(directory / "begun"),
        "steps": 4,
        "batch_size": 8,
        "optimizer": FAST,
        "checkpoint": CheckpointConfig(every=2),
        "eval": EvalConfig(every=100),
        "writers": (),
    }
    return TrainConfig(**(settings | options))


def batch_of(config, step=0):
    return Batches(prepare(config.data, log=lambda _: None), config.data, batch_size=config.batch_size, seed=0)[step]


def random_params(seed, head=False):
    specs = param_specs(MODEL) | ({REWARD_HEAD: scalar_head_spec(MODEL)} if head else {})
    random = np.random.default_rng(seed)
    draw = lambda spec: jnp.asarray((spec.init == "ones") + 0.3 * random.standard_normal(spec.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, specs, is_leaf=is_spec)


def records(run_dir):
    return [record for record in read_jsonl(f"{run_dir}/metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A directory with examples."""
    return tmp_path_factory.mktemp("preferences")


@pytest.fixture(scope="module")
def begun(examples):
    """The directory with a run in it that the others begin with."""
    directory = examples
    config = job(directory, None, initial_weights="", run_dir=str(directory / "begun"), steps=1)
    assert train(config, log=lambda _: None) == 0
    return directory


# --- The objective of a batch ---------------------------------------------------------------------------------------------


def answers_alone(batch):
    """Each answer of the packed rows as a row of its own, with all that is read: tokens [A, L], which of their successors are
    learned [A, L - 1], index of the last token; and its label. Answers 2 n and 2 n + 1 belong together."""
    found = []
    for r in range(len(batch["tokens"])):
        for s in range(1, batch["segment_ids"][r].max() + 1):
            here = batch["segment_ids"][r] == s
            assert not batch["weights"][r][here][-1]  # the stop token, once more
            learned = batch["weights"][r][here][:-1]
            found.append((batch["tokens"][r][here], learned, float(batch["labels"][r][here][0])))
    longest = max(len(tokens) for tokens, _, _ in found)
    tokens = np.zeros((len(found), longest), np.int32)
    learned = np.zeros((len(found), longest - 1), np.float32)
    for i, (ids, mask, _) in enumerate(found):
        tokens[i, : len(ids)], learned[i, : len(mask)] = ids, mask
    assert all(ids[np.flatnonzero(mask)[-1] + 1] == 257 and len(mask) == len(ids) - 1 for ids, mask, _ in found)
    last = np.array([len(ids) - 1 for ids, _, _ in found])
    return tokens, learned, last, np.array([label for *_, label in found])


@pytest.fixture(scope="module")
def alone():
    """Of answers in rows of their own: log-probabilities [A], reward scores of the last and mean-able of all tokens, and their
    Jacobian by parameters, with the whole softmax."""

    def quantities(params, tokens, learned, last):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _, _ = forward(params, MODEL, tokens, places, jnp.ones_like(tokens))
        logprobs = jax.nn.log_softmax(unembed(params, MODEL, hidden))
        of_next = jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        scores = (hidden @ params[REWARD_HEAD])[..., 0]
        return (of_next * learned).sum(1), scores[jnp.arange(len(last)), last]

    def both(params, *rows):
        flat, unravel = ravel_pytree(params)
        of_flat = lambda flat: quantities(unravel(flat), *rows)  # noqa: E731
        return of_flat(flat), jax.jacrev(of_flat)(flat)

    return jax.jit(both)


def log_sigmoid(x):
    return -jnp.logaddexp(0.0, -x)


def by_hand(name, s, ref, n, score, labels, z0):
    """Mean loss of pairs or answers in float64: s, ref, score [N, 2], lengths n [N, 2], margins or labels [N]."""
    w, l = 0, 1  # noqa: E741
    h = (s[:, w] - ref[:, w]) - (s[:, l] - ref[:, l])
    mean = s / n
    log_odds = mean - jnp.log(-jnp.expm1(mean))
    losses = {
        "dpo": lambda: -log_sigmoid(0.1 * h),
        "conservative": lambda: -0.9 * log_sigmoid(0.1 * h) - 0.1 * log_sigmoid(-0.1 * h),
        "robust": lambda: (-0.9 * log_sigmoid(0.1 * h) + 0.1 * log_sigmoid(-0.1 * h)) / 0.8,
        "hinge": lambda: jnp.maximum(0, 1 - 0.1 * h),
        "ipo": lambda: ((s - ref)[:, w] / n[:, w] - (s - ref)[:, l] / n[:, l] - 5.0) ** 2,
        "simpo": lambda: -log_sigmoid(2 * (mean[:, w] - mean[:, l]) - 1),
        "orpo": lambda: -mean[:, w] - 0.1 * log_sigmoid(log_odds[:, w] - log_odds[:, l]),
        "cpo": lambda: -log_sigmoid(0.1 * (s[:, w] - s[:, l])) - mean[:, w],
        "reward_model": lambda: -log_sigmoid(score[:, w] - score[:, l] - labels) + 0.01 * (score[:, w] + score[:, l]) ** 2,
        "outcome": lambda: -labels * log_sigmoid(score[:, 0]) - (1 - labels) * log_sigmoid(-score[:, 0]),
        "kto": lambda: 1 - jax.nn.sigmoid(jnp.where(labels == 1, 0.1, -0.1) * ((s - ref)[:, 0] - z0)),
    }
    return losses[name]().mean()


OBJECTIVES = {
    "dpo": DPO,
    "kto": KTO,
    "reward_model": ObjectiveConfig(reward_model=RewardModelConfig()),
    "conservative": ObjectiveConfig(dpo=DPOConfig("conservative", label_smoothing=0.1)),
    "robust": ObjectiveConfig(dpo=DPOConfig("robust", label_smoothing=0.1)),
    "hinge": ObjectiveConfig(dpo=DPOConfig("hinge")),
    "ipo": ObjectiveConfig(dpo=DPOConfig("ipo", length_normalised=True)),
    "simpo": ObjectiveConfig(simpo=SimPOConfig()),
    "orpo": ObjectiveConfig(orpo=ORPOConfig()),
    "cpo": ObjectiveConfig(cpo=CPOConfig()),
    "outcome": ObjectiveConfig(outcome_model=OutcomeModelConfig()),
}
PROCESS = ObjectiveConfig(process_model=ProcessModelConfig())
QUICK = ("kto",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVES])
def test_gradients_through_packed_rows_are_those_of_answers_alone(examples, alone, name):
    objective = OBJECTIVES[name]
    config = job(examples, objective, batch_size=2)
    batch = {key: np.pad(value, ((0, 1), (0, 0))) for key, value in batch_of(config).items()}  # a row of padding
    assert batch["segment_ids"].max() >= 4
    params, reference = random_params(1, head=True), random_params(2, head=True)
    tokens, learned, last, labels = answers_alone(batch)
    (sums, scores), jacobians = alone(params, tokens, learned, last)
    of_reference = alone(reference, tokens, learned, last)[0][0]
    z0 = float(np.mean((np.asarray(sums, np.float64) - of_reference)[1::2]))
    if name == "kto" and z0 < 0:  # the reference point must count
        params, reference = reference, params
        (of_reference, _), ((sums, scores), jacobians) = ((sums, scores), alone(params, tokens, learned, last))
        z0 = -z0

    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x), jnp.float64).reshape(-1, 2)  # noqa: E731
        fixed = wide(of_reference), wide(learned.sum(1)), jnp.asarray(labels[::2], jnp.float64)

        def loss(s, score):
            return by_hand(name, s, fixed[0], fixed[1], score, fixed[2], z0)

        expected = float(loss(wide(sums), wide(scores)))
        outer = [np.asarray(g).reshape(-1) for g in jax.grad(loss, (0, 1))(wide(sums), wide(scores))]
    gradient = sum(g @ np.asarray(j, np.float64) for g, j in zip(outer, jacobians, strict=True))

    trainer = make_trainer(config, jax.devices()[:1])
    head = {} if objective.has_head else {REWARD_HEAD}
    ours, theirs = ({k: v for k, v in tree.items() if k not in head} for tree in (params, reference))
    prepared = trainer.prepare(ours, theirs, batch) if trainer.prepare else batch
    computed = jax.jit(
        lambda params, batch: gradient_sums(
            params, batch, model=MODEL, objective=preference_objective(objective, LossConfig()), accumulation=1
        )
    )
    found, metrics = computed(ours, prepared)
    number = float(metrics["weight"])
    assert number == len(labels) / 2
    assert float(metrics["loss"]) / number == pytest.approx(expected, rel=2e-6)
    if name == "kto":
        assert float(metrics["kl"]) / number == pytest.approx(z0, rel=1e-5)
        assert z0 > 0
        gained, good = 0.1 * (np.asarray(sums, np.float64) - of_reference)[::2], labels[::2] == 1
        assert 0 < good.sum() < len(good)
        assert float(metrics["class_balance"]) / number == pytest.approx(good.sum() / (~good).sum(), rel=1e-5)
        rewards = {"reward_chosen": gained[good].mean(), "reward_rejected": gained[~good].mean()}
        rewards["reward_margin"] = rewards["reward_chosen"] - rewards["reward_rejected"]
        assert {name: float(metrics[name]) / number for name in rewards} == pytest.approx(
            {key: float(value) for key, value in rewards.items()}, rel=1e-4
        )
        assert float(metrics["accuracy"]) == ((gained > 0.1 * z0) == good).sum()
    if name == "reward_model":
        of_pairs, lengths = np.asarray(scores).reshape(-1, 2), learned.sum(1).reshape(-1, 2)
        agree = np.sign(of_pairs[:, 0] - of_pairs[:, 1]) * np.sign(lengths[:, 0] - lengths[:, 1])
        assert float(metrics["longer_scored_higher"]) == ((agree + 1) / 2).sum()
    flat = ravel_pytree({**{k: jnp.zeros_like(params[k]) for k in head}, **jax.tree.map(lambda g: g / number, found)})[0]
    np.testing.assert_allclose(flat, gradient, rtol=1e-4, atol=2e-6 * np.abs(gradient).max())


def test_answers_of_one_class_alone_have_finite_metrics_and_gradients(examples):
    """What is reported of the class that is absent is 0, and not NaN."""
    batch = batch_of(job(examples, KTO, batch_size=2))
    add, objective = constants_of_update(KTO, LossConfig()), preference_objective(KTO, LossConfig())

    @jax.jit
    def gradient(params, reference, batch):
        prepared = add(params, reference, batch, model=MODEL, accumulation=1, layout=None)
        return jax.grad(lambda x: objective(x, MODEL, prepared, None), has_aux=True)(params)

    for label, absent in ((1.0, "rejected"), (0.0, "chosen")):
        labelled = batch | {"labels": np.full_like(batch["labels"], label)}
        gradients, metrics = gradient(random_params(1), random_params(2), labelled)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, metrics)))
        assert any(np.any(x) for x in jax.tree.leaves(gradients))
        assert metrics[f"reward_{absent}"] == metrics[f"logprob_{absent}"] == metrics["class_balance"] == 0


def test_gradients_of_a_process_model_through_packed_rows_are_those_of_solutions_alone(examples):
    """The cross-entropy of the labels, where those stand in rows of their own, with nothing else to read."""
    config = job(examples, PROCESS, batch_size=2)
    batch = {key: np.pad(value, ((0, 1), (0, 0))) for key, value in batch_of(config).items()}  # a row of padding
    assert batch["segment_ids"].max() >= 3
    params = random_params(1, head=True)
    alone = [(r, s) for r in range(3) for s in range(1, batch["segment_ids"][r].max() + 1)]
    tokens, labels = (np.zeros((len(alone), config.data.seq_len), dtype) for dtype in (np.int32, np.float64))
    labels[:] = np.nan
    for i, (r, s) in enumerate(alone):
        here = batch["segment_ids"][r] == s
        tokens[i, : here.sum()] = batch["tokens"][r][here]
        labels[i, : here.sum()] = np.where(batch["labels"][r][here] == IGNORE, np.nan, batch["labels"][r][here])
    judged = ~np.isnan(labels)
    assert {0.0, 1.0} == set(labels[judged])
    assert len(set(judged.sum(1))) > 1

    def by_hand(params):
        places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        hidden, _, _ = forward(params, MODEL, tokens, places, np.ones_like(tokens))
        logits = (hidden @ params[REWARD_HEAD])[..., 0]
        return -jnp.sum(jnp.where(judged, log_sigmoid(jnp.where(labels == 1, logits, -logits)), 0)) / judged.sum()

    def packed(params):
        loss, sums = preference_objective(PROCESS, LossConfig())(params, MODEL, batch, None)
        return loss / judged.sum(), sums["weight"]

    expected, gradient = jax.jit(jax.value_and_grad(by_hand))(params)
    (found, weight), found_gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    assert float(weight) == judged.sum()
    assert float(found) == pytest.approx(float(expected), rel=2e-6)
    flat, flat_expected = (np.asarray(ravel_pytree(tree)[0]) for tree in (found_gradient, gradient))
    assert np.abs(flat_expected).max() > 0.1
    np.testing.assert_allclose(flat, flat_expected, rtol=1e-4, atol=2e-6 * np.abs(flat_expected).max())


def after_a_step(config, devices, batch):
    """Parameters after a step, and its metrics."""
    trainer = make_trainer(config, devices)
    state = trainer.begin(random_params(2, config.objective.has_head), jax.random.key(0))
    if trainer.prepare:  # a policy that has left its reference
        state = state.replace(params=jax.device_put(random_params(1), jax.tree.map(lambda x: x.sharding, state.params)))
    state, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def compare_with_one_batch(examples, name, others):
    """Rows hold different numbers of pairs, so that a mean of means would be another number."""
    objective = PROCESS if name == "process" else OBJECTIVES[name]
    config = job(examples, objective, optimizer=SGD, model=dataclasses.replace(MODEL, num_heads=4))
    batch = batch_of(config)
    batch = {key: np.concatenate([value[:7], 0 * value[:1]]) for key, value in batch.items()}  # a row of padding
    assert len(set(batch["segment_ids"].max(1))) > 1
    one = after_a_step(config, jax.devices()[:1], batch)
    assert one[1].get("kl", 1) > 0
    assert one[1]["grad_norm"] > 0.1
    for changes, devices in others:
        params, metrics = after_a_step(dataclasses.replace(config, **changes), devices, batch)
        assert metrics == pytest.approx(one[1], rel=2e-5, abs=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), params, one[0])


EVERY = (*OBJECTIVES, "process")


@pytest.mark.parametrize("name", [n if n == "kto" else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_micro_batches_change_nothing(examples, name):
    compare_with_one_batch(examples, name, [({"accumulation": 4}, jax.devices()[:1])])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_eight_devices_do_what_one_does(examples, name):
    meshes = [MeshConfig(8), MeshConfig(1, 4, 2)]
    compare_with_one_batch(examples, name, [({"mesh": mesh}, jax.devices()) for mesh in meshes])


# --- Runs -----------------------------------------------------------------------------------------------------------------


def stop_at_first_checkpoint(config, monkeypatch):
    import train.loop

    class Kill(Exception):
        pass

    save = train.loop.Loop._save

    def save_and_die(self, complete):
        save(self, complete=True)
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Loop, "_save", save_and_die)
        with pytest.raises(Kill):
            train.loop.train(config, log=lambda _: None)


def final_params(config):
    trainer = make_trainer(config)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainer.abstract_state.params)
    found = Checkpoints(f"{config.run_dir}/checkpoints", keep=None).restore_newest({"params": abstract}, print, partial=True)
    return found[0]["params"]


@pytest.mark.slow
def test_dpo_begins_at_log_2_learns_and_continues_to_the_same_bits(begun, monkeypatch):
    config = job(begun, DPO, run_dir=str(begun / "dpo"), steps=8, checkpoint=CheckpointConfig(every=4))
    assert train(config, log=lambda _: None) == 0
    steps = records(config.run_dir)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert steps[0]["reward_chosen"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["accuracy"] > 0.9
    assert steps[-1]["logprob_rejected"] < steps[0]["logprob_rejected"]
    result = json.loads((begun / "dpo" / "result.json").read_text())
    assert result["val_accuracy"] > 0.9
    assert result["val_loss"] < 0.6
    assert "bits_per_byte" not in result
    assert "Preferences told right" in write_report(config.run_dir).read_text()

    stopped = dataclasses.replace(config, run_dir=str(begun / "dpo-stopped"))
    stop_at_first_checkpoint(stopped, monkeypatch)
    assert train(stopped, log=lambda _: None) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(config), final_params(stopped))
    assert records(config.run_dir) == records(stopped.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "outcome", "simpo", "orpo", "cpo", "ipo", "reward_model"])
def test_each_objective_learns_and_continues_to_the_same_bits(begun, monkeypatch, name):
    config = job(begun, OBJECTIVES[name], run_dir=str(begun / name), steps=40, checkpoint=CheckpointConfig(every=20))
    assert train(config, log=lambda _: None) == 0
    steps = records(config.run_dir)
    if name in ("kto", "outcome"):  # The head of a reward model begins with preferences of its own.
        assert steps[0]["loss"] == pytest.approx(0.5 if name == "kto" else math.log(2), abs=0.06)
        assert steps[0]["accuracy"] == 0.5
    result = json.loads((begun / name / "result.json").read_text())
    assert result["val_accuracy"] > 0.9
    assert steps[-1]["loss"] < steps[0]["loss"]
    stopped = dataclasses.replace(config, run_dir=str(begun / f"{name}-stopped"))
    stop_at_first_checkpoint(stopped, monkeypatch)
    assert train(stopped, log=lambda _: None) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(config), final_params(stopped))


def test_another_reference_is_refused_when_a_run_continues(tmp_path):
    one, other = random_params(1), random_params(2)
    compare_initial(tmp_path, "initial_weights", "here", one, begun=False)
    compare_initial(tmp_path, "initial_weights", "here", one, begun=True)
    with pytest.raises(ValueError, match="here no longer holds the weights"):
        compare_initial(tmp_path, "initial_weights", "here", other, begun=True)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 8])
def test_the_reference_of_adapters_is_what_they_adapt(examples, alone, bits):
    config = job(examples, DPO, lora=LoraConfig(rank=2, base_bits=bits), batch_size=2)
    batch = batch_of(config)
    trainer = make_trainer(config, jax.devices()[:1])
    base = random_params(1)
    state = trainer.begin(base, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(state.frozen)) <= sum(x.size for x in jax.tree.leaves(base)) + 258 * 16 * bool(
        bits
    )
    whole = trainer.whole(state.params, state.frozen)
    sums = trainer.evaluate(whole, trainer.prepare(whole, state.frozen, batch))
    pairs = batch["segment_ids"].max(1).sum() / 2
    assert float(sums["loss"]) / pairs == pytest.approx(math.log(2), abs=1e-6)

    moved = jax.tree.map(lambda x: x + 0.1, state.params)
    whole = trainer.whole(moved, state.frozen)
    sums = trainer.evaluate(whole, trainer.prepare(whole, state.frozen, batch))
    if bits:
        assert abs(float(sums["reward_chosen"])) > 0.1
        return
    merged = merge(whole, param_specs(MODEL))
    rows = answers_alone(batch)[:3]
    head = {REWARD_HEAD: jnp.zeros((16, 1))}
    policy, reference = (np.asarray(alone(tree | head, *rows)[0][0], np.float64) for tree in (merged, base))
    assert float(sums["reward_chosen"]) == pytest.approx(0.1 * (policy - reference)[::2].sum(), rel=1e-4)
    assert float(sums["logprob_rejected"]) == pytest.approx(policy[1::2].sum(), rel=1e-5)


def test_held_out_scores_are_per_pair_whatever_the_batches(examples):
    """The last one has rows of padding."""
    config = job(examples, DPO, batch_size=5)
    data = prepare(config.data, log=lambda _: None)
    trainer = make_trainer(config, jax.devices()[:1])
    params, reference = random_params(1), random_params(2)
    held_out = data.held_out["made"]
    assert len(held_out) % 5
    rows = held_out.read(np.arange(len(held_out)))
    padded = {key: np.pad(value, ((0, -len(value) % 5), (0, 0))) for key, value in rows.items()}
    sums = [0.0, 0.0, 0]
    for start in range(0, len(padded["tokens"]), 5):
        part = {key: value[start : start + 5] for key, value in padded.items()}
        found = trainer.evaluate(params, trainer.prepare(params, reference, part))
        sums = [sums[0] + float(found["loss"]), sums[1] + float(found["accuracy"]), sums[2]]
    pairs = len(np.unique(rows["sequence_ids"][rows["segment_ids"] > 0])) // 2
    scores = evaluate(trainer, params, data, frozen=reference)
    assert scores == pytest.approx({"val_loss": sums[0] / pairs, "val_accuracy": sums[1] / pairs}, rel=1e-6)


# --- Reward models --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reward_model_learns_a_rule_and_scores_samples_as_it_scored_answers(begun):
    directory = begun / "scorer"
    objective = ObjectiveConfig(reward_model=RewardModelConfig())
    config = job(begun, objective, run_dir=str(directory), steps=40, checkpoint=CheckpointConfig(every=40))
    assert train(config, log=lambda _: None) == 0
    steps, result = records(directory), json.loads((directory / "result.json").read_text())
    assert steps[0]["accuracy"] == 0.5
    assert result["val_accuracy"] > 0.9
    network = open_initial(str(directory), MODEL).load(make_trainer(job(begun, DPO)).abstract_weights)
    assert set(network) == set(param_specs(MODEL))
    anew = load_initial(open_initial(str(directory), MODEL), make_trainer(config))
    assert not np.any(anew[REWARD_HEAD])

    trainer = make_trainer(config, jax.devices()[:1])
    learned = LearnedReward(str(directory), MODEL, trainer.mesh, max_rows=3)
    batch = batch_of(config)
    read = answer_scores(learned.params, MODEL, batch)
    scores = np.asarray(at_stop_tokens(read, batch))
    prompts, answers, expected = [], [], []
    for r in range(len(batch["tokens"])):
        for s in range(1, batch["segment_ids"][r].max() + 1):
            here = batch["segment_ids"][r] == s
            drawn = batch["targets"][r][here][batch["weights"][r][here] == 1].tolist()
            ids = batch["tokens"][r][here].tolist()
            prompts.append(ids[: len(ids) - len(drawn)])
            last = len(drawn) - 1
            tokens = [Token(0, 0, t, -1.0, -1.0, None, None, "stop" if i == last else None) for i, t in enumerate(drawn)]
            answers.append([tokens])
            expected.append(scores[r].reshape(-1)[s - 1])
    samples = to_rows(prompts, answers, row_tokens=60)
    np.testing.assert_allclose(learned(samples), expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 0.1
    # On a mesh that divides neither the rows nor the 61 columns.
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    on_mesh = LearnedReward(str(directory), MODEL, mesh, max_rows=3)
    np.testing.assert_allclose(on_mesh(samples), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_outcome_model_of_all_tokens_judges_after_each_that_is_written(examples):
    objective = ObjectiveConfig(outcome_model=OutcomeModelConfig(all_tokens=True))
    config = job(examples, objective, batch_size=2)
    batch, params = batch_of(config), random_params(1, head=True)
    _, sums = preference_objective(objective, LossConfig())(params, MODEL, batch, None)
    tokens, learned, _, labels = answers_alone(batch)
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(params, MODEL, tokens, places, np.ones_like(tokens))[0]
    logits = np.asarray(hidden @ params[REWARD_HEAD], np.float64)[:, 1:, 0]  # after each token but the first
    losses = np.log1p(np.exp(np.where(labels[:, None] == 1, -logits, logits)))
    of_answers = (losses * learned).sum(1) / learned.sum(1)
    assert float(sums["loss"]) == pytest.approx(of_answers[::2].sum(), rel=1e-5)
    assert float(sums["weight"]) == len(labels) / 2


# --- What does not go together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "options", "complaint"),
    [
        (DPO, {"initial_weights": ""}, r"objective\.dpo compares with .* set initial_weights"),
        (KTO, {"initial_weights": ""}, r"objective\.kto compares"),
        (OBJECTIVES["reward_model"], {"lora": LoraConfig()}, "leave lora out"),
        (DPO, {"mesh": MeshConfig(1, context=2)}, r"mesh\.context"),
        (DPO, {"loss": LossConfig(z_loss=1e-4)}, r"loss\.z_loss"),
        (OBJECTIVES["outcome"], {"eval": EvalConfig(sample_prompts=("x",))}, "sample_prompts"),
        (DPO, {"content": "labels"}, r"objective\.dpo learns from data\.content='pairs', and it is 'labels'"),
        (KTO, {"content": "pairs"}, r"data\.content='labels'"),
        (OBJECTIVES["outcome"], {"content": "conversations"}, r"data\.content='labels'"),
        (None, {"content": "pairs"}, "set objective"),
    ],
)
def test_what_an_objective_does_not_go_with_is_refused(tmp_path, objective, options, complaint):
    config = job(tmp_path, objective or DPO)
    content = options.pop("content", config.data.content)
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(config, objective=objective, data=dataclasses.replace(config.data, content=content), **options)


def test_exactly_one_objective_is_named():
    with pytest.raises(ValueError, match="objective has dpo and kto: set exactly one"):
        ObjectiveConfig(dpo=DPOConfig(), kto=KTOConfig())
    with pytest.raises(ValueError, match="objective has nothing"):
        ObjectiveConfig()
