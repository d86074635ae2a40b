"""Opens a run's newest checkpoint, or another model: to continue prompts (`loam sample`), or for others (`loam convert`)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from data.chat_encoder import ChatEncoder
from data.gguf_tokenizer import metadata_of
from data.prepare import load_chat_template
from data.tokenizer import Tokenizer, as_huggingface, load_tokenizer
from experiments.config import build
from inference.generate import generate
from inference.models import LoadedModel, describe_model, locate, open_model
from inference.sampling import Sampling
from model.attention import runs_on
from model.config import DType, ModelConfig
from model.convert import gguf, huggingface
from model.convert.families import family_of
from model.convert.gguf_file import read_gguf
from model.convert.peft import CONFIG as ADAPTER_CONFIG
from model.convert.peft import holds_adapters, save_adapters
from model.lora import adapter_specs
from model.params import Params, abstract_params, dimensions, param_shardings, param_specs, unstack_layers
from model.quantize import Bits, quantize
from model.sharding import DECODE_RULES, MESH_AXES, Layout, Rules, indivisible, make_mesh
from train.checkpoint import Checkpoints
from train.config import TrainConfig, check
from train.initial import base_weights, in_checkpoint, merged_weights, of_checkpoint
from train.rl_config import RLConfig


def open_run(run_dir: Path, step: int) -> tuple[TrainConfig | RLConfig, Tokenizer, Params]:
    """The config, tokenizer and weights of a run; the moving average of the weights if it keeps one.

    Args:
      step: of the checkpoint; below 0 the newest.

    Raises:
      ValueError, FileNotFoundError: the directory is not that of a run, or has no such checkpoint; or its adapters were trained
        on other weights than `initial_weights` of its config holds now.
    """
    config, tokenizer, params = _restore(run_dir, step)
    return config, tokenizer, _merged(run_dir, params, config) if config.lora else params


def _restore(run_dir: Path, step: int) -> tuple[TrainConfig | RLConfig, Tokenizer, Params]:
    """What `open_run` gives, but the adapters alone of a run that has some."""
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is not the directory of a run (it has no config.json): give one under runs/")
    config, there = _config_of(run_dir), json.loads((run_dir / "config.json").read_text())
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    specs = adapter_specs(config.model, config.lora) if config.lora else param_specs(config.model)
    abstract = in_checkpoint(there, abstract_params(specs))
    checkpoints = Checkpoints(str(run_dir / "checkpoints"), keep=None)
    if step >= 0:
        steps = checkpoints.steps()
        check(step in steps, f"{run_dir} has no checkpoint of step {step}; there are {steps}")
        state, _ = checkpoints.restore(step, abstract, partial=True)
    else:
        restored = checkpoints.restore_newest(abstract, print, partial=True)
        if restored is None:
            raise FileNotFoundError(f"{run_dir} has no checkpoint yet: wait for the first, or run its config")
        state = restored[0]
    return config, tokenizer, of_checkpoint(there, state)


def _config_of(run_dir: Path) -> TrainConfig | RLConfig:
    there = json.loads((run_dir / "config.json").read_text())
    return build(RLConfig if "task" in there else TrainConfig, there)


def _merged(run_dir: Path, adapters: Params, config: TrainConfig | RLConfig) -> Params:
    """The initial weights of a run with its adapters in them."""
    assert config.lora is not None
    return merged_weights(run_dir, config.model, config.lora, config.initial_weights, adapters, _on_one_device(config.model))


def _on_one_device(model: ModelConfig) -> Params:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_params(param_specs(model)))


def is_run(source: str) -> bool:
    return any((Path(source) / part).is_dir() for part in ("checkpoints", "tokenizer"))


def open_any(source: str, step: int = -1, dtype: DType | None = None, tensor: int = 1, bits: Bits | None = None) -> LoadedModel:
    """A run of ours, or what `inference.models.open_model` opens.

    Args:
      dtype: of activations and parameters; None is that of a run's config, else float32.
      tensor: over how many devices it lies, see `tensor_shardings`.
      bits: rounds matrices, see `model/quantize.py`: those of a run when all have been read, others one by one.

    Raises:
      ValueError, FileNotFoundError: see `open_run`, `open_model`, `tensor_shardings` and `quantize`.
    """
    if not is_run(source):
        known = ("config.json", ADAPTER_CONFIG, "*.gguf")
        if Path(source).is_dir() and not any(file for name in known for file in Path(source).glob(name)):
            raise FileNotFoundError(
                f"{source} is not the directory of a run, nor of a checkpoint (it has no config.json): give one under runs/, a "
                "model's directory, or a .gguf file"
            )
        check(step < 0, f"--step is for runs, and {source} is none: leave it out")
        kind = dtype or "float32"
        return open_model(
            source, dtype=kind, param_dtype=kind, place=lambda config: tensor_shardings(config, tensor), bits=bits
        )
    config, tokenizer, params = open_run(Path(source), step)
    template, stop_ids = _chat_of_run(Path(source), tokenizer)
    # A run of a TPU is opened elsewhere too.
    own = runs_on(config.model.attention_backend, jax.devices()[0].platform)
    model = config.model if own else dataclasses.replace(config.model, attention_backend="xla")
    if dtype:
        model = dataclasses.replace(model, dtype=dtype, param_dtype=dtype)
        params = jax.tree.map(lambda leaf, spec: leaf.astype(spec.dtype), params, param_specs(model))
    if shardings := tensor_shardings(model, tensor):
        params = jax.device_put(params, shardings)
    if bits:
        params, model = unstack_layers(params, model)
        params, model = quantize(params, model, bits)
    return LoadedModel(params, model, tokenizer, template, stop_ids, Path(source).resolve().name)


def _chat_of_run(run_dir: Path, tokenizer: Tokenizer) -> tuple[str | None, frozenset[int]]:
    """The chat template of a run, and the tokens that end an answer."""
    template = load_chat_template(run_dir / "tokenizer") or None
    if template is not None:
        return template, ChatEncoder(tokenizer, template).stop_ids
    return None, frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})


def tensor_shardings(config: ModelConfig, tensor: int) -> Params | None:
    """Where each parameter lies if heads and MLPs lie over `tensor` devices, and the vocabulary and the heads of keys and
    values where they divide these; None for one device.

    Raises:
      ValueError: there are not so many devices, or they do not divide the network.
    """
    specs, devices = param_specs(config), jax.devices()

    def rules(count: int) -> Rules:
        may_be_copied = {"vocab": config.vocab_size, "kv_heads": config.num_kv_heads}
        return DECODE_RULES | {axis: () for axis, length in may_be_copied.items() if length % count}

    def problem(count: int) -> str:
        return indivisible(dimensions(specs), rules(count), dict.fromkeys(MESH_AXES, 1) | {"tensor": count})

    check(tensor > 0, f"--tensor={tensor} must be positive")
    if tensor > len(devices) or problem(tensor):
        fitting = ", ".join(str(n) for n in range(1, len(devices) + 1) if not problem(n))
        reason = problem(tensor) or f"there are {len(devices)} {devices[0].platform} devices here"
        raise ValueError(f"--tensor={tensor} does not fit: {reason}. It may be {fitting}")
    if tensor == 1:
        return None
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | {"tensor": tensor}, devices[:tensor])
    return param_shardings(specs, Layout.of(mesh, rules(tensor)))


def open_to_decode(arguments: argparse.Namespace) -> LoadedModel:
    """The MODEL of a command, with its `--dtype`, `--weights`, `--tensor` and, where it has one, `--step`.

    Raises:
      ValueError, FileNotFoundError: see `open_any`.
    """
    bits: dict[str | None, Bits | None] = {None: None, "int8": 8, "int4": 4}
    step = getattr(arguments, "step", -1)
    return open_any(arguments.source, step, arguments.dtype, arguments.tensor, bits[arguments.weights])


def open_draft(arguments: argparse.Namespace) -> LoadedModel | None:
    """The model that guesses for the MODEL of a command, by its `--draft` and `--guesses`; it lies on one device.

    Raises:
      ValueError, FileNotFoundError: they do not go together, or its tokenizer is another; see `open_to_decode`.
    """
    name, source, guesses = arguments.draft, arguments.source, arguments.guesses
    check(guesses >= 0, f"--guesses={guesses} must not be negative (0 is off)")
    if name is None:
        return None
    check(guesses > 0, f"--draft={name} is to guess 0 tokens at once: add --guesses=4, say")
    check(
        _tokenizer_of(name).token_bytes == _tokenizer_of(source).token_bytes,
        f"--draft={name} has another tokenizer than {source}: take a model of the same one",
    )
    return open_to_decode(argparse.Namespace(**vars(arguments) | {"source": name, "step": -1, "tensor": 1}))


def _tokenizer_of(source: str) -> Tokenizer:
    return load_tokenizer(Path(source) / "tokenizer") if is_run(source) else describe_model(source).tokenizer


def convert(arguments: argparse.Namespace) -> None:
    """Writes a model as a Hugging Face checkpoint or, where the target ends so, as a .gguf file; or a run's adapters for peft.

    Raises:
      ValueError, FileNotFoundError: as `open_any`, or no family has words for the model, or the target is not empty; or there
        are no adapters, or none that peft has words for.
    """
    target = Path(arguments.target)
    to_gguf = target.suffix == ".gguf"
    check(to_gguf or not arguments.type, f"--type is for GGUF, and {target} is none: let its name end in .gguf")
    check(not (to_gguf and arguments.family), "--family is for Hugging Face checkpoints: a GGUF file finds its own")
    if arguments.adapters:
        check(not to_gguf, f"--adapters are for peft, and {target} is a GGUF file: name a directory")
        _convert_adapters(arguments.source, target, arguments.family, arguments.step)
        return
    loaded = open_any(arguments.source, arguments.step)
    if to_gguf:
        gguf.save(
            target, loaded.params, loaded.config, arguments.type or "F16", _gguf_keys(arguments.source, loaded), loaded.name
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        if not is_run(arguments.source) and (path := locate(arguments.source)).is_dir() and not holds_adapters(path):
            huggingface.save(target, loaded.params, loaded.config, arguments.family, path)
        else:
            special = _write_tokenizer(Path(scratch), loaded.tokenizer, loaded.chat_template, loaded.stop_ids)
            huggingface.save(target, loaded.params, loaded.config, arguments.family, scratch, special)


def _convert_adapters(source: str, target: Path, family: str | None, step: int) -> None:
    check(is_run(source), f"--adapters is for runs with lora, and {source} is none: leave it out")
    lora = _config_of(Path(source)).lora
    check(lora is not None, f"{source} was trained without lora and has no adapters: leave --adapters out")
    config, tokenizer, adapters = _restore(Path(source), step)
    assert lora is not None
    base, chosen = config.initial_weights, family_of(config.model, family) if family else None
    base_weights(Path(source), config.model, base, _on_one_device(config.model))  # are those that they were trained on
    path = Path(base).expanduser()
    if is_run(base) or (path.is_dir() and holds_adapters(path)):
        print(
            f"the base of these adapters is {base}, which peft does not open: `loam convert {shlex.quote(base)} DIRECTORY` "
            f"writes it; then name DIRECTORY in {target / ADAPTER_CONFIG}, as base_model_name_or_path"
        )
        base = ""
    else:
        chosen = chosen or describe_model(base).family
        base = str(path.resolve()) if path.exists() else base
    with tempfile.TemporaryDirectory() as scratch:
        _write_tokenizer(Path(scratch), tokenizer, *_chat_of_run(Path(source), tokenizer))
        save_adapters(target, adapters, config.model, lora, base, chosen, scratch)


def _gguf_keys(source: str, loaded: LoadedModel) -> dict[str, Any]:
    """The tokenizer's keys: just those of the source if it is a GGUF file."""
    if not is_run(source) and (path := locate(source)).is_file():
        return {key: value for key, value in read_gguf(path).metadata.items() if key.startswith("tokenizer.")}
    return metadata_of(loaded.tokenizer, loaded.config.vocab_size, loaded.chat_template, loaded.stop_ids)


def _write_tokenizer(
    directory: Path, tokenizer: Tokenizer, chat_template: str | None, stop_ids: frozenset[int]
) -> dict[str, Any]:
    """What transformers reads of a tokenizer beside a checkpoint; returns the keys for its config.json."""
    ends = sorted(stop_ids, key=lambda token: (token != tokenizer.eos_id, token))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    (directory / "config.json").write_text("{}")
    (directory / "generation_config.json").write_text(json.dumps(special, indent=2))
    if chat_template:
        (directory / "chat_template.jinja").write_text(chat_template)
    try:
        theirs = as_huggingface(tokenizer)
    except ValueError as error:
        print(f"written without a tokenizer: {error}")
        return special
    texts = {i: text for text, i in theirs.special_tokens.items()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": theirs.adds_bos}
    named = {"bos_token": theirs.bos_id, "eos_token": theirs.eos_id}
    config |= {name: texts[i] for name, i in named.items() if i is not None and i in texts}
    (directory / "tokenizer.json").write_bytes(theirs.model)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return special


def sample(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) for each prompt.

    Raises:
      ValueError, FileNotFoundError: as `open_to_decode` and `open_draft`, or a sampling option is off limits.
    """
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    draft = open_draft(arguments)
    loaded = open_to_decode(arguments)
    tokenizer = loaded.tokenizer
    prompts = arguments.prompt or _prompts_of(arguments.source) or ["The "]
    outputs = generate(
        loaded.params,
        loaded.config,
        [tokenizer.encode_prompt(prompt) for prompt in prompts],
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        stop_ids=loaded.stop_ids,
        cache_dtype=arguments.cache_dtype,
        num_guesses=arguments.guesses,
        draft=draft,
    )
    for prompt, tokens in zip(prompts, outputs, strict=True):
        yield prompt, tokenizer.decode(tokens)


def _prompts_of(source: str) -> list[str]:
    """Those a run samples from."""
    if not is_run(source):
        return []
    config = _config_of(Path(source))
    return list(config.eval.sample_prompts) if isinstance(config, TrainConfig) else []
