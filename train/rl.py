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
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from data.chat_encoder import ChatEncoder
from data.tasks.task import Example, Split
from inference.engine import Engine
from inference.sampling import Sampling
from model.config import check
from model.lora import merge
from model.params import Params, param_shardings, param_specs, unstack_layers
from model.sharding import DECODE_RULES, TRAIN_RULES, Layout
from train.checkpoint import Checkpoints, check_room
from train.config import PREEMPTED
from train.distillation import TEACHER
from train.distributed import Group
from train.files import only_process_in, write_atomic, write_json_atomic
from train.initial import InitialModel, compare_initial, load_initial, open_initial
from train.learned_reward import LearnedReward
from train.loop import Log, differences, stop_on_signal
from train.metrics import JsonlWriter, check_writers, make_writers, read_jsonl, truncate_jsonl
from train.objectives.aggregate import normalised_apart
from train.objectives.config import GROUP_ADVANTAGES
from train.objectives.entropy import adapt_coefficient
from train.objectives.grpo import group_statistics, select_groups
from train.objectives.metrics import pass_at_k, rollout_metrics
from train.objectives.policy_gradient import PolicyBatch, prepare
from train.objectives.policy_gradient import Rollouts as ScoredRollouts
from train.objectives.ppo import adapt_kl_coefficient
from train.objectives.reinforce import update_ema
from train.peak import peak_flops
from train.progress import Progress, rate
from train.provenance import provenance
from train.rewards import Part, Rewards, Verifiers, compose, counts_failures
from train.rl_config import RLConfig
from train.rl_step import Scores, policy_objective, score
from train.rollouts import Array, Samples, draw, engine_config, fitting, shuffled_rows
from train.scalar_head import scalar_head_spec
from train.step import TrainState, make_trainer_of

# Fields that may differ when a run is continued: none of them changes an update by more than rounding.
FREE_FIELDS = ("run_dir", "mesh", "cpu_devices", "deadlines", "writers", "checkpoint", "eval", "rollouts.verifiers",
               "rollouts.verifier_seconds", "rollouts.max_mismatch")  # fmt: skip
EVAL_STEP = 2**31  # Its prompts have random numbers of their own.


@flax.struct.dataclass
class Judged:
    """Samples and what they deserve, [B] each: reward; whether it was judged; whether the answer is right; the reward of the
    greedy answer to the prompt (for `advantage="greedy"`); and [B, K] what the reward is made of (for `normalise_parts`)."""

    samples: Samples
    rewards: Array
    valid: Array
    correct: Array
    baseline: Array | None = None
    parts: Array | None = None


@flax.struct.dataclass
class RLState:
    """All that changes from step to step. `ahead` are the samples of the next step, where those are drawn early."""

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
        loop = RLLoop(config, initial, policy, checkpoints, group, log, began)
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


class RLLoop:
    """The effects of a run, around the pure functions of its `Policy`."""

    def __init__(
        self,
        config: RLConfig,
        initial: InitialModel,
        policy: Policy,
        checkpoints: Checkpoints,
        group: Group,
        log: Log,
        began: float,
    ):
        self.config, self.policy, self.checkpoints, self.group, self.log = config, policy, checkpoints, group, log
        self.run_dir = pathlib.Path(config.run_dir)
        timing = read_jsonl(self.run_dir / "timing.jsonl")
        self.started = time.perf_counter() - max((record["seconds"] for record in timing), default=0.0)
        self.timing = JsonlWriter(self.run_dir / "timing.jsonl")
        self.timing.write({"event": "start", "seconds": self.seconds(), "event_seconds": time.perf_counter() - began,
                           "unix_time": time.time()})  # fmt: skip
        self.task = config.task.make()
        self.tokenizer = initial.tokenizer
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
        self.teacher = self._open_teacher()
        self.learned = self._open_reward_model() if config.reward_model else None
        # Prompts that are too long, or a task without any, are told before the work. A later one of training is left out.
        for example in self._examples("train", 0, 8) + self._examples("eval", 0, config.eval.prompts):
            self._prompt(example)
        self._write_description(initial)
        with self.timed("restore") as record:
            self.state, self.step, self.reference, self.ahead_metrics = self._restore(initial)
            record["restored_step"] = self.step
        self.engine: Engine | None = None
        judges = (Part("right", self.task.score),)
        self.verifiers = Verifiers(judges, config.rollouts.verifiers, config.rollouts.verifier_seconds)
        self.metrics = make_writers(config.writers, self.run_dir, config.name, first_step=self.step + 1)
        self.samples = JsonlWriter(self.run_dir / "samples.jsonl")
        self.progress = Progress(config.steps, self.step, log)
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.phases: dict[str, float] = {}

    # --- Setting up -----------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[Part, ...]:
        """What the reward is made of."""
        config = self.config
        by_task = (Part("right", self.task.score, config.task_weight),) if config.task_weight else ()
        return (*by_task, Part("learned", weight=config.reward_model_weight)) if config.reward_model else by_task

    def _open_reward_model(self) -> LearnedReward:
        """Raises ValueError where it was shown other prompts than are drawn for, or other weights than the run began with."""
        config, source = self.config, self.config.reward_model
        learned = LearnedReward(
            source, config.model, self.policy.trainer.mesh, config.rollouts.max_batch, config.reward_model_steps
        )
        example = self._examples("train", 0, 1)[0]
        theirs = learned.chat.encode_prompt([{"role": "user", "content": example.prompt}]).tolist()
        check(
            theirs == self._prompt(example) and learned.chat.stop_ids == self.stop_ids,
            f"reward_model={source!r} was trained with another tokenizer or chat template: it reads the prompt "
            f"{example.prompt!r} as {theirs}, the policy as {self._prompt(example)}; take one that began with the same model",
        )
        begun = bool(self.checkpoints.steps())
        compare_initial(self.run_dir, "reward_model", source, learned.params, begun)
        return learned

    def _write_description(self, initial: InitialModel) -> None:
        config = self.config
        described = hashlib.sha256(repr((self.task, self.tokenizer.fingerprint)).encode()).hexdigest()[:16]
        peak = peak_flops(jax.local_devices(), config.model.dtype)
        write_json_atomic(self.run_dir / "provenance.json", provenance(self.policy.trainer.mesh, described, peak))
        write_json_atomic(self.run_dir / "config.json", dataclasses.asdict(config))
        self.tokenizer.save(self.run_dir / "tokenizer")
        if initial.chat_template:
            write_atomic(self.run_dir / "tokenizer" / "chat_template.jinja", initial.chat_template.encode())

    def _restore(self, initial: InitialModel) -> tuple[RLState, int, Params | None, dict[str, float]]:
        """The newest sound checkpoint, or the initial state; the reference, if there is one; what is known of samples ahead."""
        config, trainer = self.config, self.policy.trainer
        weights = load_initial(initial, trainer)
        begun = bool(self.checkpoints.steps())
        compare_initial(self.run_dir, "initial_weights", config.initial_weights, weights, begun)
        fresh = trainer.begin(weights, jax.random.key(config.seed), self._teacher_weights(begun))
        reference = None
        if config.policy.kl.needs_reference:
            reference = jax.tree.map(jnp.copy, self.policy.whole(fresh))
        more = (
            jnp.zeros(()),
            jnp.float32(config.policy.kl.reward_coefficient),
            self._no_samples() if config.rollouts.ahead else None,
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
            teacher.tokenizer.fingerprint == self.tokenizer.fingerprint,
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

    def _no_samples(self) -> Judged:
        rows, tokens = self.config.num_rows, self.config.row_tokens
        ints, floats = jnp.zeros((rows, tokens), jnp.int32), jnp.zeros((rows, tokens), jnp.float32)
        flags = jnp.zeros(rows, bool)
        samples = Samples(ints, ints, ints, ints, floats, floats, flags, jnp.zeros(rows, jnp.int32))
        rewards, policy = jnp.zeros(rows, jnp.float32), self.config.policy
        parts = jnp.zeros((rows, len(self._parts())), jnp.float32) if policy.normalise_parts else None
        return Judged(samples, rewards, flags, flags, rewards if policy.advantage == "greedy" else None, parts)

    def _saved(self, state: RLState) -> RLState:
        """What a checkpoint holds."""
        return dataclasses.replace(state, train=state.train.saved())

    # --- Time -----------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Since the run's first start, not counting the time between a kill and a restart."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def timed(self, event: str) -> Iterator[dict[str, Any]]:
        """Records the seconds of what interrupts the steps; the yielded dict takes what else is to be recorded."""
        begin = time.perf_counter()
        more: dict[str, Any] = {}
        with self.group.phase(f"{event} at step {getattr(self, 'step', 0)}"):
            yield more
        self.timing.write({"event": event, "seconds": self.seconds(), "event_seconds": time.perf_counter() - begin, **more})

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin

    # --- Samples --------------------------------------------------------------------------------------------------

    def _examples(self, split: Split, first: int, count: int) -> list[Example]:
        return [
            self.task.example(index, self.config.seed if split == "train" else 0, split)
            for index in range(first, first + count)
        ]

    def _encode(self, example: Example) -> list[int]:
        if self.chat:
            return self.chat.encode_prompt([{"role": "user", "content": example.prompt}]).tolist()
        return list(self.tokenizer.encode_prompt(example.prompt))

    def _prompt(self, example: Example) -> list[int]:
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
            self.progress.say(f"left out, for it exceeds rollouts.max_prompt_tokens: the prompt {example.prompt[:80]!r}")
        return examples, prompts, len(left_out)

    def _judge(self, samples: Samples, examples: list[Example]) -> tuple[Rewards, np.ndarray, dict[str, float]]:
        """Rewards; whether each answer is right, by the task's own verdict; what is reported."""
        texts = [self._text(answer) for answer in samples.answers()]
        asked = [examples[i] for i in samples.group]
        verdicts = self.verifiers(texts, asked)
        for failure in verdicts.failures[:3]:
            self.progress.say(f"verifier {failure.part!r} {failure.kind}: {failure.message}")
        values = dict(verdicts.values)
        if self.learned:
            values["learned"] = self.learned(samples)
        right = np.nan_to_num(values["right"])
        rewards = compose(self._parts(), {part.name: values[part.name] for part in self._parts()})
        return rewards, right == 1, {"reward/right": float(right.mean()), **rewards.metrics, **verdicts.metrics}

    def _text(self, answer: list[int]) -> str:
        """What the verifiers read. Tokens that the tokenizer does not know are drawn like any others, or the trainer would
        score another distribution; they spoil an answer."""
        known = [token for token in answer if token < self.tokenizer.vocab_size]
        return self.tokenizer.decode(known) + ("" if len(known) == len(answer) else "\ufffd")

    def _draw(
        self, prompts: list[list[int]], count: int, step: int, first_prompt: int = 0, sampling: Sampling | None = None
    ) -> Samples:
        config = self.config
        assert self.engine is not None
        return draw(
            self.engine,
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

    def _load_engine(self) -> None:
        """The weights of the trainer, in the layout of decoding."""
        config = self.config
        with self.phase("hand_over"):
            params = jax.block_until_ready(self.policy.hand_over(self.policy.whole(self.state.train)))
        if self.engine is None:
            self.engine = Engine(params, self.policy.sampler, engine_config(config))
        else:
            self.engine.load(params, self.policy.sampler)

    def _samples_of(self, step: int) -> tuple[Judged, dict[str, float]]:
        """Those of step number `step` (from 0), by the weights the engine has. With `resample`, groups whose rewards are all
        equal, or of which no two were judged, are replaced while there are rounds left."""
        config = self.config
        wanted, size = config.rollouts.prompts, config.policy.group_size
        resample = config.policy.zero_variance == "resample"
        rounds = config.sampling_rounds
        found: list[Judged] = []
        metrics: dict[str, float] = {}
        left_out = 0
        for number in range(rounds):
            first = (step * rounds + number) * wanted
            with self.phase("rollout"):
                examples, prompts, too_long = self._fitting(first, wanted)
                left_out += too_long
                drawn_so = Sampling(temperature=config.rollouts.temperature, top_k=config.rollouts.top_k)
                samples = self._draw(prompts, size, step, number * wanted, drawn_so)
            with self.phase("reward"):
                rewards, right, judged = self._judge(samples, examples)
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
            groups = group_statistics(together.rewards, together.samples.group, together.valid)
            compared = ~groups.all_equal & (groups.size > 1)
            informative = np.asarray(compared).reshape(-1, size)[:, 0]
            chosen, missing = select_groups(jnp.asarray(informative), wanted)
            if not int(missing):
                break
        if resample:
            rows = (np.asarray(chosen)[:, None] * size + np.arange(size)).reshape(-1)
            together = jax.tree.map(lambda x: x[rows], together)
            metrics["rounds"] = number + 1
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
        with self.phase("rollout"):
            samples = self._draw(prompts, 1, step, sampling=Sampling(temperature=0.0))
        with self.phase("reward"):
            return self._judge(samples, examples)[0]

    # --- Running --------------------------------------------------------------------------------------------------

    def run(self, stop_requested: Callable[[], bool]) -> int:
        config, begun, deadlines = self.config, self.step, self.config.deadlines
        if self.step == 0:
            self._evaluate()
        if config.rollouts.ahead and self.step == 0:
            with self.group.phase("drawing the answers of step 1"):
                self._load_engine()
                judged, self.ahead_metrics = self._samples_of(0)
            self.state = dataclasses.replace(self.state, ahead=judged)
        while self.step < config.steps:
            # The first one of a start compiles, too.
            allowed = deadlines.step_seconds if self.step > begun else deadlines.phase_seconds
            self.group.watchdog.begin(f"step {self.step + 1}", allowed)
            begin = time.perf_counter()
            self.phases = {}
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
            phases = {f"{name}_seconds": value for name, value in self.phases.items()}
            rates = {"tokens": tokens, "tokens_per_second": tokens / seconds}
            self.timing.write({"step": self.step, "seconds": self.seconds(), "step_seconds": seconds, **rates, **phases})
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
            coming = self.pool.submit(self._samples_of, step + 1) if step + 1 < config.steps else None
        else:
            judged, drawn_metrics = self._samples_of(step)
            coming = None
        with self.phase("score"):
            constants, metrics = self._constants(judged)
            constants, metrics = jax.device_get((constants, metrics))
        if config.rollouts.max_mismatch and metrics["mismatch_kl"] > config.rollouts.max_mismatch and not config.rollouts.ahead:
            raise RuntimeError(
                f"step {step + 1}: KL(sampler, trainer) is {metrics['mismatch_kl']:.3g} nats a token, more than "
                f"rollouts.max_mismatch={config.rollouts.max_mismatch}: what was sampled is not what is trained"
            )
        with self.phase("update"):
            sums = jax.device_get(self._update(judged.samples, constants, step))
        updated = {name: float(np.mean([update[name] for update in sums])) for name in sums[0]} | {"updates": len(sums)}
        self._adapt(judged, metrics, updated["entropy"])
        if coming is not None:
            with self.phase("wait"):
                following, self.ahead_metrics = coming.result()
            self.state = dataclasses.replace(self.state, ahead=following)
        lengths = judged.samples.mask.sum(1)
        metrics |= rollout_metrics(judged.rewards, judged.correct, lengths, judged.samples.truncated, judged.valid)
        return {**drawn_metrics, **{name: float(value) for name, value in metrics.items()}, **updated}, int(lengths.sum())

    def _rows(self, samples: Samples) -> dict[str, np.ndarray]:
        return {name: getattr(samples, name) for name in ("tokens", "targets", "segment_ids", "positions")}

    def _constants(self, judged: Judged) -> tuple[PolicyBatch, dict[str, jax.Array]]:
        """Advantages and weights, of the whole batch."""
        config, samples = self.config, judged.samples
        rows = jax.device_put(self._rows(samples) | {"mask": samples.mask}, self.policy.trainer.batch_sharding)
        now = Scores(samples.behavior_logprobs, None, None)
        if config.rollouts.score:
            now = self.policy.score(self.policy.whole(self.state.train), rows)
        reference = None if self.reference is None else self.policy.score(self.reference, rows).logprobs
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
            baseline=self.state.baseline if config.policy.advantage == "ema" else judged.baseline,
            parts=judged.parts,
            part_weights=None if judged.parts is None else jnp.asarray([part.weight for part in self._parts()], jnp.float32),
        )
        constants, metrics = self.policy.prepare(scored, self.state.kl_coefficient, self.state.entropy_coefficient)
        if not config.rollouts.score:  # Nothing was compared.
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

    def _adapt(self, judged: Judged, metrics: dict[str, Any], entropy: float) -> None:
        """The baseline and the coefficients of the next step."""
        policy = self.config.policy
        if policy.advantage == "ema":
            baseline = update_ema(self.state.baseline, judged.rewards, judged.valid, policy.ema_decay)
            self.state = dataclasses.replace(self.state, baseline=baseline)
        if policy.kl.target:
            adapted = adapt_kl_coefficient(
                self.state.kl_coefficient, metrics["reference_kl"], self.config.num_rows, policy.kl.target, policy.kl.horizon
            )
            metrics["kl_coefficient"] = float(self.state.kl_coefficient)  # of this step
            self.state = dataclasses.replace(self.state, kl_coefficient=jnp.asarray(adapted, jnp.float32))
        if policy.entropy_target:
            assert self.state.entropy_coefficient is not None
            adapted = adapt_coefficient(
                self.state.entropy_coefficient, jnp.float32(entropy), policy.entropy_target, policy.entropy_step
            )
            metrics["entropy_coefficient"] = float(self.state.entropy_coefficient)  # of this step
            self.state = dataclasses.replace(self.state, entropy_coefficient=adapted)

    def _save(self, complete: bool) -> None:
        with self.timed("checkpoint") as record:
            record["at_step"] = self.step
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
        """The same prompts every time, which no step of training sees."""
        with self.timed("eval") as record:
            record["at_step"] = self.step
            config = self.config.eval
            self._load_engine()
            examples = self._examples("eval", 0, config.prompts)
            samples = self._draw([self._prompt(example) for example in examples], config.samples, EVAL_STEP)
            rewards, right, _ = self._judge(samples, examples)
            counts = right.reshape(config.prompts, config.samples).sum(1)
            scores = {
                "eval/pass@1": float(pass_at_k(config.samples, counts, 1).mean()),
                f"eval/pass@{config.samples}": float(pass_at_k(config.samples, counts, config.samples).mean()),
                "eval/reward": float(rewards.total[rewards.valid].mean()) if rewards.valid.any() else 0.0,
                "eval/length": float(samples.mask.sum(1).mean()),
                "eval/truncated_fraction": float(samples.truncated.mean()),
            }
            self.metrics.write(self.step, scores)
            for i in range(min(8, config.prompts)):
                row = i * config.samples
                text = self._text(samples.answers()[row])
                sample = {"step": self.step, "prompt": examples[i].prompt, "text": text, "reward": float(rewards.total[row])}
                self.samples.write(sample)
            self.progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))

    def _write_result(self) -> None:
        """`result.json`, from the files of the run."""
        self.metrics.flush()
        scores = [record for record in read_jsonl(self.run_dir / "metrics.jsonl") if "eval/pass@1" in record]
        steps = {record["step"]: record for record in read_jsonl(self.run_dir / "timing.jsonl") if "step" in record}
        result = {
            **{name: value for name, value in scores[-1].items() if name != "step"},
            **{f"initial_{name}": value for name, value in scores[0].items() if name != "step"},
            "steps": self.step,
            "drawn_tokens": sum(record["tokens"] for record in steps.values()),
            "train_seconds": self.seconds(),
        }
        write_json_atomic(self.run_dir / "result.json", result)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # All of them, whatever one of them raises.
            for part in (self.progress, self.timing, self.samples, self.metrics, self.verifiers):
                stack.callback(part.close)
            stack.callback(self.pool.shutdown, wait=True, cancel_futures=True)
