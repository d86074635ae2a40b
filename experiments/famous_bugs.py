"""Well-known mistakes of policy-gradient code, switched on one at a time, and what each costs.

    python -m experiments.famous_bugs            three seeds of each, 18 runs

All runs are a short `configs/grpo_reverse.py` from one checkpoint, with groups of equal rewards dropped, and 0.1 x KL from the
reference in the loss, without which noise takes any policy apart at this learning rate (`experiments/LOG.md`):

- `clean`, the control of the others: the KL by the estimator k2, whose gradient is that of the KL.
- `stop_token_untrained`: the token that ends an answer is masked out of the loss, as where it is taken for padding.
- `truncated_sampling`: answers are drawn with top-k 3, and scored with the whole distribution.
- `micro_batch_normaliser`: each micro-batch takes the mean over its own tokens, and those means are averaged; micro-batches of
  two rows. (The same micro-batches with the right normaliser are `clean`, to rounding.)
- `kl_k1`: the KL by k1. Its value is right, its gradient is noise around 0: nothing holds the policy.
- `kl_k3`: the same by k3, as most code has it. Its value is right, its gradient is that of KL(reference, policy).

Judged by pass@1 on unseen prompts, drawn from the whole distribution, and by the KL that was to be small.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from typing import Any

from experiments.rl_curves import PASS, TOY_RL, TOY_START, policy
from experiments.study import Run, Study, by_name, curve, figure, main, mean_and_error, outcome
from train.objectives.config import Bug, KLConfig, PolicyConfig

CLEAN = PolicyConfig(zero_variance="drop", kl=KLConfig(loss_coefficient=0.1, loss_estimator="k2"))
SHORT = ("--config.steps=100", "--config.rollouts.prompts=16", "--config.checkpoint.every=100", "--config.eval.every=25",
         "--config.eval.prompts=256", "--config.eval.samples=2")  # fmt: skip
LAST = 10  # steps whose KL is averaged
KL = "KL from the reference, nats an answer"


def with_bug(bug: Bug, **changes: Any) -> str:
    return policy(dataclasses.replace(CLEAN, bugs=(bug,), **changes))


VARIANTS: dict[str, tuple[str, ...]] = {
    "clean": (policy(CLEAN),),
    "stop_token_untrained": (with_bug("stop_token_untrained"),),
    "truncated_sampling": (with_bug("truncated_sampling"), "--config.rollouts.top_k=3", "--config.rollouts.max_mismatch=0"),
    "micro_batch_normaliser": (with_bug("micro_batch_normaliser"), "--config.accumulation=64"),
    "kl_k1": (with_bug("k1_in_loss", kl=KLConfig(loss_coefficient=0.1, loss_estimator="k1")),),
    "kl_k3": (policy(dataclasses.replace(CLEAN, kl=KLConfig(loss_coefficient=0.1, loss_estimator="k3"))),),
}


def runs(seeds: int, quick: bool) -> list[Run]:
    start = Run("reverse_start", "configs/pretrain_reverse.py", overrides=TOY_START if quick else ())
    # Two rows of a micro-batch remain two.
    toy = {"micro_batch_normaliser": (*TOY_RL, "--config.accumulation=8")}
    return [
        Run(name, "configs/grpo_reverse.py", seed, (*SHORT, *words, *(toy.get(name, TOY_RL) if quick else ())), start)
        for seed in range(seeds)
        for name, words in VARIANTS.items()
    ]


def summarise(done: list[Run], root: pathlib.Path) -> dict[str, Any]:
    """By variant: pass@1 at the end; its difference from the control with the same seed; KL over the last steps."""
    groups = {name: group for name, group in by_name(done).items() if name in VARIANTS}
    passes = {name: {run.seed: outcome(run, root)[PASS] for run in group} for name, group in groups.items()}
    summary: dict[str, Any] = {}
    for name, group in groups.items():
        control = passes.get("clean", {})
        lost = [passes[name][seed] - control[seed] for seed in passes[name] if seed in control]
        lengths = [outcome(run, root)["eval/length"] for run in group]
        summary[name] = {
            "pass@1": mean_and_error(list(passes[name].values())),
            "length": mean_and_error(lengths),
            **({"pass@1 against its control": mean_and_error(lost)} if lost else {}),
            KL: mean_and_error([statistics.fmean(curve(run, root, ["reference_kl"])["reference_kl"][-LAST:]) for run in group]),
        }
    curves = {name: [{"seed": run.seed, **curve(run, root, [PASS])} for run in group] for name, group in groups.items()}
    return {"summary": summary, "curves": curves}


def plot(content: dict[str, Any], directory: pathlib.Path) -> None:
    """A dot for each seed, a bar for the mean."""
    summary = content["summary"]
    panels = (
        ("pass@1 on unseen prompts", [(name, of["pass@1"]) for name, of in summary.items()]),
        (KL, [(name, of[KL]) for name, of in summary.items()]),
    )
    with figure(directory / "famous_bugs.svg", panels=2) as axes:
        for axis, (label, values) in zip(axes, panels, strict=True):
            for i, (_, value) in enumerate(values):
                axis.barh(i, value["mean"], color="0.85")
                axis.plot(value["values"], [i] * len(value["values"]), "k.", markersize=5)
            axis.set_yticks(range(len(values)), [name for name, _ in values])
            axis.invert_yaxis()
            axis.set(xlabel=label)


STUDY = Study("famous_bugs", runs, summarise, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
