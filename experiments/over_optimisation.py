"""What becomes of the true reward when a policy is optimised against a learned one (arXiv:2210.10760).

    python -m experiments.over_optimisation        three sizes of a reward model's data, two seeds

The reference (`configs/pretrain_worth.py`) writes two strings for each of some prompts, and of these the one with more gold
reward (`data/tasks/worth.py`) is preferred (`configs/synthesize_worth.py`). A reward model learns from the pairs
(`configs/reward_model_worth.py`), and the policy from its scores alone, with next to no penalty; the gold reward is only
watched. Every step is a point (KL from the reference, learned score, gold reward), means over its 64 fresh answers. All reward
models are told right by the same pairs, which none of them learns from (`pairs_fixed`, of another seed). The line is the best
that any policy has at that KL (`experiments/reward_frontier.py`). Scores of different reward models have no common scale: only
their shape is to be seen.

The best is that of all windows of so many steps, so it is above the end by chance alone. How far, the control tells: `gold` is
the same run with the gold reward itself, and what it loses after its best is the floor of noise for what the others lose.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from experiments.reward_frontier import KL, exact_frontier
from experiments.rl_curves import policy
from experiments.study import Run, Study, by_name, curve, figure, main, mean_and_error, outcome
from train.objectives.config import KLConfig, PolicyConfig

PAIRS = (32, 128, 1024)
FIXED, FIXED_SEED = 512, 1000  # pairs that all reward models are compared on; no run of the study has their seed
STEPS, LAST = 120, 10
GOLD, LEARNED = "reward/right", "reward/learned"
# As little penalty as keeps the reference at hand, whose distance is to be known.
POLICY = PolicyConfig(surrogate="reinforce", advantage="batch", clip_low=0, clip_high=0, kl=KLConfig(loss_coefficient=1e-4))
# Of a toy, the model is as large as ever: it has to write strings that differ in what they are worth.
TOY_START = ("--config.steps=150", "--config.data.sources.0.num_examples=2000", "--config.eval.max_batches=1")
TOY_DATA = ("--config.batch=32",)
TOY_REWARD = ("--config.steps=2", "--config.batch_size=4", "--config.eval.every=2")
TOY_RL = ("--config.steps=2", "--config.rollouts.prompts=2", "--config.eval.prompts=2", "--config.eval.samples=2")


def runs(seeds: int, quick: bool) -> list[Run]:
    toy_start, toy_data, toy_reward, toy_rl = (TOY_START, TOY_DATA, TOY_REWARD, TOY_RL) if quick else ((), (), (), ())
    start = Run("worth_start", "configs/pretrain_worth.py", overrides=toy_start)

    fixed_size = f"--config.prompts.number={64 if quick else FIXED}"
    fixed = Run("pairs_fixed", "configs/synthesize_worth.py", FIXED_SEED, (fixed_size, *toy_data), start)

    def optimised(name: str, seed: int, *overrides: str, reads: tuple[tuple[str, Run], ...] = ()) -> Run:
        words = (policy(POLICY), f"--config.steps={STEPS}", f"--config.checkpoint.every={STEPS}", *overrides, *toy_rl)
        return Run(name, "configs/grpo_worth.py", seed, words, start, reads)

    def against_learned(pairs: int, seed: int) -> Run:
        number = f"--config.prompts.number={pairs}"
        data = Run(f"pairs_{pairs}", "configs/synthesize_worth.py", seed, (number, *toy_data), start)
        paths = tuple((f"--config.data.sources.{i}.path={{}}/dataset.jsonl", of) for i, of in enumerate((data, fixed)))
        model = Run(f"reward_model_{pairs}", "configs/reward_model_worth.py", seed, toy_reward, start, paths)
        return optimised(f"learned_{pairs}", seed, "--config.task_weight=0.0", reads=(("--config.reward_model={}", model),))

    sizes = (32, 64) if quick else PAIRS
    every = range(seeds)
    return [*(against_learned(pairs, seed) for seed in every for pairs in sizes), *(optimised("gold", seed) for seed in every)]


def windows(column: Sequence[float]) -> list[float]:
    """Means of all full windows of `LAST` values; of fewer values, their mean."""
    size = min(LAST, len(column))
    return [statistics.fmean(column[end - size : end]) for end in range(size, len(column) + 1)]


def summarise(done: list[Run], root: pathlib.Path) -> dict[str, Any]:
    """Of each size: accuracy on the fixed pairs; the gold reward at its best and at the end, and the KL of the same steps."""
    summary: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, group in by_name(done).items():
        if name.startswith("reward_model"):
            accuracy = mean_and_error([outcome(run, root)["val_accuracy"] for run in group])
            summary.setdefault(name.replace("reward_model", "learned"), {})["accuracy on the fixed pairs"] = accuracy
        elif name == "gold" or name.startswith("learned"):
            columns = [curve(run, root, [KL, GOLD, *([LEARNED] if name != "gold" else [])]) for run in group]
            curves[name] = [{"seed": run.seed, **column} for run, column in zip(group, columns, strict=True)]
            gold, kl = ([windows(column[of]) for column in columns] for of in (GOLD, KL))
            peaks = [max(range(len(line)), key=line.__getitem__) for line in gold]
            summary.setdefault(name, {}).update(
                {
                    f"gold reward at its best, over {LAST} steps": mean_and_error([max(line) for line in gold]),
                    "KL there": mean_and_error([line[peak] for line, peak in zip(kl, peaks, strict=True)]),
                    "gold reward at the end": mean_and_error([line[-1] for line in gold]),
                    "KL at the end": mean_and_error([line[-1] for line in kl]),
                    "lost after its best": mean_and_error([max(line) - line[-1] for line in gold]),
                }
            )
    noise = {"noise floor of what is lost": summary["gold"]["lost after its best"]} if "gold" in summary else {}
    kl, reward = exact_frontier()
    return {"summary": summary, **noise, "curves": curves, "exact": {"kl": kl.tolist(), "reward": reward.tolist()}}


def plot(content: dict[str, Any], directory: pathlib.Path) -> None:
    """Gold reward, and the learned score, over the distance from the reference."""
    with figure(directory / "over_optimisation.svg", panels=2) as (gold, learned):
        gold.plot(content["exact"]["kl"], content["exact"]["reward"], color="0.6", label="the best there is")
        for number, (name, lines) in enumerate(content["curves"].items()):
            for i, line in enumerate(lines):
                style = {"color": f"C{number}", "linewidth": 0.9, "label": name.replace("_", ", pairs: ") if i == 0 else None}
                gold.plot(line[KL], line[GOLD], **style)
                if LEARNED in line:
                    learned.plot(line[KL], line[LEARNED], **style)
        for axis, label in ((gold, "gold reward"), (learned, "learned score, each on a scale of its own")):
            axis.set(xlabel="KL from the reference, nats an answer", ylabel=label)
        gold.legend(frameon=False, fontsize=7)


STUDY = Study("over_optimisation", runs, summarise, plot, seeds=2)

if __name__ == "__main__":
    sys.exit(main(STUDY))
