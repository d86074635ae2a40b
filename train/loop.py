"""The training loop: prepares, restores, steps, evaluates, saves, and undoes what went wrong.

Everything is a function of (config, seed, step), so a run that is killed at any moment continues to the same bits:
  - a checkpoint of step s is written only after the metrics up to s are on disk and were found good;
  - a start drops the metrics after the checkpoint it restores, and the batch of step s depends on nothing but s;
  - data that led to a bad loss is skipped from a record on disk (`incidents.jsonl`).
Step t+1 is dispatched before the metrics of step t are read, so the devices never wait for the host.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import signal
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from data.loader import Batches, held_out_batches, load
from data.prepare import PreparedData, prepare
from inference.sample import SamplingConfig, generate
from model.flops import train_flops_per_token
from train.baseline import xz_bits_per_byte
from train.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from train.config import PREEMPTED, TrainConfig, check
from train.files import only_process_in, write_json_atomic
from train.metrics import JsonlWriter, Writer, check_writers, make_writers, read_jsonl, truncate_jsonl
from train.peak import matmul_peak
from train.progress import Progress
from train.provenance import provenance
from train.step import Trainer, TrainState, abstract_batch, make_trainer

Log = Callable[[str], None]

# Fields of a config that may differ when a run is continued: none of them changes an update by more than rounding.
FREE_FIELDS = ("run_dir", "mesh", "cpu_devices", "writers", "log_every", "checkpoint", "eval", "data.cache_dir",
               "data.loader_threads", "data.prefetch_batches", "rollback.max_incidents", "xz_baseline")  # fmt: skip


# Where the text lies may change too: `compare_data` looks at what it is.
MOVED = re.compile(r"(data\.)?sources\.[\w.-]+\.(path|origin)")


class Incident(Exception):
    """A loss that must not be trained on."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


def train(config: TrainConfig, log: Log = print) -> int:
    """Runs, or continues, the job to its end. Returns the exit status: 0, or PREEMPTED after SIGTERM or Ctrl-C.

    Raises:
      ValueError, OSError: bad input, told before anything expensive; see the message.
      RuntimeError: the loss went bad more than `rollback.max_incidents` times.
    """
    check(jax.process_count() == 1, "training on several hosts is not implemented: run one process")
    check_writers(config.writers)
    run_dir = pathlib.Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_process_in(run_dir))
        # Whatever ends the loop, a checkpoint that is being written is completed first.
        checkpoints = Checkpoints(str(run_dir / "checkpoints"), config.checkpoint.keep)
        stack.enter_context(contextlib.closing(checkpoints))
        compare_config(run_dir, config, checkpoints)
        trainer = make_trainer(config)
        data = prepare(config.data, config.seed, log=log)
        check(
            data.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {data.tokenizer.vocab_size} tokens, but model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to {data.tokenizer.vocab_size} or more",
        )
        compare_data(run_dir, data, checkpoints)
        check_prompts(config, data)
        loop = Loop(config, data, trainer, checkpoints, log)
        stack.enter_context(contextlib.closing(loop))
        return loop.run(stack.enter_context(stop_on_signal()))


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
            for key, old, new in _differences(there, here)
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
        differences = _differences(json.loads(path.read_text()), json.loads(json.dumps(data.manifest)))
        differing = [key for key, _, _ in differences if not MOVED.fullmatch(key)]
        check(
            not differing,
            f"the data of {run_dir} has changed since the run began ({', '.join(differing[:8])}): bring the old data back, or "
            "choose another --config.run_dir",
        )


def check_prompts(config: TrainConfig, data: PreparedData) -> None:
    """Raises ValueError for prompts that could not be continued at the first evaluation."""
    for prompt in config.eval.sample_prompts:
        length = len(data.tokenizer.encode_prompt(prompt))
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


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{prefix}.{i}")
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

    def __init__(self, config: TrainConfig, data: PreparedData, trainer: Trainer, checkpoints: Checkpoints, log: Log):
        self.config, self.data, self.trainer, self.checkpoints, self.log = config, data, trainer, checkpoints, log
        self.run_dir = pathlib.Path(config.run_dir)
        self.incidents = rolled_back(self.run_dir)
        timing = read_jsonl(self.run_dir / "timing.jsonl")
        self.started = time.perf_counter() - max((record["seconds"] for record in timing), default=0.0)
        self.timing = JsonlWriter(self.run_dir / "timing.jsonl")
        self.peak = matmul_peak(trainer.mesh, config.model.dtype)
        self.flops_per_step = train_flops_per_token(config.model, config.data.seq_len) * config.tokens_per_step
        self._write_provenance()
        write_json_atomic(self.run_dir / "config.json", dataclasses.asdict(config))
        write_json_atomic(self.run_dir / "data_manifest.json", data.manifest)
        data.tokenizer.save(self.run_dir / "tokenizer")
        self.step_function = self._compile()
        self.state, self.step, self.losses = self._restore()
        self.metrics, self.samples = self._open_writers()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.progress = Progress(config.steps, self.step, log)

    # --- Time -----------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Since the run's first start, not counting the time between a kill and a restart."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def timed(self, event: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self.timing.write({"event": event, "seconds": self.seconds(), "event_seconds": took})
        self.last_settled = time.perf_counter()

    # --- Setting up -----------------------------------------------------------------------------------------------

    def _write_provenance(self) -> None:
        """That of this start, with those of earlier starts, which may have been of other code or on another machine."""
        path = self.run_dir / "provenance.json"
        info = provenance(self.trainer.mesh, self.data.manifest_hash, self.peak)
        if path.exists():
            last = json.loads(path.read_text())
            info["earlier_starts"] = [*last.pop("earlier_starts", []), last]
        write_json_atomic(path, info)

    def _compile(self) -> Any:
        with self.timed("compile"):
            return self.trainer.step.lower(self.trainer.abstract_state, abstract_batch(self.config)).compile()

    def _restore(self, among: list[int] | None = None) -> tuple[TrainState, int, collections.deque[float]]:
        """The newest sound checkpoint (`among` these steps), or the initial state; metrics that came after it are dropped."""
        with self.timed("restore"):
            restored = self.checkpoints.restore_newest(self.trainer.abstract_state, self.log, among=among)
            if restored is None:
                state, step, losses = self.trainer.init(jax.random.key(self.config.seed)), 0, []
            else:
                state, metadata, step = restored
                losses = metadata["recent_losses"]
                self.log(f"continuing from the checkpoint of step {step}")
        truncate_jsonl(self.run_dir / "metrics.jsonl", step + 1)
        truncate_jsonl(self.run_dir / "samples.jsonl", step + 1)
        return state, step, collections.deque(losses, maxlen=self.config.rollback.window)

    def _open_writers(self) -> tuple[Writer, JsonlWriter]:
        metrics = make_writers(self.config.writers, self.run_dir, self.config.name, first_step=self.step + 1)
        return metrics, JsonlWriter(self.run_dir / "samples.jsonl")

    def _batches(self) -> Generator[dict[str, np.ndarray]]:
        batches = Batches(
            self.data,
            self.config.data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            skipped=skipped_windows(self.incidents),
        )
        data = self.config.data
        self.data_step = batches.data_step
        return load(batches, self.step, self.config.steps, data.loader_threads, data.prefetch_batches)

    def _on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        rows = self.trainer.batch_sharding
        return {name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()}

    # --- Running --------------------------------------------------------------------------------------------------

    def run(self, stop_requested: Callable[[], bool]) -> int:
        while True:
            try:
                status = self._advance(stop_requested)
            except Incident as incident:
                self._roll_back(incident)
                continue
            if status == 0:
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
            batch = self._on_devices(next(batches))
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.step_function(self.state, batch)
            self._settle()
            self.step += 1
            self.pending = (self.step, metrics)

            last = self.step == config.steps
            stop = stop_requested() and not last
            evaluate = last or self.step % config.eval.every == 0
            save = last or stop or self.step % config.checkpoint.every == 0
            if evaluate or save:
                self._settle()
            if evaluate:
                self._evaluate(all_batches=last)
            if save:
                self._save()
            if stop:
                self.checkpoints.wait()
                self.log(f"stopped on a signal; step {self.step} is saved, and the same command continues from it")
                return PREEMPTED
        self.checkpoints.wait()
        return 0

    def _settle(self) -> None:
        """Reads, checks and records the metrics of the step dispatched last."""
        if self.pending is None:
            return
        (step, device_metrics), self.pending = self.pending, None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        self._check_loss(step, metrics)
        now = time.perf_counter()
        step_seconds, self.last_settled = now - self.last_settled, now
        rate = self.config.tokens_per_step / step_seconds
        mfu = self.flops_per_step / step_seconds / self.peak
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.metrics.write(step, {"tokens": step * self.config.tokens_per_step, **metrics})
            self.timing.write(
                {"step": step, "seconds": self.seconds(), "step_seconds": step_seconds, "tokens_per_second": rate, "mfu": mfu}
            )
        self.progress.update(step, metrics["loss"], rate, mfu)

    def _check_loss(self, step: int, metrics: dict[str, float]) -> None:
        loss, rollback = metrics["loss"], self.config.rollback
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(metrics[name]):
                raise Incident(step, f"{name} is {metrics[name]}")
        if rollback.spike_factor and len(self.losses) == rollback.window:
            median = statistics.median(self.losses)
            if loss > rollback.spike_factor * median:
                raise Incident(step, f"loss {loss:.4g} is above {rollback.spike_factor} x the recent median {median:.4g}")
        self.losses.append(loss)

    def _roll_back(self, incident: Incident) -> None:
        """Records the incident, then goes back to the last checkpoint; the data since then will not be seen again."""
        self.log(str(incident))
        record = {"step": incident.step, "reason": incident.reason, "seconds": self.seconds()}
        incidents = JsonlWriter(self.run_dir / "incidents.jsonl")
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
        del self.state
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

    def _save(self) -> None:
        with self.timed("checkpoint"):
            self.metrics.flush()
            self.samples.flush()
            # One made on SIGTERM is deleted once there is a newer one, so that it takes no scheduled one's place.
            for step in self.checkpoints.steps()[:-1]:
                if not self._is_scheduled(step):
                    self.checkpoints.delete(step)
            scheduled = self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps
            self.checkpoints.save(self.step, self.state, {"recent_losses": list(self.losses), "scheduled": scheduled})

    # --- Held-out data --------------------------------------------------------------------------------------------

    def _eval_params(self) -> Any:
        return self.state.ema if self.state.ema is not None else self.state.params

    def _evaluate(self, all_batches: bool) -> None:
        with self.timed("eval"):
            limit = 0 if all_batches else self.config.eval.max_batches
            scores = evaluate(self.trainer, self._eval_params(), self.data, limit)
            if not math.isfinite(scores["val_loss"]):
                raise Incident(self.step, f"val_loss is {scores['val_loss']}")
            self.metrics.write(self.step, scores)
            self.progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            for prompt, text in self._sample():
                self.samples.write({"step": self.step, "prompt": prompt, "text": text})

    def _sample(self) -> Iterator[tuple[str, str]]:
        settings, tokenizer = self.config.eval, self.data.tokenizer
        if not settings.sample_prompts:
            return
        outputs = generate(
            self._eval_params(),
            self.config.model,
            [tokenizer.encode_prompt(prompt) for prompt in settings.sample_prompts],
            max_new_tokens=settings.sample_tokens,
            seed=self.config.seed,
            sampling=SamplingConfig(temperature=settings.sample_temperature),
            vocab_size=tokenizer.vocab_size,
            eos_id=-1 if tokenizer.eos_id is None else tokenizer.eos_id,
        )
        for prompt, tokens in zip(settings.sample_prompts, outputs, strict=True):
            yield prompt, tokenizer.decode(tokens)

    def _write_result(self) -> None:
        """`result.json`, from the files of the run: the same however often it was interrupted."""
        self.metrics.flush()
        final = read_jsonl(self.run_dir / "metrics.jsonl")
        scores = {name: value for record in final if "val_loss" in record for name, value in record.items()}
        rates = [record["tokens_per_second"] for record in read_jsonl(self.run_dir / "timing.jsonl") if "step" in record]
        result = {
            **{name: scores[name] for name in scores if name.startswith(("val_loss", "bits_per_byte"))},
            "tokens_per_second": statistics.median(rates),
            "steps": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "train_seconds": self.seconds(),
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


def evaluate(trainer: Trainer, params: Any, data: PreparedData, max_batches: int = 0) -> dict[str, float]:
    """Loss per token (nats) and bits per byte on held-out data, over all sources and for each where there are several.

    The bytes are those of the predicted tokens; a document's first token is context only.
    """
    config = trainer.config
    totals: dict[str, list[float]] = {}
    for source in data.held_out:
        sums = []
        for batch in held_out_batches(data, config.data, source, config.batch_size // config.accumulation, max_batches):
            num_bytes = float(np.sum(data.tokenizer.byte_lengths[batch["targets"]] * batch["weights"]))
            on_devices = {k: jax.make_array_from_process_local_data(trainer.batch_sharding, v) for k, v in batch.items()}
            if sums:  # One at a time: see `train.checkpoint.digests`.
                jax.block_until_ready(sums[-1][0])
            sums.append((trainer.evaluate(params, on_devices), float(batch["weights"].sum()), num_bytes))
        loss = sum(float(jax.device_get(metrics["loss"])) for metrics, _, _ in sums)
        totals[source] = [loss, sum(tokens for _, tokens, _ in sums), sum(num_bytes for _, _, num_bytes in sums)]

    def scores(sums: list[float], suffix: str) -> dict[str, float]:
        loss, tokens, num_bytes = sums
        return {f"val_loss{suffix}": loss / tokens, f"bits_per_byte{suffix}": loss / math.log(2) / num_bytes}

    result = scores([sum(column) for column in zip(*totals.values(), strict=True)], "")
    if len(totals) > 1:
        for source, sums in totals.items():
            result |= scores(sums, f"/{source}")
    return result
