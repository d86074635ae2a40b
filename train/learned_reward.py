"""A trained reward model as a reward: it reads each sample to its last token, or judges its steps, and its score is a part of
the reward."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.chat_encoder import ChatEncoder
from data.steps import line_tokens, step_ends
from model.config import ModelConfig, check
from model.kernels.tiles import round_up
from model.params import Params, abstract_params, param_shardings, param_specs
from model.sharding import TRAIN_RULES, Layout
from train.initial import open_initial
from train.objectives.config import StepAggregation
from train.objectives.reward_model import solution_scores
from train.preferences import REWARD_HEAD, answer_scores
from train.rollouts import Samples
from train.scalar_head import scalar_head_spec


def reward_model_specs(model: ModelConfig) -> Params:
    """Of a network of this shape that judges: ParamSpecs, with those of the head."""
    return param_specs(model) | {REWARD_HEAD: scalar_head_spec(model)}


def reward_model_weights(model: ModelConfig, layout: Layout) -> Params:
    """ShapeDtypeStructs with shardings."""
    specs = reward_model_specs(model)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(specs),
        param_shardings(specs, layout),
    )


def scores(
    params: Params, rows: Mapping[str, jax.Array], model: ModelConfig, layout: Layout | None, steps: StepAggregation | None
) -> jax.Array:
    """float32 [B] of rows [B, T]; `steps` of a process model."""
    found = answer_scores(params, model, dict(rows), layout)
    if steps:
        return solution_scores(found, rows["step_ends"], steps)
    last = jnp.sum(rows["segment_ids"], axis=1) - 1
    return jnp.take_along_axis(found, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]


def lower_scores(model: ModelConfig, mesh: Mesh, max_rows: int, row_tokens: int) -> Any:
    """What judges `max_rows` samples of rows of so many tokens, lowered."""
    layout = Layout.of(mesh, TRAIN_RULES)
    shape = round_up(max_rows, layout.shards("batch")), round_up(row_tokens + 1, layout.shards("residual"))
    dtypes = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "step_ends": jnp.float32}
    rows = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
    judge = jax.jit(functools.partial(scores, model=model, layout=layout, steps=None))
    return judge.lower(reward_model_weights(model, layout), rows)


class LearnedReward:
    """Scores samples with a run of `objective.reward_model`, `objective.outcome_model` or `objective.process_model`.

    Attributes:
      chat: how it was shown prompts and answers.
      judges_steps: its scores are chances, in [0, 1]; those of the other kinds may be negative.
      params: its weights, with the head.
    """

    def __init__(self, source: str, model: ModelConfig, mesh: Mesh, max_rows: int, steps: StepAggregation = "min"):
        """
        Args:
          max_rows: how many samples are scored at once.
          steps: of a process model, what the score of a sample is of the chances of its steps.

        Raises:
          ValueError, FileNotFoundError: it is no such run, or one of another network.
        """
        check(
            (Path(source) / "checkpoints").is_dir(),
            f"reward_model={source!r} is not the directory of a run: train one with objective.reward_model",
        )
        objective = json.loads((Path(source) / "config.json").read_text()).get("objective") or {}
        opened = open_initial(source, model)
        self.chat = ChatEncoder(opened.tokenizer, opened.chat_template)
        layout = Layout.of(mesh, TRAIN_RULES)
        self.params: Params = opened.load(reward_model_weights(model, layout))
        # The mesh divides rows and columns.
        self._max_rows = round_up(max_rows, layout.shards("batch"))
        self._columns = layout.shards("residual")
        self._lines = line_tokens(opened.tokenizer)
        self.judges_steps = objective.get("process_model") is not None
        steps_of = steps if self.judges_steps else None
        self._score = jax.jit(functools.partial(scores, model=model, layout=layout, steps=steps_of))

    def __call__(self, samples: Samples) -> np.ndarray:
        """float32 [B]; of a process model in [0, 1]. A sample that was cut off has no stop token, and is judged by what there
        is: its last step ends where it does."""
        first = np.asarray(samples.tokens)[:, :1]
        # One column more than the rows of an update: there the last token is predicted, and not read.
        lengths = np.asarray(samples.segment_ids).sum(1) + 1
        tokens = np.concatenate([first, np.asarray(samples.targets)], axis=1)
        columns = np.arange(tokens.shape[1], dtype=np.int32)
        segments = (columns < lengths[:, None]).astype(np.int32)
        written = np.pad(np.asarray(samples.mask) > 0, ((0, 0), (1, 0)))
        ends = step_ends(tokens, written, self._lines).astype(np.float32)
        rows = {"tokens": tokens, "segment_ids": segments, "positions": columns * segments, "step_ends": ends}
        found = []
        for start in range(0, len(tokens), self._max_rows):
            part = {name: x[start : start + self._max_rows] for name, x in rows.items()}
            number = len(part["tokens"])
            missing = ((0, self._max_rows - number), (0, -tokens.shape[1] % self._columns))
            part = {name: np.pad(x, missing) for name, x in part.items()}
            found.append(np.asarray(self._score(self.params, part))[:number])
        return np.concatenate(found)
