"""What `loam inspect` prints: parameters by group, memory and FLOPs of a config, without allocating anything."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from model.flops import forward_flops_per_token, train_flops_per_token
from model.params import active_parameters, num_parameters, param_specs, parameter_groups
from train.config import TrainConfig
from train.step import make_trainer


def describe(config: TrainConfig) -> str:
    """A table for people. Memory is what a device holds between steps; activations come on top of it."""
    specs = param_specs(config.model)
    trainer = make_trainer(config)
    total = num_parameters(specs)
    active = f", of which each token meets {sum(active_parameters(config.model).values()):,}" if config.model.moe else ""
    lines = [f"{config.name}: {total:,} parameters{active}", ""]
    lines += [f"  {name:<28}{count:>16,}{100 * count / total:>7.1f} %" for name, count in parameter_groups(specs).items()]
    state = trainer.abstract_state
    mesh = ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
    lines += ["", f"memory per device, mesh {mesh}"]
    for name, tree in (("parameters", state.params), ("optimizer state", state.opt_state), ("moving average", state.ema)):
        lines.append(f"  {name:<28}{_device_bytes(tree) / 2**20:>14,.1f} MiB")
    lines.append(f"  {'gradients':<28}{_device_bytes(state.params) / 2**20:>14,.1f} MiB")
    seq_len = config.data.seq_len
    lines += [
        "",
        f"FLOPs per token at {seq_len} tokens a row, attention counted causally",
        f"  {'forward':<28}{forward_flops_per_token(config.model, seq_len):>16,.0f}",
        f"  {'forward and backward':<28}{train_flops_per_token(config.model, seq_len):>16,.0f}",
        "",
        f"run: {config.steps:,} steps x {config.tokens_per_step:,} tokens = {config.steps * config.tokens_per_step:,} tokens, "
        f"{config.steps * config.tokens_per_step * train_flops_per_token(config.model, seq_len):.3g} FLOPs",
    ]
    return "\n".join(lines)


def _device_bytes(tree: object) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStruct with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
