"""Configs: what is accepted, what is refused, and that a refusal names the key and its fix."""

import dataclasses
import json
import math

import pytest
from ml_collections import ConfigDict

from data.config import DataConfig, MixtureConfig, SourceConfig, TokenizerConfig
from experiments.config import ConfigError, apply_overrides, build, load_config_file
from model.config import ModelConfig, RopeConfig
from train.config import DEFAULT_RULES, OptimizerConfig, ScheduleConfig, TrainConfig

MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, d_ff=64, max_seq_len=32)
SOURCES = (SourceConfig("a", "files", path="a.txt"), SourceConfig("b", "files", path="b.txt"))
DATA = DataConfig(SOURCES, TokenizerConfig(kind="chars"), mixtures=(MixtureConfig(0, (("a", 3), ("b", 1))),), seq_len=16)
TREE = {"name": "job", "model": MODEL, "data": DATA, "steps": 10, "batch_size": 4}


def config_with(*overrides, **groups):
    return build(TrainConfig, apply_overrides({**TREE, **groups}, [f"--config.{word}" for word in overrides], TrainConfig))


def write(tmp_path, text):
    path = tmp_path / "job.py"
    path.write_text(text)
    return str(path)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_loaded_and_named_after_itself(tmp_path):
    path = write(
        tmp_path,
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    config = ConfigDict()\n"
        "    config.optimizer = ConfigDict({'schedule': {'name': 'wsd'}})\n"
        "    config.steps = 3\n"
        "    return config\n",
    )
    assert load_config_file(path) == {"name": "job", "optimizer": {"schedule": {"name": "wsd"}}, "steps": 3}


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    path = write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"jobb\.py' does not exist\. Did you mean '.*job\.py'\?"):
        load_config_file(path.replace("job.py", "jobb.py"))


def test_a_file_without_get_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"job\.py' has no function get_config\(\)"):
        load_config_file(write(tmp_path, "steps = 3\n"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ModelConfig(vocab_sise=3)", r"job\.py:3: TypeError: .*vocab_sise"),
        ("ModelConfig(9, 1, 30, 4, 8, 8)", r"job\.py:3: ValueError: model\.d_model=30 is not divisible"),
        ("ModelConfig(", r"SyntaxError"),
    ],
)
def test_a_mistake_in_the_file_names_the_line(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        load_config_file(write(tmp_path, f"from model.config import ModelConfig\ndef get_config():\n    return {body}\n"))


# --- Types ------------------------------------------------------------------------------------------------------------


def test_groups_may_be_dicts_config_dicts_or_dataclasses_within_each_other():
    optimizer = ConfigDict({"name": "adamw", "schedule": ScheduleConfig(warmup="3 steps")})
    config = build(TrainConfig, {**TREE, "optimizer": optimizer.to_dict()})
    assert config.model == MODEL
    assert config.optimizer == OptimizerConfig(schedule=ScheduleConfig(warmup="3 steps"))


def test_an_int_is_a_float_and_nothing_else_is_converted():
    value = build(OptimizerConfig, {"learning_rate": 1}).learning_rate
    assert value == 1.0
    assert type(value) is float
    assert build(OptimizerConfig, {"learning_rate": 1e-3}).learning_rate == 1e-3


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_float_is_finite(value):
    """A comparison with NaN is false whichever way a dataclass asks."""
    with pytest.raises(ConfigError, match=r"config\.optimizer\.clip_norm=.* must be a finite number"):
        build(TrainConfig, {**TREE, "optimizer": {"clip_norm": value}})
    rope = dataclasses.replace(RopeConfig(), beta_fast=value)
    with pytest.raises(ConfigError, match=r"config\.model\.rope\.beta_fast=.* must be a finite number"):
        build(TrainConfig, {**TREE, "model": dataclasses.replace(MODEL, rope=rope)})


@pytest.mark.parametrize("value", [True, "10", 10.0, None, (10,)])
def test_an_int_takes_only_an_int(value):
    with pytest.raises(ConfigError, match=rf"config\.steps=.* must be of type int, not {type(value).__name__}"):
        build(TrainConfig, {**TREE, "steps": value})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.learning_rate=fast", r"config\.optimizer\.learning_rate='fast' must be of type float, not str"),
        ("optimizer.learning_rate=True", r"config\.optimizer\.learning_rate=True must be of type float, not bool"),
        ("xz_baseline=1", r"config\.xz_baseline=1 must be of type bool, not int"),
        ("eval.sample_prompts=the", r"config\.eval\.sample_prompts='the' must be a sequence, such as \('the',\)"),
        ("eval.sample_prompts=('a', 3)", r"config\.eval\.sample_prompts\.1=3 must be of type str, not int"),
        ("data.mixtures.0.proportions.1=('b',)", r"config\.data\.mixtures\.0\.proportions\.1=\('b',\) must have 2 entries"),
        ("optimizer=adamw", r"config\.optimizer='adamw' must be a group of keys, like those of OptimizerConfig"),
        ("optimizer.name=adamv", r"config\.optimizer\.name='adamv' must be one of adamw, .*sgd\. Did you mean 'adamw'\?"),
        ("writers=('wandbb',)", r"config\.writers\.0='wandbb' must be one of .*Did you mean 'wandb'\?"),
        ("steps", r"'--config\.steps' is not of the form --config\.key=value"),
    ],
)
def test_an_ill_typed_value_names_its_path(word, message):
    with pytest.raises(ConfigError, match=message):
        config_with(word)


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepz=3", r"config\.stepz is unknown\. Did you mean 'steps'\? Known keys there: .*batch_size"),
        ("optimizer.learning_rat=3", r"config\.optimizer\.learning_rat is unknown\. Did you mean 'learning_rate'\?"),
        ("optimizer.schedule.warm_up='1 %'", r"config\.optimizer\.schedule\.warm_up is unknown\. Did you mean 'warmup'\?"),
        ("data.sources.0.pth=x", r"config\.data\.sources\.0\.pth is unknown\. Did you mean 'path'\?"),
        ("data.sources.2.path=x", r"config\.data\.sources\.2: data\.sources has entries 0 to 1"),
        ("data.sources.a.path=x", r"config\.data\.sources\.a: data\.sources has entries 0 to 1"),
        ("eval.sample_prompts.0=x", r"config\.eval\.sample_prompts\.0: eval\.sample_prompts is empty"),
        ("steps.a=3", r"config\.steps is a single value; it has no key 'a'"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(word, message):
    with pytest.raises(ConfigError, match=message):
        config_with(word)


def test_an_unknown_key_of_the_file_is_refused_too():
    with pytest.raises(ConfigError, match=r"config\.eval\.evry is unknown\. Did you mean 'every'\?"):
        build(TrainConfig, {**TREE, "eval": {"evry": 3}})


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"config lacks batch_size, steps: set config\.batch_size in the config file"):
        build(TrainConfig, {"name": "job", "model": MODEL, "data": DATA})
    with pytest.raises(ConfigError, match=r"config\.data lacks sources: set config\.data\.sources"):
        build(TrainConfig, {**TREE, "data": {"seq_len": 16}})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.rope.fraction=2", r"config\.model\.rope: rope\.fraction=2\.0 must lie in \(0, 1\]"),
        (
            "optimizer.schedule.warmup=soon",
            r"config\.optimizer\.schedule: optimizer\.schedule\.warmup='soon' is not a duration",
        ),
        ("data.seq_len=64", r"config: data\.seq_len=64 is longer than model\.max_seq_len=32"),
        ("model.norm_eps=0.0", r"config\.model: model\.norm_eps=0\.0 must be positive"),
        ("optimizer.learning_rate=1e999", r"config\.optimizer\.learning_rate=inf must be a finite number"),
        ("cpu_devices=-1", r"config: cpu_devices=-1 must be >= 0"),
        ("data.mixtures.0.proportions.1=('c', 1)", r"config\.data: data\.mixtures names 'c'"),
    ],
)
def test_what_a_dataclass_refuses_is_told_with_its_path(word, message):
    with pytest.raises(ConfigError, match=message):
        config_with(word)


@pytest.mark.parametrize("context", [2, -1])
def test_cudnn_on_a_ring_is_refused(context):
    words = ["model.attention_backend=cudnn", "model.dtype=bfloat16", "mesh.data=1"]
    assert config_with(*words).model.attention_backend == "cudnn"
    with pytest.raises(ConfigError, match=r"'cudnn' attends to whole rows: set mesh\.context to 1, or take 'xla'"):
        config_with(*words, f"mesh.context={context}")


def test_cudnn_with_rows_of_odd_length_is_refused():
    words = ["model.attention_backend=cudnn", "model.dtype=bfloat16", "mesh.data=1"]
    with pytest.raises(ConfigError, match=r"data\.seq_len=15 is odd, and model\.attention_backend='cudnn'"):
        config_with(*words, "data.seq_len=15")


# --- Overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_into_dataclasses_and_tuples_and_leave_the_rest():
    config = config_with("data.sources.1.path=c.txt", "data.mixtures.0.proportions.0.1=5", "model.rope.theta=5", "steps=7")
    sources = (SOURCES[0], dataclasses.replace(SOURCES[1], path="c.txt"))
    assert config.data == dataclasses.replace(DATA, sources=sources, mixtures=(MixtureConfig(0, (("a", 5), ("b", 1))),))
    assert config.model == dataclasses.replace(MODEL, rope=RopeConfig(theta=5.0))
    assert config.steps == 7


def test_defaults_of_groups_that_the_file_leaves_out_can_be_overridden():
    config = config_with("optimizer.schedule.warmup=10 steps", "optimizer.rules.0.weight_decay=true", "checkpoint.every=3")
    assert config.optimizer.schedule == ScheduleConfig(warmup="10 steps")
    assert config.optimizer.rules == (dataclasses.replace(DEFAULT_RULES[0], weight_decay=True), DEFAULT_RULES[1])
    assert config.checkpoint.every == 3
    config = config_with("optimizer.schedule.warmup=10 steps", optimizer={"learning_rate": 0.5})
    assert config.optimizer == OptimizerConfig(learning_rate=0.5, schedule=ScheduleConfig(warmup="10 steps"))


def test_of_two_overrides_the_later_counts():
    assert config_with("steps=3", "steps=4").steps == 4
    assert config_with("optimizer.b1=0.5", "optimizer={'b2': 0.5}").optimizer == OptimizerConfig(b2=0.5)


@pytest.mark.parametrize(
    ("word", "name"),
    [("name=2024", "2024"), ("name=true", "true"), ("name=a=b", "a=b"), ("name='a b'", "a b"), ("name=1e5", "1e5")],
)
def test_a_key_that_holds_text_takes_what_looks_like_a_number(word, name):
    assert config_with(word).name == name


def test_fields_derived_from_others_follow_an_override():
    # num_kv_heads and head_dim were filled in for 4 heads when the file was read.
    model = config_with("model.num_heads=8").model
    assert (model.num_kv_heads, model.head_dim) == (8, 4)
    assert config_with("model.d_model=64").model.head_dim == 16
    grouped = dataclasses.replace(MODEL, num_kv_heads=2)
    assert config_with("model.num_heads=8", model=grouped).model.num_kv_heads == 2


def test_the_input_is_left_as_it_was():
    tree = {**TREE, "optimizer": {"schedule": {"name": "linear"}}}
    copy = {**TREE, "optimizer": {"schedule": {"name": "linear"}}}
    apply_overrides(tree, ["--config.optimizer.schedule.name=wsd", "--config.steps=3"], TrainConfig)
    assert tree == copy


def test_json_and_back_is_the_same_config():
    rope = RopeConfig(scaling="yarn", factor=4, original_max_len=8)
    config = config_with(
        "eval.sample_prompts=('a', 'b')",
        "model.window_pattern=(8, 0)",
        "optimizer.name=muon",
        "optimizer.adam_learning_rate=1e-3",
        model=dataclasses.replace(MODEL, rope=rope, num_kv_heads=2),
    )
    assert build(TrainConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_dataclass_made_in_a_config_file_is_checked_like_a_mapping():
    data = DataConfig(sources=(SourceConfig(name="a", kind="stdlib"),), packing="bestfit")  # pyright: ignore
    with pytest.raises(ConfigError, match=r"config.packing='bestfit' must be one of .*Did you mean 'best_fit'"):
        build(DataConfig, data)
