"""Reinforcement learning: draws answers with the decode engine, has them judged, and makes updates of them.

A step is a function of (state, seed, step): which prompts, the random numbers of every answer, the order of minibatches. The
state is parameters, optimizer, step, the adaptive baseline and coefficient, and, with `rollouts.ahead`, the answers that were
drawn already. So a run that is killed at any moment continues to the same bits. The reference of a KL penalty is not saved: it
is the initial weights, read again, and compared with their digest.

    draw (engine) -> judge (verifiers) -> score (trainer; reference) -> advantages and weights, of the whole batch -> updates
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from model.config import check
from model.params import Params
from model.sharding import TRAIN_RULES, Layout
from train.checkpoint import Checkpoints, check_room
from train.collector import Collector, Judged
from train.config import PREEMPTED
from train.distributed import Group
from train.files import only_process_in, write_atomic, write_json_atomic
from train.initial import InitialModel, compare_initial, compare_task, load_initial, open_initial
from train.loop import Log, differences, stop_on_signal
from train.metrics import JsonlWriter, check_writers, make_writers, read_jsonl, truncate_jsonl
from train.objectives.aggregate import normalised_apart
from train.objectives.entropy import adapt_coefficient
from train.objectives.metrics import held_out_scores, rollout_metrics
from train.objectives.policy_gradient import PolicyBatch
from train.objectives.policy_gradient import Rollouts as ScoredRollouts
from train.objectives.ppo import adapt_kl_coefficient
from train.objectives.reinforce import ema_baseline, update_ema
from train.peak import peak_flops
from train.policy import Policy
from train.progress import Progress, rate
from train.provenance import write_provenance
from train.rl_config import RLConfig
from train.rl_step import Scores
from train.rollouts import Samples
from train.step import TrainState
from train.timing import Timing

# Fields that may differ when a run is continued: none of them changes an update by more than rounding.
FREE_FIELDS = ("run_dir", "mesh", "cpu_devices", "deadlines", "writers", "checkpoint", "eval", "rollouts.verifiers",
               "rollouts.verifier_seconds", "rollouts.max_mismatch")  # fmt: skip
EVAL_STEP = 2**31  # Its prompts have random numbers of their own.


@flax.struct.dataclass
class RLState:
    """All that changes from step to step. `baseline` is what `update_ema` makes, and 0 where nothing does; `ahead` are the
    samples of the next step, where those are drawn early."""

    train: TrainState
    baseline: jax.Array
    kl_coefficient: jax.Array
    ahead: Judged | None
    entropy_coefficient: jax.Array | None = None


def train_with_rewards(config: RLConfig, log: Log = print, group: Group | None = None, began: float | None = None) -> int:
    """Runs, or continues, the job to its end. Returns the exit status: 0, or PREEMPTED after SIGTERM or Ctrl-C.

    Raises:
      ValueError, OSError: bad input, told before anything expensive; see the message.
      RuntimeError: a loss that is not finite, or a sampler that disagrees with the trainer.
    """
    began = time.perf_counter() if began is None else began
    with open_loop(config, log, group, began) as loop, stop_on_signal() as stop_requested:
        return loop.run(stop_requested)


@contextlib.contextmanager
def open_loop(config: RLConfig, log: Log, group: Group | None, began: float) -> Iterator[RLLoop]:
    """The job at its newest checkpoint, alone in its directory; raises as `train_with_rewards` does."""
    run_dir = pathlib.Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(group or Group(deadlines=config.deadlines))
        check(group.count == 1, "reinforcement learning runs in one process: start it with one")
        check_writers(config.writers)
        initial = open_initial(config.initial_weights, config.model)
        check(
            initial.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer of {config.initial_weights} has {initial.tokenizer.vocab_size} tokens, but model.vocab_size="
            f"{config.model.vocab_size}",
        )
        policy = Policy(config)
        group.watch_into(run_dir)
        stack.enter_context(only_process_in(run_dir))
        checkpoints = Checkpoints(str(run_dir / "checkpoints"), config.checkpoint.keep, group)
        stack.enter_context(contextlib.closing(checkpoints))
        compare_config(run_dir, config)
        copies = min(config.checkpoint.keep, math.ceil(config.steps / config.checkpoint.every)) + 1
        check_room(str(run_dir), policy.trainer.abstract_state, copies - len(checkpoints.steps()))
        timing = stack.enter_context(contextlib.closing(Timing(run_dir, group, began)))
        collector = stack.enter_context(contextlib.closing(Collector(config, initial, policy.trainer.mesh, log)))
        loop = RLLoop(config, initial, policy, collector, checkpoints, group, timing, log)
        yield stack.enter_context(contextlib.closing(loop))


def compare_config(run_dir: pathlib.Path, config: RLConfig) -> None:
    """Raises ValueError where the directory holds a run of another config; every differing key is named."""
    path = run_dir / "config.json"
    if path.exists():
        there, here = json.loads(path.read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
        differing = [
            f"{key} (there {old!r}, here {new!r})"
            for key, old, new in differences(there, here)
            if not any(key == field or key.startswith(field + ".") for field in FREE_FIELDS)
        ]
        check(
            not differing,
            f"{run_dir} holds a run of another config; different are {', '.join(differing[:8])}. Continue it with its own "
            "config, choose another --config.run_dir, or move the old run away.",
        )


class RLLoop:
    """The effects of a run, around the pure functions of its `Policy`."""

    def __init__(
        self,
        config: RLConfig,
        initial: InitialModel,
        policy: Policy,
        collector: Collector,
        checkpoints: Checkpoints,
        group: Group,
        timing: Timing,
        log: Log,
    ):
        self.config, self.policy, self.collector, self.checkpoints = config, policy, collector, checkpoints
        self.group, self.timing, self.log, self.phases = group, timing, log, collector.phases
        self.run_dir = pathlib.Path(config.run_dir)
        self.teacher = self._open_teacher()
        begun = bool(checkpoints.steps())
        compare_task(self.run_dir, collector.task, begun)
        if collector.learned:
            compare_initial(self.run_dir, "reward_model", config.reward_model, collector.learned.params, begun)
        self._write_description(initial)
        with self.timing.timed("restore", 0) as record:
            self.state, self.step, self.reference, self.ahead_metrics = self._restore(initial)
            record["restored_step"] = self.step
        self.metrics = make_writers(config.writers, self.run_dir, config.name, first_step=self.step + 1)
        self.samples = JsonlWriter(self.run_dir / "samples.jsonl")
        self.progress = Progress(config.steps, self.step, log)
        collector.say = self.progress.say
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    # --- Setting up -----------------------------------------------------------------------------------------------

    def _write_description(self, initial: InitialModel) -> None:
        config = self.config
        described = hashlib.sha256(repr((self.collector.task, self.collector.tokenizer.fingerprint)).encode()).hexdigest()[:16]
        peak = peak_flops(jax.local_devices(), config.model.dtype)
        write_provenance(self.run_dir, self.policy.trainer.mesh, described, peak)
        write_json_atomic(self.run_dir / "config.json", dataclasses.asdict(config))
        self.collector.tokenizer.save(self.run_dir / "tokenizer")
        if initial.chat_template:
            write_atomic(self.run_dir / "tokenizer" / "chat_template.jinja", initial.chat_template.encode())

    def _restore(self, initial: InitialModel) -> tuple[RLState, int, Params | None, dict[str, float]]:
        """The newest sound checkpoint, or the initial state; the reference (what is trained of it); samples ahead's metrics."""
        config, trainer = self.config, self.policy.trainer
        weights = load_initial(initial, trainer)
        begun = bool(self.checkpoints.steps())
        compare_initial(self.run_dir, "initial_weights", config.initial_weights, weights, begun)
        fresh = trainer.begin(weights, jax.random.key(config.seed), self._teacher_weights(begun))
        reference = None
        if config.policy.kl.needs_reference:
            # What adapters adapt never changes: a second copy of it would be a second model.
            reference = jax.tree.map(jnp.copy, fresh.params)
        more = (
            jnp.zeros(2 if config.policy.advantage == "ema" else ()),
            jnp.float32(config.policy.kl.reward_coefficient),
            self.collector.nothing() if config.rollouts.ahead else None,
            jnp.float32(config.policy.entropy_coefficient) if config.policy.entropy_target else None,
        )
        state = RLState(fresh, *jax.device_put(more, Layout.of(trainer.mesh, TRAIN_RULES).sharding()))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._saved(state))
        restored = self.checkpoints.restore_newest(abstract, self.log)
        step, ahead_metrics = 0, {}
        if restored is not None:
            saved, metadata, step = restored
            ahead_metrics = metadata["ahead_metrics"]
            state = dataclasses.replace(saved, train=dataclasses.replace(saved.train, frozen=fresh.frozen))
            self.log(f"continuing from the checkpoint of step {step}")
        for name in ("metrics", "samples"):
            truncate_jsonl(self.run_dir / f"{name}.jsonl", step + 1 if step else 0)
        return state, step, reference, ahead_metrics

    def _open_teacher(self) -> InitialModel | None:
        if self.config.distillation is None:
            return None
        teacher = open_initial(self.config.distillation.teacher, self.config.distillation.model)
        check(
            teacher.tokenizer.fingerprint == self.collector.tokenizer.fingerprint,
            f"distillation.teacher={self.config.distillation.teacher!r} has another tokenizer than "
            f"{self.config.initial_weights}: take one that has the same",
        )
        return teacher

    def _teacher_weights(self, begun: bool) -> Params | None:
        if self.teacher is None:
            return None
        assert self.config.distillation is not None
        weights = self.teacher.load(self.policy.trainer.abstract_state.frozen)
        compare_initial(self.run_dir, "teacher", self.config.distillation.teacher, weights, begun)
        return weights

    def _saved(self, state: RLState) -> RLState:
        """What a checkpoint holds."""
        return dataclasses.replace(state, train=state.train.saved())

    # --- Running --------------------------------------------------------------------------------------------------

    def run(self, stop_requested: Callable[[], bool]) -> int:
        config, begun, deadlines = self.config, self.step, self.config.deadlines
        if self.step == 0:
            self._evaluate()
        if config.rollouts.ahead and self.step == 0:
            with self.group.phase("drawing the answers of step 1"):
                self._load_engine()
                judged, self.ahead_metrics = self.collector.collect(0)
            self.state = dataclasses.replace(self.state, ahead=judged)
        while self.step < config.steps:
            # The first one of a start compiles, too.
            allowed = deadlines.step_seconds if self.step > begun else deadlines.phase_seconds
            self.group.watchdog.begin(f"step {self.step + 1}", allowed)
            begin = time.perf_counter()
            self.phases.seconds.clear()
            metrics, tokens = self.advance()
            self.step += 1
            seconds = time.perf_counter() - begin
            for name in ("loss", "grad_norm", "param_norm"):
                if not math.isfinite(metrics[name]):
                    raise RuntimeError(
                        f"step {self.step}: {name} is {metrics[name]}. The last checkpoint is that of step "
                        f"{(self.checkpoints.steps() or [0])[-1]}: lower the learning rate, or clip harder, in a new run"
                    )
            self.metrics.write(self.step, metrics)
            phases = {f"{name}_seconds": value for name, value in self.phases.seconds.items()}
            rates = {"tokens": tokens, "tokens_per_second": tokens / seconds}
            self.timing.step(self.step, step_seconds=seconds, **rates, **phases)
            self.progress.update(
                self.step,
                f"reward {metrics.get('reward/total', math.nan):.3f}, entropy {metrics['entropy']:.3f}, "
                f"{rate(tokens / seconds)} drawn tokens/s",
            )
            last = self.step == config.steps
            stop = stop_requested() and not last
            if last or self.step % config.eval.every == 0:
                self._evaluate()
            if last or stop or self.step % config.checkpoint.every == 0:
                self._save(complete=last or stop)
            if stop:
                self.log(f"stopped on a signal; step {self.step} is saved, and the same command continues from it")
                return PREEMPTED
        self._write_result()
        return 0

    def advance(self) -> tuple[dict[str, float], int]:
        """One step: metrics, and how many tokens its answers have."""
        config, step = self.config, self.step
        self._load_engine()
        if config.rollouts.ahead:
            judged, drawn_metrics = jax.device_get(self.state.ahead), self.ahead_metrics
            # The engine has weights of its own, so the update may go on meanwhile.
            coming = self.pool.submit(self.collector.collect, step + 1) if step + 1 < config.steps else None
        else:
            judged, drawn_metrics = self.collector.collect(step)
            coming = None
        with self.phases.timed("score"):
            constants, metrics = self._constants(judged)
            constants, metrics = jax.device_get((constants, metrics))
        if config.rollouts.score:
            self._check_mismatch(metrics["mismatch_kl"])
        with self.phases.timed("update"):
            sums = jax.device_get(self._update(judged.samples, constants, step))
        if not config.rollouts.score:  # The first update begins with the weights that drew: its ratio is trainer to sampler.
            metrics["mismatch_kl"] = sums[0]["update_kl"]
            self._check_mismatch(metrics["mismatch_kl"])
        updated = {name: float(np.mean([update[name] for update in sums])) for name in sums[0]} | {"updates": len(sums)}
        self._adapt(metrics, updated["entropy"])
        if coming is not None:
            with self.phases.timed("wait"):
                following, self.ahead_metrics = coming.result()
            self.state = dataclasses.replace(self.state, ahead=following)
        lengths = judged.samples.mask.sum(1)
        metrics |= rollout_metrics(judged.rewards, judged.correct, lengths, judged.samples.truncated, judged.valid)
        return {**drawn_metrics, **{name: float(value) for name, value in metrics.items()}, **updated}, int(lengths.sum())

    def _check_mismatch(self, kl: float) -> None:
        """Raises RuntimeError where what was sampled is not what is trained, and should be."""
        limit = self.config.rollouts.max_mismatch
        if limit and kl > limit and not self.config.rollouts.ahead:
            raise RuntimeError(
                f"step {self.step + 1}: KL(sampler, trainer) is {kl:.3g} nats a token, more than "
                f"rollouts.max_mismatch={limit}: what was sampled is not what is trained"
            )

    def _load_engine(self) -> None:
        """The weights of the trainer, in the layout of decoding."""
        with self.phases.timed("hand_over"):
            params = jax.block_until_ready(self.policy.hand_over(self.policy.whole(self.state.train)))
        self.collector.load(params, self.policy.sampler)

    def _rows(self, samples: Samples) -> dict[str, np.ndarray]:
        return {name: getattr(samples, name) for name in ("tokens", "targets", "segment_ids", "positions")}

    def _constants(self, judged: Judged) -> tuple[PolicyBatch, dict[str, jax.Array]]:
        """Advantages and weights, of the whole batch."""
        config, samples, policy, state = self.config, judged.samples, self.policy, self.state.train
        rows = jax.device_put(self._rows(samples) | {"mask": samples.mask}, policy.trainer.batch_sharding)
        now = Scores(samples.behavior_logprobs, None, None)
        if config.rollouts.score:
            now = policy.score(policy.whole(state), rows)
        reference = None
        if self.reference is not None:
            reference = policy.score(policy.whole(dataclasses.replace(state, params=self.reference)), rows).logprobs
        scored = ScoredRollouts(
            mask=samples.mask,
            sampler_logprobs=samples.behavior_logprobs,
            trainer_logprobs=now.logprobs,
            rewards=judged.rewards,
            groups=samples.group,
            valid=judged.valid,
            truncated=samples.truncated,
            reference_logprobs=reference,
            values=now.values,
            entropies=now.entropies,
            baseline=ema_baseline(self.state.baseline) if config.policy.advantage == "ema" else judged.baseline,
            parts=judged.parts,
            part_weights=None
            if judged.parts is None
            else jnp.asarray([part.weight for part in self.collector.parts], jnp.float32),
        )
        constants, metrics = self.policy.prepare(scored, self.state.kl_coefficient, self.state.entropy_coefficient)
        if not config.rollouts.score:  # Nothing was compared yet.
            metrics = {name: value for name, value in metrics.items() if not name.startswith("mismatch")}
        return constants, metrics

    def _update(self, samples: Samples, constants: PolicyBatch, step: int) -> list[dict[str, jax.Array]]:
        """The updates of a step, up to the one that meets too large a KL. Of several minibatches each counts as much as the
        whole would."""
        config, trainer = self.config, self.policy.trainer
        batch: dict[str, np.ndarray] = self._rows(samples) | {
            field.name: value
            for field in dataclasses.fields(PolicyBatch)
            if (value := getattr(constants, field.name)) is not None
        }
        for name in batch.keys() & {"weights", "kl_weights", "token_weights", "entropy_weights"}:
            batch[name] = batch[name] * np.float32(config.minibatches)
        sums = []
        for epoch in range(config.policy.updates_per_batch):
            order = np.arange(config.num_rows)
            if config.minibatches > 1:
                order = order.reshape(-1, config.policy.group_size if config.share_prompts else 1)
                order = np.random.default_rng([config.seed, step, 2, epoch]).permutation(order).reshape(-1)
            for part in np.split(order, config.minibatches):
                chosen = {name: x[part] for name, x in batch.items()}
                if "micro_batch_normaliser" in config.policy.bugs:
                    for name in ("weights", "kl_weights"):
                        chosen[name] = np.asarray(normalised_apart(jnp.asarray(chosen[name]), config.accumulation))
                rows = jax.device_put(chosen, trainer.batch_sharding)
                state, metrics = trainer.step(self.state.train, rows)
                self.state = dataclasses.replace(self.state, train=state)
                sums.append(metrics)
                if config.policy.max_update_kl and float(metrics["update_kl"]) > config.policy.max_update_kl:
                    return sums
        return sums

    def _adapt(self, metrics: dict[str, Any], entropy: float) -> None:
        """The baseline and the coefficients of the next step; a step of which nothing could be judged says nothing of them."""
        policy, state = self.config.policy, self.state
        judged = metrics["bad_reward_fraction"] < 1
        if policy.advantage == "ema" and judged:
            baseline = update_ema(state.baseline, jnp.asarray(metrics["return_mean"]), policy.ema_decay)
            state = dataclasses.replace(state, baseline=baseline)
        if policy.kl.target:
            metrics["kl_coefficient"] = float(state.kl_coefficient)  # of this step
        if policy.kl.target and judged:
            adapted = adapt_kl_coefficient(
                state.kl_coefficient, metrics["reference_kl"], self.config.num_rows, policy.kl.target, policy.kl.horizon
            )
            state = dataclasses.replace(state, kl_coefficient=jnp.asarray(adapted, jnp.float32))
        if policy.entropy_target:
            assert state.entropy_coefficient is not None
            metrics["entropy_coefficient"] = float(state.entropy_coefficient)  # of this step
            if judged:
                adapted = adapt_coefficient(
                    state.entropy_coefficient, jnp.float32(entropy), policy.entropy_target, policy.entropy_step
                )
                state = dataclasses.replace(state, entropy_coefficient=adapted)
        self.state = state

    def _save(self, complete: bool) -> None:
        with self.timing.timed("checkpoint", self.step, at_step=self.step):
            self.metrics.flush()
            self.samples.flush()
            everywhere = Layout.of(self.policy.trainer.mesh, TRAIN_RULES).sharding()
            saved = self._saved(self.state)
            if saved.ahead is not None:
                saved = dataclasses.replace(saved, ahead=jax.device_put(saved.ahead, everywhere))
            self.checkpoints.save(self.step, saved, {"ahead_metrics": self.ahead_metrics})
            if complete:
                self.checkpoints.wait()

    # --- Held-out prompts -----------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """The same prompts every time, which no step of training sees. What nobody could judge is counted, and is in no mean; a
        mean over nothing is left out."""
        with self.timing.timed("eval", self.step, at_step=self.step):
            config = self.config.eval
            self._load_engine()
            examples = self.collector.examples("eval", 0, config.prompts)
            samples = self.collector.draw([self.collector.prompt(example) for example in examples], config.samples, EVAL_STEP)
            rewards, right, _ = self.collector.judge(samples, examples)
            scores = held_out_scores(right.reshape(config.prompts, config.samples))
            if rewards.valid.any():
                scores["eval/reward"] = float(rewards.total[rewards.valid].mean())
            scores |= {
                "eval/length": float(samples.mask.sum(1).mean()),
                "eval/truncated_fraction": float(samples.truncated.mean()),
            }
            self.metrics.write(self.step, scores)
            for i in range(min(8, config.prompts)):
                row = i * config.samples
                text = self.collector.text(samples.answers()[row])
                reward = float(rewards.total[row]) if rewards.valid[row] else None
                self.samples.write({"step": self.step, "prompt": examples[i].prompt, "text": text, "reward": reward})
            self.progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def _write_result(self) -> None:
        """`result.json`, from the files of the run."""
        self.metrics.flush()
        scores = [record for record in read_jsonl(self.run_dir / "metrics.jsonl") if "eval/length" in record]
        steps = {record["step"]: record for record in read_jsonl(self.run_dir / "timing.jsonl") if "step" in record}
        result = {
            **{name: value for name, value in scores[-1].items() if name != "step"},
            **{f"initial_{name}": value for name, value in scores[0].items() if name != "step"},
            "steps": self.step,
            "drawn_tokens": sum(record["tokens"] for record in steps.values()),
            "train_seconds": self.timing.seconds(),
        }
        write_json_atomic(self.run_dir / "result.json", result)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # All of them, whatever one of them raises.
            for part in (self.progress, self.samples, self.metrics):
                stack.callback(part.close)
            stack.callback(self.pool.shutdown, wait=True, cancel_futures=True)
