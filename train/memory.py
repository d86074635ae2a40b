"""What a device will hold in training, planned from shapes before anything is compiled.

Nothing is allocated and no device is asked: parameters and optimizer state are counted under the rules of the mesh, and what
the backward pass needs of the forward one is found by tracing one device's share of the model. It is a plan: the compiler
shares buffers, pads them and keeps copies; `loam compile` tells what it really takes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh

from model.config import LoraConfig, ModelConfig
from model.lora import adapter_specs, frozen_base
from model.params import Params, abstract_params, block_layout, param_shardings, param_specs, parameter_groups
from model.sharding import DECODE_RULES, TRAIN_RULES, Layout, Rules
from model.transformer import empty_pages, forward
from train.config import OptimizerConfig, TrainConfig
from train.learned_reward import reward_model_specs
from train.optimizer import make_optimizer
from train.rl_config import RLConfig
from train.rollouts import engine_config
from train.step import Job, adapter_settings, opt_state_shardings


def plan_memory(config: Job, mesh: Mapping[str, int]) -> dict[str, int]:
    """Bytes that each device holds at the fullest moment of an update, by what they are.

    Args:
      mesh: sizes of the axes, as `train.step.mesh_sizes` gives them.
    """
    objective = config.objective if isinstance(config, TrainConfig) else None
    parameters, opt_state = _state_bytes(config.model, config.lora, config.optimizer, tuple(mesh.items()))
    plan = {
        "parameters": parameters,
        "optimizer state": opt_state,
        "moving average": parameters if config.optimizer.ema_decay else 0,
        "gradients": parameters * (2 if config.accumulation > 1 else 1),
    }
    if objective and objective.needs_reference and not config.lora:
        plan["reference"] = parameters
    if config.distillation:
        plan["teacher"] = _weight_bytes(config.distillation.model, mesh, TRAIN_RULES)
    if config.lora:
        plan["frozen weights"] = _frozen_bytes(config.model, config.lora, mesh)
    return plan | _activations(config, mesh)


def plan_sampler(config: RLConfig, mesh: Mapping[str, int]) -> dict[str, int]:
    """Bytes that each device holds all the time for drawing answers and, if there are such, for the reference of a KL penalty
    and a reward model."""
    model = dataclasses.replace(config.model, scan_layers=False)
    engine = engine_config(config)
    pages = jax.eval_shape(functools.partial(empty_pages, model, engine.num_pages, engine.page_size, engine.cache_dtype))
    heads = 1 if model.mla else model.num_kv_heads
    parts = 1 if heads % mesh["tensor"] else mesh["tensor"]
    parameters, _ = _state_bytes(config.model, config.lora, config.optimizer, tuple(mesh.items()))
    judge = {"reward model": _weight_bytes(config.model, mesh, TRAIN_RULES, reward_model_specs)} if config.reward_model else {}
    return judge | {
        "reference": parameters if config.policy.kl.needs_reference else 0,
        "weights of the sampler": _weight_bytes(model, mesh, DECODE_RULES),
        "pages of the sampler": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages)) // parts,
    }


def _frozen_bytes(model: ModelConfig, lora: LoraConfig, mesh: Mapping[str, int]) -> int:
    """Of what adapters adapt: rounded weights are whole on every device."""
    if not lora.base_bits:
        return _weight_bytes(model, mesh, TRAIN_RULES)
    base = jax.eval_shape(lambda params: frozen_base(params, model, lora)[0], abstract_params(param_specs(model)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))


def _abstract_layout(mesh: Mapping[str, int], rules: Rules) -> Layout:
    abstract_mesh: Any = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    return Layout.of(abstract_mesh, rules)


def _weight_bytes(
    model: ModelConfig, mesh: Mapping[str, int], rules: Rules, specs_of: Callable[[ModelConfig], Params] = param_specs
) -> int:
    specs = specs_of(model)
    return _bytes(abstract_params(specs), param_shardings(specs, _abstract_layout(mesh, rules)))


@functools.cache
def _state_bytes(
    model: ModelConfig, lora: LoraConfig | None, optimizer: OptimizerConfig, mesh: tuple[tuple[str, int], ...]
) -> tuple[int, int]:
    """Bytes per device of what is trained, and of optimizer state."""
    specs = adapter_specs(model, lora) if lora else param_specs(model)
    layout = _abstract_layout(dict(mesh), TRAIN_RULES)
    params = abstract_params(specs)
    optimizer = adapter_settings(optimizer) if lora else optimizer
    of_params = param_shardings(specs, layout)
    opt_state = jax.eval_shape(make_optimizer(optimizer, specs, lambda _: 0.0).init, params)
    return _bytes(params, of_params), _bytes(opt_state, opt_state_shardings(opt_state, specs, of_params, layout.sharding()))


def _bytes(tree: object, shardings: object) -> int:
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _activations(config: Job, mesh: Mapping[str, int]) -> dict[str, int]:
    """What comes and goes within a micro-batch: what all layers keep, and the larger of what comes after it."""
    tensor = mesh["tensor"]
    rows = config.update_rows // config.accumulation // math.prod(mesh[axis] for axis in TRAIN_RULES["batch"])
    seq_len = config.row_tokens // mesh["context"]
    model = _share(config.model, tensor)
    width = jnp.dtype(model.dtype).itemsize
    chunk = min(rows * seq_len, config.chunk_tokens or rows * seq_len)
    _, period, _ = block_layout(model)
    kept = rows * _period_bytes(model, seq_len, tensor, mesh["expert"])
    one = rows * _period_bytes(dataclasses.replace(model, remat="none"), seq_len, tensor, mesh["expert"])
    # In the backward pass their gradients stand beside them, and of both a copy in the layout that an all-to-all wants; of the
    # widths of the experts themselves one chunk at a time, each with its gradient.
    exchanged, chunk_rows = expert_rows(model, rows * seq_len, mesh["expert"])
    if model.moe:
        one += period * width * (4 * exchanged * model.d_model + 6 * chunk_rows * model.moe.d_ff)
    groups = parameter_groups(param_specs(dataclasses.replace(model, num_layers=1)))
    # An expert's matrices are gathered where it lives, everything else everywhere.
    groups["blocks/experts"] = groups.get("blocks/experts", 0) // mesh["expert"]
    block = sum(size for name, size in groups.items() if name.startswith("blocks/"))
    head = model.vocab_size * model.d_model
    # Where weights are scattered, those of the next layer arrive while one is used; gradients leave in the parameters' type.
    gathered = math.prod(mesh[axis] for axis in TRAIN_RULES["embed"]) > 1
    of_layer = int(one / period) + (2 * width + 4) * block * gathered
    logits = 2  # and their gradient
    if config.distillation:
        # Of both models, both distributions, and a gradient; in chunks, those of the texts' likelihood are gone by then.
        logits = 5 if config.chunk_tokens else logits + 5
        kept += rows * seq_len * config.distillation.model.d_model * width * period / model.num_layers
    of_loss = logits * 4 * chunk * model.vocab_size + (width + 4) * head * gathered
    return {
        f"activations kept (remat {model.remat})": int(kept * model.num_layers / period),
        "the loss" if of_loss > of_layer else "a layer in the backward pass": max(of_loss, of_layer),
    }


def _share(model: ModelConfig, tensor: int) -> ModelConfig:
    """The model whose layers are as wide as a device's part of them under tensor parallelism; all of them have experts."""
    moe = model.moe and dataclasses.replace(model.moe, d_ff=model.moe.d_ff // tensor, num_dense_layers=0)
    return dataclasses.replace(
        model,
        moe=moe,
        num_heads=model.num_heads // tensor,
        num_kv_heads=max(1, model.num_kv_heads // tensor),
        d_ff=model.d_ff // tensor,
        vocab_size=-(-model.vocab_size // tensor),
    )


def expert_rows(model: ModelConfig, tokens: int, devices: int) -> tuple[int, int]:
    """(rows that a device has room for, rows of a chunk) with experts on so many devices, each with so many tokens; see
    `model/moe.py`. Both are 0 where tokens stay at home."""
    if not model.moe or devices == 1:
        return 0, 0
    most = tokens * min(model.moe.experts_per_token, model.moe.num_experts // devices)
    return devices * most, most


@functools.cache
def _period_bytes(model: ModelConfig, seq_len: int, tensor: int, devices: int) -> float:
    """Bytes that one period of layers leaves for the backward pass, for one row: what two leave more than one."""
    _, period, _ = block_layout(model)
    one, two = (_residual_bytes(dataclasses.replace(model, num_layers=n * period), seq_len, tensor, devices) for n in (1, 2))
    kept = expert_rows(model, seq_len, devices)[0] if model.remat in ("none", "dots") else 0
    return two - one + period * kept * model.d_model * jnp.dtype(model.dtype).itemsize


def _residual_bytes(model: ModelConfig, seq_len: int, tensor: int, devices: int) -> float:
    """Bytes of all that the forward pass of a row leaves for the backward one, except what does not depend on the row:
    parameters, cast or reshaped.

    Where experts are on several devices, neither are the rows of each expert's widths: they are computed again by the chunk.
    """
    params = abstract_params(param_specs(model))
    row = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)

    def residuals(params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> Any:
        return jax.vjp(lambda params: forward(params, model, tokens, positions, segment_ids)[0], params)[1]

    traced = jax.make_jaxpr(residuals)(params, row, row, row)
    copies = seq_len * model.moe.experts_per_token if model.moe and devices > 1 else 0
    total = 0.0
    for number, leaf in enumerate(traced.out_avals):
        needed = dce_jaxpr(traced.jaxpr, [other == number for other in range(len(traced.out_avals))])[1]
        if any(needed[-3:]) and not (model.moe and leaf.shape[-2:] == (copies, model.moe.d_ff)):
            # Between the layers tokens are split over `tensor`; within them heads and the MLP's width are (`_share`).
            parts = tensor if leaf.shape[-2:] == (seq_len, model.d_model) else 1
            total += leaf.size * jnp.dtype(leaf.dtype).itemsize / parts
    return total
