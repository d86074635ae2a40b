"""The compiled functions of a run of reinforcement learning: updates, scores, and the way to the layout of decoding."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model.config import check
from model.lora import merge
from model.params import Params, param_shardings, param_specs, unstack_layers
from model.sharding import DECODE_RULES, Layout
from train.distillation import TEACHER
from train.objectives.policy_gradient import prepare
from train.rl_config import RLConfig
from train.rl_step import Scores, policy_objective, score
from train.scalar_head import scalar_head_spec
from train.step import TrainState, make_trainer_of


class Policy:
    """The compiled functions of a run, on its mesh.

    Attributes:
      sampler: the network as it decodes: layer by layer.
      hand_over: parameters of the trainer -> those of the sampler, in the layout of decoding.
      score: (parameters of the trainer, rows) -> Scores.
    """

    def __init__(self, config: RLConfig, devices: Sequence[Any] | None = None):
        """
        Raises:
          ValueError: the mesh does not fit the devices.
        """
        self.config = config
        self.specs = param_specs(config.model)
        weights = self.specs | ({"value_head": scalar_head_spec(config.model)} if config.policy.value else {})
        objective = functools.partial(policy_objective, config=config)
        teacher = config.distillation.model if config.distillation else None
        self.trainer = make_trainer_of(config, objective, weights, devices, teacher=teacher)
        mesh = self.trainer.mesh
        replicas = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
        prompts = config.update_rows // config.policy.group_size
        check(
            not config.share_prompts or prompts % replicas == 0,
            f"share_prompts: {prompts} prompts of an update do not divide over {replicas} devices with rows of their own",
        )
        self.sampler = dataclasses.replace(config.model, scan_layers=False)
        in_decoding = param_shardings(param_specs(self.sampler), Layout.of(mesh, DECODE_RULES))
        self.hand_over = jax.jit(self._hand_over, out_shardings=in_decoding)
        self.score = jax.jit(functools.partial(self._score, layout=self.trainer.layout))
        self.prepare = jax.jit(functools.partial(prepare, config.policy))

    def _hand_over(self, params: Params) -> Params:
        """What decodes: adapters merged, no value head, layers unstacked."""
        plain = merge(params, self.specs) if self.config.lora else {name: params[name] for name in self.specs}
        # Copies even where nothing moves: the update takes the memory of what it is given.
        return jax.tree.map(jnp.copy, unstack_layers(plain, self.config.model)[0])

    def _score(self, params: Params, rows: dict[str, jax.Array], layout: Layout | None) -> Scores:
        """By the micro-batches of the update, so that both compute the same."""
        config = self.config
        parts = config.minibatches * config.accumulation
        split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), rows)
        of_part = functools.partial(
            score,
            params,
            self.trainer.model,
            temperature=config.rollouts.temperature,
            max_tokens=config.rollouts.max_tokens,
            chunk_tokens=config.chunk_tokens,
            layout=layout,
            shared=config.policy.group_size if config.share_prompts else 1,
        )
        scores = jax.lax.map(lambda part: dataclasses.replace(of_part(part), routing=None), split)
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), scores)

    def whole(self, state: TrainState) -> Params:
        """Parameters of the policy alone."""
        params = self.trainer.whole(state.params, state.frozen)
        return {name: leaf for name, leaf in params.items() if name != TEACHER}
