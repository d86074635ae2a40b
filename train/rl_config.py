"""What a run of reinforcement learning is. Frozen and validated without importing jax, so a mistake is told before anything
expensive."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from data.config import TaskConfig
from data.tasks.registry import make_form
from model.config import LoraConfig, ModelConfig, check
from train.config import (
    CheckpointConfig,
    DeadlineConfig,
    DistillationConfig,
    MeshConfig,
    OptimizerConfig,
    WriterName,
    check_lora,
    check_row_tokens,
)
from train.objectives.config import PolicyConfig, StepAggregation
from train.rewards import Part, Verifier, check_parts, counts_failures


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Attributes:
    prompts: of a step, each answered `policy.group_size` times.
    max_prompt_tokens: longer prompts are left out, and refused among the first or the held-out ones; with `max_tokens` it sets
      the length of the rows.
    max_tokens: of an answer, its stop token among them.
    top_k: draw from the most likely tokens alone, a bug on purpose (`policy.bugs`); 0 is off.
    ahead: the answers of a step are drawn while the update before it is made, with the weights before that update.
    max_rounds: how often other prompts are sampled for groups whose rewards are all equal (`policy.zero_variance="resample"`).
    max_batch: answers that are decoded at once.
    verifiers: processes that judge.
    verifier_seconds: of one judgement.
    score: the trainer goes over the answers before it is updated, for their log-probabilities. False spares that pass: those of
      the sampler stand for them, so the ratio of an update is that of its weights to the sampler's, and how far the two are
      apart is known after the first update (`mismatch_kl`; of several minibatches, of the first).
    max_mismatch: KL(sampler, trainer), in nats a token, above which the run ends: the two should agree; 0 does not look.
    """

    prompts: int = 32
    max_prompt_tokens: int = 64
    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    ahead: bool = False
    max_rounds: int = 3
    max_batch: int = 256
    verifiers: int = 2
    verifier_seconds: float = 60.0
    score: bool = True
    max_mismatch: float = 0.01

    def __post_init__(self) -> None:
        for field in ("prompts", "max_prompt_tokens", "max_tokens", "max_rounds", "max_batch", "verifiers"):
            check(getattr(self, field) > 0, f"rollouts.{field}={getattr(self, field)} must be positive")
        check(
            0 < self.temperature < float("inf"), f"rollouts.temperature={self.temperature} must be positive: answers are drawn"
        )
        check(self.verifier_seconds > 0, f"rollouts.verifier_seconds={self.verifier_seconds} must be positive")


@dataclasses.dataclass(frozen=True)
class FormRewardConfig:
    """A part of the reward for the form of an answer, beside the task's verdict (`right`) and a learned score (`learned`).

    Attributes:
      name: in metrics: `reward/<name>`.
      form, options: a verifier of `data/tasks/forms.py` (`length`, `pattern`, `answer_format`), and (field, value) pairs of it.
      weight: what the form adds to the reward where `only_if` holds; below 0 it costs.
      gate: the reward is 0 without the form; not beside a learned score that may be negative.
      only_if: name of another part that this one counts times: `right`, or `learned` if that is a process model's. Either it or
        `gate` is needed.
    """

    name: str
    form: str
    options: tuple[tuple[str, Any], ...] = ()
    weight: float = 1.0
    gate: bool = False
    only_if: str = ""

    def __post_init__(self) -> None:
        metric, reserved = f"reward/{self.name}", ("right", "learned", "total", "total_std", "valid_fraction", "greedy")
        check(
            re.fullmatch(r"[A-Za-z]\w*", self.name) is not None and self.name not in reserved and not counts_failures(metric),
            f"rewards: name={self.name!r} must be a word, none of {', '.join(reserved)}, and must not end in _failed: the "
            f"metric is called {metric}",
        )
        self.make()

    def make(self) -> Part:
        """Raises ValueError where there is no such form or option."""
        verifier = make_form(self.form, **dict(self.options)).score
        return Part(self.name, verifier, self.weight, "form", self.gate, self.only_if)


@dataclasses.dataclass(frozen=True)
class RLEvalConfig:
    """Attributes:
    every: steps between evaluations on held-out prompts; before the first step and after the last there is always one.
    prompts, samples: how many prompts, always the same, and answers to each, drawn at the temperature of the rollouts.
    """

    every: int = 10
    prompts: int = 128
    samples: int = 4

    def __post_init__(self) -> None:
        for field in ("every", "prompts", "samples"):
            check(getattr(self, field) > 0, f"eval.{field}={getattr(self, field)} must be positive")


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """A run that learns from rewards: in each of `steps`, answers are drawn and judged, and `updates` are made of them.

    Attributes:
      initial_weights: the policy to begin with, and the reference of a KL penalty: see `TrainConfig.initial_weights`.
      chat: prompts are a user's message in the model's chat template; otherwise bare text.
      reward_model: directory of a run of `objective.reward_model`, `objective.outcome_model` or `objective.process_model`, of
        the same network, tokenizer and prompts: its score is a part of the reward (`reward/learned`). Empty is none.
      reward_model_steps: of a process model, what an answer's score is of the chances that its steps are right.
      task_weight, reward_model_weight: of the task's own verdict in the reward, and of the learned score. Without weight the
        verdict is still reported (`reward/right`): the true reward beside the learned one.
      rewards: further parts, of form: each a gate, or conditional on one of the two. The reward is the sum of the parts times
        the gates (`train/rewards.py`); each part is reported by its name.
      policy: the objective (`train/objectives/config.py` has the well-known ones).
      minibatches: equal parts of a step's rows, each of which makes an update; `policy.updates_per_batch` passes over all rows.
      accumulation: micro-batches of an update; nothing but memory depends on it.
      chunk_tokens: see `train.config.LossConfig`.
      share_prompts: updates and scores read a prompt once for all its answers, which then stand side by side in one row. For
        long prompts with short answers: each pair of answers to one prompt is a tile of attention that is computed in vain.
      distillation: the policy learns from a teacher too, token by token of its own answers (on-policy distillation,
        arXiv:2306.13649); with `share=1` from it alone, and rewards are only told. None is off.
      shuffle_rewards: a control: rewards are dealt out at random and teach nothing; within groups where answers are
        compared with their group, and within the batch otherwise.
    """

    name: str
    model: ModelConfig
    initial_weights: str
    task: TaskConfig
    steps: int
    chat: bool = False
    reward_model: str = ""
    task_weight: float = 1.0
    reward_model_weight: float = 1.0
    reward_model_steps: StepAggregation = "min"
    rewards: tuple[FormRewardConfig, ...] = ()
    policy: PolicyConfig = PolicyConfig()
    rollouts: RolloutConfig = RolloutConfig()
    minibatches: int = 1
    accumulation: int = 1
    chunk_tokens: int = 0
    share_prompts: bool = False
    lora: LoraConfig | None = None
    distillation: DistillationConfig | None = None
    shuffle_rewards: bool = False
    seed: int = 0
    run_dir: str = ""
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    checkpoint: CheckpointConfig = CheckpointConfig(every=20)
    eval: RLEvalConfig = RLEvalConfig()
    mesh: MeshConfig = MeshConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    writers: tuple[WriterName, ...] = ()
    cpu_devices: int = 1

    def __post_init__(self) -> None:
        check(bool(self.name), "name is empty: a run is named after its config file")
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.name}")
        check("://" not in self.run_dir, f"run_dir={self.run_dir!r} must be a local or mounted directory")
        check(bool(self.initial_weights), "initial_weights is empty: name the run or the model that is to be trained further")
        for field in ("steps", "minibatches", "accumulation"):
            check(getattr(self, field) > 0, f"{field}={getattr(self, field)} must be positive")
        check(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        check(self.cpu_devices > 0, f"cpu_devices={self.cpu_devices} must be positive")
        rows = f"rollouts.prompts={self.rollouts.prompts} x policy.group_size={self.policy.group_size}"
        parts = self.minibatches * self.accumulation
        check(
            self.num_rows % parts == 0,
            f"{rows} rows are not divisible by minibatches={self.minibatches} x accumulation={self.accumulation}",
        )
        check(
            self.row_tokens <= self.model.max_seq_len,
            f"rollouts.max_prompt_tokens={self.rollouts.max_prompt_tokens} and rollouts.max_tokens={self.rollouts.max_tokens} "
            f"exceed model.max_seq_len={self.model.max_seq_len}: shorten one of them",
        )
        check(
            self.policy.max_length in (0, self.rollouts.max_tokens),
            f"policy.max_length={self.policy.max_length} is not rollouts.max_tokens={self.rollouts.max_tokens}: set it so",
        )
        check(
            self.minibatches == 1 or self.policy.surrogate != "reinforce",
            f"minibatches={self.minibatches}: policy.surrogate='reinforce' has no ratio for a policy that has moved; set 1",
        )
        check(
            not self.policy.kl.loss_coefficient
            or self.policy.kl.ratio != "none"
            or self.minibatches * self.policy.updates_per_batch == 1,
            "policy.kl.ratio='none' is for samples of the policy that is updated: in the second update of a batch the gradient "
            "of the penalty is that of no KL. Set it to 'detached', or make one update (minibatches=1, "
            "policy.updates_per_batch=1)",
        )
        check(
            not self.policy.max_update_kl or self.minibatches * self.policy.updates_per_batch > 1,
            f"policy.max_update_kl={self.policy.max_update_kl} leaves out later updates of a batch, and there is one: raise "
            "policy.updates_per_batch or minibatches, or set it to 0",
        )
        if self.share_prompts:
            check(
                self.rollouts.prompts % parts == 0 and self.policy.group_size % self.accumulation == 0,
                f"share_prompts keeps groups together: rollouts.prompts={self.rollouts.prompts} must be divisible by "
                f"minibatches={self.minibatches} x accumulation={self.accumulation}, and policy.group_size="
                f"{self.policy.group_size} by accumulation",
            )
            check(
                self.model.attention_backend in ("xla", "reference"),
                f"share_prompts is a mask that model.attention_backend={self.model.attention_backend!r} does not read: set it "
                "to 'xla', or share_prompts to False",
            )
            check(self.policy.group_size > 1, "share_prompts is for several answers to a prompt: raise policy.group_size")
        check(
            (self.rollouts.top_k > 0) == ("truncated_sampling" in self.policy.bugs),
            f"rollouts.top_k={self.rollouts.top_k}: the trainer scores the whole distribution, so set it to 0 "
            "(policy.bugs=('truncated_sampling',) with a positive one is for studies)",
        )
        check(
            ("micro_batch_normaliser" in self.policy.bugs) <= (self.accumulation > 1),
            "policy.bugs=('micro_batch_normaliser',) needs micro-batches: set accumulation above 1",
        )
        check(
            not self.policy.normalise_parts or (bool(self.reward_model) and self.task_weight > 0),
            "policy.normalise_parts is for rewards of several parts: set reward_model, and task_weight above 0",
        )
        check(
            self.task_weight >= 0 and (self.task_weight > 0 or bool(self.reward_model)),
            f"task_weight={self.task_weight} must be >= 0, and above 0 unless a reward_model judges",
        )
        check(self.reward_model_weight > 0, f"reward_model_weight={self.reward_model_weight} must be positive")
        check(
            not self.reward_model or self.policy.advantage != "maxrl",
            "policy.advantage='maxrl' divides by the mean reward, and learned scores may be negative: leave reward_model out",
        )
        check_parts(self.reward_parts())
        check(
            self.policy.advantage != "maxrl" or all(part.weight > 0 for part in self.rewards),
            "policy.advantage='maxrl' divides by the mean reward, which rewards of negative weight may turn: leave them out",
        )
        check(
            not self.policy.normalise_parts or not self.rewards,
            "policy.normalise_parts weighs parts apart, and rewards are gates or conditional on others: leave one of them out",
        )
        check(self.mesh.context == 1, "mesh.context: reinforcement learning does not split rows; set it to 1")
        if self.lora is not None:
            check_lora(self.lora, self.model, self.mesh)
        check(
            self.rollouts.temperature == 1 or (not self.model.logit_soft_cap and not self.model.head_bias),
            f"rollouts.temperature={self.rollouts.temperature} cannot be applied by the trainer to capped logits, or to logits "
            "with a bias: set 1",
        )
        check(
            self.model.param_dtype == "float32",
            f"model.param_dtype={self.model.param_dtype!r}: training keeps float32 master weights; set model.dtype instead",
        )
        check(
            self.policy.value is None or self.lora is None,
            "policy.value needs a head that lora does not adapt: leave lora out, or take another advantage than 'gae'",
        )
        needs = {
            "policy.importance": self.policy.importance.level != "none" or self.policy.importance.reject != "none",
            "policy.kl": self.policy.kl.needs_reference,
            "policy.value": self.policy.value is not None,
            "policy.entropy_fraction": self.policy.entropy_fraction < 1,
        }
        check(
            self.rollouts.score or not any(needs.values()),
            f"rollouts.score=False leaves out what {', '.join(name for name in needs if needs[name])} needs: set it to True",
        )
        check(
            not self.policy.kl.target or self.policy.kl.horizon > self.num_rows / 5,
            f"policy.kl.horizon={self.policy.kl.horizon} is at most a fifth of {rows} rows, so that one step can make the "
            f"coefficient of policy.kl.target={self.policy.kl.target} 0 or negative: raise the horizon, or set target to 0",
        )
        check(
            not self.rollouts.ahead or self.policy.importance.level != "none",
            "rollouts.ahead draws answers with older weights: set policy.importance.level='token', which corrects for it",
        )

        check_row_tokens(self.model, self.row_tokens, "rollouts.max_prompt_tokens + rollouts.max_tokens - 1")
        if self.distillation is not None:
            self._check_distillation(self.distillation)

    def _check_distillation(self, distillation: DistillationConfig) -> None:
        theirs = distillation.model
        check(
            theirs.vocab_size == self.model.vocab_size,
            f"distillation.model.vocab_size={theirs.vocab_size} is not model.vocab_size={self.model.vocab_size}: the "
            "distributions must be over the same tokens",
        )
        check(
            theirs.max_seq_len >= self.row_tokens,
            f"distillation.model.max_seq_len={theirs.max_seq_len} is less than the {self.row_tokens} tokens of a row",
        )
        check(self.lora is None, "distillation does not go with lora: leave lora out")
        check(self.model.moe is None, "distillation does not balance experts (model.moe) of a student: take a dense model")
        check(
            not self.share_prompts or theirs.attention_backend in ("xla", "reference"),
            f"share_prompts is a mask that distillation.model.attention_backend={theirs.attention_backend!r} does not read: "
            "set it to 'xla', or share_prompts to False",
        )
        check_row_tokens(theirs, self.row_tokens, "rollouts.max_prompt_tokens + rollouts.max_tokens - 1")
        sizes = (self.mesh.tensor, self.mesh.expert)
        check(sizes == (1, 1), "distillation goes with the mesh axes data and fsdp alone: set the others to 1")

    def reward_parts(self, verdict: Verifier | None = None) -> tuple[Part, ...]:
        """What the reward is made of; `verdict` is the task's."""
        by_task = (Part("right", verdict, self.task_weight),) if self.task_weight else ()
        by_model = (Part("learned", weight=self.reward_model_weight),) if self.reward_model else ()
        return (*by_task, *by_model, *(part.make() for part in self.rewards))

    def where_zero_is_worst(self) -> list[str]:
        """What takes 0 for the worst that an answer can get, which it is not beside scores that may be negative."""
        truncation = ["policy.truncation='zero_reward'"] if self.policy.truncation == "zero_reward" else []
        gates = [f"the gate {part.name!r} of rewards" for part in self.rewards if part.gate]
        conditional = [f"only_if='learned' of rewards {part.name!r}" for part in self.rewards if part.only_if == "learned"]
        return truncation + gates + conditional

    @property
    def num_rows(self) -> int:
        """Answers of a step."""
        return self.rollouts.prompts * self.policy.group_size

    @property
    def row_tokens(self) -> int:
        """Targets of a row."""
        return self.rollouts.max_prompt_tokens + self.rollouts.max_tokens - 1

    @property
    def sampling_rounds(self) -> int:
        """How often prompts are drawn for one step, at most."""
        return self.rollouts.max_rounds if self.policy.zero_variance == "resample" else 1

    @property
    def num_updates(self) -> int:
        return self.steps * self.minibatches * self.policy.updates_per_batch

    @property
    def update_rows(self) -> int:
        return self.num_rows // self.minibatches
