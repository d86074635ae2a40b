"""What a run begins with when it is not noise: another run, or other people's model, with its tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax

from data.prepare import load_chat_template
from data.tokenizer import Tokenizer, load_tokenizer
from inference.models import describe_model
from model.config import ModelConfig, check
from model.convert.config_json import differences
from model.params import Params
from train.checkpoint import Checkpoints

# Fields of a model that say how it is computed, not what: they may differ from those of the run that is continued from.
_FREE_FIELDS = ("dtype", "param_dtype", "remat", "attention_backend", "max_seq_len", "init_std")


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """Attributes:
    chat_template: "" where it has none.
    load: abstract parameters, with shardings -> parameters.
    """

    tokenizer: Tokenizer
    chat_template: str
    load: Callable[[Params], Params]


def open_initial(source: str, config: ModelConfig) -> InitialModel:
    """Opens the model that `TrainConfig.initial_weights` names; its weights are not read yet.

    Args:
      source: the directory of a run, or what `inference.models.open_model` opens.
      config: the network to be trained, which must be that of the source.

    Raises:
      ValueError, FileNotFoundError: there is none, or it is another network; every differing field is named.
    """
    directory = Path(source)
    if (directory / "checkpoints").is_dir():
        return _open_run(directory, config)
    described = describe_model(source)
    different = differences(config, described.config)
    check(
        not different,
        f"initial_weights={source!r} is another network than the config: {', '.join(different)} is not so there; set "
        "config.model to what it is (model/presets.py has the published ones)",
    )

    def load(abstract: Params) -> Params:
        return described.load(config, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    return InitialModel(described.tokenizer, described.chat_template or "", load)


def _open_run(directory: Path, config: ModelConfig) -> InitialModel:
    there = json.loads((directory / "config.json").read_text())
    here = json.loads(json.dumps(dataclasses.asdict(config)))
    different = [
        f"model.{name}={here[name]!r} (there {there['model'].get(name)!r})"
        for name in here
        if name not in _FREE_FIELDS and here[name] != there["model"].get(name)
    ]
    check(not different, f"initial_weights={str(directory)!r} is another network than the config: {', '.join(different)}")
    check(not there.get("lora"), f"initial_weights={str(directory)!r} has adapters: `loam convert` it, and begin with that")
    name = "ema" if there["optimizer"]["ema_decay"] else "params"

    def load(abstract: Params) -> Params:
        restored = Checkpoints(str(directory / "checkpoints"), keep=None).restore_newest({name: abstract}, print, partial=True)
        if restored is None:
            raise FileNotFoundError(f"initial_weights={str(directory)!r} has no checkpoint yet: let that run make one")
        return restored[0][name]

    tokenizer = directory / "tokenizer"
    return InitialModel(load_tokenizer(tokenizer), load_chat_template(tokenizer), load)
