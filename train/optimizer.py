"""Optimizers and learning-rate schedules, put together from optax by the rules of the config.

AdamW (arXiv:1711.05101), Lion (arXiv:2302.06675), Adafactor (arXiv:1804.04235), SGD with momentum, and Muon for the hidden
matrices with Adam for everything else, scaled so that both take updates of like size (arXiv:2502.16982).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from model.params import Params, ParamSpec, is_spec, path_name
from train.config import OptimizerConfig, ParamRule, ScheduleConfig, check, duration_in_steps

# Root-mean-square of a typical AdamW update, which Muon's are scaled to (arXiv:2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    """Learning rate of update number 0, 1, ...: warm-up, the named shape, and `end_fraction` x peak at the last update.

    Warm-up rises linearly and reaches the peak at update `warmup`; the first update is not wasted on a rate of 0.

    Raises:
      ValueError: warm-up and decay do not fit into the run.
    """
    warmup = duration_in_steps(config.warmup, total_steps, tokens_per_step)
    last = max(total_steps - 1, 1)
    end = peak * config.end_fraction
    if config.name == "cosine":
        tail = [optax.cosine_decay_schedule(peak, max(last - warmup, 1), alpha=config.end_fraction)]
        boundaries = []
    elif config.name == "linear":
        tail = [optax.linear_schedule(peak, end, max(last - warmup, 1))]
        boundaries = []
    elif config.name == "constant":
        tail = [optax.constant_schedule(peak)]
        boundaries = []
    else:
        decay = duration_in_steps(config.decay, total_steps, tokens_per_step)
        check(
            warmup + decay <= total_steps,
            f"optimizer.schedule: warmup={config.warmup!r} and decay={config.decay!r} are {warmup} + {decay} steps, "
            f"more than the {total_steps} of the run: shorten them",
        )
        tail = [optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(decay, 1))]
        boundaries = [last - decay]
    check(
        warmup <= total_steps,
        f"optimizer.schedule.warmup={config.warmup!r} is {warmup} steps, more than the {total_steps} of the run: shorten it",
    )
    if not warmup:
        return optax.join_schedules(tail, boundaries)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, *tail], [warmup, *boundaries])


def match_rules(specs: Params, rules: tuple[ParamRule, ...]) -> Params:
    """The first rule that matches each parameter's path, as a tree.

    Raises:
      ValueError: a parameter that no rule matches, or a rule that matches no parameter before an earlier one does.
    """
    used: set[ParamRule] = set()

    def first_match(path: tuple[Any, ...], _: ParamSpec) -> ParamRule:
        name = path_name(path)
        for rule in rules:
            if re.fullmatch(rule.pattern, name):
                used.add(rule)
                return rule
        raise ValueError(f"optimizer.rules cover no parameter {name!r}: end the rules with one whose pattern is '.*'")

    matched = jax.tree_util.tree_map_with_path(first_match, specs, is_leaf=is_spec)
    for rule in rules:
        check(rule in used, f"optimizer.rules: {rule.pattern!r} applies to no parameter: mend or remove it")
    return matched


EMBED_AXES = ("embed", "expert_embed")


def is_hidden_matrix(path: tuple[Any, ...], spec: ParamSpec) -> bool:
    """Whether Muon orthogonalises it: a matrix of a block, that is not an embedding, head, norm or bias."""
    in_block = "blocks" in path_name(path).split("/")[0]
    return in_block and spec.init == "normal" and any(axis in EMBED_AXES for axis in spec.axes)


def _matrix_axes(spec: ParamSpec) -> tuple[int, list[int]]:
    """`embed` on one side, all else but the stacked layers and experts on the other."""
    (embed,) = (axis for axis, name in enumerate(spec.axes) if name in EMBED_AXES)
    others = [axis for axis, name in enumerate(spec.axes) if name not in (*EMBED_AXES, "layers", "experts")]
    return embed, others


def _muon_scale(spec: ParamSpec) -> float:
    """An orthogonal matrix has root-mean-square 1 / sqrt(its longer side)."""
    embed, others = _matrix_axes(spec)
    return MUON_UPDATE_RMS * math.sqrt(max(spec.shape[embed], math.prod(spec.shape[axis] for axis in others)))


def _direction(config: OptimizerConfig, specs: Params) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.name == "sgd":
        return optax.trace(config.momentum)

    def of_matrices(function: Callable[[ParamSpec], Any], otherwise: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, spec: function(spec) if is_hidden_matrix(path, spec) else otherwise, specs, is_leaf=is_spec
        )

    labels = of_matrices(lambda _: "muon", "adam")
    scales = of_matrices(_muon_scale, optax.MaskedNode())
    muon = optax.chain(
        contrib.scale_by_muon(
            beta=config.momentum,
            weight_dimension_numbers=of_matrices(
                lambda spec: contrib.MuonDimensionNumbers(*_matrix_axes(spec)), optax.MaskedNode()
            ),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def make_optimizer(config: OptimizerConfig, specs: Params, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """clip -> direction -> decoupled decay -> learning rate of each parameter's rule x schedule.

    Args:
      schedule: see `make_schedule`; its peak is `config.learning_rate`.
    """
    rules = match_rules(specs, config.rules)

    def scale(path: tuple[Any, ...], spec: ParamSpec, rule: ParamRule) -> float:
        if not spec.trained:
            return 0.0
        if config.name == "muon" and not is_hidden_matrix(path, spec):
            return rule.learning_rate_scale * config.adam_learning_rate / config.learning_rate
        return rule.learning_rate_scale

    scales = jax.tree_util.tree_map_with_path(scale, specs, rules, is_leaf=is_spec)
    decayed = jax.tree.map(lambda rule: rule.weight_decay, rules)
    per_parameter = optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _direction(config, specs),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        per_parameter,
        optax.scale_by_learning_rate(schedule),
    )
