"""Learning curves of GRPO on a task, from a model trained from scratch, with the controls that they need.

    python -m experiments.rl_curves                               three seeds of everything
    python -m experiments.rl_curves --only=reverse_grpo           three seeds of one thing

Of each task (`reverse`, `countdown`), all begin with one checkpoint that half knows it, and are judged on the same 512 unseen
prompts:

- `grpo`: `configs/grpo_<task>.py`.
- `shuffled`: the same with rewards dealt out at random within each group; must not learn. (Its noise is
  that of `grpo`, which is enough to take a policy apart that nothing holds.)
- `rejection`: keep the right answers, raise their likelihood, draw again. It is the same run with the loss -r log p, r in
  {0, 1}, and no baseline. One update is made of each batch, by the policy that drew it, so the gradient is exactly that of
  fine-tuning on the right answers, times their share of the tokens, which Adam divides out again but for its memory.
- `sft`: pretraining goes on with solutions to prompts of the same kind, which the others do not see. On `countdown` for about
  as long as GRPO takes, which is four times GRPO's tokens (it draws nothing); on `reverse` for about as many tokens as GRPO
  trains on, at which it is saturated (0.998) and more of it could not show. Evaluated at its end only (`sft_evaluated`: the
  evaluation before the first step of a run of one step).

`minutes` are those of the steps alone, each as long as their median; `wall minutes` those of the whole run, from its start to
its last evaluation, with all that is compiled, saved and evaluated in between.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from typing import Any

from experiments.cli import load_run_config
from experiments.study import Run, Study, by_name, curve, figure, main, mean_and_error, outcome
from train.metrics import read_jsonl
from train.objectives.config import PolicyConfig

PASS = "eval/pass@1"
MISMATCH = "mismatch_max"  # between sampler and trainer, nats of a token
REJECTION = PolicyConfig(surrogate="reinforce", advantage="none", clip_low=0, clip_high=0)
TOY_MODEL = ("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.d_ff=16", "--config.model.num_layers=1")
TOY_START = (*TOY_MODEL, "--config.steps=4", "--config.batch_size=4", "--config.data.sources.0.num_examples=200",
             "--config.eval.max_batches=1")  # fmt: skip
TOY_RL = (*TOY_MODEL, "--config.steps=2", "--config.rollouts.prompts=2", "--config.eval.prompts=2", "--config.eval.samples=2",
          "--config.eval.every=1")  # fmt: skip


def policy(config: PolicyConfig) -> str:
    """As a word of the command line."""
    return f"--config.policy={dataclasses.asdict(config)}"


def runs(seeds: int, quick: bool) -> list[Run]:
    return [run for task in ("reverse", "countdown") for run in runs_of(task, seeds, quick)]


def runs_of(task: str, seeds: int, quick: bool) -> list[Run]:
    toy_start, toy_rl = (TOY_START, TOY_RL) if quick else ((), ())
    before, grpo = f"configs/pretrain_{task}.py", f"configs/grpo_{task}.py"
    start = Run(f"{task}_start", before, overrides=toy_start)

    def by_reward(name: str, seed: int, *overrides: str, after: Run = start) -> Run:
        return Run(f"{task}_{name}", grpo, seed, (*overrides, *toy_rl), after)

    def supervised(seed: int) -> Run:
        options = f"--config.data.sources.0.task.options={load_run_config(grpo, []).task.options}"  # The prompts of GRPO.
        steps = {"reverse": 1400, "countdown": 5600}[task]
        longer = (f"--config.steps={steps}", "--config.optimizer.learning_rate=0.001", f"--config.eval.every={steps}", options)
        return Run(f"{task}_sft", before, seed, (*longer, *toy_start), start)

    every = range(seeds)
    return [
        *(by_reward("grpo", seed) for seed in every),
        *(by_reward("shuffled", seed, "--config.shuffle_rewards=True") for seed in every),
        *(by_reward("sft_evaluated", seed, "--config.steps=1", after=supervised(seed)) for seed in every),
        *(by_reward("rejection", seed, policy(REJECTION)) for seed in every),
    ]


def minutes(run: Run, root: pathlib.Path) -> float:
    """What the steps of a run take, each as long as their median: compiling and pauses do not count, other work does."""
    timing = [record for record in read_jsonl(run.directory(root) / "timing.jsonl") if "step_seconds" in record]
    return len(timing) * statistics.median(record["step_seconds"] for record in timing) / 60


def summarise(done: list[Run], root: pathlib.Path) -> dict[str, Any]:
    """Pass@1 on unseen prompts: before, after, and the way there."""
    summary, curves = {}, {}
    for name, group in by_name(done).items():
        if name.endswith("_start"):
            continue
        results = [outcome(run, root) for run in group]
        summary[name] = {
            "minutes": mean_and_error([minutes(run, root) for run in group]),
            "wall minutes": mean_and_error([result["train_seconds"] / 60 for result in results]),
        }
        if name.endswith("_sft"):
            continue
        if name.endswith("_sft_evaluated"):
            summary[name] = {"pass@1": mean_and_error([result[f"initial_{PASS}"] for result in results])}
            continue
        summary[name]["pass@1"] = mean_and_error([result[PASS] for result in results])
        summary[name]["pass@1 before"] = mean_and_error([result[f"initial_{PASS}"] for result in results])
        summary[name]["drawn_tokens"] = mean_and_error([result["drawn_tokens"] for result in results])
        mismatches = [curve(run, root, [MISMATCH])[MISMATCH] for run in group]
        if all(mismatches):
            summary[name][f"{MISMATCH}, the largest of all steps"] = mean_and_error([max(steps) for steps in mismatches])
        curves[name] = [{"seed": run.seed, **curve(run, root, [PASS])} for run in group]
    return {"summary": summary, "curves": curves}


def plot(content: dict[str, Any], directory: pathlib.Path) -> None:
    """A panel for each task, a line for each seed."""
    tasks = sorted({name.split("_")[0] for name in (*content["curves"], *content["summary"])})
    if not tasks:
        return
    with figure(directory / "pass_at_1.svg", panels=len(tasks)) as axes:
        for axis, task in zip(axes, tasks, strict=True):
            of_task = {
                name.removeprefix(f"{task}_"): lines for name, lines in content["curves"].items() if name.startswith(task)
            }
            for number, (name, lines) in enumerate(of_task.items()):
                for i, line in enumerate(lines):
                    axis.plot(line["step"], line[PASS], color=f"C{number}", alpha=0.8, label=name if i == 0 else None)
            if supervised := content["summary"].get(f"{task}_sft_evaluated"):
                axis.axhline(supervised["pass@1"]["mean"], color="0.5", linestyle="--", label="sft, at its end")
            axis.set(title=task, xlabel="step", ylabel="pass@1 on unseen prompts", ylim=(0, 1))
            axis.legend(frameon=False)


STUDY = Study("rl_curves", runs, summarise, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
