"""What a run of reinforcement learning learns from: answers to the prompts of a step, drawn and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.chat_encoder import ChatEncoder
from data.tasks.task import Example, Split
from inference.engine import Engine
from inference.sampling import Sampling
from model.config import ModelConfig, check
from model.params import Params
from train.initial import InitialModel
from train.learned_reward import LearnedReward
from train.objectives.config import GROUP_ADVANTAGES
from train.objectives.grpo import group_statistics, select_groups
from train.objectives.policy_gradient import shaped_rewards
from train.rewards import Part, Rewards, Verifiers, compose, counts_failures
from train.rl_config import RLConfig
from train.rollouts import Array, Samples, draw, engine_config, fitting, shuffled_rows
from train.timing import Phases


@flax.struct.dataclass
class Judged:
    """Samples and what they deserve, [B] each: reward; whether it was judged; whether the answer is right (1 or 0, NaN where
    nobody could tell); the reward of the greedy answer to the prompt (for `advantage="greedy"`); and [B, K] what the reward is
    made of (for `normalise_parts`)."""

    samples: Samples
    rewards: Array
    valid: Array
    correct: Array
    baseline: Array | None = None
    parts: Array | None = None


class Collector:
    """Draws answers with the decode engine and has them judged: a function of (weights, seed, step). Close it.

    Attributes:
      task, tokenizer: where prompts come from, and how they are read.
      chat: the template that prompts are put into; None asks them bare.
      stop_ids: what ends an answer.
      parts: what the reward is made of.
      learned: the reward model, if there is one.
      phases: the seconds that drawing and judging take.
      say: takes lines about prompts and answers that are not as they should be.
    """

    def __init__(self, config: RLConfig, initial: InitialModel, mesh: Mesh, log: Callable[[str], None]):
        """
        Args:
          mesh: that of the reward model.
          log: the first `say`.

        Raises:
          ValueError: a model or a reward model that cannot be asked for answers to this task, or prompts that are too long.
          RuntimeError: the verifiers cannot be loaded.
        """
        self.config, self.tokenizer, self.phases, self.say = config, initial.tokenizer, Phases(), log
        self.task = config.task.make()
        self.chat = ChatEncoder(initial.tokenizer, initial.chat_template) if config.chat and initial.chat_template else None
        check(
            self.chat is not None or not config.chat,
            f"chat=True needs a chat template, and {config.initial_weights} has none: set it to False",
        )
        eos_id = self.tokenizer.eos_id
        self.stop_ids = self.chat.stop_ids if self.chat else frozenset() if eos_id is None else frozenset({eos_id})
        check(
            bool(self.stop_ids),
            f"the tokenizer of {config.initial_weights} has no token that ends an answer: train one with document_boundaries",
        )
        self.parts = config.reward_parts(self.task.score)
        self.learned = self._open_reward_model(mesh) if config.reward_model else None
        # Prompts that are too long, or a task without any, are told before the work. A later one of training is left out.
        for example in self.examples("train", 0, 8) + self.examples("eval", 0, config.eval.prompts):
            self.prompt(example)
        self._engine: Engine | None = None
        # Without weight, too, the task's verdict is told.
        judges = self.parts if config.task_weight else (Part("right", self.task.score), *self.parts)
        self._verifiers = Verifiers(judges, config.rollouts.verifiers, config.rollouts.verifier_seconds)

    def _open_reward_model(self, mesh: Mesh) -> LearnedReward:
        """Raises ValueError where it was shown other prompts than are drawn for, or its scores do not go with the rewards."""
        config, source = self.config, self.config.reward_model
        learned = LearnedReward(source, config.model, mesh, config.rollouts.max_batch, config.reward_model_steps)
        worst = config.where_zero_is_worst()
        check(
            learned.judges_steps or not worst,
            f"reward_model={source!r} gives scores that may be negative, and {', '.join(worst)} would pay for what it is to "
            "refuse, as 0 is more than that: leave it out, or take a process model (objective.process_model), whose scores lie "
            "in [0, 1]; for truncation there are 'mask' and 'penalty', and rewards of form may have only_if='right'",
        )
        example = self.examples("train", 0, 1)[0]
        theirs = learned.chat.encode_prompt([{"role": "user", "content": example.prompt}]).tolist()
        check(
            theirs == self.prompt(example) and learned.chat.stop_ids == self.stop_ids,
            f"reward_model={source!r} was trained with another tokenizer or chat template: it reads the prompt "
            f"{example.prompt!r} as {theirs}, the policy as {self.prompt(example)}; take one that began with the same model",
        )
        return learned

    def load(self, params: Params, sampler: ModelConfig) -> None:
        """Draws by these weights from now on."""
        if self._engine is None:
            self._engine = Engine(params, sampler, engine_config(self.config))
        else:
            self._engine.load(params, sampler)

    @property
    def part_weights(self) -> np.ndarray:
        """[K], float32."""
        return np.array([part.weight for part in self.parts], np.float32)

    def nothing(self) -> Judged:
        """In the shape of what `collect` gives."""
        rows, tokens = self.config.num_rows, self.config.row_tokens
        ints, floats = jnp.zeros((rows, tokens), jnp.int32), jnp.zeros((rows, tokens), jnp.float32)
        flags = jnp.zeros(rows, bool)
        samples = Samples(ints, ints, ints, ints, floats, floats, flags, jnp.zeros(rows, jnp.int32))
        rewards, policy = jnp.zeros(rows, jnp.float32), self.config.policy
        parts = jnp.zeros((rows, len(self.parts)), jnp.float32) if policy.normalise_parts else None
        return Judged(samples, rewards, flags, rewards, rewards if policy.advantage == "greedy" else None, parts)

    def examples(self, split: Split, first: int, count: int) -> list[Example]:
        return [
            self.task.example(index, self.config.seed if split == "train" else 0, split)
            for index in range(first, first + count)
        ]

    def _encode(self, example: Example) -> list[int]:
        if self.chat:
            return self.chat.encode_prompt([{"role": "user", "content": example.prompt}]).tolist()
        return list(self.tokenizer.encode_prompt(example.prompt))

    def prompt(self, example: Example) -> list[int]:
        """Raises ValueError where it does not fit."""
        ids, limit = self._encode(example), self.config.rollouts.max_prompt_tokens
        check(
            0 < len(ids) <= limit,
            f"the prompt {example.prompt!r} has {len(ids)} tokens, and rollouts.max_prompt_tokens={limit}: raise it",
        )
        return ids

    def _fitting(self, first: int, count: int) -> tuple[list[Example], list[list[int]], int]:
        """Examples to train on from number `first` on, their prompts, and how many of other prompts did not fit. Those that
        stand in for them are numbered beyond all of the run's."""
        config = self.config
        stride = config.steps * config.sampling_rounds * config.rollouts.prompts
        examples, prompts, left_out = fitting(
            lambda number: self.task.example(number, config.seed, "train"),
            self._encode,
            range(first, first + count),
            config.rollouts.max_prompt_tokens,
            stride,
        )
        for example in left_out[:3]:
            self.say(f"left out, for it exceeds rollouts.max_prompt_tokens: the prompt {example.prompt[:80]!r}")
        return examples, prompts, len(left_out)

    def judge(self, samples: Samples, examples: list[Example]) -> tuple[Rewards, np.ndarray, dict[str, float]]:
        """Rewards; whether each answer is right, by the task's own verdict (1 or 0, NaN without one); what is reported."""
        texts = [self.text(answer) for answer in samples.answers()]
        asked = [examples[i] for i in samples.group]
        verdicts = self._verifiers(texts, asked)
        for failure in verdicts.failures[:3]:
            self.say(f"verifier {failure.part!r} {failure.kind}: {failure.message}")
        values = dict(verdicts.values)
        if self.learned:
            values["learned"] = self.learned(samples)
        verdict = values["right"]
        told = np.isfinite(verdict)
        right = np.where(told, verdict == 1, np.nan).astype(np.float32)
        rewards = compose(self.parts, {part.name: values[part.name] for part in self.parts})
        mean = {"reward/right": float(verdict[told].mean())} if told.any() else {}
        return rewards, right, {**mean, **rewards.metrics, **verdicts.metrics}

    def text(self, answer: list[int]) -> str:
        """What the verifiers read, of an answer without its stop token. Special tokens, and those that the tokenizer does not
        know, are drawn like any others, or the trainer would score another distribution; they spoil an answer."""
        return self.tokenizer.decode_answer(answer)

    def draw(
        self, prompts: list[list[int]], count: int, step: int, first_prompt: int = 0, sampling: Sampling | None = None
    ) -> Samples:
        config = self.config
        assert self._engine is not None
        return draw(
            self._engine,
            prompts,
            samples=count,
            row_tokens=config.row_tokens,
            max_tokens=config.rollouts.max_tokens,
            sampling=sampling or Sampling(temperature=config.rollouts.temperature),
            stop_ids=self.stop_ids,
            seed=config.seed,
            step=step,
            first_prompt=first_prompt,
        )

    def collect(self, step: int) -> tuple[Judged, dict[str, float]]:
        """Those of step number `step` (from 0), by the weights the engine has. With `resample`, groups whose rewards are all
        equal as the update sees them, or of which no two were judged, are replaced while there are rounds left; how many of
        them are among the last is told (`groups_filled_up`)."""
        config = self.config
        wanted, size = config.rollouts.prompts, config.policy.group_size
        resample = config.policy.zero_variance == "resample"
        rounds = config.sampling_rounds
        found: list[Judged] = []
        metrics: dict[str, float] = {}
        left_out = 0
        for number in range(rounds):
            first = (step * rounds + number) * wanted
            with self.phases.timed("rollout"):
                examples, prompts, too_long = self._fitting(first, wanted)
                left_out += too_long
                drawn_so = Sampling(temperature=config.rollouts.temperature, top_k=config.rollouts.top_k)
                samples = self.draw(prompts, size, step, number * wanted, drawn_so)
            with self.phases.timed("reward"):
                rewards, right, judged = self.judge(samples, examples)
            valid, baseline, parts = rewards.valid, None, None
            if config.policy.advantage == "greedy":
                greedy = self._greedy_rewards(prompts, examples, step)
                judged |= {"reward/greedy_failed": float(np.sum(~greedy.valid))}
                if greedy.valid.any():
                    judged["reward/greedy"] = float(greedy.total[greedy.valid].mean())
                # Without its baseline a prompt is left out.
                baseline, valid = np.repeat(greedy.total.astype(np.float32), size), valid & np.repeat(greedy.valid, size)
            if config.policy.normalise_parts:
                parts = np.nan_to_num(np.stack([*rewards.parts.values()], axis=1)).astype(np.float32)
            # Of the first round: what prompts of the task get, not those that were chosen. But failures are of all rounds.
            failed = {name: metrics.get(name, 0.0) + count for name, count in judged.items() if counts_failures(name)}
            metrics = (metrics or judged) | failed
            samples = dataclasses.replace(samples, group=samples.group + number * wanted)
            found.append(Judged(samples, rewards.total.astype(np.float32), valid, right, baseline, parts))
            together = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
            if not resample:
                break
            drawn = together.samples
            shaped = shaped_rewards(config.policy, together.rewards, drawn.truncated, drawn.mask.sum(1))
            groups = group_statistics(shaped, drawn.group, together.valid)
            compared = ~groups.all_equal & (groups.size > 1)
            informative = np.asarray(compared).reshape(-1, size)[:, 0]
            chosen, missing = select_groups(jnp.asarray(informative), wanted)
            if not int(missing):
                break
        if resample:
            rows = (np.asarray(chosen)[:, None] * size + np.arange(size)).reshape(-1)
            together = jax.tree.map(lambda x: x[rows], together)
            metrics |= {"rounds": number + 1, "groups_filled_up": int(missing)}
        metrics["prompts_left_out"] = left_out
        # Groups are numbered within the batch.
        group = np.unique(together.samples.group, return_inverse=True)[1].astype(np.int32)
        together = dataclasses.replace(together, samples=dataclasses.replace(together.samples, group=group))
        if config.shuffle_rewards:
            rows, grouped = len(together.rewards), config.policy.advantage in GROUP_ADVANTAGES
            order = shuffled_rows(np.random.default_rng([config.seed, step, 1]), rows, size if grouped else rows)
            together = dataclasses.replace(
                together,
                rewards=together.rewards[order],
                valid=together.valid[order],
                parts=None if together.parts is None else together.parts[order],
            )
        return together, metrics

    def _greedy_rewards(self, prompts: list[list[int]], examples: list[Example], step: int) -> Rewards:
        """Of the most likely answer to each prompt, token by token."""
        with self.phases.timed("rollout"):
            samples = self.draw(prompts, 1, step, sampling=Sampling(temperature=0.0))
        with self.phases.timed("reward"):
            return self.judge(samples, examples)[0]

    def close(self) -> None:
        self._verifiers.close()
