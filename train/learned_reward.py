"""A trained reward model as a reward: it reads each sample to its last token, and its score is a part of the reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.chat_encoder import ChatEncoder
from model.config import ModelConfig, check
from model.params import Params, abstract_params, param_shardings, param_specs
from model.sharding import TRAIN_RULES, Layout
from train.initial import open_initial
from train.preferences import REWARD_HEAD, answer_scores
from train.rollouts import Samples
from train.scalar_head import scalar_head_spec


class LearnedReward:
    """Scores samples with a run of `objective.reward_model` or `objective.outcome_model`.

    Attributes:
      chat: how it was shown prompts and answers.
      params: its weights, with the head.
    """

    def __init__(self, source: str, model: ModelConfig, mesh: Mesh, max_rows: int):
        """
        Args:
          max_rows: how many samples are scored at once.

        Raises:
          ValueError, FileNotFoundError: it is no such run, or one of another network.
        """
        check(
            (Path(source) / "checkpoints").is_dir(),
            f"reward_model={source!r} is not the directory of a run: train one with objective.reward_model",
        )
        opened = open_initial(source, model)
        self.chat = ChatEncoder(opened.tokenizer, opened.chat_template)
        specs = param_specs(model) | {REWARD_HEAD: scalar_head_spec(model)}
        layout = Layout.of(mesh, TRAIN_RULES)
        abstract = abstract_params(specs)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            param_shardings(specs, layout),
        )
        self.params: Params = opened.load(placed)
        self._max_rows = max_rows
        self._model = model
        self._score = jax.jit(self._last_scores)

    def _last_scores(self, params: Params, rows: Mapping[str, jax.Array]) -> jax.Array:
        scores = answer_scores(params, self._model, dict(rows))
        last = jnp.sum(rows["segment_ids"], axis=1) - 1
        return jnp.take_along_axis(scores, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]

    def __call__(self, samples: Samples) -> np.ndarray:
        """float32 [B]. A sample that was cut off has no stop token, and is judged by what there is."""
        first = np.asarray(samples.tokens)[:, :1]
        # One column more than the rows of an update: there the last token is predicted, and not read.
        lengths = np.asarray(samples.segment_ids).sum(1) + 1
        tokens = np.concatenate([first, np.asarray(samples.targets)], axis=1)
        columns = np.arange(tokens.shape[1], dtype=np.int32)
        segments = (columns < lengths[:, None]).astype(np.int32)
        rows = {"tokens": tokens, "segment_ids": segments, "positions": columns * segments}
        found = []
        for start in range(0, len(tokens), self._max_rows):
            part = {name: x[start : start + self._max_rows] for name, x in rows.items()}
            number = len(part["tokens"])
            part = {name: np.pad(x, ((0, self._max_rows - number), (0, 0))) for name, x in part.items()}
            found.append(np.asarray(self._score(self.params, part))[:number])
        return np.concatenate(found)
