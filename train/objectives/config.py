"""What each objective of post-training can be told. Frozen, checked and read without jax.

A combination whose gradient would not be that of any sensible objective is refused here, with the option to change.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from model.config import check, check_choices

Aggregation = Literal["token_mean", "seq_mean", "seq_sum", "dr_grpo"]
KLEstimator = Literal["k1", "k2", "k3"]
RatioUse = Literal["none", "detached", "differentiated"]
Level = Literal["none", "token", "sequence"]
RejectLevel = Literal["none", "token", "sequence", "geometric"]
Surrogate = Literal["reinforce", "clipped", "gspo", "cispo", "sapo"]
Advantage = Literal["none", "ema", "batch", "rloo", "greedy", "group", "maxrl", "gae"]
Scale = Literal["none", "group", "batch"]
Truncation = Literal["keep", "mask", "zero_reward", "penalty", "soft_penalty"]
ZeroVariance = Literal["keep", "drop", "resample"]
Bug = Literal["k1_in_loss", "truncated_sampling", "stop_token_untrained", "micro_batch_normaliser"]
StepAggregation = Literal["min", "product", "last"]
DPOKind = Literal["sigmoid", "conservative", "robust", "hinge", "ipo"]

GROUP_ADVANTAGES = ("rloo", "group", "maxrl")


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """A penalty on the distance from the reference policy; at most one of the two coefficients is above 0.

    In the reward the estimator is always k1, the only one whose gradient is then that of KL(policy, reference).

    Attributes:
      loss_estimator: see `train.objectives.kl` for the gradients of each.
      ratio: how a loss of samples from an older policy is corrected; see `train.objectives.kl.kl_losses`. `none` is for one
        update of a batch (answers drawn ahead are corrected by `importance`, as the rest of the loss is).
      target, horizon: of the adaptive coefficient in the reward (arXiv:1909.08593), in nats per sequence and in sequences;
        target 0 keeps it fixed.
    """

    reward_coefficient: float = 0.0
    loss_coefficient: float = 0.0
    loss_estimator: KLEstimator = "k2"
    ratio: RatioUse = "none"
    target: float = 0.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        check_choices("kl", self)
        for field in ("reward_coefficient", "loss_coefficient", "target"):
            check(getattr(self, field) >= 0, f"kl.{field}={getattr(self, field)} must be >= 0 (0 is off)")
        check(
            not (self.reward_coefficient and self.loss_coefficient),
            "kl.reward_coefficient and kl.loss_coefficient penalise the same thing twice: set one of them to 0",
        )
        check(self.horizon > 0, f"kl.horizon={self.horizon} must be positive")
        check(
            not self.target or self.reward_coefficient > 0,
            "kl.target adapts the coefficient in the reward: set kl.reward_coefficient, or kl.target to 0",
        )

    @property
    def needs_reference(self) -> bool:
        return self.reward_coefficient > 0 or self.loss_coefficient > 0


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
    """Correction for samples that were drawn from another distribution than the trainer's; with r = trainer / sampler.

    Attributes:
      level: of the weight min(r, cap): each token's own, or the product over its sequence for all.
      reject: zero weight where r of the token, of the sequence, or its geometric mean over the sequence is not in [low, high].
    """

    level: Level = "none"
    cap: float = 2.0
    reject: RejectLevel = "none"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        check_choices("importance", self)
        check(self.cap >= 1, f"importance.cap={self.cap} must be >= 1, or equal distributions would be reweighted")
        check(
            0 <= self.low < 1 < self.high,
            f"importance.low={self.low} and importance.high={self.high} must have 1 between them",
        )


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """Value function of `advantage="gae"`.

    Attributes:
      coefficient: of the value loss.
      clip: largest step of a value away from that at the time of the rollout; 0 is off.
      discount, gae_lambda: of generalised advantage estimation (arXiv:1506.02438).
      adaptive_lambda: a in 1 - 1 / (a x length), at least 0, which is then lambda in the advantages of an answer of so many
        tokens (arXiv:2504.05118), and `gae_lambda` that of the returns alone; 0 is off.
      whiten_rewards: rewards per token to variance 1 over the batch, the mean kept, before anything is made of them.
    """

    coefficient: float = 0.5
    clip: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    adaptive_lambda: float = 0.0
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        check(self.coefficient > 0, f"value.coefficient={self.coefficient} must be positive")
        check(self.clip >= 0, f"value.clip={self.clip} must be >= 0 (0 is off)")
        check(self.adaptive_lambda >= 0, f"value.adaptive_lambda={self.adaptive_lambda} must be >= 0 (0 is off)")
        for field in ("discount", "gae_lambda"):
            check(0 <= getattr(self, field) <= 1, f"value.{field}={getattr(self, field)} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A policy-gradient objective: an advantage, a surrogate, weights, and penalties.

    Attributes:
      surrogate: `reinforce`: -A log p. `clipped`: PPO's. `gspo`: PPO's with the sequence's ratio. `cispo`: -A log p times the
        detached, truncated ratio. `sapo`: a soft gate on the ratio.
      advantage: return minus a baseline: `none`, `ema` of earlier returns, mean of the `batch`, of the rest of the group
        (`rloo`), return of the `greedy` answer, mean of the `group`; `maxrl`: (r - group mean) / group mean; `gae`: by a value
        function.
      scale: divides `group` advantages by the standard deviation of the group's rewards, or of the batch's.
      whiten: advantages to mean 0 and variance 1 over all tokens of the batch.
      reward_to_go: a token's return are the rewards from it on, not those of its sequence; differs where KL is in the reward.
      aggregation: see `train.objectives.aggregate.token_weights`.
      clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; cispo knows only the upper bound.
      dual_clip: bound on the ratio where the advantage is negative; 0 is off.
      sapo_positive, sapo_negative: how fast `sapo` fades away from a ratio of 1, by the sign of the advantage.
      group_size: samples of each prompt.
      max_length: limit on generated tokens; denominator of `dr_grpo`, end of the ramp of `soft_penalty`.
      truncation: of samples that reached the limit: `keep` them as they are; `mask` them out of loss and denominators, though
        not out of their group's mean; give them `zero_reward`; subtract `truncation_penalty`; or (`soft_penalty`) subtract a
        penalty that rises from 0 to 1 over the last `overlong_cache` tokens before the limit.
      zero_variance: groups whose rewards are all equal: `keep` them in the denominators, `drop` them, or sample other prompts
        until there are enough (`resample`, which is `drop` here).
      normalise_parts: each part of the reward has advantages of its own, scaled by its own deviation, and those are weighed
        and added (GDPO, arXiv:2601.05242), so that no part is drowned by one of larger spread; otherwise the sum has them.
      entropy_coefficient: bonus on the entropy of the whole distribution.
      entropy_target, entropy_step: nats per token; after a step whose entropy is below the target the coefficient is raised by
        `entropy_step`, above it lowered (arXiv:2505.22312); target 0 keeps it fixed.
      entropy_fraction: train only on this share of tokens, those of highest entropy (arXiv:2506.01939).
      updates_per_batch: optimizer updates made of one batch of rollouts.
      max_update_kl: KL from the policy that was sampled to the one that is trained, in nats per token, above which the update
        that meets it is the last of its batch; 0 is off. Schedules count the updates that are made.
      bugs: what is wrong on purpose, in a study of what it does.
    """

    surrogate: Surrogate = "clipped"
    advantage: Advantage = "group"
    scale: Scale = "none"
    whiten: bool = False
    reward_to_go: bool = False
    aggregation: Aggregation = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    group_size: int = 8
    max_length: int = 0
    truncation: Truncation = "keep"
    truncation_penalty: float = 0.0
    overlong_cache: int = 0
    zero_variance: ZeroVariance = "keep"
    kl: KLConfig = KLConfig()
    importance: ImportanceConfig = ImportanceConfig()
    value: ValueConfig | None = None
    ema_decay: float = 0.95
    normalise_parts: bool = False
    entropy_coefficient: float = 0.0
    entropy_target: float = 0.0
    entropy_step: float = 0.005
    entropy_fraction: float = 1.0
    updates_per_batch: int = 1
    max_update_kl: float = 0.0
    bugs: tuple[Bug, ...] = ()

    def __post_init__(self) -> None:
        check_choices("policy", self)
        self._check_surrogate()
        self._check_advantage()
        self._check_penalties()

    def _check_surrogate(self) -> None:
        clips = f"policy.clip_low={self.clip_low}, policy.clip_high={self.clip_high}"
        if self.surrogate in ("clipped", "gspo"):
            check(0 < self.clip_low < 1 and self.clip_high > 0, f"{clips}: must lie in (0, 1) and above 0")
        elif self.surrogate == "cispo":
            check(self.clip_low == 0 and self.clip_high > 0, f"{clips}: cispo takes clip_low=0 and a positive clip_high")
        else:
            check(self.clip_low == self.clip_high == 0, f"{clips}: {self.surrogate} has no ratio to clip: set both to 0")
        check(
            self.sapo_positive > 0 and self.sapo_negative > 0,
            f"policy.sapo_positive={self.sapo_positive}, policy.sapo_negative={self.sapo_negative} must be positive",
        )
        check(
            self.dual_clip == 0 or (self.dual_clip > 1 + self.clip_high and self.surrogate == "clipped"),
            f"policy.dual_clip={self.dual_clip} must be 0 (off), or with surrogate='clipped' above 1 + clip_high",
        )
        check(self.updates_per_batch > 0, f"policy.updates_per_batch={self.updates_per_batch} must be positive")
        check(
            self.surrogate != "reinforce" or self.updates_per_batch == 1,
            "policy.surrogate='reinforce' has no ratio for a policy that has moved: set updates_per_batch=1, or take 'clipped'",
        )
        check(
            self.surrogate != "gspo" or self.aggregation == "seq_mean",
            f"policy.aggregation={self.aggregation!r} weighs gspo's sequences by their lengths: take 'seq_mean'",
        )
        check(
            self.surrogate != "gspo" or (self.advantage != "gae" and not self.reward_to_go),
            "policy.surrogate='gspo' has one ratio per sequence, so needs one advantage: not 'gae', not reward_to_go",
        )
        check(
            self.surrogate != "gspo" or self.entropy_fraction == 1,
            "policy.surrogate='gspo' trains on whole sequences: set entropy_fraction=1",
        )
        check(
            self.aggregation != "dr_grpo" or self.max_length > 0,
            "policy.aggregation='dr_grpo' divides by policy.max_length: set it to the limit on generated tokens",
        )

    def _check_advantage(self) -> None:
        check(self.group_size > 0, f"policy.group_size={self.group_size} must be positive")
        check(
            self.advantage not in GROUP_ADVANTAGES or self.group_size > 1,
            f"policy.advantage={self.advantage!r} compares samples of one prompt: set group_size >= 2, or advantage='batch'",
        )
        check(
            self.scale == "none" or self.advantage == "group",
            f"policy.scale={self.scale!r} belongs to advantage='group', not {self.advantage!r}: set scale='none'",
        )
        check(
            self.scale != "group" or not self.kl.reward_coefficient,
            "policy.scale='group' would lift the KL of groups whose rewards are equal to unit variance: take scale='none' or "
            "'batch', or kl.loss_coefficient",
        )
        check(
            self.zero_variance == "keep" or self.advantage in GROUP_ADVANTAGES,
            f"policy.zero_variance={self.zero_variance!r} needs groups: take advantage rloo, group or maxrl, or 'keep'",
        )
        check(
            self.zero_variance == "keep" or not self.kl.reward_coefficient,
            f"policy.zero_variance={self.zero_variance!r} leaves out groups that kl.reward_coefficient still has something to "
            "tell: take 'keep', or kl.loss_coefficient",
        )
        check(
            (self.advantage == "gae") == (self.value is not None),
            "policy.advantage='gae' needs policy.value, and no other advantage uses one",
        )
        check(
            self.advantage != "greedy" or self.truncation in ("keep", "mask"),
            f"policy.truncation={self.truncation!r} changes the rewards of samples, and not that of the greedy answer, which "
            "advantage='greedy' subtracts: take 'keep' or 'mask'",
        )
        check(
            not self.normalise_parts or (self.scale != "none" and self.zero_variance == "keep"),
            "policy.normalise_parts divides each part of the reward by its deviation: set advantage='group', scale='group' or "
            "'batch', and zero_variance='keep'",
        )
        check(
            not self.normalise_parts or (not self.kl.reward_coefficient and self.truncation in ("keep", "mask")),
            "policy.normalise_parts is of the parts alone, and kl.reward_coefficient and policy.truncation change their sum: "
            "take kl.loss_coefficient, and truncation 'keep' or 'mask'",
        )
        check(
            self.advantage != "maxrl"
            or (not self.kl.reward_coefficient and self.truncation not in ("penalty", "soft_penalty")),
            "policy.advantage='maxrl' divides by the mean reward, so no reward may be negative: no kl.reward_coefficient, no "
            "penalty for truncation",
        )
        check(
            not self.reward_to_go or self.advantage in ("none", "ema", "batch", "rloo", "greedy"),
            f"policy.reward_to_go has no meaning with advantage={self.advantage!r}: set it to False",
        )
        check(0 <= self.ema_decay < 1, f"policy.ema_decay={self.ema_decay} must lie in [0, 1)")

    def _check_penalties(self) -> None:
        check(self.max_update_kl >= 0, f"policy.max_update_kl={self.max_update_kl} must be >= 0 (0 is off)")
        check(
            (self.truncation_penalty > 0) == (self.truncation == "penalty"),
            f"policy.truncation_penalty={self.truncation_penalty} must be positive with truncation='penalty', otherwise 0",
        )
        check(
            (0 < self.overlong_cache <= self.max_length) if self.truncation == "soft_penalty" else self.overlong_cache == 0,
            f"policy.overlong_cache={self.overlong_cache} must lie in [1, max_length] with truncation='soft_penalty', "
            "otherwise be 0",
        )
        check(self.entropy_coefficient >= 0, f"policy.entropy_coefficient={self.entropy_coefficient} must be >= 0 (0 is off)")
        check(
            self.entropy_target >= 0 and self.entropy_step > 0,
            f"policy.entropy_target={self.entropy_target} must be >= 0 (0 is off), entropy_step={self.entropy_step} positive",
        )
        check(0 < self.entropy_fraction <= 1, f"policy.entropy_fraction={self.entropy_fraction} must lie in (0, 1]")
        check(
            not self.kl.loss_coefficient
            or self.kl.loss_estimator != "k1"
            or self.kl.ratio == "differentiated"
            or "k1_in_loss" in self.bugs,
            "kl.loss_estimator='k1' has no gradient in expectation: take 'k2', or kl.ratio='differentiated', or put it in the "
            "reward (bugs=('k1_in_loss',) is for studies)",
        )


REINFORCE = PolicyConfig(surrogate="reinforce", advantage="batch", clip_low=0, clip_high=0)
RLOO = dataclasses.replace(REINFORCE, advantage="rloo", aggregation="seq_sum")
REMAX = dataclasses.replace(REINFORCE, advantage="greedy", aggregation="seq_sum")
REINFORCE_PLUS_PLUS = PolicyConfig(advantage="none", reward_to_go=True, whiten=True, kl=KLConfig(reward_coefficient=0.01))
PPO = PolicyConfig(advantage="gae", whiten=True, value=ValueConfig(), group_size=1, kl=KLConfig(reward_coefficient=0.05))
GRPO = PolicyConfig(scale="group", aggregation="seq_mean", kl=KLConfig(loss_coefficient=0.04, loss_estimator="k3"))
GSPO = PolicyConfig(surrogate="gspo", scale="group", aggregation="seq_mean", clip_low=3e-4, clip_high=4e-4)
CISPO = PolicyConfig(surrogate="cispo", scale="group", clip_low=0, clip_high=4.0)
MAXRL = PolicyConfig(advantage="maxrl")


def dr_grpo(max_length: int) -> PolicyConfig:
    return PolicyConfig(aggregation="dr_grpo", max_length=max_length)


def dapo(max_length: int, overlong_cache: int) -> PolicyConfig:
    return PolicyConfig(
        scale="group",
        clip_high=0.28,
        max_length=max_length,
        truncation="soft_penalty",
        overlong_cache=overlong_cache,
        zero_variance="resample",
    )


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Attributes:
    kind: `ipo` compares log-probabilities per token, and its `beta` sets a margin of 1 / (2 beta); see `train.objectives.dpo`.
    label_smoothing: share of wrong labels assumed by `conservative` and `robust`.
    length_normalised: log-ratios per token (`ipo` always).
    nll_coefficient: of the chosen answer's negative log-likelihood per token, against its displacement.
    """

    kind: DPOKind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    nll_coefficient: float = 0.0

    def __post_init__(self) -> None:
        check_choices("dpo", self)
        check(self.beta > 0, f"dpo.beta={self.beta} must be positive")
        check(self.nll_coefficient >= 0, f"dpo.nll_coefficient={self.nll_coefficient} must be >= 0 (0 is off)")
        smoothed = self.kind in ("conservative", "robust")
        check(
            0 < self.label_smoothing < 0.5 if smoothed else self.label_smoothing == 0,
            f"dpo.label_smoothing={self.label_smoothing} must lie in (0, 0.5) for 'conservative' and 'robust', and be 0 for "
            f"kind={self.kind!r}",
        )
        check(self.kind != "ipo" or self.length_normalised, "dpo.kind='ipo' is defined per token: set length_normalised=True")


@dataclasses.dataclass(frozen=True)
class SimPOConfig:
    """`beta` times the difference of mean log-probabilities must exceed `gamma`."""

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check(self.beta > 0 and self.gamma >= 0, f"simpo.beta={self.beta} must be positive, simpo.gamma={self.gamma} >= 0")


@dataclasses.dataclass(frozen=True)
class ORPOConfig:
    """`coefficient` of the odds-ratio term beside the chosen answer's likelihood."""

    coefficient: float = 0.1

    def __post_init__(self) -> None:
        check(self.coefficient > 0, f"orpo.coefficient={self.coefficient} must be positive")


@dataclasses.dataclass(frozen=True)
class CPOConfig:
    """`nll_coefficient` of the chosen answer's negative log-likelihood per token."""

    beta: float = 0.1
    nll_coefficient: float = 1.0

    def __post_init__(self) -> None:
        check(self.beta > 0, f"cpo.beta={self.beta} must be positive")
        check(self.nll_coefficient > 0, f"cpo.nll_coefficient={self.nll_coefficient} must be positive: nothing else holds CPO")


PairConfig = DPOConfig | SimPOConfig | ORPOConfig | CPOConfig


@dataclasses.dataclass(frozen=True)
class KTOConfig:
    """The weights should satisfy 1 <= (desirable weight x count) / (undesirable weight x count) <= 4/3."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check(self.beta > 0, f"kto.beta={self.beta} must be positive")
        check(
            self.desirable_weight > 0 and self.undesirable_weight > 0,
            "kto.desirable_weight and kto.undesirable_weight must be positive",
        )


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """`centring`: coefficient of (chosen + rejected)^2, which takes away the free additive constant; 0 is off."""

    centring: float = 0.01

    def __post_init__(self) -> None:
        check(self.centring >= 0, f"reward_model.centring={self.centring} must be >= 0 (0 is off)")


@dataclasses.dataclass(frozen=True)
class OutcomeModelConfig:
    """`all_tokens`: every token of an answer foretells whether it is right, not the last alone (arXiv:2110.14168)."""

    all_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class ProcessModelConfig:
    """Whether each step of a solution is right, judged where it ends (arXiv:2305.20050); labels may be chances, such as the
    share of continuations that succeed (arXiv:2312.08935)."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned from preferences: exactly one of these is set.

    Attributes:
      dpo, simpo, orpo, cpo, reward_model: of pairs (`data.content="pairs"`).
      kto, outcome_model: of answers that are each desirable or not (`data.content="labels"`).
      process_model: of solutions whose steps are each right or not (`data.content="steps"`).
    """

    dpo: DPOConfig | None = None
    simpo: SimPOConfig | None = None
    orpo: ORPOConfig | None = None
    cpo: CPOConfig | None = None
    kto: KTOConfig | None = None
    reward_model: RewardModelConfig | None = None
    outcome_model: OutcomeModelConfig | None = None
    process_model: ProcessModelConfig | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        found = [name for name in names if getattr(self, name) is not None]
        check(len(found) == 1, f"objective has {' and '.join(found) or 'nothing'}: set exactly one of {', '.join(names)}")

    @property
    def chosen(self) -> PairConfig | KTOConfig | RewardModelConfig | OutcomeModelConfig | ProcessModelConfig:
        return next(value for field in dataclasses.fields(self) if (value := getattr(self, field.name)) is not None)

    @property
    def name(self) -> str:
        return next(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None)

    @property
    def content(self) -> Literal["pairs", "labels", "steps"]:
        """What `data.content` must be."""
        if self.process_model:
            return "steps"
        return "labels" if self.kto or self.outcome_model else "pairs"

    @property
    def needs_reference(self) -> bool:
        """Whether the initial weights are kept, frozen, to compare with."""
        return self.dpo is not None or self.kto is not None

    @property
    def has_head(self) -> bool:
        """Whether answers are scored, rather than written."""
        return any(part is not None for part in (self.reward_model, self.outcome_model, self.process_model))
