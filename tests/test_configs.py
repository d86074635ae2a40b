"""Every config builds, and every command that a document tells the reader to type exists."""

import itertools
import re
import shlex
from pathlib import Path

import jax
import pytest

from experiments.cli import load_run_config, parse
from model.params import abstract_params, num_parameters, param_specs
from train.optimizer import make_optimizer, make_schedule
from train.synthesis.config import SynthesisConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py")
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
# A command in a code span, in a code block, or after `Command:`; a comment or a mark outside of quotes ends it.
COMMAND = re.compile(r'(?:^|[`(]|Command: +|or: |\$ )((?:loam|make) (?:"[^"\n]*"|[^`#()"\n])+)', re.MULTILINE)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_with_its_model_and_optimizer(path):
    config = load_run_config(str(path), [])
    assert config.name == path.stem
    assert config.run_dir == f"runs/{path.stem}"
    if isinstance(config, SynthesisConfig):  # which trains nothing
        return
    specs = param_specs(config.model)
    assert num_parameters(specs) > 0
    tokens = config.update_rows * config.row_tokens
    schedule = make_schedule(config.optimizer.schedule, config.optimizer.learning_rate, config.num_updates, tokens)
    optimizer = make_optimizer(config.optimizer, specs, schedule)
    params = abstract_params(specs)
    state = jax.eval_shape(optimizer.init, params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.map(lambda leaf: leaf.shape, updates) == jax.tree.map(lambda leaf: leaf.shape, params)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_it_is_run_and_what_comes_out(path):
    for heading in ("Command:", "Hardware:", "Expected:"):
        assert re.search(rf"^{heading} +\S", path.read_text().split('"""')[1], re.MULTILINE), heading
    assert any(str(path.relative_to(ROOT)) in command for _, command in commands(path))


def commands(path):
    text = path.read_text()
    text = text.split('"""')[1] if path.suffix == ".py" else re.sub(r"\\\n\s*", "", text)
    return [(path.name, match.strip().rstrip(".,;:")) for match in COMMAND.findall(text)]


@pytest.mark.parametrize(("document", "command"), [item for path in (*CONFIGS, *DOCUMENTS) for item in commands(path)])
def test_a_command_that_a_document_shows_exists(document, command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    elif "--help" not in words:
        arguments = parse(words[1:])
        # configs/NAME.py and --config.key=value stand for any.
        if arguments.command in ("run", "inspect", "launch") and "NAME" not in arguments.config:
            load_run_config(arguments.config, [word for word in arguments.overrides if word != "--config.key=value"])


def test_each_stage_of_the_quickstart_begins_with_the_one_before():
    recipe = re.search(r"^quickstart: env\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    stages = [load_run_config(path, []) for path in re.findall(r"loam run --config=(\S+)", recipe[1])]
    assert [stage.name for stage in stages] == ["quickstart", "sft_quickstart", "grpo_quickstart"]
    for before, stage in itertools.pairwise(stages):
        assert stage.initial_weights == before.run_dir
        assert stage.model == before.model
    # What is rewarded is what was shown, and neither saw what is evaluated (tests/data has the task's split).
    assert stages[2].task == stages[1].data.sources[0].task
    assert stages[2].chat
