"""LoRA GRPO on somebody else's model: SmolLM2-135M-Instruct learns to add, asked in its own chat template.

    python -m experiments.smollm2_curve            three seeds of `configs/grpo_smollm2.py`

It needs `loam pull smollm2-135m-instruct`. Judged on the same 128 unseen sums before the first
step, half-way and after the last, two answers to each; and by the reward of every step, which is that of 32 fresh answers. The
toy of `--quick` is a network of one layer, pretrained on such sums in bare text, and needs nothing pulled.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from experiments import rl_curves
from experiments.cli import load_run_config
from experiments.rl_curves import PASS, TOY_RL, TOY_START
from experiments.study import Run, Study, curve, figure, main

CONFIG = "configs/grpo_smollm2.py"
REWARD = "reward/total"
EVALUATION = ("--config.eval.every=30", "--config.eval.prompts=128", "--config.eval.samples=2")
TOY_MODEL = {"vocab_size": 64, "num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 16, "max_seq_len": 64}


def runs(seeds: int, quick: bool) -> list[Run]:
    if not quick:
        return [Run("grpo", CONFIG, seed, EVALUATION) for seed in range(seeds)]
    model = f"--config.model={TOY_MODEL}"
    task = f"--config.data.sources.0.task={dataclasses.asdict(load_run_config(CONFIG, []).task)}"
    start = Run("toy_start", "configs/pretrain_reverse.py", overrides=(*TOY_START, model, task))
    return [Run("grpo", CONFIG, seed, (*TOY_RL, model, "--config.chat=False"), start) for seed in range(seeds)]


def summarise(done: list[Run], root: pathlib.Path) -> dict[str, Any]:
    """Pass@1 on unseen prompts: before, after, and the way there; and the reward of every step."""
    rewards = [{"seed": run.seed, **curve(run, root, [REWARD])} for run in done if run.name == "grpo"]
    return {**rl_curves.summarise(done, root), "rewards": rewards}


def plot(content: dict[str, Any], directory: pathlib.Path) -> None:
    """A line for each seed."""
    with figure(directory / "pass_at_1.svg") as (axis,):
        for line in content["rewards"]:
            axis.plot(line["step"], line[REWARD], color=f"C{line['seed']}", alpha=0.3, linewidth=0.8)
        for line in content["curves"].get("grpo", []):
            axis.plot(line["step"], line[PASS], color=f"C{line['seed']}", marker="o", label=f"seed {line['seed']}")
        axis.set(xlabel="step", ylabel="pass@1 on unseen sums (thin: reward of the step)", ylim=(0, 1))
        if content["curves"]:
            axis.legend(frameon=False)


STUDY = Study("smollm2_curve", runs, summarise, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
