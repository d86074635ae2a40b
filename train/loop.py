"""The training loop: prepares, restores, steps, evaluates, saves, and undoes what went wrong.

Everything is a function of (config, seed, step), so a run that is killed at any moment continues to the same bits:
  - a checkpoint of step s is written only after the metrics up to s are on disk and were found good;
  - a start drops the metrics after the checkpoint it restores, and the batch of step s depends on nothing but s;
  - data that led to a bad loss is skipped from a record on disk (`incidents.jsonl`).
Of several processes each does all of this, on its rows of a batch; what they decide on is the same everywhere (the metrics), or
told by process 0 (what is on disk), which alone writes.
Step t+1 is dispatched before the metrics of step t are read, so the devices never wait for the host.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import secrets
import signal
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np

from data.config import IGNORE
from data.loader import Batches, held_out_batches, load, num_held_out_batches
from data.prepare import PreparedData, prepare
from inference.generate import generate
from inference.sampling import Sampling
from model.flops import train_flops_per_token
from train.baseline import xz_bits_per_byte
from train.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, check_room
from train.config import PREEMPTED, TrainConfig, check
from train.distillation import TEACHER
from train.distributed import ALONE, Group, global_batch, local_rows
from train.files import only_process_in, write_atomic, write_json_atomic
from train.initial import InitialModel, compare_initial, load_initial, open_initial
from train.metrics import JsonlWriter, NoWriter, Writer, check_writers, make_writers, read_jsonl, truncate_jsonl
from train.peak import peak_flops
from train.progress import Progress, rate
from train.provenance import write_provenance
from train.step import Trainer, TrainState, abstract_batch, make_trainer
from train.timing import Timing

Log = Callable[[str], None]

# Fields of a config that may differ when a run is continued: none of them changes an update by more than rounding.
FREE_FIELDS = ("run_dir", "mesh", "cpu_devices", "deadlines", "writers", "log_every", "checkpoint", "eval", "data.cache_dir",
               "data.loader_threads", "data.prefetch_batches", "rollback.max_incidents", "xz_baseline")  # fmt: skip


# Where the text lies may change too: `compare_data` looks at what it is.
MOVED = re.compile(r"(data\.)?sources\.[\w.-]+\.(path|origin)")


class Incident(Exception):
    """A loss that must not be trained on."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


def train(config: TrainConfig, log: Log = print, group: Group | None = None, began: float | None = None) -> int:
    """Runs, or continues, the job to its end. Returns the exit status: 0, or PREEMPTED after SIGTERM or Ctrl-C.

    Args:
      group: the processes that all make this call, with the same config; by default this one is alone. Of several, any that
        raises ends them all.
      began: when the process did, by `time.perf_counter`; by default now.

    Raises:
      ValueError, OSError: bad input, told before anything expensive; see the message.
      RuntimeError: the loss went bad more than `rollback.max_incidents` times.
    """
    began = time.perf_counter() if began is None else began
    run_dir = pathlib.Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(group or Group(deadlines=config.deadlines))
        # What this config cannot do here is told before anything is written.
        check_writers(config.writers)
        trainer = make_trainer(config)
        initial = open_initial(config.initial_weights, config.model) if config.initial_weights else None
        if group.is_first:
            stack.enter_context(only_process_in(run_dir))
        share_directory(run_dir, group)
        # Whatever ends the loop, a checkpoint that is being written is completed first.
        checkpoints = Checkpoints(str(run_dir / "checkpoints"), config.checkpoint.keep, group)
        stack.enter_context(contextlib.closing(checkpoints))
        compare_config(run_dir, config, checkpoints)
        # One more than are kept exists while it is written; a short run makes fewer, and perhaps one on SIGTERM.
        copies = min(config.checkpoint.keep, math.ceil(config.steps / config.checkpoint.every)) + 1
        check_room(str(run_dir), trainer.abstract_state.saved(), copies - len(checkpoints.steps()))
        teacher = open_initial(config.distillation.teacher, config.distillation.model) if config.distillation else None
        data = prepare_together(config, group, log, initial)
        check(
            teacher is None or teacher.tokenizer.fingerprint == data.tokenizer.fingerprint,
            "distillation.teacher has another tokenizer than the data: set data.tokenizer.path to that of the teacher",
        )
        check(
            data.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {data.tokenizer.vocab_size} tokens, but model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to {data.tokenizer.vocab_size} or more",
        )
        compare_data(run_dir, data, checkpoints)
        check_prompts(config, data)
        loop = Loop(config, data, trainer, checkpoints, log, group, began, initial, teacher)
        stack.enter_context(contextlib.closing(loop))
        return loop.run(stack.enter_context(stop_on_signal()))


def share_directory(run_dir: pathlib.Path, group: Group) -> None:
    """Raises ValueError, naming the process, where the run's directory is not the same one for all processes."""
    group.watch_into(run_dir)
    if group.count == 1:
        return
    mark = run_dir / ".shared"
    said = group.from_first("shared", lambda: secrets.token_hex(8))
    if group.is_first:
        write_atomic(mark, said.encode())
    group.barrier("shared directory")
    seen = mark.read_text() if mark.exists() else "nothing"
    group.compare({f"the content of {mark}": said if seen == said else f"not {said}"})


def prepare_together(config: TrainConfig, group: Group, log: Log, initial: InitialModel | None = None) -> PreparedData:
    """Process 0 first; the others find its work, or do it again where they share no cache directory."""
    seconds = config.deadlines.data_seconds
    with group.phase("preparing data", seconds):
        if not group.is_first:
            group.barrier("data of process 0", seconds)
        given = {} if initial is None else {"tokenizer": initial.tokenizer, "chat_template": initial.chat_template}
        data = prepare(config.data, config.seed, log=log, **given)
        if group.is_first:
            group.barrier("data of process 0", seconds)
        group.barrier("data", seconds)
    return data


def compare_config(run_dir: pathlib.Path, config: TrainConfig, checkpoints: Checkpoints) -> None:
    """Compares the config with the one of the run that is to be continued.

    Only FREE_FIELDS may differ, and mixtures of sources that start at data steps which no checkpoint has seen yet.

    Raises:
      ValueError: the directory belongs to another config; every differing key is named.
    """
    path = run_dir / "config.json"
    here = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        there = json.loads(path.read_text())
        skipped = skipped_windows(rolled_back(run_dir))
        seen = (checkpoints.steps() or [0])[-1] + sum(last - first + 1 for first, last in skipped)
        past = [[mixture for mixture in side["data"]["mixtures"] if mixture["start_step"] < seen] for side in (there, here)]
        free = (*FREE_FIELDS, "data.mixtures") if past[0] == past[1] else FREE_FIELDS
        differing = [
            f"{key} (there {old!r}, here {new!r})"
            for key, old, new in differences(there, here)
            if not any(key == field or key.startswith(field + ".") for field in free) and not MOVED.fullmatch(key)
        ]
        check(
            not differing,
            f"{run_dir} holds a run of another config; different are {', '.join(differing[:8])}. Continue it with its own "
            "config, choose another --config.run_dir, or move the old run away.",
        )


def compare_data(run_dir: pathlib.Path, data: PreparedData, checkpoints: Checkpoints) -> None:
    """Raises ValueError where a run is to be continued on other data than it began with."""
    path = run_dir / "data_manifest.json"
    if path.exists() and checkpoints.steps():
        found = differences(json.loads(path.read_text()), json.loads(json.dumps(data.manifest)))
        differing = [key for key, _, _ in found if not MOVED.fullmatch(key)]
        check(
            not differing,
            f"the data of {run_dir} has changed since the run began ({', '.join(differing[:8])}): bring the old data back, or "
            "choose another --config.run_dir",
        )


def check_prompts(config: TrainConfig, data: PreparedData) -> None:
    """Raises ValueError for prompts that could not be continued at the first evaluation."""
    for prompt in config.eval.sample_prompts:
        length = len(data.encode_prompt(prompt))
        check(length > 0, f"eval.sample_prompts: {prompt!r} has no token: give some text")
        check(
            length + config.eval.sample_tokens <= config.model.max_seq_len,
            f"eval.sample_prompts: {prompt!r} has {length} tokens; with eval.sample_tokens={config.eval.sample_tokens} that "
            f"exceeds model.max_seq_len={config.model.max_seq_len}: shorten one of them",
        )


def rolled_back(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """The recorded incidents but those at which a run gave up."""
    return [record for record in read_jsonl(run_dir / "incidents.jsonl") if not record.get("gave_up")]


def skipped_windows(incidents: list[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    """The disjoint windows (first, last) of data steps that incidents leave out.

    Windows overlap where a run had to go back behind an earlier incident, because a checkpoint was damaged.
    """
    merged: list[tuple[int, int]] = []
    for first, last in sorted((record["first_skipped"], record["last_skipped"]) for record in incidents):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{prefix}.{i}")
    elif old != new:
        yield prefix, old, new


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and a first Ctrl-C only set a flag, which the yielded function returns."""
    received = []

    def receive(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Loop:
    """The effects of a run, around the pure functions of its `Trainer`."""

    def __init__(
        self,
        config: TrainConfig,
        data: PreparedData,
        trainer: Trainer,
        checkpoints: Checkpoints,
        log: Log,
        group: Group,
        began: float,
        initial: InitialModel | None = None,
        teacher: InitialModel | None = None,
    ):
        self.teacher = teacher
        self.config, self.data, self.trainer, self.checkpoints = config, data, trainer, checkpoints
        self.log, self.group, self.initial = log, group, initial
        self.run_dir = pathlib.Path(config.run_dir)
        self.incidents = group.from_first("incidents", lambda: rolled_back(self.run_dir))
        self.timing = Timing(self.run_dir, group, began)
        self.data_seconds = 0.0  # waited for batches since the last step that was recorded
        self.rows = local_rows(trainer.batch_sharding, (config.batch_size, config.data.seq_len))
        self.peak = group.count * peak_flops(jax.local_devices(), config.model.dtype)
        self.flops_per_step = train_flops_per_token(config.model, config.data.seq_len, config.lora) * config.tokens_per_step
        self.step_function = self._compile()
        if group.is_first:
            write_provenance(self.run_dir, trainer.mesh, data.manifest_hash, self.peak)
            write_json_atomic(self.run_dir / "config.json", dataclasses.asdict(config))
            write_json_atomic(self.run_dir / "data_manifest.json", data.manifest)
            data.tokenizer.save(self.run_dir / "tokenizer")
            if data.chat is not None:
                write_atomic(self.run_dir / "tokenizer" / "chat_template.jinja", data.chat.template.encode())
        self.state: Any = None
        self.step = 0
        self.state, self.step, self.losses = self._restore()
        self.metrics, self.samples = self._open_writers()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.progress = Progress(config.steps, self.step, log)

    # --- Setting up -----------------------------------------------------------------------------------------------

    def _writer(self, name: str) -> JsonlWriter | NoWriter:
        return JsonlWriter(self.run_dir / name) if self.group.is_first else NoWriter()

    def _compile(self) -> Any:
        with self.timing.timed("compile", 0):
            lowered = self.trainer.step.lower(self.trainer.abstract_state, abstract_batch(self.config))
            self.group.compare(facts(self.config, self.data, lowered.as_text() if self.group.count > 1 else ""))
            return lowered.compile()

    def _restore(self, among: list[int] | None = None) -> tuple[TrainState, int, collections.deque[float]]:
        """The newest sound checkpoint (`among` these steps), or the initial state; metrics that came after it are dropped."""
        with self.timing.timed("restore", self.step) as record:
            restored = self.checkpoints.restore_newest(self.trainer.abstract_state.saved(), self.log, among=among)
            if restored is None:
                state, step, losses = self._initial_state(), 0, []
            else:
                state, saved, step = restored
                losses = saved["recent_losses"]
                state = state.replace(frozen=self._frozen())
                self.log(f"continuing from the checkpoint of step {step}")
            record["restored_step"] = step
            # Gloo connects at the first collective, within 30 s; compiling may take one process longer than another.
            self.group.barrier("the state is there")
        if self.group.is_first:
            truncate_jsonl(self.run_dir / "metrics.jsonl", step + 1)
            truncate_jsonl(self.run_dir / "samples.jsonl", step + 1)
        return state, step, collections.deque(losses, maxlen=self.config.rollback.window)

    def _initial_state(self) -> TrainState:
        key, taught_by = jax.random.key(self.config.seed), self._teacher_weights(begun=False)
        if self.initial is None:
            return self.trainer.init(key, taught_by)
        self.log(f"beginning with the weights of {self.config.initial_weights}")
        return self.trainer.begin(self._initial_weights(begun=False), key, taught_by)

    def _teacher_weights(self, begun: bool) -> Any:
        if self.teacher is None:
            return None
        assert self.config.distillation is not None
        weights = self.teacher.load(self.trainer.abstract_state.frozen)
        compare_initial(self.run_dir, "teacher", self.config.distillation.teacher, weights, begun, self.group)
        return weights

    def _initial_weights(self, begun: bool) -> Any:
        assert self.initial is not None
        weights = load_initial(self.initial, self.trainer)
        if self.trainer.abstract_state.frozen is not None and self.teacher is None:
            compare_initial(self.run_dir, "initial_weights", self.config.initial_weights, weights, begun, self.group)
        return weights

    def _frozen(self) -> Any:
        """What the adapters of LoRA adapt, the reference or the teacher, which is in no checkpoint; kept over a rollback."""
        if self.trainer.abstract_state.frozen is None:
            return None
        if self.state is None and self.teacher is not None:
            return self._teacher_weights(begun=True)
        if self.state is None:
            return self.trainer.freeze(self._initial_weights(begun=True))
        return self.state.frozen

    def _open_writers(self) -> tuple[Writer | NoWriter, JsonlWriter | NoWriter]:
        if not self.group.is_first:
            return NoWriter(), NoWriter()
        metrics = make_writers(self.config.writers, self.run_dir, self.config.name, first_step=self.step + 1)
        return metrics, self._writer("samples.jsonl")

    def _batches(self) -> Generator[dict[str, np.ndarray]]:
        batches = Batches(
            self.data,
            self.config.data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rows=self.rows,
            skipped=skipped_windows(self.incidents),
        )
        data = self.config.data
        self.data_step = batches.data_step
        return load(batches, self.step, self.config.steps, data.loader_threads, data.prefetch_batches)

    def _next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        begin = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - begin
        return global_batch(batch, self.rows, self.trainer.batch_sharding, self.config.batch_size)

    # --- Running --------------------------------------------------------------------------------------------------

    def run(self, stop_requested: Callable[[], bool]) -> int:
        while True:
            try:
                status = self._advance(stop_requested)
            except Incident as incident:
                self._roll_back(incident)
                continue
            if status == 0 and self.group.is_first:
                with self.timing.timed("result", self.step):
                    self._write_result()
            return status

    def _advance(self, stop_requested: Callable[[], bool]) -> int:
        """Steps until the end (0), a stop (PREEMPTED) or an Incident."""
        with contextlib.closing(self._batches()) as batches:
            return self._advance_over(batches, stop_requested)

    def _advance_over(self, batches: Iterator[dict[str, np.ndarray]], stop_requested: Callable[[], bool]) -> int:
        config = self.config
        self.last_settled = time.perf_counter()
        while self.step < config.steps:
            self.group.watchdog.begin(f"reading the batch of step {self.step + 1}", config.deadlines.step_seconds)
            batch = self._next(batches)
            self.group.watchdog.begin(f"step {self.step + 1}", config.deadlines.step_seconds)
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.step_function(self.state, batch)
            self._settle()
            self.step += 1
            self.pending = (self.step, metrics)

            last = self.step == config.steps
            stop = self.group.stops_after(self.step, stop_requested()) and not last
            evaluate = last or self.step % config.eval.every == 0
            save = last or stop or self.step % config.checkpoint.every == 0
            if evaluate or save:
                self._settle()
            if evaluate:
                self._evaluate(last)
            if save:
                self._save(complete=last or stop)
            if stop:
                self.log(f"stopped on a signal; step {self.step} is saved, and the same command continues from it")
                return PREEMPTED
        return 0

    def _settle(self) -> None:
        """Reads, checks and records the metrics of the step dispatched last."""
        if self.pending is None:
            return
        (step, device_metrics), self.pending = self.pending, None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        self._check_loss(step, metrics)
        now = time.perf_counter()
        step_seconds, self.last_settled = now - max(self.last_settled, self.timing.interrupted), now
        per_second = self.config.tokens_per_step / step_seconds
        mfu = self.flops_per_step / step_seconds / self.peak
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.metrics.write(step, {"tokens": step * self.config.tokens_per_step, **metrics})
            rates = {"tokens_per_second": per_second, "mfu": mfu}
            self.timing.step(step, step_seconds=step_seconds, data_seconds=self.data_seconds, **rates)
            self.data_seconds = 0.0
        self.progress.update(step, f"loss {metrics['loss']:.4f}, {rate(per_second)} tokens/s, MFU {mfu:.1%}")

    def _check_loss(self, step: int, metrics: dict[str, float]) -> None:
        loss, rollback = metrics["loss"], self.config.rollback
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(metrics[name]):
                raise Incident(step, f"{name} is {metrics[name]}")
        if self._mixtures_begun(step) > self._mixtures_begun(step - 1):
            self.losses.clear()  # Those of other data are no measure.
        if rollback.spike_factor and len(self.losses) == rollback.window:
            median = statistics.median(self.losses)
            if loss > rollback.spike_factor * max(median, 1.0):
                raise Incident(step, f"loss {loss:.4g} is above {rollback.spike_factor} x the recent median {median:.4g}")
        self.losses.append(loss)

    def _mixtures_begun(self, step: int) -> int:
        return sum(mixture.start_step <= self.data_step(step - 1) for mixture in self.config.data.mixtures)

    def _roll_back(self, incident: Incident) -> None:
        """Records the incident, then goes back to the last checkpoint; the data since then will not be seen again."""
        self.log(str(incident))
        record = {"step": incident.step, "reason": incident.reason, "seconds": self.timing.seconds()}
        incidents = self._writer("incidents.jsonl")
        if len(self.incidents) >= self.config.rollback.max_incidents:
            incidents.write_and_close({**record, "gave_up": True})
            raise RuntimeError(
                f"{incident}. This is incident number {len(self.incidents) + 1}, more than rollback.max_incidents="
                f"{self.config.rollback.max_incidents}: look at {self.run_dir}/incidents.jsonl, then lower the learning rate, "
                "or clip harder, and start the run anew"
            )
        self.metrics.close()
        self.samples.close()
        # The old state makes room for the one that is read.
        self.pending = None
        self.state = self.state.replace(params=None, opt_state=None, ema=None)
        self.state, self.step, self.losses = self._restore_scheduled()
        for step in self.checkpoints.steps():
            if step > self.step:
                self.checkpoints.delete(step)
        record |= {"first_skipped": self.data_step(self.step), "last_skipped": self.data_step(incident.step - 1)}
        # Last: a kill before this line repeats the steps, and the incident, instead of skipping data that it has seen.
        incidents.write_and_close(record)
        self.incidents.append(record)
        self.metrics, self.samples = self._open_writers()
        self.log(f"went back to step {self.step}; data steps {record['first_skipped']} to {record['last_skipped']} are skipped")

    def _restore_scheduled(self) -> tuple[TrainState, int, collections.deque[float]]:
        """The newest scheduled checkpoint: without a SIGTERM there would be no other, and the same data must be skipped.

        Where none of them can be read, the newest of all; where none was made yet, the initial state.
        """
        scheduled = [step for step in self.checkpoints.steps() if self._is_scheduled(step)]
        try:
            return self._restore(scheduled)
        except CheckpointError as error:
            self.log(str(error))
            return self._restore()

    def _is_scheduled(self, step: int) -> bool:
        try:
            return self.checkpoints.metadata(step)["scheduled"]
        except DamagedCheckpoint:
            return True  # Reading it will tell.

    def _save(self, complete: bool) -> None:
        """Starts to write a checkpoint; returns when it is `complete`, or else when the next step may run."""
        with self.timing.timed("checkpoint", self.step, at_step=self.step):
            self.metrics.flush()
            self.samples.flush()
            # One made on SIGTERM is deleted once there is a newer one, so that it takes no scheduled one's place.
            for step in self.checkpoints.steps()[:-1]:
                if not self._is_scheduled(step):
                    self.checkpoints.delete(step)
            scheduled = self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps
            self.checkpoints.save(self.step, self.state.saved(), {"recent_losses": list(self.losses), "scheduled": scheduled})
            if complete:
                self.checkpoints.wait()

    # --- Held-out data --------------------------------------------------------------------------------------------

    def _eval_params(self) -> Any:
        params = self.state.ema if self.state.ema is not None else self.state.params
        return self.trainer.whole(params, self.state.frozen)

    def _evaluate(self, last: bool) -> None:
        """On the same held-out rows at every step, so that the scores are a curve; after the last step on all of them too."""
        with self.timing.timed("eval", self.step, at_step=self.step):
            limit = self.config.eval.max_batches
            scores = evaluate(self.trainer, self._eval_params(), self.data, limit, self.group, self.state.frozen)
            if last:
                final = scores
                if self._leaves_rows_out():
                    final = evaluate(self.trainer, self._eval_params(), self.data, 0, self.group, self.state.frozen)
                scores |= {f"final_{name}": value for name, value in final.items()}
            for name, value in scores.items():
                if not math.isfinite(value):
                    raise Incident(self.step, f"{name} is {value}")
            self.metrics.write(self.step, scores)
            self.progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            for prompt, text in self._sample():
                self.samples.write({"step": self.step, "prompt": prompt, "text": text})

    def _leaves_rows_out(self) -> bool:
        rows, limit = self.config.batch_size // self.config.accumulation, self.config.eval.max_batches
        return any(0 < limit < num_held_out_batches(self.data, source, rows) for source in self.data.held_out)

    def _sample(self) -> Iterator[tuple[str, str]]:
        settings, tokenizer = self.config.eval, self.data.tokenizer
        if not settings.sample_prompts:
            return
        params = {name: leaf for name, leaf in self._eval_params().items() if name != TEACHER}
        outputs = generate(
            params,
            self.trainer.model,
            [self.data.encode_prompt(prompt) for prompt in settings.sample_prompts],
            max_tokens=settings.sample_tokens,
            seed=self.config.seed,
            sampling=Sampling(temperature=settings.sample_temperature),
            vocab_size=tokenizer.vocab_size,
            stop_ids=self.data.stop_ids,
        )
        for prompt, tokens in zip(settings.sample_prompts, outputs, strict=True):
            yield prompt, tokenizer.decode(tokens)

    def _write_result(self) -> None:
        """`result.json`, from the files of the run: the same however often it was interrupted.

        Raises:
          RuntimeError: they lack what it is made of.
        """
        self.metrics.flush()
        last = [record for record in read_jsonl(self.run_dir / "metrics.jsonl") if record["step"] == self.step]
        scores = {name[len("final_") :]: x for record in last for name, x in record.items() if name.startswith("final_")}
        rates = [record["tokens_per_second"] for record in read_jsonl(self.run_dir / "timing.jsonl") if "step" in record]
        for name, found in (("metrics.jsonl", scores), ("timing.jsonl", rates)):
            if not found:
                raise RuntimeError(
                    f"the run is finished, but {self.run_dir / name} lacks what its last step wrote, and result.json was left "
                    f"as it is: bring the file back, or move {self.run_dir}/checkpoints/{self.step} away and start the same "
                    "command again, which repeats the steps since the checkpoint before it"
                )
        result = {
            **scores,
            "tokens_per_second": statistics.median(rates),
            "steps": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "train_seconds": self.timing.seconds(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.trainer.abstract_state.params)),
        }
        if self.config.xz_baseline:
            texts = (text for name in self.data.held_out for text in self.data.held_out_texts(name))
            result["baseline_xz_bits_per_byte"] = xz_bits_per_byte(texts)
        write_json_atomic(self.run_dir / "result.json", result)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # All of them, whatever one of them raises.
            for part in (self.progress, self.timing, self.samples, self.metrics):
                stack.callback(part.close)


def facts(config: TrainConfig, data: PreparedData, program: str) -> dict[str, str]:
    """What must be the same on all processes; where a path lies need not be."""
    tree = {key: value for key, value in dataclasses.asdict(config).items() if key != "run_dir"}
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in ("cache_dir", "sources", "tokenizer")}
    return {
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "config": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16],
        "data": data.manifest_hash,
        "program of a step": hashlib.sha256(program.encode()).hexdigest()[:16],
    }


def evaluate(
    trainer: Trainer, params: Any, data: PreparedData, max_batches: int = 0, group: Group = ALONE, frozen: Any = None
) -> dict[str, float]:
    """Scores on held-out data, over all sources and for each where there are several: loss per token (nats) and bits per byte,
    or loss and accuracy per pair, labelled answer or labelled step.

    The bytes are those of the predicted tokens; a document's first token is context only. Over all sources, each weighs by all
    of its held-out tokens or answers, however many of its batches were taken. KTO's reference point is that of a batch.

    Args:
      max_batches: of each source; 0 is all.
      frozen: of the state.
    """
    config = trainer.config
    batch_size = config.batch_size // config.accumulation
    rows = local_rows(trainer.batch_sharding, (batch_size, config.data.seq_len))
    summed = ("loss", "accuracy") if config.objective else ("loss",)
    totals: dict[str, list[float]] = {}
    for source in data.held_out:
        sums = []
        counts = np.zeros((2, rows.size))  # of each row of a batch: predicted tokens and their bytes; or pairs, or steps
        for batch in held_out_batches(data, config.data, source, batch_size, max_batches, rows=rows):
            if config.objective and config.objective.content == "steps":
                counts[0] += ((batch["labels"] != IGNORE) & (batch["segment_ids"] > 0)).sum(1)
            elif config.objective:
                counts[0] += batch["segment_ids"].max(1) // 2
            else:
                counts += [(n * batch["weights"]).sum(1) for n in (1, data.tokenizer.byte_lengths[batch["targets"]])]
            on_devices = global_batch(batch, rows, trainer.batch_sharding, batch_size)
            if sums:  # One at a time: see `train.checkpoint.digests`.
                jax.block_until_ready(sums[-1])
            if trainer.prepare:
                on_devices = jax.block_until_ready(trainer.prepare(params, frozen, on_devices))
            sums.append(trainer.evaluate(params, on_devices))
        # Several processes may hold the same row.
        by_row: dict[str, list[float]] = {}
        for told in group.gather("held-out counts", json.dumps(dict(zip(rows.tolist(), counts.T.tolist(), strict=True)))):
            by_row |= json.loads(told)
        counted = [sum(column) for column in zip(*by_row.values(), strict=True)]
        totals[source] = [*counted, *(sum(float(jax.device_get(metrics[name])) for metrics in sums) for name in summed)]

    def scores(sums: list[float], suffix: str) -> dict[str, float]:
        number, num_bytes, loss, *accuracy = sums
        if accuracy:
            return {f"val_loss{suffix}": loss / number, f"val_accuracy{suffix}": accuracy[0] / number}
        return {f"val_loss{suffix}": loss / number, f"bits_per_byte{suffix}": loss / math.log(2) / num_bytes}

    held_out = {source: data.manifest["sources"][source]["held_out"] for source in totals}
    all_of = {source: _num_judged(split) if config.objective else split["targets"] for source, split in held_out.items()}
    weighted = [[all_of[source] / sums[0] * x for x in sums] for source, sums in totals.items()]
    result = scores([sum(column) for column in zip(*weighted, strict=True)], "")
    if len(totals) > 1:
        for source, sums in totals.items():
            result |= scores(sums, f"/{source}")
    return result


def _num_judged(split: dict[str, Any]) -> int:
    """Labelled steps, pairs or labelled answers, by the manifest."""
    return split["steps"] if "steps" in split else split["sequences"] // 2
