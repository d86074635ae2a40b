"""What a training job is.  Frozen and validated without importing jax, so a mistake is told before anything expensive."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from data.config import DataConfig
from model.config import LoraConfig, ModelConfig, check, check_choices
from train.objectives.config import ObjectiveConfig

OptimizerName = Literal["adamw", "muon", "lion", "adafactor", "sgd"]
ScheduleName = Literal["cosine", "wsd", "linear", "constant"]
WriterName = Literal["tensorboard", "wandb", "trackio"]
PathKind = Literal["written", "model", "read"]

# Exit status that asks the scheduler for a restart; any other than 0 is an error of the job.
PREEMPTED = 42

DURATION = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*(steps|tokens|%)")


def check_duration(name: str, text: str) -> None:
    """Raises ValueError unless `text` is a duration such as "500 steps", "2_000_000 tokens" or "10 %"."""
    check(
        DURATION.fullmatch(text.strip()) is not None,
        f'{name}={text!r} is not a duration: write "500 steps", "2_000_000 tokens" or "10 %"',
    )


def duration_in_steps(text: str, total_steps: int, tokens_per_step: int) -> int:
    """Number of steps of a duration, rounded to the nearest."""
    match = DURATION.fullmatch(text.strip())
    assert match is not None, text
    amount, unit = float(match[1].replace("_", "")), match[2]
    steps_per_unit = {"steps": 1.0, "tokens": 1 / tokens_per_step, "%": total_steps / 100}[unit]
    return round(amount * steps_per_unit)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over time: linear warm-up to the peak, then the named shape down to `end_fraction` of the peak.

    Durations are "500 steps", "2_000_000 tokens" or "10 %" (of all steps).

    Attributes:
      decay: length of the final decay; for `wsd` (warm-up, stable, decay: arXiv:2404.06395) only.
    """

    name: ScheduleName = "cosine"
    warmup: str = "2 %"
    decay: str = "20 %"
    end_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_choices("optimizer.schedule", self)
        for field in ("warmup", "decay"):
            check_duration(f"optimizer.schedule.{field}", getattr(self, field))
        check(0 <= self.end_fraction <= 1, "optimizer.schedule.end_fraction must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """Applies to the parameters whose whole path (`blocks/0/attention/query`; `scanned_blocks/...` under scan_layers) matches
    `pattern`; the first match wins.

    Attributes:
      weight_decay: whether decay applies.
      learning_rate_scale: multiplies the learning rate; 0 freezes.
    """

    pattern: str
    weight_decay: bool = True
    learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"optimizer.rules: {self.pattern!r} is not a regular expression: {error}") from error
        check(self.learning_rate_scale >= 0, f"optimizer.rules: {self.pattern!r} has a negative learning_rate_scale")


# Norm scales, biases and sinks are not decayed; matrices are.
DEFAULT_RULES = (
    ParamRule(r".*(norm|bias|sinks)[^/]*(/.*)?", weight_decay=False),
    ParamRule(r".*"),
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    learning_rate: peak. For `muon` it is that of the matrices; `adam_learning_rate` serves embeddings, head, norms, biases.
    weight_decay: decoupled (arXiv:1711.05101), multiplied by the learning rate, for parameters whose rule says so.
    clip_norm: global gradient norm above which gradients are scaled down; 0 is off.
    ema_decay: keep an exponential moving average of the parameters, used for evaluation and sampling; 0 is off.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    adam_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    schedule: ScheduleConfig = ScheduleConfig()
    rules: tuple[ParamRule, ...] = DEFAULT_RULES

    def __post_init__(self) -> None:
        check_choices("optimizer", self)
        for field in ("b1", "b2", "momentum"):
            check(0 <= getattr(self, field) < 1, f"optimizer.{field}={getattr(self, field)} must lie in [0, 1)")
        check(self.eps > 0, f"optimizer.eps={self.eps} must be positive")
        check(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must be >= 0")
        check(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        check(self.clip_norm >= 0, "optimizer.clip_norm must be >= 0 (0 is off)")
        check(0 <= self.ema_decay < 1, "optimizer.ema_decay must lie in [0, 1)")
        check(
            self.name != "muon" or self.adam_learning_rate > 0,
            "optimizer.name='muon' needs optimizer.adam_learning_rate for the parameters that are not hidden matrices",
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Attributes:
    z_loss: weight of log(Z)^2 (arXiv:2204.02311), which keeps the log-sum-exp near zero.
    chunk_tokens: tokens per chunk of the cross-entropy; logits of one chunk exist at a time. 0 takes all at once.
    """

    z_loss: float = 0.0
    chunk_tokens: int = 0

    def __post_init__(self) -> None:
        check(self.z_loss >= 0, "loss.z_loss must be >= 0")
        check(self.chunk_tokens >= 0, "loss.chunk_tokens must be >= 0 (0: no chunks)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Attributes:
    every: steps between checkpoints (the last step is always saved).
    keep: how many of the newest to keep; at least 3: a damaged one needs a fallback, and one made on SIGTERM comes between.
    """

    every: int = 200
    keep: int = 3

    def __post_init__(self) -> None:
        check(self.every > 0, f"checkpoint.every={self.every} must be positive")
        check(
            self.keep >= 3,
            f"checkpoint.keep={self.keep} must be at least 3: a damaged newest one needs a fallback, and one made on SIGTERM "
            "may come between them",
        )


@dataclasses.dataclass(frozen=True)
class RollbackConfig:
    """When a loss is not finite, or above `spike_factor` x the median of the last `window` losses, the run goes back to the
    last checkpoint and skips the data between it and the incident.

    The first `window` losses, of a run and of each of its mixtures, need only be finite. A median below 1 nat counts as 1: the
    losses of a model that knows its data by heart are small, and far apart (experiments/LOG.md).

    Attributes:
      spike_factor: 0 looks at non-finite losses only.
      max_incidents: the run gives up after so many.
    """

    spike_factor: float = 2.0
    window: int = 50
    max_incidents: int = 3

    def __post_init__(self) -> None:
        check(self.spike_factor == 0 or self.spike_factor > 1, "rollback.spike_factor must be 0 (off) or above 1")
        check(self.window > 0 and self.max_incidents >= 0, "rollback.window must be positive, max_incidents >= 0")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Attributes:
    every: steps between evaluations on held-out data; the last step is always evaluated.
    max_batches: held-out (micro-)batches of each source per evaluation, always the same; 0 is all. After the last step all are
      evaluated as well (`final_val_loss`, `final_bits_per_byte`, and those of result.json).
    sample_prompts, sample_tokens: text continued at every evaluation, for the report.
    """

    every: int = 500
    max_batches: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 100
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        check(self.every > 0 and self.max_batches >= 0, "eval.every must be positive and eval.max_batches >= 0")
        check(self.sample_tokens > 0, f"eval.sample_tokens={self.sample_tokens} must be positive")
        check(self.sample_temperature >= 0, f"eval.sample_temperature={self.sample_temperature} must be >= 0 (0 is greedy)")


@dataclasses.dataclass(frozen=True)
class DeadlineConfig:
    """After how many seconds a run ends, with a status that asks for a restart, instead of waiting on.

    Attributes:
      start_seconds: for all processes to come together.
      data_seconds: for preparing the data.
      phase_seconds: for compiling, reading or writing a checkpoint, evaluating; and for other processes at a barrier.
      step_seconds: for the batch of one step, and for the step.
    """

    start_seconds: float = 300.0
    data_seconds: float = 86_400.0
    phase_seconds: float = 3600.0
    step_seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            seconds = getattr(self, field.name)
            check(seconds > 0, f"deadlines.{field.name}={seconds} must be positive")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, and takes all that remain.

    Attributes:
      data: copies of the model, each with its share of the rows.
      fsdp: the same, but parameters are scattered over them and gathered layer by layer.
      tensor: heads, MLP and vocabulary are split; between layers, tokens are.
      context: the tokens of a row are split; keys and values go round.
      expert: the experts of an MoE are split; elsewhere like fsdp.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        check(all(size == -1 or size > 0 for size in sizes), f"mesh sizes {sizes} must be positive, or -1 for the rest")
        check(sizes.count(-1) <= 1, f"mesh sizes {sizes}: only one axis can be -1")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """A teacher whose distributions are learned, token by token, beside the texts (arXiv:1503.02531).

    Attributes:
      teacher: see `TrainConfig.initial_weights`; of the same tokenizer.
      model: its network.
      direction: `forward` is KL(teacher, student), which covers all that the teacher does; `reverse` is KL(student, teacher),
        which may drop what the student cannot do (arXiv:2306.08543; there, and in `RLConfig`, on its own samples).
      temperature: of both.
      share: of the teacher in the loss; the rest is the likelihood of the texts, or in `RLConfig` the objective of the policy.
    """

    teacher: str
    model: ModelConfig
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        check_choices("distillation", self)
        check(bool(self.teacher), "distillation.teacher is empty: name the run or the model that teaches")
        check(self.temperature > 0, f"distillation.temperature={self.temperature} must be positive")
        check(0 < self.share <= 1, f"distillation.share={self.share} must lie in (0, 1]")


def check_lora(lora: LoraConfig, model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError where a network or a mesh does not go with adapters."""
    check(model.moe is None and model.mla is None, "lora does not go with model.moe or model.mla")
    check(
        not lora.base_bits or ((mesh.fsdp, mesh.tensor, mesh.context, mesh.expert) == (1, 1, 1, 1) and not model.scan_layers),
        "lora.base_bits goes with model.scan_layers=False and a mesh of `data` alone: rounded weights are not split",
    )


def check_row_tokens(model: ModelConfig, row_tokens: int, name: str) -> None:
    """Raises ValueError where attention cannot train on rows of that length."""
    check(
        model.attention_backend != "cudnn" or row_tokens % 2 == 0,
        f"{name}={row_tokens} is odd, and model.attention_backend='cudnn' takes a mask of even sizes only: change it, or take "
        "'xla'",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run that learns to write texts, or the answers in conversations, or from preferences between answers: `steps` optimizer
    updates of `batch_size` rows.

    Attributes:
      name: the config file's; the run lives in `runs/<name>` unless `run_dir` says otherwise.
      batch_size: rows of `data.seq_len` tokens per step, over all hosts and micro-batches.
      accumulation: micro-batches per step; gradients are weighted by their tokens.
      cpu_devices: how many devices the CPU is split into; 0 is one per core, up to what divides the batch, which is faster for
        models so small that their operations do not fill the cores. Ignored on TPUs and GPUs.
      initial_weights: what to begin with: the directory of a run (its newest checkpoint, its moving average if it keeps one) or
        of a Hugging Face checkpoint or of adapters of peft, a .gguf file, or a name of `loam models`. Its tokenizer and chat
        template come along, unless `data` names its own. Empty draws new weights.
      lora: trains adapters of the initial weights instead of the weights; None is off.
      objective: what is learned of pairs or of labelled answers; None learns to write what is read. The reference of DPO and
        KTO is the initial weights, with `lora` what the adapters adapt.
      distillation: learns from another model too; None is off.
      xz_baseline: also report what `xz -9e` needs for each held-out document (`baseline_xz_bits_per_byte`).
    """

    name: str
    model: ModelConfig
    data: DataConfig
    steps: int
    batch_size: int
    accumulation: int = 1
    initial_weights: str = ""
    lora: LoraConfig | None = None
    objective: ObjectiveConfig | None = None
    distillation: DistillationConfig | None = None
    seed: int = 0
    run_dir: str = ""
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    rollback: RollbackConfig = RollbackConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    writers: tuple[WriterName, ...] = ("tensorboard",)
    log_every: int = 1
    cpu_devices: int = 1
    xz_baseline: bool = False

    def __post_init__(self) -> None:
        check(bool(self.name), "name is empty: a run is named after its config file")
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.name}")
        check("://" not in self.run_dir, f"run_dir={self.run_dir!r} must be a local or mounted directory")
        for field in ("steps", "batch_size", "accumulation", "log_every"):
            check(getattr(self, field) > 0, f"{field}={getattr(self, field)} must be positive")
        check(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        check(self.cpu_devices >= 0, f"cpu_devices={self.cpu_devices} must be >= 0 (0: as many as there are cores)")
        check(
            self.batch_size % self.accumulation == 0,
            f"batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}",
        )
        check(
            self.data.seq_len <= self.model.max_seq_len,
            f"data.seq_len={self.data.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}: "
            "shorten the rows or train a longer context",
        )
        check(
            self.model.param_dtype == "float32",
            f"model.param_dtype={self.model.param_dtype!r}: training keeps float32 master weights, or small updates would be "
            "rounded away; set model.dtype to compute in another type",
        )
        check(
            self.model.attention_backend != "cudnn" or self.mesh.context == 1,
            "model.attention_backend='cudnn' attends to whole rows: set mesh.context to 1, or take 'xla'",
        )
        check_row_tokens(self.model, self.data.seq_len, "data.seq_len")
        tokenizer = self.data.tokenizer
        tokens = 256 + 2 * tokenizer.document_boundaries if tokenizer.kind == "bytes" else tokenizer.vocab_size
        check(
            bool(tokenizer.path or self.initial_weights) or tokenizer.kind == "chars" or tokens <= self.model.vocab_size,
            f"the {tokenizer.kind} tokenizer's {tokens} tokens are more than model.vocab_size={self.model.vocab_size}: "
            f"set model.vocab_size to {tokens} or more",
        )
        if self.lora is not None:
            check(bool(self.initial_weights), "lora adapts a model: set initial_weights")
            check(self.optimizer.name != "muon", "lora does not go with optimizer.name='muon': adapters are no hidden matrices")
            check_lora(self.lora, self.model, self.mesh)
        if self.objective is not None:
            self._check_objective(self.objective)
        else:
            check(
                self.data.content in ("text", "conversations"),
                f"data.content={self.data.content!r} is not something to write: 'text' and 'conversations' are; to learn from "
                "'pairs' or 'labels', set objective",
            )
        if self.distillation is not None:
            self._check_distillation(self.distillation)
        check(
            self.data.content == "text" or not self.xz_baseline,
            "xz_baseline compares texts, and data.content is not 'text': leave it out",
        )
        check(
            any(source.held_out_fraction > 0 for source in self.data.sources),
            "nothing is held out to evaluate on: set held_out_fraction of a data source above 0",
        )

    def _check_distillation(self, distillation: DistillationConfig) -> None:
        check(
            distillation.model.vocab_size == self.model.vocab_size,
            f"distillation.model.vocab_size={distillation.model.vocab_size} is not model.vocab_size={self.model.vocab_size}: "
            "the distributions must be over the same tokens",
        )
        check(
            distillation.model.max_seq_len >= self.data.seq_len,
            f"distillation.model.max_seq_len={distillation.model.max_seq_len} is less than data.seq_len={self.data.seq_len}",
        )
        check(self.objective is None, "distillation learns to write, and an objective compares answers: leave one of them out")
        check(self.lora is None, "distillation does not go with lora: leave lora out")
        check(self.model.moe is None, "distillation does not balance experts (model.moe) of a student: take a dense model")
        check(not self.loss.z_loss, "distillation has no z-loss: set loss.z_loss to 0")
        check_row_tokens(distillation.model, self.data.seq_len, "data.seq_len")
        sizes = (self.mesh.tensor, self.mesh.context, self.mesh.expert)
        check(sizes == (1, 1, 1), "distillation goes with the mesh axes data and fsdp alone: set the others to 1")

    def _check_objective(self, objective: ObjectiveConfig) -> None:
        name = f"objective.{objective.name}"
        check(
            self.data.content == objective.content,
            f"{name} learns from data.content={objective.content!r}, and it is {self.data.content!r}: set it so",
        )
        check(
            bool(self.initial_weights) or not objective.needs_reference,
            f"{name} compares with the model it begins with: set initial_weights",
        )
        check(
            self.lora is None or not objective.has_head,
            f"{name} needs a head that lora does not adapt: leave lora out",
        )
        check(self.model.moe is None, f"{name} does not balance experts (model.moe): take a dense model")
        check(self.mesh.context == 1, f"{name} does not split rows: set mesh.context to 1")
        check(not self.loss.z_loss, f"{name} has no z-loss: set loss.z_loss to 0")
        check(
            not (objective.has_head and self.eval.sample_prompts),
            f"{name} judges answers and writes none: leave eval.sample_prompts out",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len

    # What `train.step.Job` calls these.

    @property
    def num_updates(self) -> int:
        return self.steps

    @property
    def update_rows(self) -> int:
        return self.batch_size

    @property
    def row_tokens(self) -> int:
        return self.data.seq_len

    @property
    def chunk_tokens(self) -> int:
        return self.loss.chunk_tokens


def paths_of(config: TrainConfig) -> dict[str, tuple[PathKind, str]]:
    """Keys of the config that name files or directories, each with what is done there and its value, if it has one.

    `written` to; read as a `model`, which may also be a name of `loam models`; or `read` as files. What is not there is not
    downloaded: a data set of the hub is no path.
    """
    data = config.data
    found: dict[str, tuple[PathKind, str]] = {
        "run_dir": ("written", config.run_dir),
        "data.cache_dir": ("written", data.cache_dir),
        "initial_weights": ("model", config.initial_weights),
        "distillation.teacher": ("model", config.distillation.teacher if config.distillation else ""),
        "data.tokenizer.path": ("read", data.tokenizer.path),
    }
    for index, source in enumerate(data.sources):
        if source.kind == "files":
            found[f"data.sources.{index}.path"] = ("read", source.path)
        for number, (option, value) in enumerate(source.task.options if source.task else ()):
            if option.endswith("path"):
                found[f"data.sources.{index}.task.options.{number}.1"] = ("read", value)
    return {key: (kind, path) for key, (kind, path) in found.items() if path}
