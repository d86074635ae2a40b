"""A step of GRPO against TRL's GRPOTrainer, side by side: python benchmarks/grpo_step.py [--rounds 5] [--quick] [--peer PYTHON]

`configs/grpo_smollm2.py`: LoRA on SmolLM2-135M-Instruct (`loam pull smollm2-135m-instruct` first). Both read one checkpoint in
the format of Hugging Face, and have the same prompts, answers to each, projections, rank and learning rate, float32, no KL
penalty, one update on policy, and a thread per core. All answers have the same length: here no token ends one, there the end is
forbidden. A step is timed from the prompts to the updated adapters. Neither side scores the answers beforehand: TRL leaves it
out when it updates once a batch, and ours does with `rollouts.score=False`, as the config has it.

Both live in processes of their own and take turns, so that the noise of the machine meets both. TRL's needs an interpreter with
trl, peft, datasets and torch (--peer; by default this one).

The last line is JSON: `time_vs_trl` is the ratio of the median seconds, ours over theirs. Rollout tokens are those drawn,
update tokens those of prompts and answers, each over the seconds of its phase.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train_step import num_cores
from experiments.cli import configure_jax, load_run_config
from model.xla import MALLOC_SETTINGS
from train.rl_config import RLConfig

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
PEERS = ("trl", "peft", "datasets", "torch")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = (
    "model.num_layers=2", "model.d_model=64", "model.d_ff=96", "model.num_heads=4", "model.num_kv_heads=2",
    "model.head_dim=16", "model.vocab_size=258", "rollouts.max_prompt_tokens=96", "rollouts.max_tokens=8",
)  # fmt: skip


def configuration(directory: Path, quick: bool) -> RLConfig:
    words = [f"initial_weights={directory / 'model'}", f"run_dir={directory / 'run'}", *(TINY if quick else ())]
    return load_run_config(str(ROOT / "configs" / "grpo_smollm2.py"), [f"--config.{word}" for word in words])


def write_tiny_model(directory: Path, config: RLConfig) -> None:
    """Random weights, and a tokenizer of bytes with marks for turns."""
    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from model.convert import huggingface
    from model.params import init_params, param_specs

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save(f"{beside}/tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
        Path(beside, "tokenizer_config.json").write_text(json.dumps(settings))
        Path(beside, "config.json").write_text("{}")
        params = init_params(param_specs(config.model), jax.random.key(0))
        huggingface.save(directory, params, config.model, source=beside, settings={"eos_token_id": 257})


def serve(directory: Path, quick: bool) -> None:
    """A worker: tells what it is, then makes a step for each line, and answers with a line of JSON."""
    config = configuration(directory, quick)
    configure_jax(config)
    import jax

    from train.rl import open_loop

    with open_loop(config, lambda _: None, None, time.perf_counter()) as loop:
        loop.collector.stop_ids, encoder = frozenset(), loop.collector.chat
        assert encoder is not None
        trained = sum(leaf.size for leaf in jax.tree.leaves(loop.state.train.params))
        about = {"version": f"jax {jax.__version__}, {num_cores()} threads", "trained_parameters": trained}
        print(json.dumps(about), flush=True)
        for _ in sys.stdin:
            loop.phases.seconds.clear()
            begin = time.perf_counter()
            _, drawn = loop.advance()
            told = {"seconds": time.perf_counter() - begin, "drawn_tokens": drawn}
            told |= {f"{name}_seconds": value for name, value in loop.phases.seconds.items()}
            first = loop.step * config.rollouts.prompts
            prompts = [
                loop.collector.task.example(first + i, config.seed, "train").prompt for i in range(config.rollouts.prompts)
            ]
            lengths = [len(encoder.encode_prompt([{"role": "user", "content": prompt}])) for prompt in prompts]
            told["prompt_tokens"] = sum(lengths) * config.policy.group_size
            print(json.dumps(told), flush=True)
            loop.step += 1


class Worker:
    """A process that only runs when it is asked to."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        environment = {**MALLOC_SETTINGS, **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.name} ended with status {self.process.wait()}: see its message above")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def job_of(config: RLConfig, directory: Path, steps: int) -> dict[str, Any]:
    """What the peer needs to know."""
    assert config.lora is not None
    task, prompts = config.task.make(), config.rollouts.prompts
    return {
        "model": str(directory / "model"),
        "directory": str(directory / "trl"),
        "task": config.task.name,
        "task_options": config.task.options,
        "examples": [dataclasses.asdict(task.example(i, config.seed, "train")) for i in range(steps * prompts)],
        "prompts": prompts,
        "group_size": config.policy.group_size,
        "max_tokens": config.rollouts.max_tokens,
        "learning_rate": config.optimizer.learning_rate,
        "clip_norm": config.optimizer.clip_norm,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "targets": config.lora.targets,
        "threads": num_cores(),
    }


def measure(rounds: int, quick: bool, peer: str) -> dict[str, Any]:
    """Medians over the rounds.

    Raises:
      RuntimeError: a worker failed, or the two sides do not make the same step.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        if quick:
            write_tiny_model(directory / "model", configuration(directory, quick))
        else:
            command = ["convert", MODEL, str(directory / "model")]
            subprocess.run([sys.executable, "-m", "experiments.cli", *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        job = directory / "job.json"
        config = configuration(directory, quick)
        job.write_text(json.dumps(job_of(config, directory, rounds + 2)))
        commands = {
            "loam": [sys.executable, __file__, "--worker", name, *(["--quick"] if quick else [])],
            "trl": [peer, str(ROOT / "benchmarks" / "trl_grpo.py"), str(job)],
        }
        workers: dict[str, Worker] = {}
        for side, command in commands.items():
            workers[side] = Worker(side, command)
            stack.callback(workers[side].close)
        steps: dict[str, list[dict[str, Any]]] = {"loam": [], "trl": []}
        for number in range(rounds + 1):
            # The order alternates, so that a drift of the machine's speed favours neither.
            for side in sorted(workers, reverse=number % 2 == 1):
                steps[side].append(workers[side].step())
            same = [[steps[side][-1][key] for key in ("prompt_tokens", "drawn_tokens")] for side in steps]
            if same[0] != same[1]:
                found = dict(zip(steps, same, strict=True))
                raise RuntimeError(f"step {number + 1}: the tokens of prompts and answers are not as many: {found}")
    trained = {side: worker.about["trained_parameters"] for side, worker in workers.items()}
    if len(set(trained.values())) > 1:
        raise RuntimeError(f"the two sides train {trained} parameters: these are not the same adapters")
    for side, worker in workers.items():
        print(f"{side}: {worker.about['version']}")
    timed = {side: taken[1:] for side, taken in steps.items()}  # The first step warms everything up.
    for side, taken in timed.items():
        print(f"{side:5}", *(f"{one['seconds']:.2f}" for one in taken), "s")
    phases = {key for one in timed["loam"] for key in one if key.endswith("_seconds")}
    medians = {key: statistics.median(one.get(key, 0.0) for one in timed["loam"]) for key in sorted(phases)}
    ours, theirs = (statistics.median(one["seconds"] for one in timed[side]) for side in ("loam", "trl"))
    first = timed["loam"][0]
    return {
        "time_vs_trl": ours / theirs,
        "step_seconds": ours,
        "trl_step_seconds": theirs,
        "rollout_tokens_per_second": first["drawn_tokens"] / medians["rollout_seconds"],
        "update_tokens_per_second": (first["prompt_tokens"] + first["drawn_tokens"]) / medians["update_seconds"],
        **medians,
        "answers": config.num_rows,
        "answer_tokens": config.rollouts.max_tokens,
        "trained_parameters": trained["loam"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side; default 5")
    parser.add_argument("--quick", action="store_true", help="only see that it works: a tiny random model, 2 rounds")
    parser.add_argument("--peer", default=sys.executable, metavar="PYTHON", help="an interpreter that has trl and peft")
    parser.add_argument("--worker", metavar="DIRECTORY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(Path(arguments.worker), arguments.quick)
        return
    code = f"import importlib.util; print(*(name for name in {PEERS} if not importlib.util.find_spec(name)))"
    missing = subprocess.run([arguments.peer, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if missing:
        sys.exit(f"{arguments.peer} lacks {missing}, which this needs: `make bench` installs it, or give --peer")
    from inference import store

    if not arguments.quick and not any(entry.name == MODEL for entry in store.entries()):
        sys.exit(f"`loam pull {MODEL}` takes the model into the store: do that first")
    rounds = 2 if arguments.quick else arguments.rounds
    result = measure(rounds, arguments.quick, arguments.peer)
    summary = {"benchmark": "grpo_step", "rounds": rounds, "quick": arguments.quick, **result}
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in summary.items()}))


if __name__ == "__main__":
    main()
