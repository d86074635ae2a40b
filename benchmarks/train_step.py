"""Training speed against eager PyTorch, side by side: python benchmarks/train_step.py [--rounds 8] [--quick]

Two settings: `configs/shakespeare_gpt2.py`, and a GPT-2 of 10 M parameters (without embeddings) at context 512. Loam trains
as `loam run` does: same flags, devices and compiled step, a batch put on the devices each step, metrics read one step late.
PyTorch (`benchmarks/torch_gpt2.py`) trains the same model from the same weights, with the same optimizer and learning rates on
the same batches, with a thread per core; the losses of the first steps are compared before anything is timed.

Both live in processes of their own and take turns in short bursts, so that the noise of the machine meets both. Tokens are
random and made beforehand: the loader has a benchmark of its own. MFU counts model FLOPs as causal, against the matmul speed
measured right after each burst.

The last line is JSON; `speed_vs_torch` is the ratio of the median speeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import configure_jax, load_train_config
from model.config import ModelConfig
from model.xla import MALLOC_SETTINGS, num_cores
from train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
NUM_BATCHES = 16  # made beforehand and served in turn
LOSS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured. `compared_steps` untimed ones come first, whose losses must agree."""

    name: str
    config: TrainConfig
    compared_steps: int
    burst_steps: int


def settings(quick: bool) -> dict[str, Setting]:
    gpt2 = load_train_config(str(ROOT / "configs" / "shakespeare_gpt2.py"), [])
    seq_len, batch_size = (64, 2) if quick else (512, 8)
    model = ModelConfig(
        vocab_size=4096,
        num_layers=6,
        d_model=384,
        num_heads=6,
        d_ff=1536,
        max_seq_len=512,
        positions="learned",
        norm="layernorm",
        mlp="gelu",
        tie_embeddings=True,
    )
    data = dataclasses.replace(gpt2.data, seq_len=seq_len)
    gpt2_10m = dataclasses.replace(gpt2, name="gpt2_10m", model=model, data=data, batch_size=batch_size)
    both = (
        Setting("gpt2", gpt2, compared_steps=5 if quick else 20, burst_steps=3 if quick else 20),
        Setting("gpt2_10m", gpt2_10m, compared_steps=2, burst_steps=1 if quick else 2),
    )
    return {setting.name: setting for setting in both}


def random_batches(config: TrainConfig) -> list[dict[str, np.ndarray]]:
    """Rows of one segment each, every token weighted; the same for both sides."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.seq_len)
    batches = []
    for _ in range(NUM_BATCHES):
        text = rng.integers(config.model.vocab_size, size=(shape[0], shape[1] + 1), dtype=np.int32)
        batches.append(
            {
                "tokens": text[:, :-1].copy(),
                "targets": text[:, 1:].copy(),
                "segment_ids": np.ones(shape, np.int32),
                "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
                "weights": np.ones(shape, np.float32),
            }
        )
    return batches


class Loam:
    """Trains as `train.loop` does. Leaves initial weights and learning rates in the file `exchange`, for PyTorch."""

    def __init__(self, config: TrainConfig, exchange: Path):
        configure_jax(config)
        import jax

        from model.flops import train_flops_per_token
        from model.params import path_name
        from train.optimizer import make_schedule
        from train.step import make_trainer

        self.trainer = make_trainer(config)
        batches = random_batches(config)
        self.batches = itertools.cycle(batches)
        self.step_function = self.trainer.step.lower(self.trainer.abstract_state, batches[0]).compile()
        self.state = self.trainer.init(jax.random.key(config.seed))
        schedule = make_schedule(
            config.optimizer.schedule, config.optimizer.learning_rate, config.steps, config.tokens_per_step
        )
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        arrays: dict[str, Any] = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(exchange, learning_rates=jax.vmap(schedule)(np.arange(config.steps)), **arrays)
        self.about = {
            "version": f"jax {jax.__version__}, {jax.device_count()} devices, XLA_FLAGS={os.environ['XLA_FLAGS']}",
            "parameters": sum(array.size for array in arrays.values()),
            "flops_per_token": train_flops_per_token(config.model, config.data.seq_len, config.lora),
        }

    def burst(self, steps: int) -> dict[str, Any]:
        import jax

        from train.peak import matmul_peak

        losses, pending = [], None
        begin = time.perf_counter()
        for _ in range(steps):
            rows = self.trainer.batch_sharding
            batch = {name: jax.make_array_from_process_local_data(rows, x) for name, x in next(self.batches).items()}
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.step_function(self.state, batch)
            if pending is not None:
                losses.append(float(jax.device_get(pending)["loss"]))
            pending = metrics
        losses.append(float(jax.device_get(pending)["loss"]))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "losses": losses, "peak": matmul_peak(self.trainer.mesh, self.trainer.config.model.dtype)}


class Torch:
    """The same training in eager PyTorch."""

    def __init__(self, config: TrainConfig, exchange: Path):
        import torch  # pyright: ignore[reportMissingImports]

        from benchmarks.torch_gpt2 import Trainer

        torch.set_num_threads(num_cores())
        params = dict(np.load(exchange))
        self.learning_rates = iter(params.pop("learning_rates").tolist())
        self.trainer = Trainer(params, config.model, config.optimizer)
        batches = [(b["tokens"].astype(np.int64), b["targets"].astype(np.int64)) for b in random_batches(config)]
        self.batches = itertools.cycle(batches)
        self.about = {"version": f"torch {torch.__version__}, {torch.get_num_threads()} threads, fused AdamW"}

    def burst(self, steps: int) -> dict[str, Any]:
        begin = time.perf_counter()
        losses = [self.trainer.step(*next(self.batches), next(self.learning_rates)) for _ in range(steps)]
        return {"seconds": time.perf_counter() - begin, "losses": losses}


def serve(side: str, config: TrainConfig, exchange: Path) -> None:
    """A worker: tells what it is, then answers each line, a number of steps, with a line of JSON."""
    worker = {"loam": Loam, "torch": Torch}[side](config, exchange)
    print(json.dumps(worker.about), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.burst(int(line))), flush=True)


class Worker:
    """The other end of `serve`: a process that only runs when it is asked to."""

    def __init__(self, side: str, setting: str, quick: bool, exchange: Path):
        self.name = f"{side} worker of {setting}"
        command = [sys.executable, __file__, "--worker", side, setting, str(exchange), *(["--quick"] if quick else [])]
        environment = {**MALLOC_SETTINGS, **os.environ, "JAX_PLATFORMS": "cpu"}  # as `loam run` starts itself
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} ended with status {self.process.wait()}: see its message above")
        return json.loads(line)

    def burst(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(setting: Setting, rounds: int, quick: bool) -> dict[str, Any]:
    """Tokens per second of both sides, medians over the rounds.

    Raises:
      RuntimeError: a worker failed, or the two sides do not train the same model.
    """
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for side in ("loam", "torch"):
            workers[side] = Worker(side, setting.name, quick, Path(directory) / "exchange.npz")
            stack.callback(workers[side].close)
        losses = {side: worker.burst(setting.compared_steps)["losses"] for side, worker in workers.items()}
        difference = max(abs(a - b) for a, b in zip(losses["loam"], losses["torch"], strict=True))
        if difference > LOSS_TOLERANCE:
            raise RuntimeError(
                f"{setting.name}: Loam's and PyTorch's losses differ by {difference:.2g} within the first "
                f"{setting.compared_steps} steps ({losses}): this is not the same training, so its speeds do not compare"
            )
        tokens = setting.burst_steps * setting.config.tokens_per_step
        speeds: dict[str, list[float]] = {"loam": [], "torch": []}
        peaks = []
        for number in range(rounds):
            # The order alternates, so that a drift of the machine's speed favours neither.
            for side in sorted(workers, reverse=number % 2 == 1):
                answer = workers[side].burst(setting.burst_steps)
                speeds[side].append(tokens / answer["seconds"])
                if side == "loam":
                    peaks.append(answer["peak"])
    flops = workers["loam"].about["flops_per_token"]
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    return {
        "versions": [worker.about["version"] for worker in workers.values()],
        "parameters": workers["loam"].about["parameters"],
        "loss_difference": difference,
        "tokens_per_second": medians["loam"],
        "torch_tokens_per_second": medians["torch"],
        "speed_vs_torch": medians["loam"] / medians["torch"],
        "speed_vs_torch_by_round": statistics.median(a / b for a, b in zip(speeds["loam"], speeds["torch"], strict=True)),
        "mfu": statistics.median(flops * speed / peak for speed, peak in zip(speeds["loam"], peaks, strict=True)),
        "matmul_gflops": statistics.median(peaks) / 1e9,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    columns = ("parameters", "Loam tok/s", "PyTorch tok/s", "ratio", "by round", "MFU", "peak GFLOP/s", "loss differs by")
    lines = [f"{'setting':<10}" + "".join(f"{column:>16}" for column in columns)]
    for name, r in results.items():
        cells = (
            f"{r['parameters']:,}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['torch_tokens_per_second']:,.0f}",
            f"{r['speed_vs_torch']:.2f}",
            f"{r['speed_vs_torch_by_round']:.2f}",
            f"{r['mfu']:.1%}",
            f"{r['matmul_gflops']:.0f}",
            f"{r['loss_difference']:.1e}",
        )
        lines.append(f"{name:<10}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="bursts of each side and setting; default 10")
    parser.add_argument("--quick", action="store_true", help="only see that it works: few steps, short rows, 2 rounds")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "SETTING", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, name, exchange = args.worker
        serve(side, settings(args.quick)[name].config, Path(exchange))
        return
    if importlib.util.find_spec("torch") is None:
        sys.exit("PyTorch, which this benchmark compares with, is not installed: `make bench` installs it (the extra `bench`).")
    rounds = 2 if args.quick else args.rounds
    results = {name: measure(setting, rounds, args.quick) for name, setting in settings(args.quick).items()}
    print("\n".join(results["gpt2"]["versions"]))
    print(table(results))
    summary = {"benchmark": "train_step", "rounds": rounds, "quick": args.quick}
    for name, suffix in (("gpt2", ""), ("gpt2_10m", "_10m")):
        summary |= {f"{key}{suffix}": value for key, value in results[name].items() if isinstance(value, float)}
    print(json.dumps({key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in summary.items()}))


if __name__ == "__main__":
    main()
