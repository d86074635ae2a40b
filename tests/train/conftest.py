"""What runs of reinforcement learning begin with."""

import functools

import jax
import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from tests.train.rl_runs import EXPERTS, MODEL, PAIRWISE, TASK
from train import rl
from train.config import OptimizerConfig, TrainConfig
from train.loop import train


@pytest.fixture
def one_device(request, monkeypatch):
    """Of the eight there are, but for tests with `eight` in their name."""
    if "eight" not in request.node.name:
        monkeypatch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    """A run that has seen a few answers."""
    directory = tmp_path_factory.mktemp("warm")
    source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.1)
    data = DataConfig((source,), tokenizer=TokenizerConfig("chars"), seq_len=16, cache_dir=str(directory / "cache"))
    config = TrainConfig(
        "warm",
        MODEL,
        data,
        steps=8,
        batch_size=8,
        run_dir=str(directory / "run"),
        writers=(),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    assert train(config, log=lambda _: None) == 0
    return directory / "run"


@pytest.fixture(scope="session")
def scorer(warm_start):
    """Makes a reward model that begins with the warm start and was shown a chat template."""

    def make(name, template, objective=PAIRWISE):
        source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.4)
        cache = str(warm_start.parent / "cache")
        data = DataConfig((source,), seq_len=16, cache_dir=cache, content=objective.content, chat_template=template)
        config = TrainConfig(
            name,
            MODEL,
            data,
            steps=8,
            batch_size=8,
            initial_weights=str(warm_start),
            objective=objective,
            run_dir=str(warm_start.parent / name),
            writers=(),
            optimizer=OptimizerConfig(learning_rate=1e-2),
        )
        assert train(config, log=lambda _: None) == 0
        return config.run_dir

    return make


@pytest.fixture(scope="session")
def expert_start(tmp_path_factory):
    """The warm start of a network with experts."""
    directory = tmp_path_factory.mktemp("experts")
    source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.1)
    data = DataConfig((source,), tokenizer=TokenizerConfig("chars"), seq_len=16, cache_dir=str(directory / "cache"))
    options = {"run_dir": str(directory / "run"), "writers": (), "optimizer": OptimizerConfig(learning_rate=1e-2)}
    assert train(TrainConfig("experts", EXPERTS, data, steps=8, batch_size=8, **options), log=lambda _: None) == 0
    return directory / "run"
