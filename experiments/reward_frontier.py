"""How much reward each algorithm gets for how much KL, from one checkpoint: the frontier, beside the exact one.

    python -m experiments.reward_frontier        twelve algorithms at three coefficients

The reference (`configs/pretrain_worth.py`) writes eight letters at random; the gold reward (`data/tasks/worth.py`) is the mean
worth of the letters. Of all policies with that KL from uniform letters, the best is exponentially tilted,
p(letter) ~ exp(worth / (length x coefficient)), and `exact_frontier` computes its reward and KL; no algorithm can be above the
line but by noise, and by what the reference differs from uniform.

Every run is `configs/grpo_worth.py` with another policy: 40 steps of 64 answers. Algorithms that clip a ratio make two updates
of each batch; the others one. The penalty stands where each method's authors, or its gradient, want it: k1 in the reward of
REINFORCE, RLOO and PPO, k3 in GRPO's loss, k2 in that of the others, in a loss always with the detached ratio: without it
the gradient of the second update would be that of no KL. Where advantages are divided by a standard deviation the same
coefficient weighs less, so what is to be compared is the distance from the line and not points of one coefficient. KL and
reward are means over the last ten steps, of fresh answers.

Measured so far (coefficient 0.03, one seed): all twelve end 0.003 to 0.010 of reward below the line; at 3.5 to 5.0 nats, but
the four that divide advantages by a standard deviation of the group at 11 to 16. (Those six that have the penalty in the loss
without the ratio: they are to be run again.)

Over-optimisation of a learned reward: a run here whose reward is that of a reward model, and whose gold reward is still
reported, is one more entry of `runs` and one more curve of `plot`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from typing import Any

import numpy as np

from configs.pretrain_worth import OPTIONS
from experiments.rl_curves import policy
from experiments.study import Run, Study, curve, figure, main, mean_and_error
from train.objectives import config as objectives
from train.objectives.config import KLConfig, PolicyConfig

COEFFICIENTS = (0.03, 0.01, 0.1)  # in the order in which they are run
LENGTH, LETTERS = int(dict(OPTIONS)["length"]), len(str(dict(OPTIONS)["alphabet"]))
MAX_TOKENS = 12
LAST = 10  # steps that are averaged
REWARD, KL = "reward/total", "reference_kl"
TOY_MODEL = ("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.d_ff=16")
TOY_START = (*TOY_MODEL, "--config.steps=4", "--config.batch_size=4", "--config.data.sources.0.num_examples=200",
             "--config.eval.max_batches=1")  # fmt: skip
TOY_RL = (*TOY_MODEL, "--config.steps=2", "--config.rollouts.prompts=2", "--config.eval.prompts=2", "--config.eval.samples=2")


def algorithms(coefficient: float) -> dict[str, PolicyConfig]:
    in_reward = KLConfig(reward_coefficient=coefficient)
    k2, k3 = (KLConfig(loss_coefficient=coefficient, loss_estimator=estimator, ratio="detached") for estimator in ("k2", "k3"))
    of = objectives
    configs = {
        "reinforce_none": dataclasses.replace(of.REINFORCE, advantage="none", kl=in_reward),
        "reinforce_ema": dataclasses.replace(of.REINFORCE, advantage="ema", kl=in_reward),
        "reinforce_batch": dataclasses.replace(of.REINFORCE, kl=in_reward),
        "reinforce_plus_plus": dataclasses.replace(of.REINFORCE_PLUS_PLUS, kl=in_reward),
        "rloo": dataclasses.replace(of.RLOO, kl=in_reward),
        "ppo": dataclasses.replace(of.PPO, kl=in_reward),
        "grpo": dataclasses.replace(of.GRPO, kl=k3),
        "dr_grpo": dataclasses.replace(of.dr_grpo(MAX_TOKENS), kl=k2),
        "dapo": dataclasses.replace(of.dapo(MAX_TOKENS, 2), kl=k2),
        "gspo": dataclasses.replace(of.GSPO, kl=k2),
        "cispo": dataclasses.replace(of.CISPO, kl=k2),
        "maxrl": dataclasses.replace(of.MAXRL, kl=k2),
    }
    return {name: dataclasses.replace(config, group_size=8) for name, config in configs.items()}


def exact_frontier(length: int = LENGTH, letters: int = LETTERS) -> tuple[np.ndarray, np.ndarray]:
    """KL in nats an answer, and mean reward, both [200], of the best policies, from uniform letters to the best string."""
    worth = np.linspace(0, 1, letters)
    tilted = np.exp(np.concatenate([[0], np.geomspace(1e-2, 300, 199)])[:, None] * (worth - 1))
    p = tilted / tilted.sum(1, keepdims=True)
    return length * (p * np.log(np.maximum(p, 1e-300) * letters)).sum(1), p @ worth


def runs(seeds: int, quick: bool) -> list[Run]:
    start = Run("worth_start", "configs/pretrain_worth.py", overrides=TOY_START if quick else ())

    def run(name: str, coefficient: float, seed: int, config: PolicyConfig) -> Run:
        minibatches = 1 if config.surrogate == "reinforce" else 2
        words = (policy(config), f"--config.minibatches={minibatches}", *(TOY_RL if quick else ()))
        return Run(f"{name}_{coefficient:g}", "configs/grpo_worth.py", seed, words, start)

    return [
        run(name, coefficient, seed, config)
        for seed in range(seeds)
        for coefficient in COEFFICIENTS
        for name, config in algorithms(coefficient).items()
    ]


def summarise(done: list[Run], root: pathlib.Path) -> dict[str, Any]:
    """By algorithm, its points by coefficient; and how far each is below the line."""
    kl, reward = exact_frontier()
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in done:
        if run.after is None:
            continue
        name, coefficient = run.name.rsplit("_", 1)
        columns = curve(run, root, [REWARD, KL])
        end = {key: statistics.fmean(columns[key][-LAST:]) for key in (REWARD, KL)}
        point = found.setdefault(name, {}).setdefault(coefficient, {"reward": [], "kl": [], "below the exact line": []})
        point["reward"].append(end[REWARD])
        point["kl"].append(end[KL])
        point["below the exact line"].append(float(np.interp(end[KL], kl, reward)) - end[REWARD])
    summary = {
        name: {
            coefficient: {key: mean_and_error(values) for key, values in point.items()}
            for coefficient, point in sorted(points.items(), key=lambda item: float(item[0]))
        }
        for name, points in found.items()
    }
    return {"summary": summary, "exact": {"kl": kl.tolist(), "reward": reward.tolist()}}


def plot(content: dict[str, Any], directory: pathlib.Path) -> None:
    with figure(directory / "reward_kl.svg") as (axis,):
        axis.plot(content["exact"]["kl"], content["exact"]["reward"], color="0.6", label="exact")
        for i, (name, points) in enumerate(content["summary"].items()):
            x, y = ([point[key]["mean"] for point in points.values()] for key in ("kl", "reward"))
            axis.plot(x, y, marker="os^Dvx"[i % 6], linestyle=":", linewidth=0.8, markersize=4, label=name)
        axis.set(xlabel="KL from the reference, nats an answer", ylabel="gold reward")
        axis.legend(frameon=False, fontsize=7, ncols=2, loc="lower right")


STUDY = Study("reward_frontier", runs, summarise, plot, seeds=2)

if __name__ == "__main__":
    sys.exit(main(STUDY))
