"""What `loam inspect` prints: parameters by group, memory and FLOPs of a config, without allocating anything."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from model.chips import Topology
from model.flops import forward_flops_per_token, train_flops_per_token
from model.params import active_parameters, num_parameters, param_specs, parameter_groups
from train.config import TrainConfig
from train.memory import plan_memory, plan_sampler
from train.policy import Policy
from train.rl_config import RLConfig
from train.step import check_backends, make_trainer, mesh_sizes

# Of what the compiler allocates: the worst of docs/pods.json is llama3_8b_v5e.
PLAN_MAY_LACK = 0.21


def describe(config: TrainConfig | RLConfig) -> str:
    """A table for people. Memory is what a device holds between steps; activations come on top of it."""
    specs = param_specs(config.model)
    trainer = Policy(config).trainer if isinstance(config, RLConfig) else make_trainer(config)
    total = num_parameters(specs)
    lines = [_title(config), ""]
    lines += [f"  {name:<28}{count:>16,}{100 * count / total:>7.1f} %" for name, count in parameter_groups(specs).items()]
    state = trainer.abstract_state
    mesh = ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
    lines += ["", f"memory per device, mesh {mesh}"]
    for name, tree in (("parameters", state.params), ("optimizer state", state.opt_state), ("moving average", state.ema)):
        lines.append(f"  {name:<28}{_device_bytes(tree) / 2**20:>14,.1f} MiB")
    if state.frozen is not None:
        lines.append(f"  {'frozen weights':<28}{_device_bytes(state.frozen) / 2**20:>14,.1f} MiB")
    lines.append(f"  {'gradients':<28}{_device_bytes(state.params) / 2**20:>14,.1f} MiB")
    if isinstance(config, RLConfig):
        held = plan_sampler(config, trainer.mesh.shape)
        lines += [f"  {name:<28}{size / 2**20:>14,.1f} MiB" for name, size in held.items()]
    return "\n".join([*lines, *_flops_lines(config)])


def describe_plan(config: TrainConfig | RLConfig, topology: Topology, slices: int = 1) -> str:
    """What each device of a slice, or of several that are joined along `data`, will hold, by plan, against its HBM.

    Raises:
      ValueError: the mesh does not fit the slices, or the attention backend is for other devices.
    """
    check_backends(config, "tpu")
    num_devices = slices * topology.num_devices
    mesh = mesh_sizes(config, num_devices, slices)
    plan = plan_memory(config, mesh) | (plan_sampler(config, mesh) if isinstance(config, RLConfig) else {})
    total, limit = sum(plan.values()), topology.chip.hbm_bytes
    names = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    machines = topology.name if slices == 1 else f"{slices} x {topology.name}"
    lines = [
        _title(config),
        "",
        f"memory per device of {machines} ({num_devices:,} devices), mesh {names}",
        *(f"  {name:<36}{size / 2**20:>14,.1f} MiB" for name, size in plan.items()),
        f"  {'planned':<36}{total / 2**20:>14,.1f} MiB, {100 * total / limit:.0f} % of its {limit / 2**30:.2f} GiB",
    ]
    if total > (1 - PLAN_MAY_LACK) * limit:
        fits = "will hardly fit" if total > limit else "may not fit"
        lines.append(
            f"  it {fits}: plans have been up to {100 * PLAN_MAY_LACK:.0f} % below what the compiler allocates; `loam compile` "
            "tells for sure, and proposes what to change"
        )
    return "\n".join([*lines, *_flops_lines(config)])


def _title(config: TrainConfig | RLConfig) -> str:
    active = f", of which each token meets {sum(active_parameters(config.model).values()):,}" if config.model.moe else ""
    return f"{config.name}: {num_parameters(param_specs(config.model)):,} parameters{active}"


def _flops_lines(config: TrainConfig | RLConfig) -> list[str]:
    seq_len = config.row_tokens
    per_token = train_flops_per_token(config.model, seq_len, config.lora)
    if isinstance(config, RLConfig):
        tokens = config.num_rows * seq_len
        run = (
            f"run: {config.steps:,} steps x {config.num_rows:,} answers of at most {config.rollouts.max_tokens:,} tokens, in "
            f"{config.num_updates:,} updates of {config.update_rows:,} rows; a pass over a step's rows is "
            f"{tokens * per_token:.3g} FLOPs"
        )
    else:
        tokens = config.steps * config.tokens_per_step
        total = f"{tokens:,} tokens, {tokens * per_token:.3g} FLOPs"
        run = f"run: {config.steps:,} steps x {config.tokens_per_step:,} tokens = {total}"
    return [
        "",
        f"FLOPs per token at {seq_len} tokens a row, attention counted causally",
        f"  {'forward':<28}{forward_flops_per_token(config.model, seq_len):>16,.0f}",
        f"  {'forward and backward':<28}{per_token:>16,.0f}",
        "",
        run,
    ]


def _device_bytes(tree: object) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStruct with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
