"""What a run begins with when it is not noise: another run, or other people's model, with its tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from data.prepare import load_chat_template
from data.tasks.task import Task
from data.tokenizer import Tokenizer, load_tokenizer
from inference.models import describe_model
from model.config import LoraConfig, ModelConfig, check
from model.convert.config_json import differences
from model.lora import adapt, adapter_specs, frozen_base, merge
from model.params import Params, abstract_params, init_params, param_specs
from train.checkpoint import Checkpoints, digests, flatten
from train.distributed import ALONE, Group
from train.files import write_json_atomic
from train.step import Trainer

# Fields of a model that say how it is computed, not what: they may differ from those of the run that is continued from.
_FREE_FIELDS = ("dtype", "param_dtype", "remat", "attention_backend", "max_seq_len", "init_std")


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """Attributes:
    chat_template: "" where it has none.
    load: abstract parameters, with shardings -> parameters.
    merged: `load` puts adapters into them, which other devices round otherwise; else they are the same to the bit anywhere.
    """

    tokenizer: Tokenizer
    chat_template: str
    load: Callable[[Params], Params]
    merged: bool = False


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

    return InitialModel(described.tokenizer, described.chat_template or "", load, described.adapters is not None)


def in_checkpoint(run: Mapping[str, Any], weights: Params) -> Params:
    """A tree with `weights` where a checkpoint of a run has those to go on with: their moving average if it keeps one.

    Args:
      run: the run's config.json.
    """
    tree = {_name_of_weights(run): weights}
    return {"train": tree} if "task" in run else tree  # The state of reinforcement learning has that of the trainer in it.


def of_checkpoint(run: Mapping[str, Any], tree: Params) -> Params:
    """The weights in a tree of `in_checkpoint`."""
    return (tree["train"] if "task" in run else tree)[_name_of_weights(run)]


def _name_of_weights(run: Mapping[str, Any]) -> str:
    return "ema" if run["optimizer"]["ema_decay"] else "params"


def _open_run(directory: Path, config: ModelConfig) -> InitialModel:
    there = json.loads((directory / "config.json").read_text())
    here = json.loads(json.dumps(dataclasses.asdict(config)))
    different = [
        f"model.{name}={here[name]!r} (there {there['model'].get(name)!r})"
        for name in here
        if name not in _FREE_FIELDS and here[name] != there["model"].get(name)
    ]
    check(not different, f"initial_weights={str(directory)!r} is another network than the config: {', '.join(different)}")

    def load(abstract: Params) -> Params:
        found = Checkpoints(str(directory / "checkpoints"), keep=None)
        restored = found.restore_newest(in_checkpoint(there, abstract), print, partial=True)
        if restored is None:
            raise FileNotFoundError(f"initial_weights={str(directory)!r} has no checkpoint yet: let that run make one")
        return of_checkpoint(there, restored[0])

    def load_merged(abstract: Params) -> Params:
        assert lora is not None
        adapters = load(_anywhere(abstract_params(adapter_specs(config, lora)), abstract))
        return merged_weights(directory, config, lora, there["initial_weights"], adapters, abstract)

    lora = LoraConfig(**there["lora"] | {"targets": tuple(there["lora"]["targets"])}) if there.get("lora") else None
    tokenizer = directory / "tokenizer"
    return InitialModel(
        load_tokenizer(tokenizer), load_chat_template(tokenizer), load_merged if lora else load, lora is not None
    )


def merged_weights(
    run_dir: Path, model: ModelConfig, lora: LoraConfig, source: str, adapters: Params, abstract: Params
) -> Params:
    """The weights of `source` with the adapters of a run in them; they live where `abstract` says.

    Raises:
      ValueError, FileNotFoundError: see `base_weights`.
    """
    base = base_weights(run_dir, model, source, abstract)
    specs = param_specs(model)
    of_weights = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    whole = jax.jit(
        lambda base, adapters: merge(adapt(frozen_base(base, model, lora)[0], adapters, lora), specs), out_shardings=of_weights
    )
    return whole(base, adapters)


def base_weights(run_dir: Path, model: ModelConfig, source: str, abstract: Params) -> Params:
    """The weights of `source`, which the adapters of the run in `run_dir` belong to.

    Of a source that has adapters merged into it differing bits may be another device's rounding, so these are only told.

    Raises:
      ValueError, FileNotFoundError: see `open_initial`; or they are not those that the run began with.
    """
    initial = open_initial(source, model)
    weights, path = initial.load(abstract), run_dir / "initial_weights.json"
    if path.exists() and json.loads(path.read_text())["digest"] != _digest(weights):
        told = f"{source} no longer holds the weights that the adapters of {run_dir} were trained on"
        check(initial.merged, f"{told}: bring them back, or train adapters of what is there now")
        print(f"warning: {told}, or adapters are merged into it in another rounding than where that run began")
    return weights


def _digest(weights: Params) -> str:
    return hashlib.sha256(json.dumps(digests(flatten(weights)[0]), sort_keys=True).encode()).hexdigest()


def _anywhere(abstract: Params, beside: Params) -> Params:
    """`abstract` on all of the devices that `beside` is on."""
    sharding = jax.tree.leaves(beside)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)


def load_initial(initial: InitialModel, trainer: Trainer) -> Params:
    """What `trainer.begin` takes: the weights of the network, and heads as they are before any training."""
    network = param_specs(trainer.config.model)
    heads = {name: spec for name, spec in trainer.specs.items() if name not in network}
    weights = initial.load({name: trainer.abstract_weights[name] for name in network})
    of_heads = {name: trainer.abstract_weights[name].sharding for name in heads}
    return weights | (init_params(heads, jax.random.key(0), of_heads) if heads else {})


def compare_initial(run_dir: Path, name: str, source: str, weights: Params, begun: bool, group: Group = ALONE) -> None:
    """Keeps the digest of weights that a run does not save in `<name>.json`.

    Args:
      begun: the run has a checkpoint, and goes on with the weights it began with.

    Raises:
      ValueError: these are others.
    """
    _compare(run_dir, name, source, "weights", _digest(weights), begun, group)


def compare_task(run_dir: Path, task: Task, begun: bool) -> None:
    """Keeps the digest of the files of a task in `task.json`; see `compare_initial`."""
    if task.files():
        of_files = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in task.files()]
        found = hashlib.sha256(json.dumps(of_files).encode()).hexdigest()
        _compare(run_dir, "task", " and ".join(task.files()), "problems", found, begun, ALONE)


def _compare(run_dir: Path, name: str, source: str, what: str, found: str, begun: bool, group: Group) -> None:
    path = run_dir / f"{name}.json"
    said = group.from_first(name, lambda: json.loads(path.read_text())["digest"] if begun and path.exists() else found)
    check(
        said == found,
        f"{source} no longer holds the {what} that {run_dir} began with: bring them back, or choose another --config.run_dir",
    )
    if group.is_first:
        write_json_atomic(path, {"source": source, "digest": found})
