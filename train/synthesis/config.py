"""What a job that makes data with a model is. Frozen and validated without importing jax."""

from __future__ import annotations

import dataclasses
from typing import Literal

from data.config import TaskConfig
from model.config import ModelConfig, check, check_choices

Keep = Literal["best", "right", "pairs", "all"]


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """What is answered: exactly one of `task`, `path` and `texts`.

    Attributes:
      task: training prompts of a verifiable task.
      path: a file of prompts (`data/chat.py`), .jsonl or .parquet.
      texts: given here.
      number: how many, from the first; 0 is all that there are, which a task cannot say.
    """

    task: TaskConfig | None = None
    path: str = ""
    texts: tuple[str, ...] = ()
    number: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("task", "path", "texts") if getattr(self, name)]
        check(len(given) == 1, f"prompts has {' and '.join(given) or 'nothing'}: set exactly one of task, path, texts")
        check(self.number >= 0, f"prompts.number={self.number} must be >= 0 (0 is all)")
        check(self.task is None or self.number > 0, "prompts.task has no end: set prompts.number")


@dataclasses.dataclass(frozen=True)
class BestOfConfig:
    """Draws answers and keeps some. They are judged by the reward model if there is one, or else by the task's verifier.

    Attributes:
      samples: drawn of each prompt.
      keep: `best`: the one of the highest score (best of n, arXiv:2009.01325); `right`: all different ones of at least
        `min_score` (rejection sampling, arXiv:2308.01825); `pairs`: the best as chosen and the worst as rejected; `all`: all
        different ones, unjudged: what a teacher writes is what the student learns (arXiv:1606.07947).
      min_score: None is any.
      max_kept: of a prompt, with `right` and `all`, the best first.
    """

    samples: int = 8
    keep: Keep = "right"
    min_score: float | None = None
    max_kept: int = 4

    def __post_init__(self) -> None:
        check_choices("best_of", self)
        check(self.samples > 0 and self.max_kept > 0, "best_of.samples and best_of.max_kept must be positive")
        check(self.keep != "pairs" or self.samples > 1, "best_of.keep='pairs' compares answers: set best_of.samples >= 2")
        check(self.keep != "right" or self.min_score is not None, "best_of.keep='right' needs best_of.min_score, such as 1.0")
        check(self.keep != "all" or self.min_score is None, "best_of.keep='all' judges nothing: leave best_of.min_score out")


@dataclasses.dataclass(frozen=True)
class Principle:
    """What the model is asked, in words.

    Attributes:
      critique: asks for what is wrong with its answer.
      revision: asks for the answer anew.
      preference: asks which of two answers is better.
    """

    critique: str
    revision: str
    preference: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(bool(getattr(self, field.name).strip()), f"a principle's {field.name} is empty: say what the model is asked")


@dataclasses.dataclass(frozen=True)
class CritiqueConfig:
    """Answers, criticises, revises, and prefers (arXiv:2212.08073).

    Attributes:
      principles: of which each revision follows one, drawn by lot.
      revisions: of each answer, one after the other.
      min_preference: probability, the mean over both orders of the two answers, from which one of them is preferred; pairs that
        are less clear are left out. 0 asks no preference: the revision is chosen.
    """

    principles: tuple[Principle, ...]
    revisions: int = 1
    min_preference: float = 0.6

    def __post_init__(self) -> None:
        check(bool(self.principles), "critique.principles is empty: there is nothing to judge by")
        check(self.revisions > 0, f"critique.revisions={self.revisions} must be positive")
        check(
            self.min_preference == 0 or 0.5 < self.min_preference < 1,
            f"critique.min_preference={self.min_preference} must lie in (0.5, 1), or be 0 (ask for none)",
        )


@dataclasses.dataclass(frozen=True)
class InstructionConfig:
    """Writes instructions like those of the prompts, and answers them (self-instruct, arXiv:2212.10560).

    Attributes:
      number: of instructions to be kept.
      shown: examples before a new one is asked for, drawn from the prompts and from what was kept.
      max_similarity: ROUGE-L with any known instruction, below which a new one must stay.
      min_words, max_words: of an instruction.
      forbidden: words that an instruction must not hold, such as those for what a language model cannot see.
      max_rounds: of `batch` new instructions each, after which the job ends with what there is.
    """

    number: int
    shown: int = 4
    max_similarity: float = 0.7
    min_words: int = 3
    max_words: int = 150
    forbidden: tuple[str, ...] = ("image", "images", "graph", "picture", "file", "map", "video", "audio")
    max_rounds: int = 100

    def __post_init__(self) -> None:
        for name in ("number", "shown", "min_words", "max_rounds"):
            check(getattr(self, name) > 0, f"instructions.{name}={getattr(self, name)} must be positive")
        check(self.min_words <= self.max_words, "instructions.min_words is more than instructions.max_words")
        check(0 < self.max_similarity <= 1, f"instructions.max_similarity={self.max_similarity} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """A job that makes a data set with a model: `dataset.jsonl` in its directory, which fine-tuning and preferences read.

    Attributes:
      model, initial_weights: what writes: see `TrainConfig.initial_weights`.
      chat: prompts are messages in the model's chat template; otherwise their bare text.
      best_of, critique, instructions: what is done; exactly one.
      reward_model: see `RLConfig.reward_model`, for `best_of`.
      batch: prompts of a round; rounds that are done are not done again.
      max_prompt_tokens: of all that the model reads before it writes; longer ones are left out and counted.
      max_batch: answers that are decoded at once.
    """

    name: str
    model: ModelConfig
    initial_weights: str
    prompts: PromptConfig
    chat: bool = False
    best_of: BestOfConfig | None = None
    critique: CritiqueConfig | None = None
    instructions: InstructionConfig | None = None
    reward_model: str = ""
    batch: int = 32
    max_prompt_tokens: int = 512
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_batch: int = 64
    verifiers: int = 2
    verifier_seconds: float = 60.0
    seed: int = 0
    run_dir: str = ""

    def __post_init__(self) -> None:
        check(bool(self.name), "name is empty: a job is named after its config file")
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.name}")
        check("://" not in self.run_dir, f"run_dir={self.run_dir!r} must be a local or mounted directory")
        check(bool(self.initial_weights), "initial_weights is empty: name the run or the model that is to write")
        for name in ("batch", "max_prompt_tokens", "max_tokens", "max_batch", "verifiers", "verifier_seconds"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        check(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        check(
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            f"temperature={self.temperature} must lie in [0.001, 1000], or be 0 (the most likely token)",
        )
        check(self.top_k >= 0, f"top_k={self.top_k} must be >= 0 (0 is off)")
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1] (1 is off)")
        methods = [name for name in ("best_of", "critique", "instructions") if getattr(self, name) is not None]
        check(
            len(methods) == 1,
            f"the config has {' and '.join(methods) or 'nothing to do'}: set exactly one of best_of, critique, instructions",
        )
        check(
            self.max_prompt_tokens + self.max_tokens <= self.model.max_seq_len,
            f"max_prompt_tokens={self.max_prompt_tokens} and max_tokens={self.max_tokens} exceed model.max_seq_len="
            f"{self.model.max_seq_len}: shorten one of them",
        )
        judged = self.best_of is not None and self.best_of.keep != "all"
        check(
            not judged or bool(self.reward_model) or self.prompts.task is not None,
            "best_of judges answers by prompts.task or reward_model: set one of them, or best_of.keep='all'",
        )
        check(not self.reward_model or judged, "reward_model is for best_of that keeps by a score: leave it out")
        check(
            self.best_of is None or self.best_of.samples == 1 or self.temperature > 0,
            "temperature=0 draws the same answer again: set it above 0, or best_of.samples to 1",
        )
        check(
            self.instructions is None or self.temperature > 0,
            "temperature=0 writes the same instruction again: set it above 0",
        )
